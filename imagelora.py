"""Image-LoRA: low-rank updates of the attention values of visual tokens, in selected heads (arXiv 2512.19219).

    V~(h) = X W_V(h) + gamma * (alpha / r) * 1/sqrt|S| * M X A B(h)    for the heads h in S          (section 3)

in one layer; S are its selected heads, and M = diag(1[token is visual]) zeroes the rows of text tokens. The projections
of queries, keys, text tokens and other heads are untouched, so with no image in the context the model is the (frozen)
base model bit for bit. The whole use:

    scores = score_heads(model, batches)                       # which value heads carry the image into the answer
    adapter = attach(model, heads=select_heads(scores, 16))    # freezes the model; adapter.parameters() are trainable
    adapter.save("adapter.pt")                                 # after training
    adapter = load(another_model, "adapter.pt")                # later, on a fresh copy of the model

A worked example: three tokens with two features each, the second token is visual; two heads with one feature each.
r = 1, alpha = 1, gamma = 1 and S = {1}, so the scale in front is 1. x_vis A = [3, 4] [1, 2]^T = 11, times B(1) = 0.1 is
1.1, added to the visual token's value in head 1 and nowhere else:

    >>> adapter = ValueAdapter(hidden_size=2, head_dim=1, num_kv_heads=2, heads=[1], r=1, lora_alpha=1)
    >>> _ = adapter.A.data.copy_(torch.tensor([[1.0], [2.0]])), adapter.B.data.fill_(0.1)
    >>> x = torch.tensor([[[1.0, 1.0], [3.0, 4.0], [5.0, 5.0]]])    # one sequence, T = 3, D = 2
    >>> value = torch.zeros(1, 3, 2)                                # what v_proj made of x: H * d_h = 2
    >>> adapter.add_update(x, value, rows=torch.tensor([1])).tolist()
    [[[0.0, 0.0], [0.0, 1.100000023841858], [0.0, 0.0]]]

Shapes:  B batch (as a matrix: LoRA's B) · T tokens · N visual tokens in the batch · D hidden size · H value heads of a
layer (the KV heads under grouped-query attention) · d_h head size · r rank · |S| selected heads of a layer · L layers
"""

import argparse
import io
import math
import os
import threading
import zipfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Heads = dict[int, list[int]]  # {layer: [value head, ...]}


# ---------------------------------------------------------------------------------------------------------------------
# The adapter of one layer


class ValueAdapter(nn.Module):
    """gamma * (alpha / r) * 1/sqrt|S| * x A B(h) for the selected heads h of one layer.

    A [D, r] is shared by the layer's heads, B [|S|, r, d_h] has a block for each and starts at zero: the model starts
    as the base. A starts as in LoRA, and gamma at 1, so that learning rates known from LoRA serve here; with gamma near
    0 the same step of B would be a much smaller update.
    """

    def __init__(self, hidden_size, head_dim, num_kv_heads, heads, r, lora_alpha, normalize=True, device=None):
        super().__init__()
        self.num_kv_heads, self.heads = num_kv_heads, heads
        self.scaling = lora_alpha / r * (len(heads) ** -0.5 if normalize else 1.0)
        self.A = nn.Parameter(torch.empty(hidden_size, r, device=device))
        self.B = nn.Parameter(torch.zeros(len(heads), r, head_dim, device=device))
        self.gamma = nn.Parameter(torch.ones(1, device=device))  # of one element: FSDP shards no scalars
        self.register_buffer("head_index", torch.tensor(heads, device=device), persistent=False)
        nn.init.kaiming_uniform_(self.A.T, a=math.sqrt(5))  # uniform in +-1/sqrt(D), as PEFT's LoRA

    def forward(self, x_vis: Tensor) -> Tensor:
        """Visual tokens' inputs [N, D] -> their updates in the selected heads [N, |S| * d_h]."""
        # z = x A: what the selected heads share. A^T is made contiguous as BLAS is several times faster on [r, D].
        z = F.linear(x_vis, self.A.T.contiguous())  # [N, r]
        # gamma * (alpha / r) * 1/sqrt|S| * z B(h), for all h in S at once
        return z @ (self.gamma * self.scaling * self.B).transpose(0, 1).flatten(1)  # [N, r] @ [r, |S| * d_h]

    def add_update(self, x: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        """X [B, T, D], X W_V [B, T, H * d_h], indices of the visual rows [N] of B * T -> the adapted values.

        M X is a gather of rows, not a product with M: nothing is computed for a text token, nor for a decoded one. In
        training zero rows still give every parameter a gradient (of zero), which data-parallel training needs.
        """
        if not len(rows) and not torch.is_grad_enabled():
            return value
        # M X, without its zero rows
        x_vis = x.flatten(0, -2).index_select(0, rows)  # [N, D]
        delta = self(x_vis.to(self.A.dtype)).to(value.dtype)  # [N, |S| * d_h]
        # V~(h) = X W_V(h) + delta(h), put back into the rows it came from
        if len(self.heads) == self.num_kv_heads:  # whole rows: one index per token instead of one per head, faster
            return value.flatten(0, -2).index_add(0, rows, delta).view_as(value)
        # In the values seen as [B * T * H, d_h], head h of token n is row n * H + h.
        head_rows = (rows[:, None] * self.num_kv_heads + self.head_index).flatten()  # [N * |S|]
        delta = delta.view(len(head_rows), self.B.shape[2])  # [N * |S|, d_h]
        return value.reshape(-1, self.B.shape[2]).index_add(0, head_rows, delta).view_as(value)


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens are visual


class VisualRows:
    """The visual tokens of the forward pass in progress, as row indices of the flattened [B * T] batch.

    Computed once per forward from `input_ids`, shared by all layers, never reused by a later forward. In time:

        model(input_ids)      begin: rows -> running     every v_proj: rows_for(x)     end: running -> last
        loss.backward()       layers under gradient checkpointing run again: rows_for(x) finds them in `last`
    """

    def __init__(self, image_token_ids: list[int]):
        self.image_token_ids = image_token_ids
        self.enabled = True
        self.mask = None  # [B, T] bool, given by visual_mask()
        self.running = {}  # {thread: (rows, shape)} of the forwards in progress; rows are None while disabled
        self.last = None  # (rows, shape) of the last forward with gradients; None where two differ
        self.awaits_backward = False  # no backward has used `last` yet

    def begin(self, module, args, kwargs):
        """Forward pre-hook of the top-level model: input_ids [B, T] -> rows [N]."""
        rows = shape = None
        if self.enabled:
            mask, ids = self.mask, kwargs.get("input_ids", args[0] if args else None)
            if ids is not None:
                mask = torch.isin(ids, torch.tensor(self.image_token_ids, device=ids.device))
            if mask is None:
                raise ValueError(
                    "without input_ids the visual tokens are unknown; call inside adapter.visual_mask(mask)"
                )
            shape, rows = mask.shape, mask.flatten().nonzero().squeeze(1)
        self.running[threading.get_ident()] = rows, shape

    def end(self, module, args, output):
        """Forward hook of the top-level model, called after an exception too, with no output."""
        rows, shape = self.running.pop(threading.get_ident(), (None, None))
        if output is not None and torch.is_grad_enabled():
            if self.awaits_backward:  # an earlier forward's backward is to come: a checkpoint could not tell them apart
                same = self.last and self.last[1] == shape  # None, as are rows, while disabled
                self.last = self.last if same and (rows is None or torch.equal(rows, self.last[0])) else None
            else:
                self.last = rows, shape
            self.awaits_backward = True

    def backward_done(self, grad):
        """Gradient hook of the lowest adapter's gamma, the last to be reached (without checkpointing)."""
        self.awaits_backward = False

    def rows_for(self, x: Tensor) -> Tensor | None:
        """The visual rows of a v_proj input [B, T, D]; None while disabled. Raises rather than use another call's."""
        forward = self.running.get(threading.get_ident())
        if forward is None:
            if torch._C._current_graph_task_id() == -1:  # else it is a checkpoint's second run, in backward
                raise RuntimeError("the language model was called by itself; call the model that attach() was given")
            forward, self.awaits_backward = self.last, False  # the next forward starts anew, whatever becomes of this
            if forward is None:
                raise RuntimeError(
                    "two forwards with different prompts before one backward cannot be checkpointed; "
                    "evaluate under torch.no_grad()"
                )
        rows, shape = forward
        if rows is not None and x.shape[:-1] != shape:
            raise RuntimeError(f"v_proj got tokens {list(x.shape[:-1])} where input_ids are {list(shape)}")
        return rows if rows is None else rows.to(x.device)


# ---------------------------------------------------------------------------------------------------------------------
# Attaching to a model


def _value_projections(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """The v_proj of every decoder layer with its head size. Raises ValueError where the method does not apply."""
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "layers" and isinstance(module, nn.ModuleList) and len(module)
        # not vision_tower (LLaVA), vision_model (SmolVLM), visual (Qwen), audio_tower, img_processor (Phi)
        if not any(part.startswith(("vision", "visual", "audio", "img")) for part in name.split("."))
    ]
    if len(stacks) != 1:
        found = ", ".join(name for name, _ in stacks) or "none"
        raise ValueError(f"expected one stack of decoder layers besides the vision tower, found {found}")
    name, layers = stacks[0]
    config = getattr(model, "config", None)
    if getattr(getattr(config, "text_config", config), "num_kv_shared_layers", 0):
        raise ValueError("layers that share their values with other layers (num_kv_shared_layers) cannot be adapted")
    projections = []
    for i, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            raise ValueError(
                f"{name}.{i} has no self_attn (cross-attention to image features?); visual tokens must be in it"
            )
        v_proj, head_dim = getattr(attention, "v_proj", None), getattr(attention, "head_dim", None)
        if v_proj is None:
            raise ValueError(f"{name}.{i}.self_attn has no v_proj; a fused qkv projection has no value slice to adapt")
        if not head_dim or v_proj.out_features % head_dim:
            raise ValueError(f"{name}.{i}.self_attn.head_dim is {head_dim}, v_proj has {v_proj.out_features} features")
        projections.append((v_proj, head_dim))
    return projections


def _image_token_ids(model: nn.Module) -> list[int]:
    config = getattr(model, "config", None)
    names = [f"{kind}_token_{suffix}" for kind in ("image", "video") for suffix in ("id", "index")]
    ids = sorted({getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)})
    if not ids:
        raise ValueError("model.config has no image_token_id, so visual tokens cannot be told from text tokens")
    return ids


def _adapt_value(visual: VisualRows, adapter: ValueAdapter, v_proj, inputs, value: Tensor) -> Tensor | None:
    """Forward hook of a v_proj: X W_V -> V~, or None to leave it as it is."""
    rows = visual.rows_for(inputs[0])
    return None if rows is None else adapter.add_update(inputs[0], value, rows)


def _checked_heads(heads: Heads | None, head_counts: list[int]) -> Heads:
    """Sorted, without empty layers; None means all heads. Raises ValueError on what the model does not have."""
    if heads is None:
        return {layer: list(range(count)) for layer, count in enumerate(head_counts)}
    for layer, selected in heads.items():
        if type(layer) is not int or not 0 <= layer < len(head_counts):
            raise ValueError(f"layer {layer!r} is not one of the model's layers 0..{len(head_counts) - 1}")
        if any(type(h) is not int or not 0 <= h < head_counts[layer] for h in selected):
            raise ValueError(f"heads of layer {layer} must be integers in 0..{head_counts[layer] - 1}, got {selected}")
        if len(set(selected)) != len(selected):
            raise ValueError(f"layer {layer} names a head twice: {selected}")
    heads = {layer: sorted(heads[layer]) for layer in sorted(heads) if heads[layer]}
    if not heads:
        raise ValueError("no head is selected; name at least one")
    return heads


class ImageLoRA(nn.Module):
    """The adapters of a model, made by `attach` or `load`; `.parameters()` are exactly the trainable A, B and gamma.

    It is registered as `model.image_lora`: it moves with the model, and `model.state_dict()` holds it. Its tensors are
    float32 whatever the model's type; `model.half()` afterwards converts them too.
    """

    def __init__(self, model: nn.Module, r: int, lora_alpha: float, heads: Heads | None, normalize: bool):
        super().__init__()
        projections = _value_projections(model)
        hooks = [hook for v_proj, _ in projections for hook in v_proj._forward_hooks.values()]
        # attached to this model, to a part of it or to a model that it is a part of
        if any(getattr(hook, "func", None) is _adapt_value for hook in hooks):
            raise ValueError("the model already has an Image-LoRA; call its detach() first")
        hidden_size = min(v_proj.in_features for v_proj, _ in projections)
        if type(r) is not int or not 1 <= r <= hidden_size:
            raise ValueError(f"r must be an integer in 1..{hidden_size}, got {r!r}")
        if type(lora_alpha) not in (int, float) or not 0 < lora_alpha <= 1e9:
            raise ValueError(f"lora_alpha must be a number above 0 and up to 1e9, got {lora_alpha!r}")
        if type(normalize) is not bool:
            raise ValueError(f"normalize must be True or False, got {normalize!r}")
        head_counts = [v_proj.out_features // head_dim for v_proj, head_dim in projections]
        self.heads = _checked_heads(heads, head_counts)
        self.r, self.lora_alpha, self.normalize, self.head_counts = r, lora_alpha, normalize, head_counts
        self.visual = VisualRows(_image_token_ids(model))
        self.model_name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.layers = nn.ModuleDict()
        for layer, selected in self.heads.items():
            v_proj, head_dim = projections[layer]
            device = next((t.device for t in [*v_proj.parameters(), *v_proj.buffers()]), None)
            device = getattr(getattr(v_proj, "_hf_hook", None), "execution_device", device)  # where accelerate runs it
            self.layers[str(layer)] = ValueAdapter(
                v_proj.in_features, head_dim, head_counts[layer], selected, r, lora_alpha, normalize, device
            )
        # From here on the model is changed, and nothing can fail.
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._handles = [
            model.register_forward_pre_hook(self.visual.begin, with_kwargs=True),
            model.register_forward_hook(self.visual.end, always_call=True),
            *(
                projections[int(layer)][0].register_forward_hook(partial(_adapt_value, self.visual, adapter))
                for layer, adapter in self.layers.items()
            ),
            next(iter(self.layers.values())).gamma.register_hook(self.visual.backward_done),
        ]
        self._model = (model,)  # in a tuple, so that the model is not a submodule of its own submodule
        model.image_lora = self

    @contextmanager
    def disabled(self):
        """Within it the model is the base model."""
        before, self.visual.enabled = self.visual.enabled, False
        try:
            yield
        finally:
            self.visual.enabled = before

    @contextmanager
    def visual_mask(self, mask: Tensor):
        """Within it calls by `inputs_embeds` [B, T, D] take this mask [B, T], True at visual tokens.

        Calls with `input_ids`, as the later steps of `generate(inputs_embeds=...)` are, go by those instead.
        """
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise ValueError(f"the visual mask must be a bool tensor [B, T], got {mask.dtype} {list(mask.shape)}")
        before, self.visual.mask = self.visual.mask, mask
        try:
            yield
        finally:
            self.visual.mask = before

    def detach(self) -> nn.Module:
        """Restore the original model (hooks, requires_grad) and return it. Raises RuntimeError when called twice."""
        if not self._handles:
            raise RuntimeError("this Image-LoRA is already detached")
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        model = self._model[0]
        del model.image_lora
        self._handles, self._frozen, self._model = [], [], ()
        return model

    def flops(self, num_visual_tokens: int) -> int:
        """FLOPs of the adapter in one training step (forward and backward) over so many visual tokens."""
        first = next(iter(self.layers.values()))
        hidden_size, head_dim = first.A.shape[0], first.B.shape[2]
        return image_lora_flops(num_visual_tokens, hidden_size, head_dim, self.heads, self.r)

    def save(self, path: str | os.PathLike) -> None:
        """Write the adapter in the layout of the authors' release, atomically. Raises ValueError on NaN."""
        state = self.state_dict()
        for name, tensor in state.items():
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP: all shards
            state[name] = tensor = tensor.detach().cpu()
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite; the adapter is not saved")
        payload = {
            "model_name": self.model_name,
            "r": self.r,
            "alpha": float(self.lora_alpha),
            "kv_indices": {str(layer): list(heads) for layer, heads in self.heads.items()},
            "layers": {
                k: {"A": state[f"layers.{k}.A"], "B": state[f"layers.{k}.B"], "gamma": state[f"layers.{k}.gamma"][0]}
                for k in self.layers
            },
        }
        if not self.normalize:
            payload["normalize"] = False  # a key of ours, absent by default
        safe_save(payload, path)

    def extra_repr(self) -> str:
        chosen, total = sum(map(len, self.heads.values())), sum(self.head_counts)
        count = sum(p.numel() for p in self.parameters())
        return f"{chosen} of {total} heads {self.heads}, r={self.r}, lora_alpha={self.lora_alpha}, {count:,} parameters"


def attach(model, r: int = 8, lora_alpha: float = 16, heads: Heads | None = None, normalize: bool = True) -> ImageLoRA:
    """Freeze `model` and adapt the values of its visual tokens.

    r: the rank; lora_alpha: the update is scaled by lora_alpha / r; normalize: and by 1/sqrt|S|.
    heads: {layer: [value head, ...]}; None means all heads of all layers; a layer not named gets no adapter.
    Raises ValueError, and leaves the model as it was, where the model or the arguments do not allow it.
    """
    return ImageLoRA(model, r, lora_alpha, heads, normalize)


# ---------------------------------------------------------------------------------------------------------------------
# Head influence and selection


def score_heads(
    model: nn.Module,
    batches: Iterable,
    loss_fn: Callable[[nn.Module, dict], Tensor] | None = None,
    probe: str = "rank1",
    seed: int = 0,
) -> Tensor:
    """Influence I(l, h) of every value head on the loss, [L, H] float32: one forward and backward pass per batch.

    An Image-LoRA with B = 0 is put on every head, so that the model's output is unchanged while it is probed, and
    I(l, h) = ||dL/dB_l(h)||^2, where dL/dB = A^T X_vis^T G and G is the gradient at the value output.
    probe="rank1": r = 1 and A ~ N(0, 1). probe="exact": r = D and A = I, so it is the squared gradient of the whole
    W_V(h) over visual tokens (A, B and dL/dB take 4 L D (D + 2 H d_h) bytes). As E[A A^T] = I, rank-1 is exact on
    average over A. One draw is a rough sketch, so each batch has its own; give several.

    loss_fn(model, batch) -> scalar, default `model(**batch).loss`; where it passes inputs_embeds it calls the model
    inside `model.image_lora.visual_mask(mask)`. The gradient of each batch's loss is squared, and the mean over batches
    returned: batches of one example square per example, and can rank heads differently. Heads that a layer does not
    have score 0. The model is left as it was. Raises ValueError without visual tokens.
    """
    if probe not in ("rank1", "exact"):
        raise ValueError(f"unknown probe {probe!r}; expected 'rank1' or 'exact'")
    loss_fn = loss_fn or (lambda model, batch: model(**batch).loss)
    r = 1 if probe == "rank1" else _value_projections(model)[0][0].in_features
    adapter = attach(model, r, lora_alpha=r, normalize=False)  # the scale in front of A B is 1
    try:
        adapters, count = list(adapter.layers.values()), 0
        scores = torch.zeros(len(adapters), max(adapter.head_counts))
        generator = torch.Generator().manual_seed(seed)
        for a in adapters:
            nn.init.eye_(a.A.requires_grad_(False))  # A = I for "exact"; "rank1" overwrites it below
        for batch in batches:
            if probe == "rank1":
                for a in adapters:
                    a.A.copy_(torch.randn(a.A.shape, generator=generator))
            loss = loss_fn(model, batch)
            if not loss.isfinite():
                raise ValueError(f"the loss of probe batch {count} is {loss.item()}")
            adapter.zero_grad()
            loss.backward()
            for layer, a in enumerate(adapters):
                # I(l, h) = ||dL/dB_l(h)||^2
                scores[layer, : a.num_kv_heads] += a.B.grad.float().square().sum((1, 2)).cpu()
            count += 1
    finally:
        adapter.detach()
    if not scores.any():
        raise ValueError(f"the {count} probe batches hold no visual token that their losses depend on")
    return scores / count


def select_heads(scores: Tensor, num_heads: int, tau: float = 0.5) -> Heads:
    """The `num_heads` heads to adapt, exactly: layer l gets k_l ~ (sum_h I(l, h))^tau of them, its most influential.

    scores [L, H], as from `score_heads`. tau=0 spreads the budget evenly, tau=1 in proportion to influence, a large tau
    fills the most influential layers first; 0.5 is the authors' default. No layer gets more than H heads. Raises
    ValueError on bad input.
    """
    if scores.ndim != 2 or not scores.isfinite().all() or (scores < 0).any():
        raise ValueError(f"scores must be finite, not negative and [layers, heads], got {list(scores.shape)}")
    num_layers, num_kv_heads = scores.shape
    if type(num_heads) is not int or not 1 <= num_heads <= scores.numel():
        raise ValueError(f"num_heads must be an integer in 1..{scores.numel()}, got {num_heads!r}")
    if type(tau) not in (int, float) or not 0 <= tau <= 1e9:
        raise ValueError(f"tau must be a number in 0..1e9, got {tau!r}")
    # k_l ~ (sum_h I(l, h))^tau with sum k_l = K exactly
    influence = scores.double().sum(1)  # of each layer
    weights = ((influence / influence.max().clamp(min=1e-300)) ** tau).tolist()  # relative, so that no power overflows
    budget = [0] * num_layers
    for _ in range(num_heads):  # Sainte-Lague: to the layer of the largest weight / (2 k + 1), k its heads so far
        open_layers = (layer for layer in range(num_layers) if budget[layer] < num_kv_heads)
        budget[max(open_layers, key=lambda i: (weights[i] / (2 * budget[i] + 1), -budget[i]))] += 1  # ties: evenly
    order = scores.argsort(dim=1, descending=True, stable=True).tolist()
    return {layer: sorted(order[layer][:k]) for layer, k in enumerate(budget) if k}


# ---------------------------------------------------------------------------------------------------------------------
# Training FLOPs, counting 2 m n k for a product [m, k] [k, n]


def lora_flops(num_tokens: int, in_features: int, out_features: int, r: int, input_grad: bool = True) -> int:
    """Training FLOPs of LoRA on one Linear: z = x A, y = z B forward; dB, dz, dA and dx backward.

    input_grad=False leaves dx out: nothing below the lowest adapted layer needs a gradient.
    """
    forward = 2 * num_tokens * r * (in_features + out_features)
    dB = dz = 2 * num_tokens * r * out_features
    dA = dx = 2 * num_tokens * r * in_features
    return forward + dB + dz + dA + (dx if input_grad else 0)


def image_lora_flops(
    num_visual_tokens: int, hidden_size: int, head_dim: int, heads: Heads, r: int, input_grad: bool = False
) -> int:
    """Training FLOPs of a whole Image-LoRA: LoRA from D to |S| d_h features, over visual tokens, summed over layers.

    input_grad: whether the input of the lowest adapted layer needs a gradient too; that of the others always does.
    """
    layers = sorted(layer for layer in heads if heads[layer])
    return sum(
        lora_flops(num_visual_tokens, hidden_size, len(heads[layer]) * head_dim, r, input_grad or layer != layers[0])
        for layer in layers
    )


def lora_costs(
    layers: int, hidden_size: int, query_heads: int, kv_heads: int, head_dim: int, num_tokens: int, r: int, names="qkvo"
) -> tuple[int, int]:
    """(Parameters, training FLOPs over so many tokens) of standard LoRA on these projections of every layer."""
    q, kv = query_heads * head_dim, kv_heads * head_dim
    shapes = {"q": (hidden_size, q), "k": (hidden_size, kv), "v": (hidden_size, kv), "o": (q, hidden_size)}
    flops = 0
    for name in names:  # q, k and v of the lowest layer read the frozen embeddings
        flops += lora_flops(num_tokens, *shapes[name], r, input_grad=name == "o")
        flops += (layers - 1) * lora_flops(num_tokens, *shapes[name], r)
    return layers * r * sum(sum(shapes[name]) for name in names), flops


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def atomic_write(path: str | os.PathLike):
    """Yields a temporary path beside `path`, which replaces it on success; `path` is never half-written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def safe_save(content: dict, path: str | os.PathLike) -> None:
    """`torch.save`, atomic. Raises OSError where the file cannot be written (torch.save itself: RuntimeError)."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def safe_load(path: str | os.PathLike) -> dict:
    """`torch.load` without executing anything, checksums verified. Raises ValueError on a missing or damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load would not notice a flipped bit in a tensor
                raise ValueError("a checksum does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise ValueError(f"{path} is damaged or not a PyTorch file ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a dict was expected")
    return content


def read_heads(content: dict, path: str | os.PathLike) -> Heads:
    """The head selection {layer: [head, ...]} of an adapter file or of the authors' head-selection JSON, parsed."""
    indices = content.get("kv_indices") if isinstance(content, dict) else None
    if not isinstance(indices, dict) or not all(
        isinstance(k, str) and k.isdecimal() and str(int(k)) == k and isinstance(v, list) for k, v in indices.items()
    ):
        raise ValueError(f"{path}: kv_indices must map layer numbers (as strings) to lists of heads")
    return {int(layer): heads for layer, heads in indices.items()}


def load(model: nn.Module, path: str | os.PathLike) -> ImageLoRA:
    """Attach the adapter in `path`, ours or the authors'.

    Raises ValueError, and leaves the model as it was, on a damaged file or one that does not fit the model.
    """
    content = safe_load(path)
    heads, adapter = read_heads(content, path), None
    try:
        adapter = attach(model, content["r"], content["alpha"], heads, content.get("normalize", True))
        saved = {f"layers.{layer}.{k}": t for layer, tensors in content["layers"].items() for k, t in tensors.items()}
        if not all(tensor.is_floating_point() and tensor.layout is torch.strided for tensor in saved.values()):
            raise ValueError("its tensors must be dense and of floating-point numbers")
        adapter.load_state_dict({k: t.reshape(1) if k.endswith("gamma") else t for k, t in saved.items()})
        if not all(parameter.isfinite().all() for parameter in adapter.parameters()):
            raise ValueError("its tensors must be finite")
        for layer, a in adapter.layers.items():  # B's blocks are in the file's order of heads
            a.B.data = a.B.data[torch.tensor(heads[int(layer)]).argsort()]
    except BaseException as error:  # Ctrl-C too leaves the model as it was
        if adapter is not None:
            adapter.detach()
        if not isinstance(error, Exception):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{path} does not fit this model ({reason})") from None
    return adapter


# ---------------------------------------------------------------------------------------------------------------------
# python imagelora.py: parameters and FLOPs at the scale of real models, without their weights

SHAPES = {  # layers, hidden size, query heads, value (KV) heads, head size
    "qwen2.5-vl-7b": (28, 3584, 28, 4, 128),
    "qwen2.5-vl-72b": (80, 8192, 64, 8, 128),
}


def print_costs(shape: tuple[int, int, int, int, int], visual: int, text: int, r: int, num_heads: int) -> None:
    """Standard LoRA (q, k, v, o, all tokens) against Image-LoRA, and the saving as a product of its three causes."""
    layers, hidden_size, query_heads, kv_heads, head_dim = shape
    heads = select_heads(torch.ones(layers, kv_heads), num_heads, tau=0)
    parameters, lora = lora_costs(*shape, visual + text, r)
    _, lora_visual = lora_costs(*shape, visual, r)
    _, lora_visual_values = lora_costs(*shape, visual, r, "v")
    our_parameters = len(heads) * (hidden_size * r + 1) + num_heads * r * head_dim
    ours = image_lora_flops(visual, hidden_size, head_dim, heads, r)
    print(f"{layers} layers, hidden size {hidden_size}, {query_heads} query and {kv_heads} value heads of {head_dim}")
    print(f"{visual} visual and {text} text tokens, r = {r}, {num_heads} of {layers * kv_heads} value heads\n")
    print(f"{'':34}{'LoRA':>14}{'Image-LoRA':>14}{'saved':>9}")
    print(f"{'trainable parameters':34}{parameters:14,}{our_parameters:14,}{1 - our_parameters / parameters:9.1%}")
    print(f"{'adapter training MFLOP a sequence':34}{lora / 1e6:14,.0f}{ours / 1e6:14,.0f}{1 - ours / lora:9.1%}\n")
    factors = (lora_visual / lora, lora_visual_values / lora_visual, ours / lora_visual_values)
    print("visual tokens only {:.3f} x values only {:.3f} x selected heads {:.3f}".format(*factors), end="")
    print(f" = {ours / lora:.3f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Parameters and adapter training FLOPs, LoRA against Image-LoRA.")
    parser.add_argument("--model", default="qwen2.5-vl-7b", choices=SHAPES)
    sizes = ("LAYERS", "HIDDEN_SIZE", "QUERY_HEADS", "VALUE_HEADS", "HEAD_SIZE")
    parser.add_argument("--shape", type=int, nargs=5, metavar=sizes, help="another model's, instead of --model")
    parser.add_argument("--visual-tokens", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--num-heads", type=int, help="selected value heads, default half of all")
    args = parser.parse_args(arguments)
    shape = args.shape or SHAPES[args.model]
    total = shape[0] * shape[3]
    num_heads = max(total // 2, 1) if args.num_heads is None else args.num_heads
    if min(*shape, args.r, args.visual_tokens, args.text_tokens + 1) < 1 or not 1 <= num_heads <= total:
        parser.error(
            f"sizes, --r and --visual-tokens must be positive, --text-tokens not negative, --num-heads in 1..{total}"
        )
    print_costs(shape, args.visual_tokens, args.text_tokens, args.r, num_heads)


if __name__ == "__main__":
    main()
