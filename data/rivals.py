"""Image-LoRA's rivals: LoRA and Partial LoRA."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from data.gamma import turned_down
from imagelora import CallTracker


class LoRA(nn.Module):
    """y + (alpha / r) x A B on some linear layers of every language layer; the rest of the model is frozen.

    projections: "qkvo" or other letters of the attention's projections; "mlp", the linear layers of the MLP; "all",
    both; or a list of names, such as ["v", "mlp"] or Llama's ["gate", "up", "down"].
    tokens: "all"; or "visual", which makes it Partial LoRA.
    As in Image-LoRA, A and B are float32, and so is the update, unless autocast is on. ValueError if there is no such
    linear layer, or if r is larger than its input."""

    def __init__(self, model, r: int, lora_alpha: float, projections="qkvo", tokens: str = "all"):
        super().__init__()
        self.gamma = torch.ones(1, device=model.device)  # the strength of the update, as in Image-LoRA
        self.A = nn.ParameterList()
        self.B = nn.ParameterList()
        self.linears = []  # the adapted linear layers, in a plain list, because they belong to the model
        self.hooks = []
        layers = {str(i): layer for i, layer in enumerate(model.language_model.layers)}
        adapted = [(i, linear) for i, layer in layers.items() for linear in linears_of(layer, projections)]
        if not adapted:
            raise ValueError(f"the model has no linear layers named {projections!r}")
        largest = min(linear.in_features for _, linear in adapted)
        if not 1 <= r <= largest:
            raise ValueError(f"r must be in 1..{largest}, got {r}")
        self.scale = lora_alpha / r
        model.requires_grad_(False)
        self.tracker = None
        if tokens == "visual":
            self.tracker = CallTracker(model, {model.config.image_token_id}, layers)
        for layer, linear in adapted:
            self.hooks.append(linear.register_forward_hook(partial(self._add_update, len(self.A), layer)))
            self.linears.append(linear)
            A = torch.empty(linear.in_features, r, device=model.device)  # [d_in, r]
            nn.init.kaiming_uniform_(A.T, a=math.sqrt(5))
            self.A.append(A)
            self.B.append(torch.zeros(r, linear.out_features, device=model.device))

    def _add_update(self, i: int, layer: str, linear, inputs, y: Tensor) -> Tensor:
        """What linear layer number i computes, y [B, T, d_out], with the update in the adapted rows."""
        (x,) = inputs  # [B, T, d_in]
        A = self.A[i]  # [d_in, r]
        B = self.B[i]  # [r, d_out]
        if self.tracker is not None:
            rows = self.tracker.call_of(layer, x).rows  # which of the B * T are visual
            x = x.flatten(0, -2)[rows]  # [visual rows, d_in]
        update = self.gamma * self.scale * (x.to(A.dtype) @ A) @ B
        update = update.to(y.dtype)
        if self.tracker is not None:
            rows = rows[:, None].expand_as(update)  # index_add would save the update for the backward pass
            return y.flatten(0, -2).scatter_add(0, rows, update).view_as(y)
        return y + update

    @torch.no_grad()
    def merge(self) -> None:
        """Moves the updates into the model's weights. For LoRA at all tokens."""
        for linear, A, B in zip(self.linears, self.A, self.B):
            linear.weight += self.gamma * self.scale * (A @ B).T
        for hook in self.hooks:
            hook.remove()

    def disabled(self):
        """A context in which the model is the base model; or, after `merge`, the merged model."""
        return turned_down(self, 0)


def linears_of(layer: nn.Module, projections) -> list[nn.Module]:
    """The linear layers of a language layer that are named so, in the order in which it runs them."""
    if projections == "mlp":
        projections = ["mlp"]
    elif projections == "all":
        projections = [*"qkvo", "mlp"]
    suffixes = tuple(f"{name}_proj" for name in projections)
    linears = []
    for name, module in layer.named_modules():
        is_of_mlp = name.startswith("mlp.") and isinstance(module, nn.Linear)
        if name.endswith(suffixes) or (is_of_mlp and "mlp" in projections):
            linears.append(module)
    return linears
