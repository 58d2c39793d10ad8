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
import inspect
import io
import math
import os
import threading
import zipfile
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Heads = dict[int, list[int]]  # {layer: [value head, ...]}


class ValueAdapter(nn.Module):
    """gamma * (alpha / r) * 1/sqrt|S| * x A B(h) for the selected heads h of one layer.

    B starts at zero: the model starts as the base. A starts as in LoRA, and gamma at 1, so that learning rates known
    from LoRA, or a few times these, serve here; with gamma near 0 the same step of B would be a much smaller update.
    """

    def __init__(self, hidden_size, head_dim, num_kv_heads, heads, r, lora_alpha, normalize=True, device=None):
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.scaling = lora_alpha / r * (len(heads) ** -0.5 if normalize else 1.0)
        self.A = nn.Parameter(torch.empty(hidden_size, r, device=device))  # shared by the layer's heads
        self.B = nn.Parameter(torch.zeros(len(heads), r, head_dim, device=device))  # a block for each head
        self.gamma = nn.Parameter(torch.ones(1, device=device))  # of one element: FSDP shards no scalars
        selected = [head in heads for head in range(num_kv_heads)]
        self.register_buffer("selected", torch.tensor(selected, device=device))  # [H]: S, as a state_dict carries it
        nn.init.kaiming_uniform_(self.A.T, a=math.sqrt(5))  # uniform in +-1/sqrt(D), as PEFT's LoRA

    def forward(self, x_vis: Tensor) -> Tensor:
        """Visual tokens' inputs [N, D] -> their updates in the selected heads [N, |S| * d_h]."""
        # z = x A: what the selected heads share. A^T is made contiguous as BLAS is several times faster on [r, D].
        z = F.linear(x_vis, self.A.T.contiguous())  # [N, r]
        # gamma * (alpha / r) * 1/sqrt|S| * z B(h), for all h in S at once
        B = self.gamma * self.scaling * self.B  # [|S|, r, d_h]
        return z @ B.transpose(0, 1).flatten(1)  # [N, r] @ [r, |S| * d_h]

    def add_update(self, x: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        """X [B, T, D], X W_V [B, T, H * d_h], indices of the visual rows [N] of B * T -> the adapted values.

        M X is a gather of rows, not a product with M: nothing is computed for a text token. Without any row the values
        stay as they are, but every parameter gets a gradient (of zero), which data-parallel training needs.
        """
        H = self.num_kv_heads
        S, _, d_h = self.B.shape
        wrong = f"v_proj gave {value.shape[-1]} features, not {H} heads of {d_h}: are heads split over devices?"
        _require(value.shape[-1] == H * d_h, wrong, RuntimeError)
        # M X, without its zero rows
        x_vis = x.flatten(0, -2).index_select(0, rows)  # [N, D]
        delta = self(x_vis.to(self.A.dtype)).to(value.dtype)  # [N, |S| * d_h]
        # V~(h) = X W_V(h) + delta(h), put back into the rows it came from
        if S == H:  # whole rows: one index per token instead of one per head, faster
            return value.flatten(0, -2).index_add(0, rows, delta).view_as(value)
        # In the values seen as [B * T * H, d_h], head h of token n is row n * H + h.
        heads = (~self.selected).byte().argsort(stable=True)[:S]  # unlike nonzero() it does not wait for a GPU
        head_rows = (rows[:, None] * H + heads).flatten()  # [N * |S|]
        by_head = value.reshape(-1, d_h).index_add(0, head_rows, delta.view(-1, d_h))
        return by_head.view_as(value)

    def _apply(self, fn, recurse=True):
        def moved(t):  # to another device, but to no type in which small steps would be lost
            new = fn(t)
            return t.to(new.device) if new.is_floating_point() and new.element_size() < 4 else new

        return super()._apply(moved, recurse)


def is_visual(input_ids: Tensor, image_token_ids: set[int]) -> Tensor:
    """The diagonal of M [B, T], bool, found at each call: of a prompt, or of one decoded token."""
    return torch.stack([input_ids == image for image in image_token_ids]).any(0)


class ImageLoRA(nn.Module):
    """The adapters of a model, made by `attach` or `load`; `.parameters()` are exactly the trainable A, B and gamma.

    As `model.image_lora` it moves with the model, and is in `model.state_dict()` (but for lora_alpha and normalize).
    In float32 or wider, whatever type the model has or is given.
    """

    def __init__(self, model, r, lora_alpha, heads, normalize):
        super().__init__()
        model = getattr(model, "_orig_mod", model)  # torch.compile's and PEFT's wrappers call the model inside them
        model = getattr(model, "get_base_model", lambda: model)()
        v_projs, self.head_counts, image_token_ids, heads = _checked(model, r, lora_alpha, heads, normalize)
        self.r, self.lora_alpha, self.normalize = r, lora_alpha, normalize
        self.model_name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.visual = VisualRows(image_token_ids)
        self.layers = nn.ModuleDict()
        for layer, selected in heads.items():
            v_proj, H = v_projs[layer], self.head_counts[layer]
            tensors = [*v_proj.parameters(), *v_proj.buffers()]
            device = tensors[0].device if tensors else None
            device = getattr(getattr(v_proj, "_hf_hook", None), "execution_device", device)  # where accelerate runs it
            sizes = v_proj.in_features, v_proj.out_features // H, H
            self.layers[str(layer)] = ValueAdapter(*sizes, selected, r, lora_alpha, normalize, device)
        self.register_load_state_dict_post_hook(_check_loaded)
        # From here on the model is changed, and nothing can fail.
        self._frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        model.requires_grad_(False)
        self._replaced = [_replace_forward(model, self.visual.call, self)]
        for layer, adapter in self.layers.items():
            self._replaced.append(_replace_forward(v_projs[int(layer)], _adapted_values, self.visual, adapter))
        model.image_lora = self

    @property
    def heads(self) -> Heads:
        return {int(layer): a.selected.nonzero().flatten().tolist() for layer, a in self.layers.items()}

    def disabled(self):
        """A context in which no row is visual: the base model. A training step in it saves the adapter's FLOPs.

        It is of the thread that enters it, as `torch.no_grad()`. Leave it after the backward pass, not before.
        """
        return self.visual.within(enabled=False)

    def visual_mask(self, mask: Tensor):
        """A context in which calls by `inputs_embeds` [B, T, D] go by this mask [B, T], True at visual tokens.

        Calls by `input_ids`, as are the later steps of `generate(inputs_embeds=...)`, go by those.
        """
        wrong = f"the visual mask must be a bool tensor [B, T], got {mask.dtype} {list(mask.shape)}"
        _require(mask.dtype == torch.bool and mask.ndim == 2, wrong)
        return self.visual.within(mask=mask)

    def detach(self) -> nn.Module:
        """Restore the original model (forward, requires_grad) and return it. Raises RuntimeError when called twice."""
        _require(self.visual.attached, "this Image-LoRA is already detached", RuntimeError)
        self.visual.attached = False  # a forward of ours that others have wrapped since stays, and does nothing
        for module, name, own, ours in self._replaced:
            if vars(module).get(name) is ours:
                if own is None:
                    delattr(module, name)
                else:
                    setattr(module, name, own)
        model = self._replaced[0][0]
        del model.image_lora
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in self._frozen:
                parameter.requires_grad_()
        self._replaced = []
        return model

    def save(self, path: str | os.PathLike) -> None:
        """Write the adapter in the authors' layout, atomically; with FSDP2 on all ranks at once. ValueError on NaN."""
        layers = {layer: {} for layer in self.layers}
        for name, tensor in self.state_dict().items():  # parameters() may be FSDP's copies in bfloat16
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP: all shards
            _require(tensor.isfinite().all(), f"{name} is not finite; the adapter is not saved")
            _, layer, kind = name.split(".")
            if kind != "selected":
                layers[layer][kind] = tensor.cpu()[0 if kind == "gamma" else ...]
        content = {
            "model_name": self.model_name,
            "r": self.r,
            "alpha": float(self.lora_alpha),
            "kv_indices": {str(layer): selected for layer, selected in self.heads.items()},
            "layers": layers,
            "normalize": self.normalize,  # this and the next are keys of ours
            "head_counts": self.head_counts,
        }
        safe_save(content, path)

    def flops(self, num_visual_tokens: int) -> int:
        """FLOPs of the adapter in one training step (forward and backward) over so many visual tokens."""
        first = next(iter(self.layers.values()))
        return image_lora_flops(num_visual_tokens, first.A.shape[0], first.B.shape[2], self.heads, self.r)

    def extra_repr(self) -> str:
        chosen = sum(len(a.B) for a in self.layers.values())
        total = sum(self.head_counts)
        count = sum(p.numel() for p in self.parameters())
        heads = "on meta" if any(p.is_meta for p in self.parameters()) else self.heads
        return f"{chosen} of {total} heads {heads}, r={self.r}, lora_alpha={self.lora_alpha}, {count:,} parameters"

    def forward(self, *args, **kwargs):
        raise RuntimeError("the adapter is no model; call, and give a Trainer, the model that it is attached to")


def attach(model, r: int = 8, lora_alpha: float = 16, heads: Heads | None = None, normalize: bool = True) -> ImageLoRA:
    """Freeze `model` and adapt the values of its visual tokens, scaled by lora_alpha / r and, if normalize, 1/sqrt|S|.

    heads: {layer: [value head, ...]}; None means all heads of all layers; a layer not named gets no adapter.
    Raises ValueError, and leaves the model as it was, where the model or the arguments do not allow it.
    """
    return ImageLoRA(model, r, lora_alpha, heads, normalize)


def score_heads(model, batches, loss_fn=None, probe: str = "rank1", seed: int = 0) -> Tensor:
    """Influence I(l, h) of every value head on the loss, [L, H] float32: one forward and backward pass per batch.

    I(l, h) = ||dL/dB_l(h)||^2 of an Image-LoRA in every head with B = 0, which leaves the model's output unchanged:
    dL/dB = A^T X_vis^T G, where G is the gradient at the value output. probe="rank1": r = 1 and A ~ N(0, 1), drawn for
    each batch. probe="exact": r = D and A = I, so it is the squared gradient of the whole W_V(h) over visual tokens.
    As E[A A^T] = I, rank-1 is exact on average over A.

    loss_fn(model, batch) -> scalar, default `model(**batch).loss`. Each batch's gradient is squared, and the mean over
    batches returned: batches of one example square per example, and can rank heads differently. Heads that a layer does
    not have score 0. The model is left as it was. Raises ValueError without visual tokens.
    """
    _require(probe in ("rank1", "exact"), f"unknown probe {probe!r}; expected 'rank1' or 'exact'")
    loss_fn = loss_fn or (lambda model, batch: model(**batch).loss)
    D = _value_projections(model)[0][0].in_features
    r = 1 if probe == "rank1" else D
    adapter = attach(model, r, lora_alpha=r, normalize=False)  # the scale in front of A B is 1
    try:
        adapters = list(adapter.layers.values())
        generator = torch.Generator().manual_seed(seed)
        scores = torch.zeros(len(adapters), max(adapter.head_counts))
        count = 0
        for batch in batches:
            for a in adapters:
                A = torch.randn(D, r, generator=generator) if probe == "rank1" else torch.eye(D)
                a.A.requires_grad_(False).copy_(A)
            with torch.enable_grad():
                loss = loss_fn(model, batch)
            finite = isinstance(loss, Tensor) and loss.isfinite().all()
            _require(finite, f"the loss of probe batch {count} is {loss}: do its labels hold an answer?")
            adapter.zero_grad()
            loss.backward()
            for layer, a in enumerate(adapters):
                # I(l, h) = ||dL/dB_l(h)||^2
                gradient = a.B.grad.float()  # [H, r, d_h]
                scores[layer, : a.num_kv_heads] += gradient.square().sum((1, 2)).cpu()
            count += 1
    finally:
        adapter.detach()
    _require(scores.any(), f"the {count} probe batches hold no visual token that their losses depend on")
    return scores / count


def select_heads(scores: Tensor, num_heads: int, tau: float = 0.5) -> Heads:
    """Exactly `num_heads` heads: layer l gets k_l ~ (sum_h I(l, h))^tau of them, its most influential. scores [L, H].

    tau=0 spreads the budget evenly, 1 in proportion to influence, a large one fills the most influential layers first;
    0.5 is the authors' default. Raises ValueError on bad input.
    """
    right = scores.ndim == 2 and scores.isfinite().all() and (scores >= 0).all()
    _require(right, f"scores must be finite, not negative and [layers, heads], got {list(scores.shape)}")
    right = type(num_heads) is int and 1 <= num_heads <= scores.numel()
    _require(right, f"num_heads must be an integer in 1..{scores.numel()}, got {num_heads!r}")
    _require(type(tau) in (int, float) and 0 <= tau <= 1e9, f"tau must be a number in 0..1e9, got {tau!r}")
    num_layers, num_kv_heads = scores.shape
    # k_l ~ (sum_h I(l, h))^tau with sum k_l = K exactly
    influence = scores.double().sum(1)  # of each layer
    influence = influence / influence.max().clamp(min=1e-300)  # so that no power overflows
    weights = (influence**tau).tolist()
    budget = [0] * num_layers

    def quotient(layer):
        return weights[layer] / (2 * budget[layer] + 1), -budget[layer]  # ties: evenly

    for _ in range(num_heads):  # one by one to the layer of the largest quotient, as Sainte-Lague does
        open_layers = [layer for layer in range(num_layers) if budget[layer] < num_kv_heads]
        budget[max(open_layers, key=quotient)] += 1
    order = scores.argsort(dim=1, descending=True, stable=True).tolist()
    return {layer: sorted(order[layer][:k]) for layer, k in enumerate(budget) if k}


# --------------- That was the method. Below: which call a layer runs in, what is refused, files, costs ----------------


@dataclass
class Call:
    """A call of the model, and which of its tokens are visual."""

    rows: Tensor = torch.zeros(0, dtype=torch.long)  # [N], the visual ones of B * T
    shape: torch.Size = torch.Size()  # [B, T]
    adapters: set[int] = field(default_factory=set)  # those that have run in it
    nodes: range = range(0)  # of autograd, those made in it


TEXT = Call()


class ThisThread(threading.local):
    """Of the thread that asks: its contexts and its call."""

    def __init__(self):  # no defaults of the class: torch.compile would not notice their change
        self.enabled = True  # False: in disabled()
        self.mask = None  # [B, T]: in visual_mask()
        self.call = None


class VisualRows:
    """Tells every v_proj which rows of its input are visual: those of the call of the model that it belongs to.

    model(input_ids)     call: finds the visual rows, and every v_proj asks rows_for(x)
    loss.backward()      gradient checkpointing runs layers again: rows_for(x) knows of which call

    It knows by the numbers of autograd nodes, counted by thread: with checkpointing, train in one thread only.
    """

    def __init__(self, image_token_ids: set[int]):
        self.image_token_ids = image_token_ids
        self.attached = True
        self.now = ThisThread()
        self.recent = deque(maxlen=64)  # calls with gradients

    def __reduce__(self):
        return VisualRows, (self.image_token_ids,), {"attached": self.attached}  # a copy begins anew

    def call(self, adapter, forward, *args, **kwargs):
        """Runs in place of `model.forward`, which it calls."""
        if args and isinstance(args[0], nn.Module):
            args = args[1:]  # accelerate passes the model itself first
        if not self.attached:
            return forward(*args, **kwargs)
        now = self.now
        grad = torch.is_grad_enabled()
        first = torch.autograd._get_sequence_nr()
        call = self.find(*args, **kwargs)
        outer = now.call
        now.call = call
        try:
            output = forward(*args, **kwargs)
        finally:
            now.call = outer
            if grad:
                call.nodes = range(first, torch.autograd._get_sequence_nr())
                self.recent.append(call)
        if len(call.rows):
            replaced = "an adapted v_proj was not called; one that replaced it after attach() (merged, unloaded, "
            replaced += "quantized) is not adapted: detach() first, then attach or load again"
            _require(len(call.adapters) == len(adapter.layers), replaced, RuntimeError)
        logits = getattr(output, "logits", None)
        if grad and isinstance(logits, Tensor) and not logits.requires_grad:
            why = "no gradient reaches the adapter: is this inference_mode(), or re-entrant checkpointing without "
            why += "model.enable_input_require_grads()?"
            _require(not any(p.requires_grad for p in adapter.parameters()), why, RuntimeError)
        return output

    def find(self, *args, **kwargs) -> Call:
        """The arguments of a call -> visual [B, T] bool -> the Call, with its rows [N]."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        visual = None
        if not self.now.enabled:
            return Call() if torch.is_grad_enabled() else TEXT
        if ids is not None and not ids.is_floating_point():
            # Most calls decode one text token a row: looked up in Python, as tensor operations cost several times more.
            decoding = not torch.is_grad_enabled() and ids.shape[-1] == 1
            if decoding and self.image_token_ids.isdisjoint(sum(ids.tolist(), [])):
                return TEXT
            visual = is_visual(ids, self.image_token_ids)
        elif kwargs.get("inputs_embeds") is not None:
            visual = self.now.mask
        unknown = "which tokens are visual? pass input_ids by name, or inputs_embeds inside adapter.visual_mask(mask)"
        _require(visual is not None, unknown)
        return Call(visual.flatten().nonzero().squeeze(1), visual.shape)

    def rows_for(self, adapter, x: Tensor) -> Tensor | None:
        """The visual rows of a v_proj input [B, T, D]; None where nothing is to do. Raises rather than guess."""
        call = self.now.call
        if call is None and (node := torch._C._current_autograd_node()) is not None:
            # checkpointing: a node that the call made runs one of its layers again
            found = [call for call in self.recent if node._sequence_nr() in call.nodes]
            lost = "a checkpoint's forward is too long ago, of another thread or nested in another"
            _require(len(found) == 1, lost, RuntimeError)
            call = found[0]
        alone = "called without the model that attach() adapted: call that, or attach to the part that is called (by "
        alone += "generate(), it may be) and give it a visual_mask(); or was its forward replaced?"
        _require(call is not None, alone, RuntimeError)
        if call is TEXT or not (len(call.rows) or torch.is_grad_enabled()):
            return None
        call.adapters.add(id(adapter))
        wrong = f"v_proj got tokens {list(x.shape[:-1])}, but input_ids or the visual mask told of {list(call.shape)}; "
        wrong += "a mask for beams is mask.repeat_interleave(num_beams, 0)"
        _require(x.shape[:-1] == call.shape or not len(call.rows), wrong, RuntimeError)
        return call.rows.to(x.device)

    @contextmanager
    def within(self, **changes):
        """Changes what this thread is in until the context is left."""
        before = {name: getattr(self.now, name) for name in changes}
        vars(self.now).update(changes)
        try:
            yield
        finally:
            vars(self.now).update(before)


def _replace_forward(module, function, *given):
    """Puts `function` in place of `module.forward`; returns (module, forward's name, the module's own if any, ours).

    No hook: torch.compile guards on a forward, not on hooks; Ctrl-C skips a hook after the call; and this is faster.
    """
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"  # the one inside of accelerate's
    own = vars(module).get(name)
    of_class = own is None or getattr(own, "__func__", None) is type(module).forward
    ours = partial(function, *given, partial(_forward_of_class, module) if of_class else own)
    ours.__signature__ = inspect.signature(getattr(module, name))
    if of_class and function is not _adapted_values:
        # what accelerate's mixed precision binds to the model, and deepcopy then to the copy
        ours.__func__ = partial(_forward_of_copy)
        ours.__func__.__signature__ = inspect.signature(type(module).forward)
    setattr(module, name, ours)
    return module, name, own, ours


def _forward_of_class(module, *args, **kwargs):
    return type(module).forward(module, *args, **kwargs)  # looked up when it is called: it may be patched


def _forward_of_copy(model, *args, **kwargs):
    ours = model.image_lora._replaced[0][-1] if hasattr(model, "image_lora") else None
    if not hasattr(ours, "__func__"):  # detached, or attached anew around what binds this
        return type(model).forward(model, *args, **kwargs)
    return ours(*args, **kwargs)


def _adapted_values(visual, adapter, forward, x, *args, **kwargs):
    """Runs in place of a `v_proj.forward`, which it calls: X -> V~."""
    value = forward(x, *args, **kwargs)
    rows = visual.rows_for(adapter, x) if visual.attached else None
    return value if rows is None else adapter.add_update(x, value, rows)


def _require(right, sentence, error=ValueError):
    if not right:
        raise error(sentence)


def _value_projections(model):
    """The v_proj of every decoder layer, and their numbers of heads; no encoder's or resampler's."""
    encoders = ("vision", "visual", "audio", "img", "image", "video", "perceiver")
    stacks = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "layers" and isinstance(module, nn.ModuleList) and len(module)
        if not any(part.startswith(encoders) for part in name.split("."))
    }
    found = ", ".join(stacks) or "none"
    _require(len(stacks) == 1, f"expected one stack of decoder layers besides the vision tower, found {found}")
    config = getattr(model, "config", None)
    shared = getattr(getattr(config, "text_config", config), "num_kv_shared_layers", 0)
    _require(not shared, "layers that share their values with other layers (num_kv_shared_layers) cannot be adapted")
    v_projs, head_counts = [], []
    for i, layer in enumerate(stacks[found]):
        name = f"{found}.{i}.self_attn"
        attention = getattr(layer, "self_attn", None)
        parts = [part for part, _ in (attention or layer).named_children()]
        other = "cross-attention to images" if "cross" in str(parts) else "layers without it, as a hybrid has,"
        _require(attention, f"there is no {name} but {', '.join(parts)}: {other} cannot be adapted")
        v_proj = getattr(attention, "v_proj", None)
        _require(v_proj, f"{name} has no v_proj; fused qkv or latent values cannot be adapted")
        d_h, features = getattr(attention, "head_dim", None), getattr(v_proj, "out_features", 0)
        _require(d_h and features and features % d_h == 0, f"{name}.head_dim is {d_h}, v_proj has {features} features")
        later = [part for part in parts if part.startswith("v_") and part != "v_proj"]
        _require(not later, f"{name} changes its values after v_proj, in {later}; they cannot be adapted")
        v_projs.append(v_proj)
        head_counts.append(features // d_h)
    _require(len(set(v_projs)) == len(v_projs), "layers share a v_proj; they cannot be adapted")
    return v_projs, head_counts


def _checked(model, r, lora_alpha, heads, normalize):
    """`_value_projections`, the ids of visual tokens and the heads, sorted. Raises ValueError on a bad argument."""
    v_projs, head_counts = _value_projections(model)
    config = getattr(model, "config", None)
    ours = [v_proj.forward for v_proj in v_projs if getattr(v_proj.forward, "func", None) is _adapted_values]
    attached = hasattr(model, "image_lora") or any(forward.args[0].attached for forward in ours)  # a part may be
    _require(not attached, "the model already has an Image-LoRA; call its detach() first")
    names = "image_token_id", "image_token_index", "video_token_id", "video_token_index"
    ids = {getattr(config, name, None) for name in names}
    ids = {token for token in ids if isinstance(token, int)}
    _require(ids, "model.config has no image_token_id to tell visual tokens by; attach to the whole VLM, unwrapped")
    D = min(v_proj.in_features for v_proj in v_projs)
    _require(type(r) is int and 1 <= r <= D, f"r must be an integer in 1..{D}, got {r!r}")
    right = type(lora_alpha) in (int, float) and 0 < lora_alpha <= 1e9
    _require(right, f"lora_alpha must be a number above 0 and up to 1e9, got {lora_alpha!r}")
    _require(type(normalize) is bool, f"normalize must be True or False, got {normalize!r}")
    existing = dict(enumerate(map(range, head_counts)))
    heads = existing if heads is None else heads
    for layer, selected in heads.items():
        whole = {type(n) for n in (layer, *selected)} == {int}
        found = set(selected) & set(existing.get(layer, ()))
        wrong = f"layer {layer!r} of 0..{len(v_projs) - 1} has no such heads, or not as integers named once: {selected}"
        _require(whole and len(found) == len(selected), wrong)
    heads = {layer: sorted(heads[layer]) for layer in sorted(heads) if heads[layer]}
    _require(heads, "no head is selected; name at least one")
    return v_projs, head_counts, ids, heads


def _check_loaded(adapter, keys):
    """Runs after every load_state_dict(), as a Trainer passes strict=False to it."""
    missing = [key for key in keys.missing_keys if key.endswith(".selected")]
    other = [key for key in keys.unexpected_keys if key.endswith(".selected")]
    right = len(missing) in (0, len(adapter.layers)) and not other  # all are missing in a state of the base
    for a in adapter.layers.values():
        right = right and (a.selected.is_meta or a.selected.sum() == len(a.B))
    _require(right, "the state_dict is of an Image-LoRA in other layers or heads; attach it there", RuntimeError)


def safe_write(data: bytes, path: str | os.PathLike) -> None:
    """Writes a file beside `path`, then moves it into place: a killed write leaves the old file."""
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def safe_save(content: dict, path: str | os.PathLike) -> None:
    """`torch.save` by `safe_write`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # not to the disk: where that is full, torch.save raises no OSError
    safe_write(buffer.getbuffer(), path)


def safe_load(path: str | os.PathLike) -> dict:
    """`torch.load` that runs nothing from the file and checks its checksums. Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load would not notice a flipped bit in a tensor
            _require(archive.testzip() is None, "a checksum does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
        _require(isinstance(content, dict), f"it holds a {type(content).__name__}")
        return content
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise ValueError(f"{path} is missing, damaged or not a PyTorch file ({reason})") from None


def load(model: nn.Module, path: str | os.PathLike) -> ImageLoRA:
    """Attach the adapter in `path`, ours or the authors'. ValueError, the model untouched, where it does not fit."""
    content, state, adapter = safe_load(path), {}, None
    try:
        heads = {int(layer): selected for layer, selected in content["kv_indices"].items()}
        for layer, saved in content["layers"].items():
            order = torch.tensor(heads[int(layer)]).argsort()  # the file's order of heads is its own, ours is sorted
            _require(len(saved["B"]) == len(order), f"layer {layer} names {len(order)} heads for {len(saved['B'])}")
            state[f"layers.{layer}.A"] = saved["A"]
            state[f"layers.{layer}.B"] = saved["B"][order]
            state[f"layers.{layer}.gamma"] = saved["gamma"].reshape(1)
        for tensor in state.values():
            right = tensor.is_floating_point() and tensor.float().isfinite().all()
            _require(right, "its tensors must be finite floating-point numbers")
        adapter = attach(model, content["r"], content["alpha"], heads, content.get("normalize", True))
        counts = content.get("head_counts", adapter.head_counts)  # like normalize, not in the authors' files
        other = f"it is of a model with {counts} value heads in its layers, this one has {adapter.head_counts}"
        _require(counts == adapter.head_counts, other)
        adapter.load_state_dict(dict(adapter.named_buffers()) | state)
        return adapter
    except Exception as error:
        if adapter:
            adapter.detach()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{path} does not fit this model ({reason})") from None


def lora_flops(num_tokens: int, in_features: int, out_features: int, r: int, input_grad: bool = True) -> int:
    """Training FLOPs of LoRA on one Linear, 2 m n k a product; input_grad: whether its input needs a gradient."""
    forward = 2 * num_tokens * r * (in_features + out_features)  # z = x A, y = z B
    dB = dz = 2 * num_tokens * r * out_features
    dA = dx = 2 * num_tokens * r * in_features
    return forward + dB + dz + dA + (dx if input_grad else 0)


def image_lora_flops(num_visual_tokens, hidden_size, head_dim, heads: Heads, r, input_grad: bool = False) -> int:
    """Training FLOPs of a whole Image-LoRA; input_grad: as above, of the lowest adapted layer (others always do)."""
    flops = 0
    for layer in sorted(layer for layer in heads if heads[layer]):
        flops += lora_flops(num_visual_tokens, hidden_size, len(heads[layer]) * head_dim, r, input_grad)
        input_grad = True
    return flops


def lora_costs(layers, hidden_size, query_heads, kv_heads, head_dim, num_tokens, r, names="qkvo") -> tuple[int, int]:
    """(Parameters, training FLOPs over so many tokens) of standard LoRA on these projections of every layer."""
    q, kv = query_heads * head_dim, kv_heads * head_dim
    shapes = {
        "q": (hidden_size, q),
        "k": (hidden_size, kv),
        "v": (hidden_size, kv),
        "o": (q, hidden_size),
    }
    parameters = flops = 0
    for layer in range(layers):
        for name in names:
            parameters += r * sum(shapes[name])
            input_grad = layer > 0 or name == "o"  # the lowest q, k, v read frozen embeddings
            flops += lora_flops(num_tokens, *shapes[name], r, input_grad)
    return parameters, flops


SHAPES = {  # layers, hidden size, query heads, value (KV) heads, head size, MLP size
    "qwen2.5-vl-7b": (28, 3584, 28, 4, 128, 18944),
    "qwen2.5-vl-72b": (80, 8192, 64, 8, 128, 29568),
}


def main(arguments: list[str] | None = None) -> None:
    """What LoRA (q, k, v, o of all tokens) and Image-LoRA cost at the scale of real models.

    The decoder's step is of its layers, forward and back to all their inputs; no vision tower, no vocabulary.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="qwen2.5-vl-7b", choices=SHAPES)
    parser.add_argument("--shape", type=int, nargs=6, metavar=("LAYERS", "HIDDEN", "QUERY", "KV", "HEAD", "MLP"))
    for name, default in {"visual-tokens": 1024, "text-tokens": 256, "r": 8, "num-heads": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default or 'half of all'}")
    args = parser.parse_args(arguments)
    *shape, mlp = args.shape or SHAPES[args.model]
    layers, D, H_q, H, d_h = shape
    N, r = args.visual_tokens, args.r
    T = N + args.text_tokens
    K = args.num_heads or -(-layers * H // 2)
    if min(*shape, mlp, N, T + 1 - N, r, K) < 1 or K > layers * H:
        parser.error(f"sizes must be positive, and --num-heads in 1..{layers * H}")
    heads = select_heads(torch.ones(layers, H), K, tau=0)
    parameters = len(heads) * (D * r + 1) + K * r * d_h
    ours = image_lora_flops(N, D, d_h, heads, r)
    lora_parameters, lora = lora_costs(*shape, T, r)
    _, visual = lora_costs(*shape, N, r)
    _, values = lora_costs(*shape, N, r, "v")
    # Frozen weights take part forward and back to their inputs; so do QK^T and PV, each with two products back.
    weights = D * (2 * (H_q + H) * d_h + 3 * mlp)  # of a layer
    step = layers * (4 * T * weights + 12 * T**2 * H_q * d_h)
    print(f"{N} visual and {T - N} text tokens, r = {r}, {K} of {layers * H} value heads")
    print(f"{'':38}{'LoRA':>16}{'Image-LoRA':>16}{'saved':>9}")
    for name, theirs, mine, form in (
        ("trainable parameters", lora_parameters, parameters, ","),
        ("adapter training FLOP a sequence", lora, ours, ","),
        ("their share of the decoder's step", lora / (step + lora), ours / (step + ours), ".3%"),
    ):
        print(f"{name:38}{theirs:16{form}}{mine:16{form}}{1 - mine / theirs:9.1%}")
    factors = visual / lora, values / visual, ours / values, ours / lora
    print("\nvisual tokens only {:.3f} x values only {:.3f} x selected heads {:.3f} = {:.3f}".format(*factors))


if __name__ == "__main__":
    main()
