"""For pretrain.py and smollm.py: the loop in which they train, and one of its optimizers."""

import torch
from torch import nn
from tqdm import tqdm


def optimize(name: str, optimizers: list, steps: int, loss_of, warm_up=1, decay=1.0, clip=1.0) -> None:
    """Follows the gradient of loss_of(step). FloatingPointError if the loss is not finite.

    Each optimizer's rate warms up over so many steps, and falls to zero over the last part of them, `decay`.
    clip: the largest norm of the gradient."""
    parameters = [parameter for optimizer in optimizers for parameter in optimizer.param_groups[0]["params"]]
    bar = tqdm(range(steps), name)
    for step in bar:
        loss = loss_of(step)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} in step {step}; choose a lower learning rate")
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        rate = min(1.0, (step + 1) / max(warm_up, 1), (1 - step / steps) / decay)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * optimizer.defaults["lr"]
            optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): steps along the orthogonal matrix that is nearest to the momentum.

    As torch.optim.Muon, but in float32, because bfloat16 is ten times slower on CPUs without such instructions; and
    also for the weights of convolutions, as matrices."""

    def __init__(self, parameters: list[nn.Parameter], lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            gradient = parameter.grad.flatten(1)  # [rows, columns]
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(gradient))
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
            lr = self.param_groups[0]["lr"]
            parameter.mul_(1 - 0.05 * lr)  # weight decay
            scale = max(1, gradient.shape[0] / gradient.shape[1]) ** 0.5
            parameter.add_(x.reshape(parameter.shape), alpha=-lr * scale)
