"""The optimizer of pretraining: Muon for matrices, AdamW for the rest."""

import torch
from torch import Tensor, nn

MUON_LR, ADAMW_LR = 0.01, 0.002  # peak learning rates


class MuonAndAdamW:
    """Muon (Jordan et al., 2024) for matrices, AdamW for the rest. Rates warm up over 100 steps, and fall to zero
    over the last 70 % of them."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], steps: int):
        self.steps = steps
        self.matrices, self.others = [], []
        for name, p in named:
            if p.ndim > 1 and name.endswith("weight") and "embed_tokens" not in name:
                self.matrices.append(p)
            else:
                self.others.append(p)
        self.momenta = [torch.zeros_like(p).flatten(1) for p in self.matrices]  # a convolution is a matrix, too
        self.adamw = torch.optim.AdamW(self.others, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, loss: Tensor, step: int) -> None:
        """Follows the gradient of the loss in step number `step`."""
        for p in self.matrices + self.others:
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.matrices + self.others, 1.0)
        rate = min(1.0, (step + 1) / 100, (1 - step / self.steps) / 0.7)
        self.adamw.param_groups[0]["lr"] = rate * ADAMW_LR
        self.adamw.step()
        for p, momentum in zip(self.matrices, self.momenta):
            muon(p, momentum, rate * MUON_LR)


@torch.no_grad()
def muon(p: nn.Parameter, momentum: Tensor, lr: float) -> None:
    """Momentum, of which each step takes the nearest orthogonal matrix.

    As torch.optim.Muon, but in float32: that one's bfloat16 is ten times slower on CPUs without such instructions."""
    gradient = p.grad.flatten(1)
    x = gradient.lerp(momentum.lerp_(gradient, 0.05), 0.95)  # Nesterov's
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x  # so that the Gram matrix is the smaller one
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):  # Newton-Schulz: singular values towards 1
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    p.mul_(1 - 0.05 * lr)  # weight decay
    update = (x.mT if tall else x).reshape(p.shape)
    p.add_(update, alpha=-lr * max(1, p.shape[0] / momentum.shape[1]) ** 0.5)
