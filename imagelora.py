"""Image-LoRA: low-rank updates of the attention values of visual tokens, in selected heads (arXiv 2512.19219).

    V~(h) = X W_V(h) + gamma * (alpha / r) * 1/sqrt|S| * M X A B(h)    for each selected head h of a layer (section 3)

X is the input of the layer's v_proj, and W_V is its frozen weight. S is the set of selected heads. M = diag(1[token is
visual]) keeps the rows of visual tokens and sets all others to zero. For the same X, the queries, the keys, the values
of text tokens and those of other heads stay what they were. Without an image the output is the base model's, exactly.

    scores = score_heads(model, batches)                       # how much each value head could help
    adapter = attach(model, heads=select_heads(scores, 16))    # adapt the best 16; then train adapter.parameters()
    adapter.save("adapter.pt")
    adapter = load(another_model, "adapter.pt")                # later, on a fresh copy of the model

A worked example. There are three tokens with two features each, and token 1 is visual. There are two heads of size 1,
head 1 is adapted, and the scale is 1. So x_vis A = [3, 4] [1, 2]^T = 11, and times B(1) = 0.1 this is 1.1. It is added
to the value of token 1 in head 1, and nowhere else:

    >>> adapter = ValueAdapter(hidden_size=2, head_dim=1, num_kv_heads=2, heads=[1], r=1, lora_alpha=1)
    >>> _ = adapter.A.data.copy_(torch.tensor([[1.0], [2.0]]))
    >>> _ = adapter.B.data.fill_(0.1)
    >>> x = torch.tensor([[[1.0, 1.0], [3.0, 4.0], [5.0, 5.0]]])    # one sequence, T = 3, D = 2
    >>> value = torch.zeros(1, 3, 2)                                # what v_proj made of x: H * d_h = 2
    >>> adapter.add_update(x, value, rows=torch.tensor([1])).tolist()
    [[[0.0, 0.0], [0.0, 1.100000023841858], [0.0, 0.0]]]

Shapes: B sequences (the matrix B is LoRA's), T tokens in each, N visual tokens in the batch, D hidden size, H value
heads of a layer (the KV heads under grouped-query attention), d_h their size, |S| selected heads, r rank, L layers.
"""

import io
import os
import zipfile
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from pathlib import Path
from threading import get_ident
from typing import NamedTuple

import torch
from torch import Tensor, nn

Heads = dict[int, list[int]]  # {layer: [value head, ...]}


class ValueAdapter(nn.Module):
    """The update of one layer: gamma * (alpha / r) * 1/sqrt|S| * x A B(h) for its selected heads h."""

    def __init__(self, hidden_size, head_dim, num_kv_heads, heads, r, lora_alpha, normalize=True, device=None):
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.scaling = lora_alpha / r
        if normalize:
            self.scaling /= len(heads) ** 0.5
        # S, [|S|]. Not a buffer, because to_empty() would leave it uninitialized.
        self.heads = torch.tensor(heads, device="cpu")
        # A is uniform in +-1/sqrt(D), as in PEFT's LoRA. Drawn on the CPU, so that a seed gives the same A everywhere.
        A = torch.empty(hidden_size, r, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(A.T, a=5**0.5)
        # B starts at zero, so training starts at the base model.
        B = torch.zeros(len(heads), r, head_dim, dtype=torch.float32, device=device)
        self.A = nn.Parameter(A.to(B.device))  # [D, r], shared by the selected heads: it reads a token once for all
        self.B = nn.Parameter(B)  # [|S|, r, d_h], one for each: it writes what this head passes on
        # Starts at 1, because a small gamma would shrink the effect of every step of B. FSDP cannot shard a scalar.
        self.gamma = nn.Parameter(B.new_ones(1))

    def forward(self, x_vis: Tensor) -> Tensor:
        """Inputs of visual tokens [N, D] -> their updates in the selected heads [N, |S| * d_h]."""
        # z = x A, which the selected heads share. BLAS is several times faster on a contiguous A^T [r, D].
        z = nn.functional.linear(x_vis, self.A.T.contiguous())  # [N, r]
        # gamma * (alpha / r) * 1/sqrt|S| * z B(h), for all h in S at once
        B = self.gamma * self.scaling * self.B  # [|S|, r, d_h]
        return z @ B.transpose(0, 1).flatten(1)  # [N, r] @ [r, |S| * d_h]

    def add_update(self, x: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        """X [B, T, D] and X W_V [B, T, H * d_h] -> V~ [B, T, H * d_h]; rows [N] says which of the B * T are visual.

        M X is a gather of these rows, so nothing is computed for text tokens. If no row is visual, the values stay as
        they are, and gradients are zero rather than None: data-parallel training waits for all of them."""
        H, d_h = self.num_kv_heads, self.B.shape[2]
        if value.shape[-1] != H * d_h:
            got = f"v_proj gave {value.shape[-1]} features instead of {H} heads of {d_h}"
            raise RuntimeError(f"{got}; if tensor parallelism splits the heads over devices, use FSDP instead")
        # M X without its zero rows
        x_vis = x.flatten(0, -2).index_select(0, rows)  # [N, D]
        delta = self(x_vis.to(self.A.dtype)).to(value.dtype)  # [N, |S| * d_h]
        # V~(h) = X W_V(h) + delta(h). Seen as [B * T * H, d_h], head h of token n is row n * H + h of the values.
        self.heads = self.heads.to(rows.device)  # kept there, so that it is copied only once
        head_rows = (rows[:, None] * H + self.heads).flatten()  # [N * |S|]
        by_head = value.reshape(-1, d_h)  # [B * T * H, d_h]
        return by_head.index_add(0, head_rows, delta.view(-1, d_h)).view_as(value)

    def _apply(self, fn, recurse=True):
        # .half() and .bfloat16() leave the adapter in float32, because in 16 bits small steps would round to nothing.
        return super()._apply(partial(_at_least_float32, fn), recurse)


class ImageLoRA(nn.Module):
    """Freezes `model` and adapts the values of visual tokens in these heads; `attach` is another name for it.

    r, lora_alpha: rank and alpha of LoRA; the update is scaled by lora_alpha / r and, with normalize, by 1/sqrt|S|.
    heads: {layer: [value head, ...]}; None means all heads. A layer that is not named gets no adapter.
    train_gamma: whether gamma is trained. With False it stays 1.

    `.parameters()` are A, B and gamma of the adapted layers, float32 or wider. The adapter becomes `model.image_lora`,
    so they are in the model's state_dict, too. Raises ValueError, and leaves the model alone, if this is impossible."""

    def __init__(self, model, r=8, lora_alpha=16, heads=None, normalize=True, train_gamma=True):
        super().__init__()
        model, decoder, image_token_ids = _checked_model(model)
        self.head_counts = [layer.self_attn.v_proj.out_features // layer.self_attn.head_dim for layer in decoder]
        _check_options(decoder, r, lora_alpha, normalize, train_gamma)
        self.heads = _checked_heads(heads, self.head_counts)
        self.r, self.lora_alpha, self.normalize = r, lora_alpha, normalize
        self.model_name = getattr(model.config, "_name_or_path", type(model).__name__)
        self.layers = nn.ModuleDict()
        adapted = {}  # {decoder layer: its ValueAdapter}
        for layer, selected in self.heads.items():
            attention = decoder[layer].self_attn
            sizes = attention.v_proj.in_features, attention.head_dim, self.head_counts[layer]
            adapter = ValueAdapter(*sizes, selected, r, lora_alpha, normalize, _device(attention.v_proj))
            adapter.gamma.requires_grad_(train_gamma)
            self.layers[str(layer)] = adapter
            adapted[decoder[layer]] = adapter
        # Only now does the model change. When it is called, Calls finds the visual_rows, and adapters add_update.
        self._calls = Calls(model, image_token_ids, adapted)
        self._requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(False)  # before the next line, which makes the adapter a part of the model
        model.image_lora = self

    def disabled(self):
        """A context in which the model is the base model again, for this thread or coroutine."""
        return self._calls.override(disabled=True)

    def visual_mask(self, mask: Tensor):
        """A context in which calls with inputs_embeds take M from this bool mask [B, T], True where it is visual."""
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise ValueError(f"the visual mask must be a bool tensor [B, T], got {mask.dtype} {list(mask.shape)}")
        return self._calls.override(mask=mask)

    def detach(self) -> nn.Module:
        """Take the adapter off, and return the model as it was. Call backward() before, not after."""
        model = self._calls.leave()
        del model.image_lora
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))
        return model

    def save(self, path):
        """Write the adapter in the file layout of the authors' release. Under FSDP2, call it on every rank."""
        safe_save(_file_content(self), path)

    def flops(self, num_visual_tokens):
        """FLOPs of the adapter in one training step (forward and backward) over this many visual tokens."""
        A, B, _ = next(iter(self.layers.values())).parameters()
        return image_lora_flops(num_visual_tokens, A.shape[0], B.shape[2], self.heads, self.r)

    def extra_repr(self):
        return f"heads {self.heads} of {self.head_counts} a layer, r={self.r}, lora_alpha={self.lora_alpha}"

    def get_extra_state(self):
        return _scale_of_each_head(self)  # lets load_state_dict refuse other heads, whose tensors can have these shapes

    def set_extra_state(self, scales):
        _check_scales(self, scales)

    # Accelerate puts a model on the meta device, and then takes each entry of its state_dict for a tensor to shard.
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if any(parameter.is_meta for parameter in self.parameters()):
            del destination[f"{prefix}_extra_state"]

    def _load_from_state_dict(self, state_dict, prefix, *others):
        if any(parameter.is_meta for parameter in self.parameters()):
            state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *others)


attach = ImageLoRA  # adapter = attach(model, ...)


def visual_rows(input_ids: Tensor, image_token_ids) -> Tensor:
    """input_ids [B, T] -> M as indices [N]: which of the B * T rows hold a placeholder of an image or a video."""
    visual = torch.stack([input_ids == token_id for token_id in image_token_ids]).any(0)  # the diagonal of M, [B, T]
    return visual.flatten().nonzero().squeeze(1)


def score_heads(model, batches, loss_fn=None, probe="rank1", seed=0) -> Tensor:
    """How much each value head could lower the loss: its influence I(l, h), [L, H] float32 (section 3).

    An Image-LoRA in every head with B = 0 leaves the output as it is, and I(l, h) = ||dL/dB_l(h)||^2. That gradient is
    dL/dB = A^T X_vis^T G, where G is dL/dV~(h) at visual tokens.
    probe="rank1": r = 1 and A ~ N(0, I), new for each batch. Its mean over A is the exact score, as E[A A^T] = I.
    probe="exact": r = D and A = I: the squared norm of the gradient of the whole W_V(h) over visual tokens.
    batches: any iterable; each costs a forward and a backward pass. The loss is loss_fn(model, batch), by default
    `model(**batch).loss`. Scores are averaged over batches, and small batches can rank heads differently from large
    ones. In float16, let loss_fn scale the loss, as gradients can underflow. Where a layer has fewer heads than others,
    the rest of its row is 0. ValueError if a loss is not finite, or if none depends on a visual token."""
    if probe not in ("rank1", "exact"):
        raise ValueError(f"probe must be 'rank1' or 'exact', got {probe!r}")
    loss_fn = loss_fn or (lambda model, batch: model(**batch).loss)
    _, decoder, _ = _checked_model(model)
    D = decoder[0].self_attn.v_proj.in_features
    r = 1 if probe == "rank1" else D
    adapter = attach(model, r, lora_alpha=r, normalize=False)  # so that the scale in front of A B is 1
    generator = torch.Generator("cpu").manual_seed(seed)
    scores = torch.zeros(len(adapter.layers), max(adapter.head_counts), dtype=torch.float32, device="cpu")  # [L, H]
    count = 0
    try:
        for batch in batches:
            for layer in adapter.layers.values():
                A = scores.new_zeros(D, r)
                A = A.normal_(generator=generator) if probe == "rank1" else A.fill_diagonal_(1)
                layer.A.requires_grad_(False).copy_(A)
            with torch.enable_grad():
                loss = loss_fn(model, batch)
            if not isinstance(loss, Tensor) or not loss.isfinite().all():
                raise ValueError(f"the loss of probe batch {count} is {loss}; check that its labels hold an answer")
            adapter.zero_grad()
            loss.backward()
            for i, layer in enumerate(adapter.layers.values()):
                if layer.B.grad is None:  # the loss was taken from a lower layer
                    continue
                # I(l, h) = ||dL/dB_l(h)||^2
                gradient = layer.B.grad.float()  # [H, r, d_h]
                scores[i, : layer.num_kv_heads] += gradient.square().sum((1, 2)).cpu()
            count += 1
    finally:
        adapter.detach()
    if not scores.any():
        none = f"in none of the {count} probe batches does the loss depend on a visual token"
        raise ValueError(f"{none}; check that they hold images, and that their labels hold answers")
    return scores / count


def select_heads(scores, num_heads, tau=0.5) -> Heads:
    """The most influential heads, num_heads in all: {layer: [value head, ...]}.

    Layer l gets its k_l best heads, with k_l in proportion to (sum_h I(l, h))^tau and at most H; scores are [L, H].
    tau = 0 spreads the heads evenly over layers, a large tau fills the best layers first, and 0.5 is the authors'.
    Raises ValueError if an argument is out of range."""
    if scores.ndim != 2 or not scores.isfinite().all() or (scores < 0).any():
        raise ValueError(f"scores must be finite, not negative, and [layers, heads], got shape {list(scores.shape)}")
    if type(num_heads) is not int or not 1 <= num_heads <= scores.numel():
        raise ValueError(f"num_heads must be an integer in 1..{scores.numel()}, got {num_heads!r}")
    if type(tau) not in (int, float) or not 0 <= tau <= 1e9:
        raise ValueError(f"tau must be a number from 0 to 1e9, got {tau!r}")
    influence = scores.double().sum(1)  # of each layer, [L]
    # Scaled to at most 1 and kept above 0, so that no power overflows or vanishes:
    weights = (influence / influence.max().clamp(min=1e-300)).pow(tau).clamp(min=1e-300)
    budget = torch.zeros_like(weights, dtype=torch.long)  # k_l
    for _ in range(num_heads):
        # Give out one head at a time, as Sainte-Lague's method does with seats, so that they add up to num_heads.
        quotient = weights / (2 * budget + 1)
        budget[quotient.where(budget < scores.shape[1], 0).argmax()] += 1
    best_first = scores.argsort(dim=1, descending=True, stable=True).tolist()
    return {layer: sorted(best_first[layer][:k]) for layer, k in enumerate(budget.tolist()) if k > 0}


# ------ That is the method. Below: what it costs, how M reaches the layers, what is refused, what is saved ------------


def lora_flops(num_tokens, in_features, out_features, r, input_grad=True):
    """FLOPs of LoRA on one Linear in a training step; a product of m x n and n x k counts 2 m n k.

    input_grad: whether the input of this Linear needs a gradient."""
    z = dA = dx = 2 * num_tokens * r * in_features  # forward z = x A, backward dA and dx
    y = dB = dz = 2 * num_tokens * r * out_features  # forward y = z B, backward dB and dz
    return z + y + dB + dz + dA + dx * input_grad


def image_lora_flops(num_visual_tokens, hidden_size, head_dim, heads, r, input_grad=False):
    """FLOPs of a whole Image-LoRA in a training step over this many visual tokens.

    input_grad: whether the input of the lowest adapted layer needs a gradient. That of the others always does."""
    flops = 0
    for selected in heads.values():
        if selected:
            flops += lora_flops(num_visual_tokens, hidden_size, len(selected) * head_dim, r, input_grad)
            input_grad = True
    return flops


# ------ How M reaches the layers --------------------------------------------------------------------------------------

OVERRIDES = ContextVar("OVERRIDES", default=())  # of this thread or coroutine: ((Calls, {"disabled": True}), ...)
NO_ROWS = torch.zeros(0, dtype=torch.long, device="cpu")
NORMS = "input_layernorm", "attention_layernorm", "operator_norm"  # what models call the norm before their attention


class Call(NamedTuple):
    """What the layers need to know about one call of the model."""

    rows: Tensor  # [N], which of the B * T rows are visual
    shape: tuple | None  # (B, T)
    grad_enabled: bool  # when it began, so a backward pass may follow
    updated: set  # the adapters that have run in this call


def hidden_from_compiler(step):
    """Lets torch.compile run this method as it is: the compiler can trace neither a storage nor a thread."""

    @wraps(step)
    def run(*args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(step)(*args, **kwargs)
        return step(*args, **kwargs)

    return run


def refuse_export(model, args) -> None:
    if hasattr(torch.compiler, "is_exporting"):
        exporting = torch.compiler.is_exporting()
    else:  # torch 2.4
        exporting = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    if exporting or torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace, torch.export and ONNX export would fix which tokens are visual")


class Calls:
    """Tells each adapted layer which rows of its input X are visual, whenever the model is called.

    The layers never see input_ids, so four hooks pass on what the model was called with:

        before model(...)          begin_call   finds the visual rows, and keeps the Call for this thread
        after a layer's norm       enter_layer  attaches the Call to the storage of what the norm read and wrote
        after the layer's v_proj   adapt        looks the Call up, and adds the update at its rows
        after model(...)           end_call     forgets the Call, once every adapted layer has used it

    Why to a storage? Gradient checkpointing runs a layer a second time, in the backward pass: after its call has
    ended, perhaps in another thread, perhaps after other calls. But it runs on the same input, and so the Call is found
    there. input.detach() and what autograd saves are new tensors, yet they share the storage of the input, and an
    attribute of a storage lives as long as the storage does. Why at the norm? It reads the layer's input and writes
    what v_proj will read. A hook of the layer itself would not do, because transformers 5 runs a layer again without
    the layer's own hooks."""

    def __init__(self, model, image_token_ids, adapted):
        """adapted: {decoder layer: its ValueAdapter}."""
        torch.compiler.reset()  # code that was compiled before would run on without the hooks
        self.model, self.image_token_ids = model, image_token_ids
        self.v_projs = [layer.self_attn.v_proj for layer in adapted]
        self.running = {}  # {thread: its Call}
        self.hooks = [model.register_forward_pre_hook(refuse_export)]
        self.hooks += [model.register_forward_pre_hook(self.begin_call, with_kwargs=True)]
        self.hooks += [model.register_forward_hook(self.end_call, always_call=True)]
        for layer in adapted:
            for name, module in layer.named_children():
                if name in NORMS:  # the one before the attention
                    self.hooks += [module.register_forward_hook(self.enter_layer, with_kwargs=True)]
        for v_proj, adapter in zip(self.v_projs, adapted.values()):
            v_proj.has_image_lora = True
            self.hooks += [v_proj.register_forward_hook(partial(self.adapt, adapter), with_kwargs=True)]

    @hidden_from_compiler
    def begin_call(self, model, args, kwargs):
        overrides = {}
        for calls, changes in OVERRIDES.get():
            if calls is self:
                overrides |= changes
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is not None:
            # Cloned, because we leave the Call on this memory, and the caller may use it again with another mask.
            kwargs["inputs_embeds"] = embeddings.clone()
        if "disabled" in overrides:
            rows, shape = NO_ROWS, None
        elif isinstance(ids, Tensor) and not ids.is_floating_point():  # floats as the first argument are embeddings
            rows, shape = visual_rows(ids, self.image_token_ids), ids.shape
        elif "mask" in overrides and embeddings is not None:
            rows, shape = visual_rows(overrides["mask"], {True}), overrides["mask"].shape
        else:
            known = "pass input_ids by name, or inputs_embeds by name inside adapter.visual_mask(mask)"
            raise ValueError(f"the model was called without telling which tokens are visual; {known}")
        self.running[get_ident()] = Call(rows, shape, torch.is_grad_enabled(), set())
        return args, kwargs

    @hidden_from_compiler
    def enter_layer(self, norm, args, kwargs, output):
        x = args[0] if args else next(iter(kwargs.values()))
        call = self.call_of(x)
        if call is not None and call.grad_enabled:
            output.untyped_storage().image_lora_call = call  # this is what v_proj will read

    @hidden_from_compiler
    def adapt(self, adapter, v_proj, args, kwargs, value):
        """X [B, T, D] and X W_V [B, T, H * d_h] -> V~ [B, T, H * d_h]."""
        x = args[0] if args else next(iter(kwargs.values()))
        call = self.call_of(x)
        if call is None:
            raise RuntimeError(
                "no call of model(...) is known to which this v_proj belongs. Either model.forward(), a layer or "
                "v_proj was called instead of model(...), or a gradient checkpoint holds several layers instead of "
                "one, or the input of a checkpointed layer was copied or offloaded before the backward pass"
            )
        if len(call.rows) == 0 and not torch.is_grad_enabled():
            return value  # With gradients it goes on, because data-parallel training needs gradients of zero.
        if len(call.rows) > 0 and call.shape != x.shape[:-1]:
            shapes = f"{list(call.shape)}, but v_proj received tokens of shape {list(x.shape[:-1])}"
            hint = "if you generate with beams, use mask.repeat_interleave(num_beams, 0)"
            raise RuntimeError(f"input_ids or the visual mask have shape {shapes}; {hint}")
        call.updated.add(adapter)
        return adapter.add_update(x, value, call.rows.to(x.device))

    @hidden_from_compiler
    def end_call(self, model, args, output):
        call = self.running.pop(get_ident(), None)
        if output is None:  # the call raised an error
            return
        if call is None:  # an inner call has ended, and has taken this one's place
            raise RuntimeError("the model was called inside its own forward pass, which Image-LoRA does not support")
        if len(call.rows) > 0 and len(call.updated) < len(self.v_projs):
            raise RuntimeError(
                "an adapted v_proj was not called in this call of the model; whatever replaces it (merging weights, "
                "patching the attention) must be done before attach()"
            )

    def call_of(self, x: Tensor) -> Call | None:
        """The call that a tensor belongs to: the one that runs in this thread, or else the one left on its memory.

        A call that may be followed by a backward pass is left on the memory, if it is not there yet."""
        running = self.running.get(get_ident())
        if running is not None and not running.grad_enabled and not torch.is_grad_enabled():
            return running  # No backward pass will ask for it, so nothing is left on the memory.
        memory = x.untyped_storage()
        left = getattr(memory, "image_lora_call", None)
        if running is None:
            return left  # the layer runs again, in a backward pass
        if running is left:
            return running
        if left is not None and not left.rows.to(running.rows).equal(running.rows):
            raise RuntimeError(
                "this layer's input shares its memory with the input of an earlier call that had other visual tokens, "
                "and a backward pass may still ask for those; clone() the input"
            )
        # A re-entrant checkpoint turns gradients off inside a layer, although the call began with them on.
        if running.grad_enabled and not torch.is_grad_enabled() and not x.requires_grad:
            raise RuntimeError(
                "no gradient would reach the adapter: re-entrant checkpointing needs "
                "model.enable_input_require_grads(), and a model that disables gradients itself needs torch.no_grad()"
            )
        memory.image_lora_call = running
        return running

    @contextmanager
    def override(self, **changes):
        """In this thread or coroutine, calls begin with these changes: disabled=True or mask=Tensor."""
        if self.model is None:
            raise RuntimeError("this Image-LoRA is detached; use the one that load() or attach() returned")
        entry = (self, changes)
        OVERRIDES.set((*OVERRIDES.get(), entry))
        try:
            yield
        finally:
            # Only this entry goes, as others may have come since and may stay.
            OVERRIDES.set(tuple(other for other in OVERRIDES.get() if other is not entry))

    def leave(self) -> nn.Module:
        """Remove the hooks and return the model."""
        if self.model is None:
            raise RuntimeError("this Image-LoRA is already detached")
        torch.compiler.reset()
        for hook in self.hooks:
            hook.remove()
        for v_proj in self.v_projs:
            del v_proj.has_image_lora
        model = self.model
        self.model, self.v_projs = None, []  # a detached adapter does not keep the model in memory
        return model


def _at_least_float32(fn, tensor):
    new = fn(tensor)
    return tensor.to(new.device) if new.element_size() < 4 else new


# ------ What cannot be adapted is refused -----------------------------------------------------------------------------


def _checked_model(model) -> tuple[nn.Module, nn.ModuleList, set[int]]:
    """The unwrapped model, its decoder layers and the ids of visual tokens. ValueError if it cannot be adapted."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    model = getattr(model, "get_base_model", lambda: model)()  # PEFT's wrapper
    if any(hasattr(module, "has_image_lora") for module in model.modules()):
        raise ValueError("the model already has an Image-LoRA; call its detach() first")
    encoders = ("vision", "visual", "audio", "img", "image", "video", "perceiver")
    stacks = {}
    for name, module in model.named_modules():
        *path, last = name.split(".")
        in_encoder = any(part.startswith(encoders) for part in path)
        if last == "layers" and isinstance(module, nn.ModuleList) and not in_encoder:
            stacks[name] = module
    if len(stacks) != 1:
        names = ", ".join(stacks) or "none"
        raise ValueError(f"expected one stack of decoder layers besides the vision tower, found {names}")
    ((name, decoder),) = stacks.items()
    for i, layer in enumerate(decoder):
        _check_attention(f"{name}.{i}", getattr(layer, "self_attn", layer))
    if len({layer.self_attn.v_proj for layer in decoder}) < len(decoder):
        raise ValueError("layers share a v_proj; they cannot be adapted one by one")
    config = getattr(model, "config", None)  # DistributedDataParallel and other wrappers have none
    fields = "image_token_id", "image_token_index", "video_token_id", "video_token_index"
    ids = {getattr(config, field, None) for field in fields} - {None}
    if not ids:
        hint = "attach to the whole VLM, unwrapped"
        raise ValueError(f"model.config has no image_token_id to tell visual tokens by; {hint}")
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    by_transformers = getattr(config, "distributed_config", None)  # whose Trainer averages the gradients itself
    if sharded and not by_transformers:
        why = "nobody would average the adapter's gradients over the processes"
        raise ValueError(f"the model is sharded already, and {why}; attach first, then shard")
    return model, decoder, ids


def _check_attention(where: str, attention: nn.Module) -> None:
    parts = [name for name, _ in attention.named_children()]
    if "v_proj" not in parts:
        raise ValueError(
            f"{where} has no self_attn.v_proj but {', '.join(parts)}; cross-attention to images, the other layers of "
            "hybrid models, fused qkv and latent values cannot be adapted"
        )
    later = [name for name in parts if name.startswith("v_") and name != "v_proj"]
    if later:
        raise ValueError(f"{where} changes its values after v_proj, in {', '.join(later)}; they cannot be adapted")
    if not hasattr(attention.v_proj, "out_features"):
        raise ValueError(f"the v_proj of {where} is a {type(attention.v_proj).__name__}, which has no out_features")
    if attention.v_proj.out_features % attention.head_dim != 0:
        sizes = f"v_proj has {attention.v_proj.out_features} features and head_dim is {attention.head_dim}"
        raise ValueError(f"the features of {where} are not whole heads: {sizes}")


def _check_options(decoder, r, lora_alpha, normalize, train_gamma) -> None:
    D = min(layer.self_attn.v_proj.in_features for layer in decoder)
    if type(r) is not int or not 1 <= r <= D:
        raise ValueError(f"r must be an integer in 1..{D}, got {r!r}")
    if type(lora_alpha) not in (int, float) or not 0 < lora_alpha <= 1e9:
        raise ValueError(f"lora_alpha must be a number above 0 and at most 1e9, got {lora_alpha!r}")
    if type(normalize) is not bool or type(train_gamma) is not bool:
        raise ValueError(f"normalize and train_gamma must be True or False, got {normalize!r} and {train_gamma!r}")


def _checked_heads(heads, head_counts: list[int]) -> Heads:
    """The selected heads, sorted and without empty layers."""
    if heads is None:
        return {layer: list(range(count)) for layer, count in enumerate(head_counts)}
    if not isinstance(heads, dict):
        raise ValueError(f"heads must be {{layer: [value head, ...]}}, got {heads!r}")
    for layer, selected in heads.items():
        if type(layer) is not int or not 0 <= layer < len(head_counts):
            raise ValueError(f"there is no layer {layer!r}; layers are the integers 0..{len(head_counts) - 1}")
        last = head_counts[layer] - 1
        valid = isinstance(selected, (list, tuple, range)) and all(type(head) is int for head in selected)
        if not valid or len(set(selected) & set(range(last + 1))) < len(selected):
            expected = f"must be a list of different integers in 0..{last}"
            raise ValueError(f"the heads of layer {layer} {expected}, got {selected!r}")
    checked = {layer: sorted(heads[layer]) for layer in sorted(heads) if heads[layer]}
    if not checked:
        raise ValueError("no head is selected; name at least one")
    return checked


def _device(v_proj) -> torch.device:
    """The device that v_proj computes on, which under accelerate may differ from where its weights are kept."""
    device = getattr(getattr(v_proj, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return device
    tensors = [*v_proj.parameters(), *v_proj.buffers(), torch.empty(0)]  # a quantized v_proj may have no parameter
    return tensors[0].device


# ------ What is saved -------------------------------------------------------------------------------------------------


def _scale_of_each_head(adapter: ImageLoRA) -> Tensor:
    """[L, H], 0 for a head that is not selected."""
    scales = torch.zeros(len(adapter.head_counts), max(adapter.head_counts), device="cpu")
    for layer, selected in adapter.heads.items():
        scales[layer, selected] = adapter.layers[str(layer)].scaling
    return scales


def _check_scales(adapter: ImageLoRA, scales: Tensor) -> None:
    own = _scale_of_each_head(adapter)
    # Compared with a tolerance, because a saved state may have been averaged or stored in 16 bits.
    if scales.shape != own.shape or not scales.to(own).allclose(own, rtol=0.01):
        raise RuntimeError(
            "the state_dict belongs to an Image-LoRA in other layers or heads, or with another scale; "
            "attach with the same heads, r, lora_alpha and normalize, then load it"
        )


def safe_write(data, path):
    """Write bytes beside `path`, then move them into place, so that a killed write leaves the old file."""
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def safe_save(content, path):
    """`torch.save` by way of safe_write. Raises OSError where the disk is full, which torch.save itself does not."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    safe_write(buffer.getbuffer(), path)


def safe_load(path) -> dict:
    """The dict in a file of torch.save; runs no code from it. ValueError if it is missing, damaged or holds no dict."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself would not notice a flipped bit
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} instead of a dict")
    except Exception as error:
        raise ValueError(f"{path} is missing, damaged or not a PyTorch file ({_in_one_line(error)})") from error
    return content


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _file_content(adapter: ImageLoRA) -> dict:
    layers = {layer: {} for layer in adapter.layers}
    for name, tensor in adapter.layers.state_dict().items():  # parameters() may be FSDP's copies in bfloat16
        layer, kind = name.split(".")
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()  # under FSDP2, gathers the shards of all ranks
        if tensor.is_meta:
            raise ValueError(f"{kind} of layer {layer} has no values; attach after accelerate's offloading, not before")
        if tensor.numel() == 0:
            gather = "deepspeed.zero.GatheredParameters(list(adapter.parameters()))"
            raise ValueError(f"{kind} of layer {layer} is empty; under DeepSpeed ZeRO-3 call save() inside {gather}")
        if not tensor.isfinite().all():
            raise ValueError(f"{kind} of layer {layer} is not finite, so the adapter is not saved")
        layers[layer][kind] = tensor.cpu().reshape(()) if kind == "gamma" else tensor.cpu()
    if not any(layer.B.requires_grad or layer.B.any() for layer in adapter.layers.values()):
        untrained = "the adapter is frozen and B is still zero, so it is as if untrained"
        raise ValueError(f"{untrained}; call get_peft_model() before attach(), as it freezes every parameter it finds")
    return {
        "model_name": adapter.model_name,
        "r": adapter.r,
        "alpha": float(adapter.lora_alpha),
        "kv_indices": {str(layer): heads for layer, heads in adapter.heads.items()},
        "layers": layers,
        "normalize": adapter.normalize,  # this and the next are not in the authors' files
        "head_counts": adapter.head_counts,
    }


def load(model, path) -> ImageLoRA:
    """Attach the adapter of a file, ours or the authors'; A, B and gamma are trainable.

    Raises ValueError, and leaves the model as it was, if the file is damaged or does not fit the model."""
    content = safe_load(path)
    adapter = None
    try:
        heads = {int(layer): selected for layer, selected in content["kv_indices"].items()}
        adapter = attach(model, content["r"], content["alpha"], heads, content.get("normalize", True))
        if any(parameter.is_meta for parameter in adapter.parameters()):
            raise ValueError("the model is on the meta device; give it its weights first")
        counts = content.get("head_counts", adapter.head_counts)
        if counts != adapter.head_counts:
            raise ValueError(f"its layers have {counts} value heads, the model's have {adapter.head_counts}")
        state = {}
        for layer, tensors in content["layers"].items():
            for name, tensor in _in_our_order(layer, tensors, heads[int(layer)]).items():
                state[f"{layer}.{name}"] = tensor
        adapter.layers.load_state_dict(state)
    except Exception as error:
        if adapter is not None:
            adapter.detach()
        raise ValueError(f"{path} does not fit this model ({_in_one_line(error)})") from error
    return adapter


def _in_our_order(layer: str, tensors: dict, heads: list[int]) -> dict:
    """The tensors of a layer with B in the order of our heads, which are sorted. ValueError if one is not finite."""
    order = torch.tensor(heads, device="cpu").argsort()
    if len(tensors["B"]) != len(order):
        raise ValueError(f"layer {layer} names {len(order)} heads, but its B has {len(tensors['B'])}")
    ours = tensors | {"B": tensors["B"][order], "gamma": tensors["gamma"].reshape(1)}
    for name, tensor in ours.items():
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise ValueError(f"{name} of layer {layer} does not hold finite floats")
    return ours
