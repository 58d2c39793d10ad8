"""Image-LoRA: low-rank updates of the attention values of visual tokens, in selected heads (arXiv 2512.19219).

    V~(h) = X W_V(h) + gamma * (alpha / r) * 1/sqrt|S| * M X A B(h)    for the heads h in S          (section 3)

in one layer; S are its selected heads, and M = diag(1[token is visual]) zeroes the rows of text tokens. For the same X
the layer's queries, keys, text rows and other heads stay. With no image the output is the base model's, bit for bit.

    scores = score_heads(model, batches)                       # which value heads carry the image into the answer
    adapter = attach(model, heads=select_heads(scores, 16))    # 16 heads; freeze gamma yourself
    adapter.save("adapter.pt")                                 # after training
    adapter = load(another_model, "adapter.pt")                # later, on a fresh copy of the model

A worked example. Three tokens with two features each; token 1 is visual. Two heads of size 1; head 1 is adapted, the
scale is 1. x_vis A = [3, 4] [1, 2]^T = 11, times B(1) = 0.1 is 1.1, added there and nowhere else:

    >>> adapter = ValueAdapter(hidden_size=2, head_dim=1, num_kv_heads=2, heads=[1], r=1, lora_alpha=1)
    >>> _ = adapter.A.data.copy_(torch.tensor([[1.0], [2.0]])), adapter.B.data.fill_(0.1)
    >>> x = torch.tensor([[[1.0, 1.0], [3.0, 4.0], [5.0, 5.0]]])    # one sequence, T = 3, D = 2
    >>> value = torch.zeros(1, 3, 2)                                # what v_proj made of x: H * d_h = 2
    >>> adapter.add_update(x, value, rows=torch.tensor([1])).tolist()
    [[[0.0, 0.0], [0.0, 1.100000023841858], [0.0, 0.0]]]

Shapes:  B batch (as a matrix: LoRA's B) · T tokens · N visual tokens in the batch · D hidden size · H value heads of a
layer (the KV heads under grouped-query attention) · d_h head size · r rank · |S| selected heads of a layer · L layers
"""

import io
import os
import threading
import zipfile
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

Heads = dict[int, list[int]]  # {layer: [value head, ...]}


class ValueAdapter(nn.Module):
    """gamma * (alpha / r) * 1/sqrt|S| * x A B(h) for the selected heads h of one layer; it starts with B = 0."""

    def __init__(self, hidden_size, head_dim, num_kv_heads, heads, r, lora_alpha, normalize=True, device=None):
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.scaling = lora_alpha / r * (len(heads) ** -0.5 if normalize else 1.0)
        self.heads = torch.tensor(heads, device="cpu")  # S, [|S|]; no buffer: to_empty() and the like would unset it
        A = torch.empty(hidden_size, r, dtype=torch.float32, device="cpu")  # so that a seed starts alike on any device
        nn.init.kaiming_uniform_(A.T, a=5**0.5)  # uniform in +-1/sqrt(D), as PEFT's LoRA
        B = torch.zeros(len(heads), r, head_dim, dtype=torch.float32, device=device)
        self.A = nn.Parameter(A.to(B.device))  # shared by the layer's heads
        self.B = nn.Parameter(B)  # a block for each head
        self.gamma = nn.Parameter(B.new_ones(1))  # a small one blunts B; FSDP shards no scalars

    def forward(self, x_vis: Tensor) -> Tensor:
        """Visual tokens' inputs [N, D] -> their updates in the selected heads [N, |S| * d_h]."""
        # z = x A: what the selected heads share. BLAS is several times faster on a contiguous A^T [r, D].
        z = nn.functional.linear(x_vis, self.A.T.contiguous())  # [N, r]
        # gamma * (alpha / r) * 1/sqrt|S| * z B(h), for all h in S at once
        B = self.gamma * self.scaling * self.B  # [|S|, r, d_h]
        return z @ B.transpose(0, 1).flatten(1)  # [N, r] @ [r, |S| * d_h]

    def add_update(self, x: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        """X [B, T, D], X W_V [B, T, H * d_h], indices of the visual rows [N] of B * T -> the adapted values V~.

        M X is a gather of rows, so nothing is computed for text tokens. Without any row the values stay, and the
        parameters' gradients are zero, not missing: data-parallel training needs them."""
        H, d_h = self.num_kv_heads, self.B.shape[2]
        _require(value.shape[-1] == H * d_h, SPLIT.format(value.shape[-1], H, d_h), RuntimeError)
        x_vis = x.flatten(0, -2).index_select(0, rows)  # M X without its zero rows, [N, D]
        delta = self(x_vis.to(self.A.dtype)).to(value.dtype)  # [N, |S| * d_h]
        # V~(h) = X W_V(h) + delta(h): in the values seen as [B * T * H, d_h], head h of token n is row n * H + h
        by_head = value.reshape(-1, d_h)
        self.heads = self.heads.to(rows.device)  # where it stays: it is copied once
        head_rows = (rows[:, None] * H + self.heads).flatten()  # [N * |S|]
        return by_head.index_add(0, head_rows, delta.view(-1, d_h)).view_as(value)

    def _apply(self, fn, recurse=True):  # .half() and .bfloat16() leave it float32, as small steps would be lost
        return super()._apply(partial(_at_least_float32, fn), recurse)


class ImageLoRA(nn.Module):
    """Freezes `model` and adapts the values of visual tokens, scaled by lora_alpha / r and, if normalize, 1/sqrt|S|.

    heads: {layer: [value head, ...]}, None for all; a layer not named gets no adapter. If the model cannot be adapted,
    or an argument is wrong, it raises ValueError and leaves the model as it was. Wrap, merge, quantize and patch (PEFT,
    Liger) first, then attach; under a reward head, attach(model.model). `.parameters()` are A, B and gamma alone,
    float32 or wider; as `model.image_lora` they are in its state_dict. Train A and B at the rate of a LoRA of
    alpha = 2 r or up to eight times as much. Freeze gamma, or give it a tenth of that. Do not checkpoint() a whole call
    inside disabled(): it runs again outside. After Ctrl-C call the whole model once before you run a part of it."""

    def __init__(self, model, r=8, lora_alpha=16, heads=None, normalize=True):
        super().__init__()
        model, decoder, self.head_counts, image_token_ids = _checked_model(model)
        self.heads = _checked_options(decoder, self.head_counts, r, lora_alpha, heads, normalize)
        self.r, self.lora_alpha, self.normalize = r, lora_alpha, normalize
        self.model_name = getattr(model.config, "_name_or_path", type(model).__name__)
        self.layers, adapted = nn.ModuleDict(), {}  # adapted: what the v_proj of a layer will compute
        for layer, selected in self.heads.items():
            attention = decoder[layer].self_attn
            sizes = attention.v_proj.in_features, attention.head_dim, self.head_counts[layer]
            adapter = ValueAdapter(*sizes, selected, r, lora_alpha, normalize, _device(attention.v_proj))
            self.layers[str(layer)] = adapter
            adapted[decoder[layer]] = partial(self._adapt_values, adapter)
        # From here on the model changes; every check is behind us.
        self._visual_rows = VisualRows(model, image_token_ids, adapted)
        self._trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        model.requires_grad_(False)
        model.image_lora = self

    def _adapt_values(self, adapter, v_proj, x, *args, **kwargs):
        """X [B, T, D] -> X W_V -> V~ [B, T, H * d_h]."""
        value = v_proj(x, *args, **kwargs)
        rows = self._visual_rows.take_rows(adapter, x)  # [N], indices into its B * T rows: where M's diagonal is 1
        return value if rows is None else adapter.add_update(x, value, rows)

    def disabled(self):
        """A context in which this thread or coroutine calls the base model; asyncio.to_thread() takes it along."""
        return self._visual_rows.within(disabled=True)

    def visual_mask(self, mask: Tensor):
        """A context in which calls by `inputs_embeds` (not by `input_ids`) go by this mask [B, T], True if visual."""
        _require(mask.dtype == torch.bool and mask.ndim == 2, NO_MASK.format(mask.dtype, mask.shape))
        return self._visual_rows.within(mask=mask)

    def detach(self) -> nn.Module:
        """Restore the original model (hooks, requires_grad) and return it. Raises RuntimeError when called twice."""
        model = self._visual_rows.leave()
        del model.image_lora
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        return model

    def get_extra_state(self):
        """Each head's scale, 0 if not selected: a state_dict of other heads or scales can have the same shapes."""
        scales = torch.zeros(len(self.head_counts), max(self.head_counts), device="cpu")
        for layer, selected in self.heads.items():
            scales[layer, selected] = self.layers[str(layer)].scaling
        return scales

    def set_extra_state(self, scales):
        own = self.get_extra_state()  # the other one may be averaged, or in 16 bits
        _require(scales.shape == own.shape and scales.to(own).allclose(own, rtol=0.01), OTHER_HEADS, RuntimeError)

    def save(self, path):
        """Write the adapter in the layout of the paper's release, atomically; under FSDP2 call it on all ranks."""
        safe_save(_content(self), path)

    def flops(self, num_visual_tokens):
        """FLOPs of the adapter in one training step (forward and backward) over so many visual tokens."""
        A, B, _ = next(iter(self.layers.values())).parameters()
        return image_lora_flops(num_visual_tokens, A.shape[0], B.shape[2], self.heads, self.r)

    def extra_repr(self):
        return f"heads {self.heads} of {self.head_counts} a layer, r={self.r}, lora_alpha={self.lora_alpha}"


attach = ImageLoRA  # adapter = attach(model, ...)


def visual_rows(input_ids: Tensor, image_token_ids) -> Tensor:
    """input_ids [B, T] -> M as indices [N]: which of the B * T rows hold a placeholder of an image or a video."""
    visual = torch.stack([input_ids == image for image in image_token_ids]).any(0)  # M's diagonal, [B, T]
    return visual.flatten().nonzero().squeeze(1)


def score_heads(model, batches, loss_fn=None, probe="rank1", seed=0) -> Tensor:
    """Influence I(l, h) of every value head on the loss, [L, H] float32: one forward and backward pass per batch.

    I(l, h) = ||dL/dB_l(h)||^2 of an Image-LoRA in every head with B = 0, which leaves the model's output unchanged.
    The gradient is dL/dB = A^T X_vis^T G, G being dL/dV~(h) at visual tokens. probe="rank1": r = 1 and A ~ N(0, 1), new
    for each batch. As E[A A^T] = I, the mean of this score is the one of probe="exact": r = D and A = I, the squared
    gradient of the whole W_V(h) over visual tokens. batches: any iterable. The loss is loss_fn(model, batch), or else
    `model(**batch).loss`. Its gradient is squared batch by batch, so single examples can rank heads otherwise than
    large batches; in float16 it can underflow: scale the loss. The model keeps its mode and state. Absent heads: 0."""
    _require(probe in ("rank1", "exact"), f"unknown probe {probe!r}; expected 'rank1' or 'exact'")
    loss_fn = loss_fn or (lambda model, batch: model(**batch).loss)
    D = _checked_model(model)[1][0].self_attn.v_proj.in_features  # of the decoder's first layer
    r = 1 if probe == "rank1" else D
    adapter = attach(model, r, lora_alpha=r, normalize=False)  # the scale in front of A B is 1
    try:
        generator = torch.Generator("cpu").manual_seed(seed)
        scores = torch.zeros(len(adapter.layers), max(adapter.head_counts), dtype=torch.float32, device="cpu")
        count = 0
        for count, batch in enumerate(batches, 1):
            for a in adapter.layers.values():
                A = scores.new_zeros(D, r)
                A = A.normal_(generator=generator) if probe == "rank1" else A.fill_diagonal_(1)
                a.A.requires_grad_(False).copy_(A)
            with torch.enable_grad():
                loss = loss_fn(model, batch)
            _require(isinstance(loss, Tensor) and loss.isfinite().all(), NO_LOSS.format(count - 1, loss))
            adapter.zero_grad()
            loss.backward()
            for layer, a in enumerate(adapter.layers.values()):
                if a.B.grad is None:
                    continue  # the loss is of a lower layer
                # I(l, h) = ||dL/dB_l(h)||^2
                gradient = a.B.grad.float()  # [H, r, d_h]
                scores[layer, : a.num_kv_heads] += gradient.square().sum((1, 2)).cpu()
    finally:
        adapter.detach()
    _require(scores.any(), f"the {count} probe batches hold no visual token that their losses depend on")
    return scores / count


def select_heads(scores, num_heads, tau=0.5) -> Heads:
    """{layer: heads}, `num_heads` in all: layer l gets its k_l best, with k_l ∝ (sum_h I(l, h))^tau. scores [L, H].

    tau=0 spreads them evenly, a large one fills the best layers first; 0.5 is the authors'. All layers have H heads."""
    _check_selection(scores, num_heads, tau)
    influence = scores.double().sum(1)  # of each layer
    weights = (influence / influence.max().clamp(min=1e-300)).pow(tau).clamp(min=1e-300)  # nothing over- or underflows
    budget = torch.zeros_like(weights, dtype=torch.long)
    for _ in range(num_heads):  # to the layer of the largest quotient, as parliaments share out seats (Sainte-Lague)
        quotient = weights / (2 * budget + 1)
        budget[quotient.where(budget < scores.shape[1], 0).argmax()] += 1
    order = scores.argsort(dim=1, descending=True, stable=True).tolist()
    return {layer: sorted(order[layer][:k]) for layer, k in enumerate(budget.tolist()) if k}


def lora_flops(num_tokens, in_features, out_features, r, input_grad=True):
    """Training FLOPs of LoRA on one Linear, 2 m n k a product; input_grad: whether its input needs a gradient."""
    z = dA = dx = 2 * num_tokens * r * in_features  # FLOPs of each: z = x A, and its two products back
    y = dB = dz = 2 * num_tokens * r * out_features  # of y = z B, likewise
    return z + y + dB + dz + dA + dx * input_grad


def image_lora_flops(num_visual_tokens, hidden_size, head_dim, heads, r, input_grad=False):
    """Training FLOPs of a whole Image-LoRA; input_grad: whether its lowest layer's input needs a gradient."""
    flops = 0
    for selected in filter(None, heads.values()):
        flops += lora_flops(num_visual_tokens, hidden_size, len(selected) * head_dim, r, input_grad)
        input_grad = True
    return flops


# ------ That is all that Image-LoRA computes. Below: how M finds its way; what is refused; how files are written ------

CONTEXTS = ContextVar("CONTEXTS")  # this thread's or coroutine's {VisualRows: {"disabled": True, "mask": ...}}
NO_ROWS = torch.zeros(0, dtype=torch.long, device="cpu")


class VisualRows:
    """How M finds its way: the visual rows of X, in each layer of each call of the model. Three steps:

        model(input_ids)             begin_call     finds the rows of the call
        a layer's input_layernorm    enter_layer    finds the rows of the layer, by its input X
        its v_proj                   take_rows      takes them; where another norm has run there are none

    While a call runs in this thread, its rows are its layers' rows. If a gradient is wanted, they are noted on the
    storage of X, and another note there is an error. While none runs, only gradient checkpointing may run a layer:
    again, in a backward pass, maybe in another thread, maybe after other calls. Then the note tells; without one it is
    refused. Views of X, X.detach() and what autograd saves share its storage, whose Python attributes live as long.
    A call is idle if it has no rows, as it is of text or disabled(), and if no gradient is wanted: then the steps do
    nothing. If one is wanted they run, as the gradients of a text are zero, not missing.

    The norm stands in for X: transformers 5 checkpoints a layer inside its hooks, so they do not run again; its norm
    does. Forwards are replaced, as compiled code may skip hooks, and hooks cost more. The model has hooks, as others
    (accelerate) put forwards back, and a call without M would go unnoticed. torch.compile can trace neither a storage
    nor a thread: where it comes upon a step, this runs out of its sight."""

    def __init__(self, model, image_token_ids, adapted):
        """adapted: {decoder layer: what its v_proj is to compute, a function of v_proj and its arguments}."""
        torch.compiler.reset()  # what is compiled already would go on without M
        self.model, self.image_token_ids, self.num_adapted = model, image_token_ids, len(adapted)
        self.now, self.wrapped = ThisThread(), {}
        self.hooks = [model.register_forward_pre_hook(self.begin_call, with_kwargs=True)]
        self.hooks += [model.register_forward_hook(self.end_call, always_call=True)]
        for layer, adapt_values in adapted.items():
            norm = getattr(layer, "input_layernorm", layer.self_attn)
            for module, step in ((norm, self.enter_layer), (layer.self_attn.v_proj, adapt_values)):
                module.without_image_lora = vars(module).get("forward")  # None: its class's
                self.wrapped[module] = module.forward = partial(step, module.forward)

    def begin_call(self, model, args, kwargs):
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self.begin_call)(model, args, kwargs)
        _require(not torch.jit.is_tracing(), TRACED, RuntimeError)
        within = CONTEXTS.get({}).get(self, {})
        ids = kwargs.get("input_ids", args[0] if args else None)
        rows, shape = NO_ROWS, None
        if "disabled" in within:
            pass
        elif ids is None or ids.is_floating_point():  # a first argument of floats is embeddings
            _require(kwargs.get("inputs_embeds") is not None and "mask" in within, UNKNOWN)
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"].clone()  # the note is not for the caller's memory
            rows, shape = visual_rows(within["mask"], {True}), within["mask"].shape
        elif ids.shape[-1] > 1 or not self.image_token_ids.isdisjoint(ids.flatten().tolist()):  # else it decodes text
            rows, shape = visual_rows(ids, self.image_token_ids), ids.shape
        now = self.now
        now.rows, now.shape = rows, shape
        now.grad, now.updated = torch.is_grad_enabled(), set()
        now.idle = not (len(rows) or now.grad)
        return args, kwargs

    def enter_layer(self, norm, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self.enter_layer)(norm, *args, **kwargs)
        now = self.now
        if now.idle and not torch.is_grad_enabled():
            return norm(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]  # [B, T, D]
        memory = x.untyped_storage()
        noted_rows, noted_shape = getattr(memory, "image_lora_note", (None, None))
        now.layer_rows = now.rows
        if now.rows is None:
            now.layer_rows = noted_rows if noted_shape == x.shape else None  # in a part of X the rows are others
        elif now.grad or torch.is_grad_enabled():  # on in the call, off in here: in a re-entrant checkpoint
            _require(x.requires_grad or torch.is_grad_enabled(), NO_GRADIENT, RuntimeError)
            _require(noted_rows is None or noted_rows.to(now.rows).equal(now.rows), REUSED, RuntimeError)
            memory.image_lora_note = now.rows, x.shape
        return norm(*args, **kwargs)

    def take_rows(self, adapter, x):
        """The visual ones [N] of the B * T rows of v_proj's input X [B, T, D]; None where nothing is to be added."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self.take_rows)(adapter, x)
        now = self.now
        if self.model is None or now.idle and not torch.is_grad_enabled():
            return None  # without a model: it is detached, but others have wrapped v_proj since
        rows, now.layer_rows = now.layer_rows, None
        _require(rows is not None, ALONE if now.rows is None else REPLACED, RuntimeError)
        if now.rows is not None and len(rows):
            _require(now.shape == x.shape[:-1], MISSHAPED.format(now.shape, x.shape[:-1]), RuntimeError)
            now.updated.add(adapter)
        return rows.to(x.device)

    def end_call(self, model, args, output):
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self.end_call)(model, args, output)
        now = self.now
        complete = output is None or not len(now.rows) or len(now.updated) == self.num_adapted  # None: it has failed
        now.idle = False
        now.rows = now.layer_rows = None
        _require(complete, REPLACED, RuntimeError)

    @contextmanager
    def within(self, **changes):
        """In this thread or coroutine calls begin with these changes: disabled, or with another mask."""
        _require(self.model is not None, DETACHED, RuntimeError)
        before = CONTEXTS.get({})
        entered = CONTEXTS.set(before | {self: before.get(self, {}) | changes})
        try:
            yield
        finally:
            CONTEXTS.reset(entered)

    def leave(self):
        _require(self.model is not None, "this Image-LoRA is already detached", RuntimeError)
        for hook in self.hooks:
            hook.remove()
        for module, ours in self.wrapped.items():
            before = vars(module).pop("without_image_lora")
            if module.forward is ours:  # else others have wrapped it since, and it passes through
                del module.forward
                if before is not None:
                    module.forward = before
        model, self.model = self.model, None
        return model


class ThisThread(threading.local):  # its call of the model, which begin_call describes
    idle = False  # whether it has neither rows nor a gradient to wait for
    rows = None  # [N], the visual ones of its B * T; None: no call is running
    layer_rows = None  # [N], from a layer's norm to its v_proj

    def __reduce__(self):
        return ThisThread, ()  # a copy of the model begins anew


def _require(holds, sentence, error=ValueError):
    if not holds:
        raise error(sentence)


UNKNOWN = "which tokens are visual? pass input_ids by name, or inputs_embeds inside adapter.visual_mask(mask)"
NO_MASK = "the visual mask must be a bool tensor [B, T], got {} {}"
MISSHAPED = "input_ids or mask tell of tokens {}, v_proj got {}; for beams, mask.repeat_interleave(num_beams, 0)"
ALONE = "v_proj ran outside of model(...): by model.forward(), alone, or in a checkpoint of several layers or of a copy"
TRACED = "torch.jit.trace would fix which tokens are visual; so would an ONNX export by it"
REUSED = "a layer's input lies in the memory of another call's, which has other visual tokens: clone() it"
REPLACED = "an adapted v_proj or its input_layernorm was not called: apply what replaces them (Liger, merging) first"
NO_GRADIENT = "no gradient reaches the adapter: re-entrant checkpointing needs model.enable_input_require_grads()"
UNTRAINED = "the adapter is frozen and B still zero, as if untrained: did get_peft_model() come after attach()?"
DETACHED = "this Image-LoRA is detached; use the one that load() or attach() returned"
OTHER_HEADS = "the state_dict is of an Image-LoRA in other layers or heads, or of another scale; attach it so"
NO_LOSS = "the loss of probe batch {} is {}: do its labels hold an answer?"
SPLIT = "v_proj gave {} features, not {} heads of {}: are heads split over devices?"


def _checked_model(model):
    """The model, out of its wrappers, its decoder's layers, how many value heads each has, the ids of visual tokens."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's and PEFT's wrappers call the model inside them
    model = getattr(model, "get_base_model", lambda: model)()
    encoders = ("vision", "visual", "audio", "img", "image", "video", "perceiver")
    stacks = {}
    for name, module in model.named_modules():
        *path, last = name.split(".")
        encoder = any(part.startswith(encoders) for part in path)
        if last == "layers" and isinstance(module, nn.ModuleList) and not encoder:
            stacks[name] = module
    found = ", ".join(stacks) or "none"
    _require(len(stacks) == 1, f"expected one stack of decoder layers besides the vision tower, found {found}")
    decoder, head_counts = stacks[found], []
    for i, layer in enumerate(decoder):
        attention = getattr(layer, "self_attn", layer)
        parts = [part for part, _ in attention.named_children()]
        why = "cross-attention to images, a hybrid's other layers, fused qkv and latent values cannot be adapted"
        _require("v_proj" in parts, f"{found}.{i} has no self_attn.v_proj but {', '.join(parts)}: {why}")
        later = [part for part in parts if part.startswith("v_") and part != "v_proj"]
        _require(not later, f"{found}.{i} changes its values after v_proj, in {later}; they cannot be adapted")
        d_h, features = attention.head_dim, attention.v_proj.out_features
        _require(features % d_h == 0, f"{found}.{i}.self_attn.head_dim is {d_h}, v_proj has {features} features")
        head_counts.append(features // d_h)
        attached = hasattr(attention.v_proj, "without_image_lora")
        _require(not attached, "the model already has an Image-LoRA; call its detach() first")
    v_projs = {layer.self_attn.v_proj for layer in decoder}
    _require(len(v_projs) == len(decoder), "layers share a v_proj; they cannot be adapted")
    config = getattr(model, "config", None)  # DistributedDataParallel and the like have none
    names = "image_token_id", "image_token_index", "video_token_id", "video_token_index"
    ids = {getattr(config, name, None) for name in names} - {None}
    _require(ids, "model.config has no image_token_id to tell visual tokens by; attach to the whole VLM, unwrapped")
    return model, decoder, head_counts, ids


def _checked_options(decoder, head_counts, r, lora_alpha, heads, normalize):
    """The heads, sorted; or ValueError."""
    D = min(layer.self_attn.v_proj.in_features for layer in decoder)
    _require(type(r) is int and 1 <= r <= D, f"r must be an integer in 1..{D}, got {r!r}")
    valid = type(lora_alpha) in (int, float) and 0 < lora_alpha <= 1e9
    _require(valid, f"lora_alpha must be a number above 0 and up to 1e9, got {lora_alpha!r}")
    _require(type(normalize) is bool, f"normalize must be True or False, got {normalize!r}")
    existing = dict(enumerate(map(range, head_counts)))
    heads = existing if heads is None else heads
    _require(isinstance(heads, dict), f"heads must be {{layer: [value head, ...]}}, got {heads!r}")
    for layer, selected in heads.items():
        wrong = f"layer {layer!r} of 0..{len(decoder) - 1} has no such heads, or not as integers named once: {selected}"
        listed = isinstance(selected, (list, tuple, range)) and {type(n) for n in (layer, *selected)} == {int}
        _require(listed and len(set(selected) & set(existing.get(layer, ()))) == len(selected), wrong)
    heads = {layer: sorted(heads[layer]) for layer in sorted(heads) if heads[layer]}
    _require(heads, "no head is selected; name at least one")
    return heads


def _at_least_float32(fn, tensor):
    new = fn(tensor)
    return tensor.to(new.device) if new.element_size() < 4 else new


def _device(v_proj):
    tensors = [*v_proj.parameters(), *v_proj.buffers(), torch.empty(0)]  # a quantized one may have no weight
    return getattr(getattr(v_proj, "_hf_hook", None), "execution_device", tensors[0].device)  # where accelerate runs it


def _check_selection(scores, num_heads, tau):
    valid = scores.ndim == 2 and scores.isfinite().all() and (scores >= 0).all()
    _require(valid, f"scores must be finite, not negative and [layers, heads], got {scores.shape}")
    valid = type(num_heads) is int and 1 <= num_heads <= scores.numel()
    _require(valid, f"num_heads must be an integer in 1..{scores.numel()}, got {num_heads!r}")
    _require(type(tau) in (int, float) and 0 <= tau <= 1e9, f"tau must be a number in 0..1e9, got {tau!r}")


def safe_write(data, path):
    """Writes a file beside `path`, then moves it into place: a killed write leaves the old file."""
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def safe_save(content, path):
    torch.save(content, buffer := io.BytesIO())  # not to the disk: where that is full, torch.save raises no OSError
    safe_write(buffer.getbuffer(), path)


def safe_load(path):
    """`torch.load` that runs nothing from the file, and sees only what its checksums confirm. Raises ValueError."""
    try:
        checked = io.BytesIO()
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as copy:
            for name in archive.namelist():
                copy.writestr(name, archive.read(name))  # torch.load itself would not notice a flipped bit
        checked.seek(0)
        content = torch.load(checked, map_location="cpu", weights_only=True)
        _require(isinstance(content, dict), f"it holds a {type(content).__name__}")
        return content
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise ValueError(f"{path} is missing, damaged or not a PyTorch file ({reason})") from None


def _content(adapter):
    layers = {layer: {} for layer in adapter.layers}
    for name, tensor in adapter.layers.state_dict().items():  # parameters() may be FSDP's copies in bfloat16
        layer, kind = name.split(".")
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP: all shards
        _require(tensor.numel() and tensor.isfinite().all(), f"{kind} of layer {layer} is empty or not finite: unsaved")
        layers[layer][kind] = tensor.cpu()[0 if kind == "gamma" else ...]
    Bs = [a.B for a in adapter.layers.values()]
    _require(any(B.requires_grad or B.any() for B in Bs), UNTRAINED)
    return {
        "model_name": adapter.model_name,
        "r": adapter.r,
        "alpha": float(adapter.lora_alpha),
        "kv_indices": {str(layer): heads for layer, heads in adapter.heads.items()},
        "layers": layers,
        "normalize": adapter.normalize,  # this and the next are keys of ours
        "head_counts": adapter.head_counts,
    }


def load(model, path) -> ImageLoRA:
    """Attach a file's adapter, ours or the authors', trainable. ValueError, the model untouched, if it does not fit."""
    content, adapter = safe_load(path), None
    try:
        heads = {int(layer): selected for layer, selected in content["kv_indices"].items()}
        adapter = attach(model, content["r"], content["alpha"], heads, content.get("normalize", True))
        counts = content.get("head_counts", adapter.head_counts)  # like normalize, not in the authors' files
        _require(counts == adapter.head_counts, f"its layers have {counts} value heads, not {adapter.head_counts}")
        state = {}
        for layer, saved in content["layers"].items():
            order = torch.tensor(heads[int(layer)], device="cpu").argsort()  # the file's own; ours is sorted
            _require(len(saved["B"]) == len(order), f"layer {layer} names {len(order)} heads for {len(saved['B'])}")
            saved = saved | {"B": saved["B"][order], "gamma": saved["gamma"].reshape(1)}
            for name, tensor in saved.items():
                finite = tensor.is_floating_point() and tensor.float().isfinite().all()
                _require(finite, f"{name} of layer {layer} does not hold finite floats")
                state[f"{layer}.{name}"] = tensor
        adapter.layers.load_state_dict(state)
        return adapter
    except Exception as error:
        if adapter:
            adapter.detach()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{path} does not fit this model ({reason})") from None
