"""The optimizer of pretraining: Muon for matrices, AdamW for the rest."""

import torch
from torch import Tensor, nn

MUON_LR, ADAMW_LR = 0.01, 0.002  # peak learning rates


class MuonAndAdamW:
    """Muon (Jordan et al., 2024) for the matrices, AdamW for the other parameters.

    The learning rates warm up over 100 steps, and fall to zero over the last 70 % of the steps."""

    def __init__(self, named_parameters: list[tuple[str, nn.Parameter]], steps: int):
        self.steps = steps
        self.matrices, self.others = [], []
        for name, parameter in named_parameters:
            if parameter.ndim > 1 and name.endswith("weight") and "embed_tokens" not in name:
                self.matrices.append(parameter)
            else:
                self.others.append(parameter)
        # A convolution's weight becomes a matrix, too.
        self.momenta = [torch.zeros_like(parameter).flatten(1) for parameter in self.matrices]
        self.adamw = torch.optim.AdamW(self.others, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, loss: Tensor, step: int) -> None:
        """Follow the gradient of the loss in step number `step`."""
        parameters = self.matrices + self.others
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = min(1.0, (step + 1) / 100, (1 - step / self.steps) / 0.7)
        self.adamw.param_groups[0]["lr"] = rate * ADAMW_LR
        self.adamw.step()
        for parameter, momentum in zip(self.matrices, self.momenta):
            muon(parameter, momentum, rate * MUON_LR)


@torch.no_grad()
def muon(parameter: nn.Parameter, momentum: Tensor, lr: float) -> None:
    """One step along the orthogonal matrix that is nearest to the momentum [rows, columns], which is updated.

    As torch.optim.Muon, but in float32, because bfloat16 is ten times slower on CPUs without such instructions."""
    gradient = parameter.grad.flatten(1)
    momentum.lerp_(gradient, 0.05)
    x = gradient.lerp(momentum, 0.95)  # Nesterov's momentum
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.mT  # so that the Gram matrix is the smaller one
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):  # Newton-Schulz iterations move the singular values towards 1
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    if is_tall:
        x = x.mT
    parameter.mul_(1 - 0.05 * lr)  # weight decay
    scale = max(1, parameter.shape[0] / momentum.shape[1]) ** 0.5
    parameter.add_(x.reshape(parameter.shape), alpha=-lr * scale)
