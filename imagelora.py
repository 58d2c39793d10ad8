"""Image-LoRA: low-rank updates of the attention values of visual tokens, in selected heads (arXiv 2512.19219).

    V~(h) = X W_V(h) + gamma * (alpha / r) * 1/sqrt|S| * M X A B(h)    for each selected head h (section 3 of the paper)

X is the input of a layer's v_proj, W_V is its frozen weight, and S is the set of selected heads. M = diag(1[token is
visual]) keeps the rows of visual tokens and sets all others to zero. For the same X, the queries, the keys, the values
of text tokens and those of other heads stay what they were. Without an image the output is the base model's, exactly.
The factor 1/sqrt|S|, selection-size normalization, makes a layer's first update as large for any number of heads.

    adapter = attach(model)                                    # in all heads; then train adapter.parameters()
    adapter.save("adapter.pt")
    adapter = load(another_model, "adapter.pt")                # later, on a fresh copy of the model

    scores = score_heads(model, batches)                       # or first probe how much each value head could help,
    adapter = attach(model, heads=select_heads(scores, 16))    # and adapt only the best 16

A worked example. There are three tokens with two features each, and token 1 is visual. There are two heads of size 1,
head 1 is adapted, and the scale is 1. So x_vis A = [3, 4] [1, 2]^T = 11, and times B(1) = 0.5 this is 5.5. It is added
to the value of token 1 in head 1, and nowhere else:

    >>> adapter = ValueAdapter(hidden_size=2, head_dim=1, num_kv_heads=2, heads=[1], r=1, lora_alpha=1)
    >>> _ = adapter.A.data.copy_(torch.tensor([[1.0], [2.0]]))
    >>> _ = adapter.B.data.fill_(0.5)
    >>> x = torch.tensor([[[1.0, 1.0], [3.0, 4.0], [5.0, 5.0]]])    # one sequence, T = 3, D = 2
    >>> value = torch.zeros(1, 3, 2)                                # what v_proj made of x: H * d_h = 2
    >>> adapter.add_update(x, value, rows=torch.tensor([1])).tolist()
    [[[0.0, 0.0], [0.0, 5.5], [0.0, 0.0]]]

Shapes: B sequences (the matrix B is LoRA's), T tokens in each, N visual tokens in the batch, D hidden size, H value
heads of a layer (the KV heads under grouped-query attention), d_h their size, |S| selected heads, r rank, L layers.
"""

import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from threading import get_ident

import torch
from torch import Tensor, nn

Heads = dict[int, list[int]]  # {layer: [value head, ...]}


class ValueAdapter(nn.Module):
    """The update of one layer: gamma * (alpha / r) * 1/sqrt|S| * x A B(h) for its selected heads h."""

    def __init__(self, hidden_size, head_dim, num_kv_heads, heads, r, lora_alpha, normalize=True):
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.scale = lora_alpha / r
        if normalize:
            self.scale /= len(heads) ** 0.5  # selection-size normalization
        self.heads = torch.tensor(heads, device="cpu")  # S, [|S|]
        options = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
        # The selected heads share A, which reads a token once for all of them. B(h) writes what head h passes on.
        self.A = nn.Parameter(torch.empty(hidden_size, r, **options))  # [D, r]
        self.B = nn.Parameter(torch.empty(len(heads), r, head_dim, **options))  # [|S|, r, d_h]
        self.gamma = nn.Parameter(torch.empty(1, **options))  # [1]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew at the base model: A is random, B is zero, gamma is 1."""
        # A is uniform in +-1/sqrt(D), as in PEFT's LoRA, and drawn on the CPU: a seed gives the same A everywhere.
        A = torch.empty(self.A.shape, dtype=torch.float32, device="cpu")
        self.A.copy_(nn.init.kaiming_uniform_(A.T, a=5**0.5).T)
        self.B.zero_()
        self.gamma.fill_(1)  # because under AdamW, a small gamma would shrink what a step of B does to the output

    def forward(self, x_vis: Tensor, factor: float = 1.0) -> Tensor:
        """Inputs of visual tokens [N, D] -> their updates in the selected heads [N, |S| * d_h], times a factor."""
        # z = x A, which the selected heads share (linear wants A^T, and is faster if it is contiguous)
        z = nn.functional.linear(x_vis, self.A.T.contiguous())  # [N, r]
        # gamma * (alpha / r) * 1/sqrt|S| * z B(h), for all h in S at once
        scaled_B = self.gamma * (factor * self.scale) * self.B  # [|S|, r, d_h]
        return z @ scaled_B.to(z.dtype).transpose(0, 1).flatten(1)  # [N, r] @ [r, |S| * d_h]

    def add_update(self, x: Tensor, value: Tensor, rows: Tensor, factor: float = 1.0) -> Tensor:
        """X [B, T, D] and X W_V [B, T, H * d_h] -> V~ [B, T, H * d_h]; rows [N] says which of the B * T are visual.

        M X is a gather of these rows, so text tokens go through no product with A or B; their values are copied. If no
        row is visual, gradients are zero rather than None, because data-parallel training waits for all of them."""
        H, d_h = self.num_kv_heads, self.B.shape[2]
        x_vis = x.flatten(0, -2).index_select(0, rows)  # [N, D], M X without its zero rows
        delta = self(x_vis.to(self.A.dtype), factor).to(value.dtype)  # [N, |S| * d_h]
        # V~(h) = X W_V(h) + delta(h). The values are one vector [d_h] for each token n and head h, at n * H + h.
        vectors = value.reshape(-1, d_h)  # [B * T * H, d_h]
        targets = (rows[:, None] * H + self.heads).view(-1, 1).expand(-1, d_h)  # [N * |S|, d_h]
        return vectors.scatter_add(0, targets, delta.view(-1, d_h)).view_as(value)  # index_add would save delta


def visual_rows(input_ids: Tensor, image_token_ids: set[int]) -> Tensor:
    """input_ids [B, T] -> M as indices [N]: which of the B * T rows hold a placeholder of an image or a video."""
    visual = torch.stack([input_ids == token_id for token_id in image_token_ids]).any(0)  # the diagonal of M, [B, T]
    return visual.flatten().nonzero().squeeze(1)


class ImageLoRA(nn.Module):
    """The adapter of a model, which `attach` makes: a ValueAdapter for each adapted layer, in `.layers[str(layer)]`."""

    def __init__(self, base, decoder, attentions, image_token_ids, heads, r, lora_alpha, normalize, train_gamma):
        super().__init__()
        self.r, self.lora_alpha = int(r), lora_alpha  # int() and bool(), because files hold no types of NumPy
        self.normalize, self.train_gamma = bool(normalize), bool(train_gamma)
        self.model_name = getattr(base.config, "_name_or_path", type(base).__name__)
        self.head_counts = [a.v_proj.out_features // head_dim_of(a) if a else 0 for a in attentions]
        self.layers = nn.ModuleDict()
        for layer, selected in checked_heads(heads, self.head_counts).items():
            v_proj = attentions[layer].v_proj
            sizes = v_proj.in_features, head_dim_of(attentions[layer]), self.head_counts[layer]
            value_adapter = PortableValueAdapter(*sizes, selected, self.r, lora_alpha, normalize)  # stays in float32
            value_adapter.gamma.requires_grad_(self.train_gamma)
            self.layers[str(layer)] = value_adapter.to(device_of(v_proj))
        self._required_grad = {name: p.requires_grad for name, p in base.named_parameters()}
        # From here on the model changes: in each of its calls the tracker finds the visual rows, and adapt changes V.
        self._tracker = CallTracker(base, image_token_ids, {i: decoder[int(i)] for i in self.layers}, adapter=self)

    @property
    def heads(self) -> Heads:
        return {int(layer): value_adapter.heads.tolist() for layer, value_adapter in self.layers.items()}

    def scaled(self, factor: float) -> AbstractContextManager:
        """A context in which the update is multiplied by factor, for this thread or coroutine; nested factors multiply.
        In a generator, enter it around each call of the model. Around a `yield`, the caller would be in it, too."""
        return self._tracker.override(factor=factor)

    def disabled(self) -> AbstractContextManager:
        """scaled(0), in which the model is the base model again, bit for bit."""
        return self.scaled(0)

    def visual_mask(self, mask: Tensor) -> AbstractContextManager:
        """A context in which calls without input_ids take M from a bool mask [B, T], True where a token is visual."""
        return self._tracker.override(mask=mask)

    def detach(self) -> nn.Module:
        """Take the adapter off, and return the model as it was. Call backward() before, not after."""
        return take_off(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write A, B and gamma, no more, in the authors' layout of a file. Under FSDP2, call it on every rank."""
        write_adapter(self, Path(path))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_tracker": None}  # a copy of the adapter alone is detached

    def extra_repr(self) -> str:
        num_heads = sum(map(len, self.heads.values()))
        selected = f"{num_heads} of {sum(self.head_counts)} heads, {len(self.layers)} of {len(self.head_counts)} layers"
        return f"{selected}, r={self.r}, lora_alpha={self.lora_alpha}"


def attach(model, r=8, lora_alpha=16, heads: Heads | None = None, normalize=True, train_gamma=False) -> ImageLoRA:
    """Freeze the model, and adapt the values of its visual tokens in these heads.

    r, lora_alpha: rank and alpha of LoRA; the update is scaled by lora_alpha / r and, with normalize, by 1/sqrt|S|.
    heads: {layer: [value head, ...]}; None means all heads. A layer that is not named gets no adapter. In hybrid models
    some layers have no v_proj, and so no heads. If a norm of each head follows v_proj, V~ is norm(X W_V + update). In
    data-parallel training every process needs the same heads: select them in one, and broadcast them to the others.
    train_gamma: whether gamma is trained, as in the paper; by default it stays 1. See `adapter.scaled` to turn it down.

    `adapter.parameters()` are A, B and gamma, float32; in the model's state_dict they are `image_lora`. Image tokens
    are those whose ids model.config names now. Raises ValueError, and changes nothing, if the model cannot be adapted.
    What PEFT has added stays trainable: for both, optimize `[p for p in model.parameters() if p.requires_grad]`."""
    base, decoder, attentions, image_token_ids = adaptable_parts(model, r, lora_alpha, normalize, train_gamma)
    adapter = ImageLoRA(base, decoder, attentions, image_token_ids, heads, r, lora_alpha, normalize, train_gamma)
    if not hasattr(base, "peft_config"):  # otherwise PEFT has frozen it
        base.requires_grad_(False)
    base.image_lora = adapter  # after it was frozen, because this makes the adapter a part of the model
    return adapter


def score_heads(model, batches: Iterable, loss_fn: Callable | None = None, probe="rank1", seed=0) -> Tensor:
    """How much each value head could lower the loss: its influence I(l, h), [L, H] float32.

    An Image-LoRA in every head with B = 0 leaves the output as it is, and I(l, h) = ||dL/dB_l(h)||^2. That gradient is
    A^T Y. Here Y = X_vis^T G is the gradient of W_V(h) from visual tokens, and G is dL/dV~(h) there.
    probe="rank1": r = 1 and A ~ N(0, I), new for each batch. As ||A^T Y||^2 = trace(Y^T A A^T Y) and E[A A^T] = I, each
    score is noisy, and right on average: its mean is ||Y||^2.
    probe="exact": r = D and A = I, so the score is ||Y||^2. It needs memory for a few float32 matrices [D, D] a layer.

    batches: an iterable of batches; each costs a forward and a backward pass. The loss is loss_fn(model, batch), by
    default `model(**batch).loss`. Scores are averaged over batches, and small batches can rank heads differently from
    large ones. Heads that a layer lacks, as all do in a layer without values, score -inf. ValueError if a loss is not
    finite, or if no loss depends on a visual token. In float16, gradients can overflow or underflow: scale the loss."""
    if probe not in ("rank1", "exact"):
        raise ValueError(f"probe must be 'rank1' or 'exact', got {probe!r}")
    if isinstance(batches, Mapping):
        raise ValueError("batches must be a list of batches, but this is one batch; pass [batch]")
    if not torch.is_grad_enabled():
        raise ValueError("the probe needs gradients; call it outside of torch.no_grad() and inference_mode()")
    loss_fn = loss_fn or (lambda model, batch: model(**batch).loss)
    base, _, attentions, _ = adaptable_parts(model)
    generator = torch.Generator("cpu").manual_seed(seed)
    r = 1 if probe == "rank1" else min(a.v_proj.in_features for a in attentions if a)  # D
    with torch.random.fork_rng(devices=[]):  # attach() draws an A; the caller's random state must not change
        adapter = attach(model, r, lora_alpha=r, normalize=False)  # so that the scale in front of A B is 1
    base.requires_grad_(False)  # Otherwise backward() would leave gradients in PEFT's parameters.
    scores = torch.zeros(len(attentions), max(adapter.head_counts), dtype=torch.float32, device="cpu")  # [L, H]
    count = 0
    try:
        for count, batch in enumerate(batches, start=1):
            for value_adapter in adapter.layers.values():
                value_adapter.B.requires_grad_(True)
                A = scores.new_zeros(value_adapter.A.shape)
                A = A.normal_(generator=generator) if probe == "rank1" else A.fill_diagonal_(1)
                value_adapter.A.copy_(A)
                value_adapter.B.grad = torch.zeros_like(value_adapter.B)  # stays zero if the loss does not depend on B
            loss = loss_fn(model, batch)
            if loss is None or not loss.isfinite().all():
                raise ValueError(f"the loss of probe batch {count} is {loss}; check that its labels hold an answer")
            loss.backward()
            for layer, value_adapter in adapter.layers.items():
                # I(l, h) = ||dL/dB_l(h)||^2, and B is [H, r, d_h] here
                scores[int(layer), : value_adapter.num_kv_heads] += value_adapter.B.grad.square().sum((1, 2)).cpu()
    finally:
        adapter.detach()
    if not scores.any():
        raise ValueError(f"no loss of {count} probe batches depends on a visual token; check their images and labels")
    for row, num_heads in zip(scores, adapter.head_counts):
        row[num_heads:] = -torch.inf  # the layer has no such heads
    return scores / count


def select_heads(scores: Tensor, num_heads: int, tau: float = 0.5) -> Heads:
    """The most influential heads, num_heads in all: {layer: [value head, ...]}.

    Layer l gets its k_l best heads, with k_l in proportion to (sum_h I(l, h))^tau and at most H; scores are [L, H].
    tau = 0 spreads the heads evenly over layers, a large tau fills the best layers first, and 0.5 is the authors'."""
    check_selection(scores, num_heads, tau)
    # Influence of each layer, [L]. The largest comes first, so that it wins a tie. Heads that a layer lacks have -inf.
    influence, order = scores.double().clamp(min=0).sum(1).sort(descending=True, stable=True)
    head_counts = (scores >= 0).sum(1)[order]
    weights = (influence / influence.max()).pow(tau)
    budget = torch.zeros_like(weights, dtype=torch.long)  # k_l
    for _ in range(int(num_heads)):
        # One head at a time, as Sainte-Lague's method gives seats to parties, so that budgets add up to num_heads.
        quotient = weights / (2 * budget + 1)
        budget[quotient.where(budget < head_counts, -1).argmax()] += 1
    best_first = scores.argsort(dim=1, descending=True, stable=True).tolist()
    return {layer: sorted(best_first[layer][:k]) for layer, k in sorted(zip(order.tolist(), budget.tolist())) if k > 0}


# ------ That is the method. Below: how M reaches the layers; files, devices, and what cannot be adapted ---------------


@dataclass
class Call:
    """What the layers need to know about one call of the model."""

    rows: Tensor  # [N], which of the B * T rows are visual
    shape: tuple  # (B, T)
    factor: float = 1.0  # of the update
    asked: frozenset = frozenset()  # the layers that have asked for it


NO_ROWS = Call(torch.zeros(0, dtype=torch.long, device="cpu"), ())  # inside disabled()
# {tracker: (factor, mask)} of scaled() and visual_mask(). Global, because a copy of a model cannot copy a ContextVar.
OVERRIDES = ContextVar("OVERRIDES")


class CallTracker:
    """Tells the layers which of their rows are visual. Only model(...) sees input_ids; its layers do not.

    A variable with the rows of the last call would not do: gradient checkpointing runs a layer a second time, in the
    backward pass, and by then the model may have been called with other images. But a checkpoint keeps the layer's
    input. So the first run leaves its Call on that tensor, and the second run finds it there:

                              first run, inside model(...)            second run, in the backward pass
        before model(...)     begin_call puts a Call into `running`   (is not run)
        after a layer's norm  pass_on leaves it on the layer's input  pass_on finds it there, and puts it into `found`
        after v_proj          adapt adds the update at its rows       adapt adds the update at the rows of `found`
        after model(...)      end_call takes it out of `running`      (is not run)

    "On a tensor" means as an attribute of its storage, which all tensors share that detach() and autograd make of it.
    `running` has a key for each thread and backward pass, so a second run finds nothing there. Outside of backward
    passes nothing is looked up on tensors, so that a layer called alone is refused. pass_on hooks norms, because
    transformers 5 runs a layer again without its own hooks. Partial LoRA asks by call_of, too, but keeps `found`, which
    all its linear layers need. So it mixes up two calls of one backward pass if the checkpoints of one were copied."""

    def __init__(self, model, image_token_ids: set[int], layers: dict[str, nn.Module], adapter=None):
        self.model = model
        self.image_token_ids = image_token_ids
        self.adapter = adapter  # the ImageLoRA whose layers must all ask in each call, if it is one
        self.running = {}  # {thread and backward pass: the Call that runs there}
        self.found = {}  # {(thread, layer): {backward pass: the Call of the layer's second run}}
        self.hooks = [model.register_forward_pre_hook(self.begin_call, with_kwargs=True)]
        self.hooks += [model.register_forward_hook(self.end_call, always_call=True)]
        for layer, module in layers.items():
            names = {part: name.rpartition(".")[2] for name, part in module.named_modules()}
            norms = [part for part, name in names.items() if "norm" in name and name not in ("q_norm", "k_norm")]
            self.hooks += [norm.register_forward_hook(partial(self.pass_on, layer)) for norm in norms]
            if adapter is not None:
                attention = attention_of(module, layer)
                add_update = partial(self.adapt, layer, adapter.layers[layer])
                self.hooks += [attention.v_proj.register_forward_hook(add_update)]

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        if self.adapter is not None:
            self.adapter._tracker = self  # This is a copy of the model, not of the adapter alone.

    def begin_call(self, model, args, kwargs):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            raise RuntimeError("a trace or an export of the model would fix which tokens are visual; run it eagerly")
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is not None:
            kwargs["inputs_embeds"] = embeddings.clone()  # because they may come again under another mask
        factor, mask = self.overrides()
        if factor == 0:
            call = NO_ROWS
        # input_ids take precedence over a mask: after a prompt of embeddings, generate() continues with input_ids.
        elif isinstance(ids, Tensor) and not ids.is_floating_point():  # floats as the first argument are embeddings
            call = Call(visual_rows(ids, self.image_token_ids), ids.shape, factor)
            if len(call.rows) == 0 and ids.shape[-1] > 1:
                check_placeholders(kwargs)
        elif mask is not None and embeddings is not None:
            if mask.dtype != torch.bool:  # in a float mask of attention, 0 means True
                raise ValueError(f"a visual mask must be bool, True where a token is visual, got {mask.dtype}")
            call = Call(mask.flatten().nonzero().squeeze(1), mask.shape, factor)
        else:
            known = "pass input_ids by name, or to an Image-LoRA inputs_embeds by name inside adapter.visual_mask(mask)"
            raise ValueError(f"the model was called without telling which tokens are visual; {known}")
        self.running[thread_and_backward_pass()] = call
        return args, kwargs

    def pass_on(self, layer: str, norm, args, output):
        self.find_call(layer, args[0])

    def adapt(self, layer: str, value_adapter: ValueAdapter, v_proj, args, value):
        """X [B, T, D] and X W_V [B, T, H * d_h] -> V~ [B, T, H * d_h]."""
        x = args[0]
        call = self.call_of(layer, x)
        if len(call.rows) == 0 and not torch.is_grad_enabled():
            return value  # With gradients it goes on, because data-parallel training needs gradients of zero.
        self.found.pop((get_ident(), layer), None)  # the layer's next second run has to find its own
        value_adapter.prepare_update(call, x, value)
        return value_adapter.add_update(x, value, call.rows.to(x.device), call.factor)

    def end_call(self, model, args, output):
        call = self.running.pop(thread_and_backward_pass(), None)
        if self.adapter is None or output is None or call is None or len(call.rows) == 0:
            return  # Nothing had to be adapted, or the call has failed.
        missing = ", ".join(layer for layer in self.adapter.layers if layer not in call.asked)
        if missing:
            how = "merge, replace or patch it before you call attach(), or leave out its heads"
            raise RuntimeError(f"the adapted v_proj of layer {missing} was not called; {how}")

    def call_of(self, layer: str, x: Tensor) -> Call:
        """The Call of the model(...) that runs this layer, for a linear layer in it whose input is x."""
        call = self.find_call(layer, x)
        if call is None:
            how = "call model(...) itself, not a part of it; checkpoint single layers, and do not offload their inputs"
            raise RuntimeError(f"no call of model(...) is known to run this layer; {how}")
        call.asked = call.asked | {layer}  # a new set, because torch.compile loses what is added to one
        return call

    def find_call(self, layer: str, x: Tensor) -> Call | None:
        """The Call of the model(...) that runs here; in a second run, the one on the layer's input. It is left on x."""
        thread, backward_pass = thread_and_backward_pass()
        call = self.running.get((thread, backward_pass))
        storage = x.untyped_storage()
        calls = getattr(storage, "image_lora_calls", {})  # {tracker: Call}, because a model may have two trackers
        if call is None and backward_pass != -1:
            found = self.found.get((thread, layer), {}).get(backward_pass)
            call = calls.get(self, found)
            self.found[thread, layer] = {backward_pass: call}  # what a norm finds, linear layers need
        elif call is None and self.overrides()[0] == 0:
            return NO_ROWS  # Inside disabled(), a part of the model may be called alone.
        if call is not None:
            # A checkpoint keeps it if x is the layer's input. If that is two calls' input, a second run is refused.
            storage.image_lora_calls = calls | {self: call if calls.get(self, call) is call else None}
        return call

    def overrides(self) -> tuple[float, Tensor | None]:
        return OVERRIDES.get({}).get(self, (1.0, None))

    @contextmanager
    def override(self, factor=1.0, mask=None):
        """In this thread or coroutine, calls go by this mask and this factor, times that of the context around it."""
        if not abs(factor) < torch.inf:
            raise ValueError(f"the factor must be finite, got {factor}")
        outer_factor, outer_mask = self.overrides()
        overrides = outer_factor * factor, outer_mask if mask is None else mask
        token = OVERRIDES.set(OVERRIDES.get({}) | {self: overrides})
        try:
            yield
        finally:
            OVERRIDES.reset(token)


def take_off(adapter: ImageLoRA) -> nn.Module:
    tracker = adapter._tracker
    if tracker is None:
        raise ValueError("the adapter is not on a model: it was detached, or copied without its model")
    for hook in tracker.hooks:
        hook.remove()
    del tracker.model.image_lora
    adapter._tracker = None  # disabled() fails from now on, and the model is not kept in memory
    for name, parameter in tracker.model.named_parameters():
        parameter.requires_grad_(adapter._required_grad.get(name, parameter.requires_grad))
    return tracker.model


def thread_and_backward_pass() -> tuple[int, int]:
    """Where this code runs: the thread, and the number of the backward pass in it, or -1 outside of any."""
    return get_ident(), torch._C._current_graph_task_id()  # private, and what torch's own checkpointing goes by


# ------ Files, moves between devices and types, and what cannot be adapted --------------------------------------------


class PortableValueAdapter(ValueAdapter):
    """A ValueAdapter that never drops below float32, and whose state_dict says which heads and scale it belongs to. The
    heads are not a buffer, because to_empty() would leave them uninitialized."""

    def _apply(self, fn, recurse=True):
        def convert(tensor):  # .to(), .half(), .to_empty() and their like convert each tensor by fn.
            new = fn(tensor)
            return tensor.to(new.device) if new.element_size() < 4 else new  # in 16 bits, small steps would be lost

        return super()._apply(convert, recurse)

    def prepare_update(self, call: Call, x: Tensor, value: Tensor) -> None:
        """Bring the heads to x's device. RuntimeError if the update would be wrong, or could not be trained."""
        if len(call.rows) > 0 and call.shape != x.shape[:-1]:
            got = f"v_proj received tokens of shape {list(x.shape[:-1])}, input_ids or visual mask {list(call.shape)}"
            raise RuntimeError(f"{got}; if you generate with beams, use mask.repeat_interleave(num_beams, 0)")
        if value.shape[-1] != self.num_kv_heads * self.B.shape[2]:
            got = f"v_proj gave {value.shape[-1]} features for {self.num_kv_heads} heads of {self.B.shape[2]}"
            raise RuntimeError(f"{got}; if tensor parallelism splits the heads over devices, use FSDP instead")
        if self.B.is_meta and self.B.requires_grad and torch.is_grad_enabled() and not x.is_meta:
            raise RuntimeError("an adapter that was offloaded cannot be trained; offload the model before you attach")
        if self.heads.device != x.device and not x.is_meta:
            self.heads = self.heads.to(x.device)  # once; what moves a model moves parameters and buffers alone

    def get_extra_state(self) -> Tensor:
        """[scale, head, ...]. A tensor, because the formats of checkpoints hold nothing else."""
        return torch.tensor([self.scale, *self.heads.tolist()], dtype=torch.float32, device="cpu")

    def set_extra_state(self, saved: Tensor) -> None:
        """RuntimeError if A and B of a state_dict belong to other heads or to another scale."""
        expected = self.get_extra_state()
        saved = saved.cpu().float()  # Close is enough, because someone may have rounded the state_dict to bfloat16.
        if saved.shape != expected.shape or not saved.allclose(expected, rtol=3e-3, atol=0):
            got = f"B is of heads {saved[1:].int().tolist()} and scale {saved[0]:.4g}"
            wanted = f"heads {expected[1:].int().tolist()} and scale {expected[0]:.4g}"
            raise RuntimeError(f"{got}, not of {wanted}; attach with the same heads, r, lora_alpha and normalize")
        if self.B.element_size() < 4:
            self.float()  # load_state_dict(assign=True) takes A and B in the types that they were saved in


def load(model: nn.Module, path: str | os.PathLike) -> ImageLoRA:
    """Attach the adapter of a file, ours or the authors'. A and B are trainable, and gamma if it was when saved.

    Raises ValueError, and leaves the model as it was, if the file is damaged or does not fit the model. Warns if the
    adapter was saved with a model of another name."""
    adaptable_parts(model)  # What is wrong with the model is no fault of the file.
    adapter = None
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load itself would not notice a flipped bit
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
        options = {name: content.get(name, True) for name in ("normalize", "train_gamma")}  # not in the authors' files
        adapter = attach(model, content["r"], content["alpha"], content["kv_indices"], **options)
        if any(parameter.is_meta for parameter in adapter.parameters()):
            raise ValueError("the model is on the meta device; give it its weights first")
        state = {f"{layer}._extra_state": module.get_extra_state() for layer, module in adapter.layers.items()}
        for layer, tensors in content["layers"].items():
            for name, tensor in tensors.items():
                state[f"{layer}.{name}"] = torch.atleast_1d(whole_tensor(tensor))  # gamma is a scalar in a file
        adapter.layers.load_state_dict(state)
    except Exception as error:
        if adapter is not None:
            adapter.detach()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{path} is missing, damaged or does not fit this model ({reason})") from error
    name = content.get("model_name")
    if name and adapter.model_name and name != adapter.model_name:
        why = "an adapter works only with the base that it was trained on; ignore this if the model was only moved"
        warnings.warn(f"{path} was saved with {name!r}, but this model is {adapter.model_name!r}; {why}", stacklevel=2)
    return adapter


def write_adapter(adapter: ImageLoRA, path: Path) -> None:
    """Write all of an adapter's file or nothing. ValueError if `load` would refuse it."""
    layers = {}
    for layer, value_adapter in adapter.layers.items():
        tensors = value_adapter.state_dict()  # parameters() may be FSDP2's copies in 16 bits
        layers[layer] = {name: whole_tensor(tensors[name]) for name in ("A", "B", "gamma")}
        if layers[layer]["B"].ndim < 3:
            gather = "summon_full_params(model) or GatheredParameters(list(adapter.parameters()))"  # FSDP1, ZeRO-3
            raise ValueError(f"this is only one rank's shard of the adapter; call save() inside {gather}")
        layers[layer]["gamma"] = layers[layer]["gamma"].reshape(())  # [1] in the model: FSDP cannot shard a scalar
    if not any(p.requires_grad for p in adapter.parameters()) or not any(t["B"].any() for t in layers.values()):
        why = "get_peft_model() and prepare_model_for_kbit_training() freeze what they find; call them before attach()"
        warnings.warn(f"B is zero or frozen, so the adapter may have learned nothing; {why} or load()", stacklevel=3)
    content = {"model_name": adapter.model_name, "r": adapter.r, "alpha": float(adapter.lora_alpha)}
    content |= {"kv_indices": {str(layer): heads for layer, heads in adapter.heads.items()}, "layers": layers}
    content |= {"normalize": adapter.normalize, "train_gamma": adapter.train_gamma}  # not in the authors' files
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:  # torch.save(content, path) would ignore a full disk
            torch.save(content, file)
        beside.replace(path)  # only now, so that the old file stays if this one cannot be written
    finally:
        beside.unlink(missing_ok=True)


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a parameter on the CPU, also if FSDP2 has sharded it. ValueError if it does not hold finite floats."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()  # gathers the shards of all ranks
    if not (tensor.is_floating_point() and tensor.float().isfinite().all()):
        raise ValueError("a parameter does not hold finite floats; if training has diverged, lower the learning rate")
    return tensor.cpu()


def device_of(v_proj: nn.Module) -> torch.device:
    """The device that v_proj computes on. Under accelerate's offloading its weights lie elsewhere."""
    tensors = [*v_proj.parameters(), *v_proj.buffers()]  # a quantized v_proj may have buffers alone
    execution_device = getattr(getattr(v_proj, "_hf_hook", None), "execution_device", None)
    return tensors[0].device if execution_device is None else execution_device


def adaptable_parts(model, r=1, lora_alpha=1, *switches) -> tuple[nn.Module, nn.ModuleList, list, set[int]]:
    """The unwrapped model, its layers, their attentions, and visual ids. ValueError if they or the options are bad."""
    model = getattr(model, "get_base_model", lambda: model)()  # PEFT's wrapper
    if any(isinstance(module, ImageLoRA) for module in model.modules()):
        raise ValueError("the model already has an Image-LoRA; call its detach() first")
    encoders = ("vision", "visual", "audio", "img", "image", "video", "perceiver")
    stacks = {}
    for name, module in model.named_modules():
        in_encoder = any(part.startswith(encoders) for part in name.split("."))
        if isinstance(module, nn.ModuleList) and f".{name}".endswith(".layers") and not in_encoder:
            stacks[name] = module
    if len(stacks) != 1:
        raise ValueError(f"expected one stack named layers beside image encoders, found {', '.join(stacks) or 'none'}")
    ((name, decoder),) = stacks.items()
    attentions = [attention_of(layer, f"{name}.{i}") for i, layer in enumerate(decoder)]
    if not any(attentions):
        raise ValueError(f"no layer of {name} has a v_proj; fused qkv and latent values cannot be adapted")
    config = getattr(model, "config", None)  # DistributedDataParallel and other wrappers have none
    fields = "image_token_id", "image_token_index", "video_token_id", "video_token_index"
    ids = {getattr(config, field, None) for field in fields} - {None}
    if not ids:
        unknown = "model.config has no image_token_id, which tells visual tokens from text"
        raise ValueError(f"{unknown}; set it if image features replace a token, or pass the whole model, unwrapped")
    # transformers' Trainer averages the gradients of what it has sharded. Nobody else would average the adapter's.
    if any(hasattr(p, "full_tensor") for p in model.parameters()) and not getattr(config, "distributed_config", None):
        raise ValueError("the model is sharded already; attach first, then shard")
    D = min(attention.v_proj.in_features for attention in attentions if attention)
    is_rank = r in range(1, D + 1) and not isinstance(r, bool)  # to Python, True is 1
    is_alpha = isinstance(lora_alpha, Real) and not isinstance(lora_alpha, bool) and 0 < lora_alpha < torch.inf
    if not (is_rank and is_alpha):
        rule = f"r must be a whole number in 1..{D}, and lora_alpha a positive, finite number"
        raise ValueError(f"{rule}, got r={r!r}, lora_alpha={lora_alpha!r}")
    if any(switch not in (True, False) for switch in switches):  # to Python, the string "False" is true
        raise ValueError(f"normalize and train_gamma must be True or False, got {switches}")
    return model, decoder, attentions, ids


def attention_of(layer: nn.Module, where: str) -> nn.Module | None:
    """The part of a layer that has a v_proj. None if there is none, as in some layers of hybrid models, or if the layer
    takes its values from another one. ValueError if something mixes heads or tokens after v_proj."""
    names = [name for name, part in layer.named_children() if getattr(part, "v_proj", None) or "cross" in name]
    if len(names) > 1 or any("cross" in name for name in names):
        raise ValueError(f"{where} has {' and '.join(names)}; layers with cross-attention cannot be adapted")
    attention = getattr(layer, names[0]) if names else None
    if attention is None or getattr(attention, "is_kv_shared_layer", False):
        return None
    where = f"{where}.{names[0]}"
    tensors = [*attention.v_proj.parameters(), *attention.v_proj.buffers()]  # none after torch's quantize_dynamic()
    if not hasattr(attention.v_proj, "out_features") or not tensors:
        raise ValueError(f"{where}.v_proj must be a linear layer, got {type(attention.v_proj).__name__}")
    d_h = head_dim_of(attention)
    if not d_h or attention.v_proj.out_features % d_h > 0:
        raise ValueError(f"{where}.head_dim must divide v_proj's {attention.v_proj.out_features} features, got {d_h}")
    later = [name for name, _ in attention.named_children() if name.startswith(("v_", "conv")) and name != "v_proj"]
    is_norm_of_heads = later == ["v_norm"] and all(p.numel() == d_h for p in attention.v_norm.parameters())
    if later and not is_norm_of_heads:
        raise ValueError(f"{where} changes its values after v_proj, in {', '.join(later)}; they cannot be adapted")
    return attention


def head_dim_of(attention: nn.Module) -> int | None:
    """d_h. Some attentions have another one for queries and keys."""
    return getattr(attention, "v_head_dim", None) or getattr(attention, "head_dim", None)


def checked_heads(heads: Heads | None, head_counts: list[int]) -> Heads:
    """The selected heads as integers, in order of layers, without empty ones. ValueError if the model lacks one."""
    if heads is None:
        heads = {layer: range(count) for layer, count in enumerate(head_counts)}
    checked = {}
    for name, selected in heads.items():
        layer = int(name) if str(name).isdecimal() else name  # in JSON, layers are strings
        selected = selected.tolist() if hasattr(selected, "tolist") else list(selected)  # of torch and NumPy
        # Unchecked, head H would write into head 0 of the next token, and layer -1 would be the last one.
        count = head_counts[layer] if layer in range(len(head_counts)) else 0
        existing = [head for head in range(count) if head in selected]
        if len(existing) < len(selected) or any(isinstance(head, bool) for head in selected) or layer in checked:
            rule = "name a layer once, and some of its heads, each once"
            raise ValueError(f"layer {layer!r} has {count} heads; {rule}, not {selected!r}")
        checked[layer] = [int(head) for head in selected]
    if not any(checked.values()):
        raise ValueError("no head is selected; name at least one")
    return {layer: checked[layer] for layer in sorted(checked) if checked[layer]}


def check_placeholders(arguments: dict) -> None:
    """ValueError if a prompt has images, but no placeholder for them. After a cache, the placeholders may be in it."""
    has_cache = arguments.get("past_key_values", arguments.get("cache")) is not None  # newer transformers say cache
    pixels = [tensor for name, tensor in arguments.items() if name.startswith("pixel_values")]
    if not has_cache and any(isinstance(p, Tensor) and p.any() for p in pixels):  # collators pad with zeros
        what = "a prompt comes with images, but has no placeholder for them, so nothing would be adapted"
        raise ValueError(f"{what}; check input_ids, and image_token_id in model.config")


def check_selection(scores: Tensor, num_heads: int, tau: float) -> None:
    if not (isinstance(tau, Real) and tau >= 0):  # a negative one would prefer the weakest layers
        raise ValueError(f"tau must be a number, and not negative, got {tau!r}")
    existing = scores[scores != -torch.inf]  # a layer lacks the others
    if num_heads not in range(1, len(existing) + 1) or isinstance(num_heads, bool):
        raise ValueError(f"num_heads must be a whole number in 1..{len(existing)}, got {num_heads!r}")
    if not (existing.isfinite().all() and (existing >= 0).all() and existing.any()):
        got = f"scores between {existing.min():.3g} and {existing.max():.3g}"
        raise ValueError(f"select_heads got {got}, but they must be finite, not negative, and not all zero")
