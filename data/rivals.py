"""Image-LoRA's rivals: LoRA and Partial LoRA."""

import math
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from imagelora import visual_rows

PROJECTIONS = {letters: tuple(f"{letter}_proj" for letter in letters) for letters in ("qkvo", "qk", "v")}
PROJECTIONS["mlp"] = ("mlp.0", "mlp.2", "gate_proj", "up_proj", "down_proj")  # of the tiny model, of a Llama
PROJECTIONS["all"] = PROJECTIONS["qkvo"] + PROJECTIONS["mlp"]


class LoRA(nn.Module):
    """y + (alpha / r) x A B on some projections of every language layer; the rest of the model is frozen.

    projections: "qkvo", "qk" or "v"; "mlp", the linear layers of each MLP; or "all" of these; or names of modules.
    tokens: "all"; or "visual", which makes it Partial LoRA.
    As in Image-LoRA, A and B are float32, and so is the update, unless autocast is on.

    It remembers which rows of the model's last call are visual. That is safe here, because a layer runs only inside
    that call: one thread calls the model, and without checkpoints no layer runs again in the backward pass."""

    def __init__(self, model, r: int, lora_alpha: float, projections="qkvo", tokens: str = "all"):
        super().__init__()
        self.scale = lora_alpha / r
        self.gamma = torch.ones(1, device=model.device)  # the strength of the update, as in Image-LoRA
        self.tokens = tokens
        self.enabled = True
        self.A = nn.ParameterList()
        self.B = nn.ParameterList()
        self.linears = []  # the adapted projections, in a plain list, because they belong to the model
        model.requires_grad_(False)
        if tokens == "visual":
            model.register_forward_pre_hook(self._find_rows, with_kwargs=True)
        suffixes = PROJECTIONS.get(projections, projections)
        for layer in model.language_model.layers:
            for linear in [module for name, module in layer.named_modules() if name.endswith(suffixes)]:
                linear.register_forward_hook(partial(self._add_update, len(self.A)))
                self.linears.append(linear)
                A = torch.empty(linear.in_features, r, device=model.device)
                nn.init.kaiming_uniform_(A.T, a=math.sqrt(5))
                self.A.append(A)
                self.B.append(torch.zeros(r, linear.out_features, device=model.device))

    def _find_rows(self, model, args, kwargs) -> None:
        """Remember which of the B * T rows of this call are visual."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.rows = visual_rows(ids, {model.config.image_token_id})

    def _add_update(self, i: int, linear, inputs, y: Tensor) -> Tensor:
        """What projection number i computes, y [B, T, d_out], with the update in the adapted rows."""
        if not self.enabled:
            return y
        (x,) = inputs  # [B, T, d_in]
        A = self.A[i]  # [d_in, r]
        B = self.B[i]  # [r, d_out]
        if self.tokens == "visual":
            x = x.flatten(0, -2)[self.rows]  # [visual rows, d_in]
        update = self.gamma * self.scale * (x.to(A.dtype) @ A) @ B
        update = update.to(y.dtype)
        if self.tokens == "visual":
            rows = self.rows[:, None].expand_as(update)  # index_add would save the update for the backward pass
            return y.flatten(0, -2).scatter_add(0, rows, update).view_as(y)
        return y + update

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the updates to the model's weights, and switches them off here. For LoRA at all tokens."""
        for linear, A, B in zip(self.linears, self.A, self.B):
            linear.weight += self.gamma * self.scale * (A @ B).T
        self.enabled = False

    @contextmanager
    def disabled(self):
        """A context in which the model is the base model; or, after `merge`, the merged model."""
        before = self.enabled
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = before
