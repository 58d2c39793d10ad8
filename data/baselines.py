"""What Image-LoRA is compared with: standard LoRA, the authors' gate, and heads that no probe has chosen."""

import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from data.costs import lora_costs, shape_of
from imagelora import Heads, select_heads


class LoRA(nn.Module):
    """y + (alpha / r) x A B on these projections of every language layer; the rest of the model is frozen.

    names: letters of q, k, v, o. visual_only: only the rows of visual tokens are updated, as in Image-LoRA."""

    def __init__(self, model, r: int, lora_alpha: float, names: str = "qkvo", visual_only: bool = False):
        super().__init__()
        self.r, self.scaling = r, lora_alpha / r
        self.names, self.visual_only = names, visual_only
        self.shape, self.enabled = shape_of(model), True
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        model.requires_grad_(False)
        model.register_forward_pre_hook(self._find_rows, with_kwargs=True)
        for layer in model.language_model.layers:
            for name in names:
                linear = getattr(layer.self_attn, f"{name}_proj")
                linear.register_forward_hook(partial(self._add, len(self.A)))
                A = torch.empty(linear.in_features, r, device=model.device)
                nn.init.kaiming_uniform_(A.T, a=math.sqrt(5))
                self.A.append(A)
                self.B.append(torch.zeros(r, linear.out_features, device=model.device))

    def _find_rows(self, model, args, kwargs) -> None:
        """Which of the B * T rows are updated; inside `disabled()` none."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        updated = torch.full_like(ids, self.enabled, dtype=torch.bool)
        if self.visual_only:
            updated &= ids == model.config.image_token_id
        self.rows = updated.flatten().nonzero().squeeze(1)

    def _add(self, i: int, linear, inputs, y: Tensor) -> Tensor:
        x = inputs[0].flatten(0, -2)[self.rows]  # [rows, d_in]
        update = self.scaling * (x @ self.A[i]) @ self.B[i]
        return y.flatten(0, -2).index_add(0, self.rows, update).view_as(y)

    @contextmanager
    def disabled(self):
        """Within it the model is the base model."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def flops(self, num_tokens: int) -> int:
        """FLOPs of the adapter in one training step (forward and backward) over so many tokens."""
        return lora_costs(self.shape, num_tokens, self.r, self.names)[1]


def gate_scores(model, batches: list[dict]) -> Tensor:
    """The authors' release scores a head by the squared gradient of a gate g on its values [L, H]."""
    # dL/dg = sum V(h) * dL/dV(h) = sum W_V(h) * dL/dW_V(h)
    layers = model.language_model.layers
    weights = [layer.self_attn.v_proj.weight for layer in layers]  # of [H * d_h, D]
    scores = torch.zeros(len(layers), model.config.num_key_value_heads, device=model.device)
    for batch in batches:
        gradients = torch.autograd.grad(model(**batch).loss, weights)
        products = torch.stack([weight * gradient for weight, gradient in zip(weights, gradients)])
        scores += products.unflatten(1, (scores.shape[1], -1)).sum((2, 3)) ** 2 / len(batches)
    return scores.detach().cpu()


def choose_heads(choice: str, scores: Tensor, count: int, tau: float, seed: int) -> Heads:
    """`count` of the value heads whose scores are [L, H]; choice "all": every head.

    top, gate: those with the highest scores of each layer, shared out over the layers by tau. bottom: those with the
    lowest scores of each layer, shared out evenly. random: any. matched: any, but as many in each layer as top."""
    num_heads = scores.shape[1]
    rng = np.random.default_rng(seed)
    if choice == "all":
        return select_heads(scores, scores.numel())
    if choice == "bottom":
        return select_heads(scores.max() - scores, count, tau=0)
    highest = select_heads(scores, count, tau)
    if choice in ("top", "gate"):
        return highest
    if choice == "matched":
        return {layer: sorted(rng.permutation(num_heads)[: len(best)].tolist()) for layer, best in highest.items()}
    if choice == "random":
        selected = {}
        for i in sorted(rng.permutation(scores.numel())[:count].tolist()):
            selected.setdefault(i // num_heads, []).append(i % num_heads)
        return selected
    raise ValueError(f"unknown choice of heads {choice!r}")
