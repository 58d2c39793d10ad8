"""Standard LoRA, the baseline: on whole Linear layers, of all tokens or of visual ones."""

import math
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from data.costs import lora_costs, shape_of
from imagelora import safe_save


class LoRA(nn.Module):
    """y + (alpha / r) x A B on these projections of every language layer; the rest of the model is frozen.

    names: letters of q, k, v, o. visual_only: only the rows of visual tokens are updated, as in Image-LoRA.
    """

    def __init__(self, model, r: int, lora_alpha: float, names: str = "qkvo", visual_only: bool = False):
        super().__init__()
        self.r, self.scaling = r, lora_alpha / r
        self.names, self.visual_only = names, visual_only
        self.shape = shape_of(model)
        self.enabled, self.rows = True, None
        self.A = nn.ParameterList()
        self.B = nn.ParameterList()
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
        """The rows of B * T that are updated: None for all of them; inside `disabled()` none."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        visual = (ids == model.config.image_token_id).flatten() & self.enabled
        self.rows = None
        if self.visual_only or not self.enabled:
            self.rows = visual.nonzero().squeeze(1)

    def _add(self, i: int, linear, inputs, y: Tensor) -> Tensor:
        x = inputs[0].flatten(0, -2)  # [B * T, d_in]
        if self.rows is not None:
            x = x[self.rows]
        update = self.scaling * (x @ self.A[i]) @ self.B[i]
        if self.rows is None:
            return y + update.view_as(y)
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
        return lora_costs(*self.shape, num_tokens, self.r, self.names)[1]

    def save(self, path) -> None:
        safe_save({"r": self.r, "scaling": self.scaling, "lora": self.state_dict()}, path)
