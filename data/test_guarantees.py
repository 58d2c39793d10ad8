"""What engineering promises beyond the paper: masks, types, threads, checkpointing, sharding, files, refusals.

Whatever happens, the answer is right or refused in one sentence. It is never silently wrong."""

import asyncio
import copy
import gc
import math
import pickle
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from imagelora import ValueAdapter, attach, load, score_heads, select_heads
from test_imagelora import (
    AFTER,
    BEFORE,
    D_H,
    EARLY,
    IMAGE,
    IMG,
    LATE,
    TEXT,
    D,
    H,
    attach_trained,
    attention,
    logits_of,
    loss_of,
    prompt,
    slopes,
    state_of,
    tiny_vlm,
    watch,
)
from tiny_vlm import Block, TinyVLM

SOME_HEADS = {0: [1], 2: [0, 1]}


# 1. The visual tokens of a call
class FromEmbeddings(TinyVLM):
    """Hugging Face's other way to call a model: by inputs_embeds instead of input_ids."""

    def forward(self, input_ids=None, inputs_embeds=None):
        x = self.language_model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states, _ = self.language_model(x, torch.arange(x.shape[1])[None])
        return hidden_states


IDS = torch.tensor([[1, IMG, IMG, 5, 6, 7], [1, 5, 6, IMG, IMG, 7]])


def model_and_embeddings():
    model = FromEmbeddings(tiny_vlm().config)
    return model, model.language_model.embed_tokens(IDS)


def test_embeddings_are_refused_without_a_mask_and_adapted_with_one():
    model, x = model_and_embeddings()
    base = model(inputs_embeds=x)
    adapter = attach_trained(model)
    with pytest.raises(ValueError, match="which tokens are visual"):
        model(inputs_embeds=x)
    with adapter.visual_mask(IDS == IMG):
        adapted = model(inputs_embeds=x)
        with adapter.disabled():
            assert torch.equal(model(inputs_embeds=x), base)
    assert torch.equal(adapted, model(input_ids=IDS))
    assert torch.autograd.grad(adapted.sum(), x)[0].any()


def test_input_ids_come_before_a_mask_and_the_same_embeddings_may_come_under_another_one():
    model, x = model_and_embeddings()
    adapter = attach_trained(model)
    adapted = model(input_ids=IDS)
    with adapter.visual_mask(IDS == IMG):
        assert torch.equal(model(inputs_embeds=x), adapted)
    with adapter.visual_mask((IDS == IMG).flip(0)):
        assert torch.equal(model(input_ids=IDS), adapted)
        assert not torch.equal(model(inputs_embeds=x), adapted)


def test_a_mask_has_the_shape_of_the_batch():
    """generate() repeats each prompt for its beams, and so must whoever gives the mask."""
    model, x = model_and_embeddings()
    adapter = attach_trained(model)
    beams = x.repeat_interleave(2, 0)
    mask = IDS == IMG
    with adapter.visual_mask(mask.repeat_interleave(2, 0)):
        torch.testing.assert_close(model(inputs_embeds=beams), model(input_ids=IDS).repeat_interleave(2, 0))
    with adapter.visual_mask(mask), pytest.raises(RuntimeError, match="repeat_interleave"):
        model(inputs_embeds=beams)
    with pytest.raises(ValueError, match=r"bool tensor \[B, T\]"):
        adapter.visual_mask(mask.float())


def test_a_prompt_may_be_prefilled_in_two_parts():
    """M is found anew for each of them: here for each of two images."""
    model = tiny_vlm()
    attach_trained(model)
    batch = prompt(BEFORE + IMAGE + IMAGE + AFTER)
    ids = batch["input_ids"]
    pictures = batch["pixel_values"]
    cut = len(BEFORE + IMAGE)
    first = model(ids[:, :cut], pictures[:1])
    second = model(ids[:, cut:], pictures[1:], past_key_values=first.past_key_values)
    in_parts = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(in_parts, logits_of(model, batch), rtol=1e-4, atol=1e-4)


def test_under_autocast_text_is_the_base_models_bit_for_bit_and_every_gradient_is_finite():
    model = tiny_vlm()
    text = prompt(TEXT)
    with torch.autocast(model.device.type, torch.bfloat16):
        base = logits_of(model, text)
        attach_trained(model)
        assert torch.equal(logits_of(model, text), base)
        gradients = slopes(model, loss_of(model, EARLY))
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.any()


# 2. Options, state dicts, types and devices
def test_without_train_gamma_it_stays_one_and_the_rest_is_trained_saved_and_loaded(tmp_path):
    model = tiny_vlm()
    adapter = attach(model, train_gamma=False)
    for layer in adapter.layers.values():
        assert layer.gamma.item() == 1
        assert not layer.gamma.requires_grad
        nn.init.normal_(layer.B)
    gradients = slopes(model, loss_of(model, EARLY))
    assert len(gradients) == 2 * len(adapter.layers)  # of A and B
    assert all(gradient.any() for gradient in gradients)

    expected = logits_of(model, EARLY)
    adapter.save(tmp_path / "adapter.pt")
    loaded = load(adapter.detach(), tmp_path / "adapter.pt")
    assert torch.equal(logits_of(model, EARLY), expected)
    for layer in loaded.layers.values():
        assert layer.gamma.item() == 1


def test_an_averaged_state_dict_loads_and_one_of_the_base_leaves_the_adapter():
    model = tiny_vlm()
    adapter = attach_trained(model, heads=SOME_HEADS)
    other = tiny_vlm()
    attach(other, heads=adapter.heads)
    averaged = {name: 0.7 * tensor + 0.3 * tensor for name, tensor in model.state_dict().items()}
    other.load_state_dict(averaged)
    torch.testing.assert_close(logits_of(other, EARLY), logits_of(model, EARLY))
    other.load_state_dict(tiny_vlm().state_dict(), strict=False)
    torch.testing.assert_close(logits_of(other, EARLY), logits_of(model, EARLY))


OTHERS = [  # heads or a scale unlike those of SOME_HEADS
    {"heads": {0: [2], 2: [0, 1]}},
    {"heads": {0: [1]}},
    {"heads": {0: [1], 1: [0], 2: [0, 1]}},
    {"heads": {0: [1], 2: [0, 1, 2]}},
    {"heads": SOME_HEADS, "normalize": False},
]


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_a_state_dict_of_other_heads_or_of_another_scale_is_refused(options):
    model = tiny_vlm()
    attach_trained(model, heads=SOME_HEADS)
    other = tiny_vlm()
    attach(other, **options)
    with pytest.raises(RuntimeError, match="same heads|size mismatch"):
        other.load_state_dict(model.state_dict(), strict=False)


def test_a_state_dict_on_meta_holds_parameters_alone_and_takes_a_state_dict():
    """accelerate's cpu_ram_efficient_loading takes every entry of a meta model's state dict for a parameter."""
    model = tiny_vlm()
    adapter = attach_trained(model)
    on_meta = tiny_vlm()
    attach(on_meta)
    on_meta.to("meta")
    assert "image_lora._extra_state" in model.state_dict()
    assert "image_lora._extra_state" not in on_meta.state_dict()

    without_extra_state = {name: t for name, t in model.state_dict().items() if "_extra_state" not in name}
    for state in (on_meta.state_dict(), without_extra_state, model.state_dict()):
        on_meta.load_state_dict(state, assign=True)
    for parameter, expected in zip(on_meta.image_lora.parameters(), adapter.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_a_narrower_type_is_the_models_alone():
    """A, B and gamma are float32, or wider where the model is."""
    model = tiny_vlm()
    adapter = attach_trained(model)
    trained = [parameter.clone() for parameter in adapter.parameters()]
    model.bfloat16()
    assert attention(model, 0).v_proj.weight.dtype == torch.bfloat16
    for parameter, expected in zip(adapter.parameters(), trained, strict=True):
        assert torch.equal(parameter, expected)
        assert parameter.dtype == torch.float32
    model.double()
    assert adapter.layers["0"].A.dtype == torch.double
    model.float()
    assert adapter.layers["0"].A.dtype == torch.float32


@pytest.fixture
def default_dtype():
    """Sets torch's default type, until the test ends."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("probe", ["rank1", "exact"])
def test_torchs_default_type_and_device_change_nothing(probe, default_dtype):
    model = tiny_vlm()
    scores = score_heads(model, [EARLY], probe=probe)
    default_dtype(torch.bfloat16)
    with torch.device("meta"):
        assert torch.equal(score_heads(model, [EARLY], probe=probe), scores)
        adapter = attach(model)
    for parameter in adapter.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.device == model.device


def test_a_seed_starts_alike_on_every_device_and_to_empty_does_not_lose_the_heads():
    random_states = []
    for device in (torch.device("meta"), torch.get_default_device()):
        torch.manual_seed(0)
        with device:
            adapter = ValueAdapter(D, D_H, H, [0, 2], r=2, lora_alpha=4).to_empty(device=device)
        random_states.append(torch.get_rng_state())
    assert torch.equal(*random_states)
    for parameter in adapter.parameters():
        nn.init.ones_(parameter)
    update = adapter.add_update(torch.ones(1, 1, D), torch.zeros(1, 1, H * D_H), torch.tensor([0]))
    assert update.view(H, D_H).any(1).tolist() == [True, False, True]


# 3. Threads, coroutines, interrupts
def test_a_context_is_of_its_coroutine_or_thread():
    """Also where two overlap in one thread; asyncio.to_thread() takes it along."""
    model = tiny_vlm()
    base = logits_of(model, EARLY)
    adapter = attach_trained(model)

    async def is_base_inside(context):
        with context:
            await asyncio.sleep(0)  # the other coroutines enter their contexts
            here = torch.equal(logits_of(model, EARLY), base)
            in_a_thread = torch.equal(await asyncio.to_thread(logits_of, model, EARLY), base)
        return here, in_a_thread

    async def all_at_once():
        contexts = adapter.disabled(), nullcontext(), adapter.disabled()
        return await asyncio.gather(*(is_base_inside(context) for context in contexts))

    assert asyncio.run(all_at_once()) == [(True, True), (False, False), (True, True)]
    assert not torch.equal(logits_of(model, EARLY), base)


def test_contexts_may_end_in_any_order():
    """As those of two streams that one thread serves in turns."""
    model = tiny_vlm()
    base = logits_of(model, EARLY)
    adapter = attach_trained(model)
    adapted = logits_of(model, EARLY)
    first = adapter.disabled()
    second = adapter.disabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits_of(model, EARLY), base)
    second.__exit__(None, None, None)
    assert torch.equal(logits_of(model, EARLY), adapted)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_interrupted_call_leaves_nothing_behind(error):
    """The next call goes by its own visual tokens. After Ctrl-C a checkpointed layer may be refused until then."""
    model = checkpoint_layers(tiny_vlm())
    adapter = attach_trained(model)
    expected = slopes(model, loss_of(model, LATE))
    loss = loss_of(model, LATE)

    def interrupt(module, args):
        raise error

    handle = model.language_model.layers[1].register_forward_pre_hook(interrupt)
    mask = adapter.visual_mask(EARLY["input_ids"] == IMG)
    for context in (nullcontext(), adapter.disabled(), mask, torch.no_grad()):
        with pytest.raises(error), context:
            model(**EARLY)
    with pytest.raises(error):
        model(**prompt(TEXT))
    handle.remove()

    try:
        gradients = slopes(model, loss)
    except RuntimeError as refused:
        assert error is KeyboardInterrupt
        assert "clone" in str(refused)
    else:
        torch.testing.assert_close(gradients, expected)
    torch.testing.assert_close(slopes(model, loss_of(model, LATE)), expected)


# 4. Gradient checkpointing runs a layer again
def checkpoint_module(module, use_reentrant=False):
    forward = module.forward

    def checkpointed(*args, **kwargs):
        return checkpoint(forward, *args, use_reentrant=use_reentrant, **kwargs)

    module.forward = checkpointed


def require_gradient(module, args, output):
    return output.requires_grad_()


def checkpoint_layers(model, use_reentrant=False, input_grads=True):
    """The model, with each decoder layer checkpointed. input_grads: as enable_input_require_grads() does."""
    for layer in model.language_model.layers:
        checkpoint_module(layer, use_reentrant)
    if input_grads:
        model.language_model.embed_tokens.register_forward_hook(require_gradient)
    return model


def after_other_steps(model):
    loss = loss_of(model, EARLY)
    for _ in range(20):
        slopes(model, loss_of(model, LATE))
    with model.image_lora.disabled():
        slopes(model, loss_of(model, LATE))
    return slopes(model, loss)


def after_its_first_backward_pass(model):
    loss = loss_of(model, EARLY)
    slopes(model, loss)
    return slopes(model, loss)


def after_generate(model):
    loss = loss_of(model, EARLY)
    model.generate(LATE["input_ids"], LATE["pixel_values"])
    return slopes(model, loss)


def of_a_disabled_forward_pass(model):
    with model.image_lora.disabled():
        loss = loss_of(model, EARLY)
    return slopes(model, loss)


def of_two_losses(model):
    return slopes(model, loss_of(model, EARLY), loss_of(model, LATE))


def in_two_threads_at_once(model):
    """The threads meet in layer 1, also where it is run again, and the main thread is inside disabled()."""
    parties = 2 if model.device.type == "cpu" else 1  # on other devices all backward passes run in one thread
    barrier = threading.Barrier(parties, timeout=60)

    def meet(norm, args):
        barrier.wait()

    model.language_model.layers[1].input_layernorm.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool, model.image_lora.disabled():
        losses = list(pool.map(loss_of, [model, model], [EARLY, LATE]))
        list(pool.map(torch.autograd.backward, losses))
    return [parameter.grad for parameter in model.image_lora.parameters()]


def of_a_checkpoint_that_holds_the_model(model):
    return slopes(model, checkpoint(loss_of, model, EARLY, use_reentrant=False))


CHECKPOINTED = [  # what happens to a checkpointed model, and the batches whose gradients must come of it
    (after_other_steps, [EARLY]),
    (after_its_first_backward_pass, [EARLY]),
    (after_generate, [EARLY]),
    (of_a_disabled_forward_pass, []),
    (of_two_losses, [EARLY, LATE]),
    (in_two_threads_at_once, [EARLY, LATE]),
    (of_a_checkpoint_that_holds_the_model, [EARLY]),
]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "re-entrant"])
@pytest.mark.parametrize("gradients, batches", CHECKPOINTED)
def test_a_layer_that_is_run_again_goes_by_its_own_forward_pass(gradients, batches, use_reentrant):
    model = tiny_vlm()
    attach_trained(model, heads=SOME_HEADS)
    losses = [loss_of(model, batch) for batch in batches]
    expected = slopes(model, 0 * loss_of(model, EARLY), *losses)
    model.zero_grad()
    checkpoint_layers(model, use_reentrant)
    torch.testing.assert_close(gradients(model), expected)


class OtherBlock(Block):
    """A decoder layer whose first norm has another name."""

    def forward(self, x, angles=None, mask=None, past=None):
        norm = getattr(self, self.norm_name)
        y, present = self.self_attn(norm(x), angles, mask, self.causal, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), present


class KeywordLinear(nn.Linear):
    """A projection that gets its input by keyword."""

    def __call__(self, x):
        return super().__call__(**{self.keyword: x})

    def forward(self, **kwargs):
        return super().forward(kwargs[self.keyword])


def rename_norm(layer, name):
    layer.__class__ = OtherBlock
    layer.norm_name = name
    setattr(layer, name, layer.input_layernorm)
    del layer.input_layernorm


def call_v_proj_by(layer, keyword):
    layer.self_attn.v_proj.__class__ = KeywordLinear
    layer.self_attn.v_proj.keyword = keyword


OTHERWISE = [
    (rename_norm, "operator_norm"),
    (rename_norm, "attention_layernorm"),
    (call_v_proj_by, "input"),
    (call_v_proj_by, "hidden_states"),
]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "re-entrant"])
@pytest.mark.parametrize("change, name", OTHERWISE)
def test_a_norm_may_have_another_name_and_v_proj_may_be_called_by_keyword(change, name, use_reentrant):
    usual = tiny_vlm()
    attach_trained(usual)
    model = tiny_vlm()
    for layer in model.language_model.layers:
        change(layer, name)
    attach_trained(model)
    checkpoint_layers(model, use_reentrant)
    torch.testing.assert_close(slopes(model, loss_of(model, EARLY)), slopes(usual, loss_of(usual, EARLY)))


def reuse_one_buffer(model):
    """As an inference server does: the decoder's input always lies in the same memory."""
    buffer = torch.zeros(1, EARLY["input_ids"].shape[1], D)

    def write(decoder, args):
        x, *others = args
        return buffer.copy_(x), *others

    model.language_model.register_forward_pre_hook(write)


def test_a_buffer_may_be_reused_where_no_gradient_is_wanted():
    model = tiny_vlm()
    attach_trained(model)
    expected = logits_of(model, LATE)
    reuse_one_buffer(model)
    logits_of(model, EARLY)
    assert torch.equal(logits_of(model, LATE), expected)


def test_a_buffer_that_a_backward_pass_may_need_is_not_reused():
    model = tiny_vlm()
    attach_trained(model)
    reuse_one_buffer(model)
    losses = [loss_of(model, EARLY)]
    with pytest.raises(RuntimeError, match="clone"):
        losses.append(loss_of(model, LATE))


# 5. Copies, compiled code, wrappers
def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_a_copy_is_a_model_of_its_own(copied):
    model = tiny_vlm()
    attach_trained(model, heads=SOME_HEADS)
    expected = slopes(model, loss_of(model, EARLY))
    twin = copied(model)
    for layer in model.image_lora.layers.values():
        layer.gamma.data.zero_()
    torch.testing.assert_close(slopes(twin, loss_of(twin, EARLY)), expected)
    twin.image_lora.detach()
    assert state_of(twin) == state_of(tiny_vlm())
    assert hasattr(model, "image_lora")


@pytest.mark.parametrize("what, limit", [("model", 2), ("layers", 8)])
def test_compiled_code_follows_attach_disabled_and_detach(what, limit):
    """Also where the compiler gives up, after `limit` variants of the code."""
    torch._dynamo.config.cache_size_limit = limit  # 8, torch's own, comes last
    model = tiny_vlm(num_hidden_layers=1)
    twin = tiny_vlm(num_hidden_layers=1)
    compiled = model
    if what == "model":
        compiled = torch.compile(model, backend="eager")
    else:
        for layer in model.language_model.layers:
            layer.compile(backend="eager")
    loss_of(compiled, EARLY)
    logits_of(compiled, EARLY)
    adapter = attach_trained(compiled)  # it looks through torch.compile's wrapper
    twin_adapter = attach_trained(twin)
    twin_adapter.load_state_dict(adapter.state_dict())
    for batch in (EARLY, prompt(IMAGE + AFTER, AFTER + IMAGE), prompt(TEXT)):
        gradients = slopes(model, loss_of(compiled, batch))
        torch.testing.assert_close(gradients, slopes(twin, loss_of(twin, batch)), rtol=1e-4, atol=1e-4)
        with adapter.disabled(), twin_adapter.disabled():
            torch.testing.assert_close(logits_of(compiled, batch), logits_of(twin, batch))
    adapter.detach()
    twin_adapter.detach()
    torch.testing.assert_close(logits_of(compiled, LATE), logits_of(twin, LATE))


def wrap_forward(module, calls: list):
    """As accelerate does: the module's own forward, in a function that notes that it was called."""
    forward = module.forward

    def wrapped(*args, **kwargs):
        calls.append(module)
        return forward(*args, **kwargs)

    module.forward = wrapped


def test_what_others_wrap_around_a_forward_works_and_stays_theirs_after_detach():
    model = tiny_vlm()
    base = logits_of(model, EARLY)
    adapter = attach_trained(model)
    adapted = logits_of(model, EARLY)
    calls = []
    wrap_forward(attention(model, 0).v_proj, calls)
    wrap_forward(model.language_model.layers[0].input_layernorm, calls)
    assert torch.equal(logits_of(model, EARLY), adapted)
    adapter.detach()
    assert torch.equal(logits_of(model, EARLY), base)
    assert len(calls) == 4


def test_what_others_have_wrapped_before_may_go_again():
    model = tiny_vlm()
    v_proj = attention(model, 0).v_proj
    norm = model.language_model.layers[0].input_layernorm
    wrap_forward(v_proj, [])
    wrap_forward(norm, [])
    attach_trained(model)
    adapted = logits_of(model, EARLY)
    del v_proj.forward
    del norm.forward
    assert torch.equal(logits_of(model, EARLY), adapted)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "re-entrant"])
def test_the_forward_of_a_norm_may_be_replaced(use_reentrant):
    """As Liger does: it gives each norm another forward, which computes the same."""
    model = tiny_vlm()
    attach_trained(model)
    expected = slopes(model, loss_of(model, EARLY))

    def replace_forward(norm):
        def forward(x):
            return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()

        norm.forward = forward

    for layer in model.language_model.layers:
        replace_forward(layer.input_layernorm)
    checkpoint_layers(model, use_reentrant)
    torch.testing.assert_close(slopes(model, loss_of(model, EARLY)), expected)


def test_detach_works_after_v_proj_was_replaced_and_leaves_alone_what_came_after_attach():
    model = tiny_vlm()
    adapter = attach_trained(model)
    attention(model, 2).v_proj = nn.Linear(D, H * D_H, bias=False)
    model.added = nn.Linear(1, 1)
    adapter.detach()
    assert not hasattr(model, "image_lora")
    assert model.added.weight.requires_grad
    assert attention(model, 0).q_proj.weight.requires_grad


def test_a_detached_adapter_does_not_keep_the_model_in_memory():
    model = tiny_vlm()
    adapter = attach_trained(model)
    layer = weakref.ref(model.language_model.layers[0])
    adapter.detach()
    del model
    gc.collect()
    assert layer() is None


# 6. FSDP2: two processes, one with images and one with text alone
def train_two_steps(model, adapter, *batches):
    """On the mean of the losses of these batches."""
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss = sum(loss_of(model, batch) for batch in batches) / len(batches)
        loss.backward()
        optimizer.step()


def train_sharded(rank: int, folder: Path):
    """One of two processes. It leaves its adapter in rank{rank}.adapter.pt, the rest in rank{rank}.pt."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = tiny_vlm()
    adapter = attach_trained(model)
    for layer in model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = {"is_sharded": [hasattr(parameter, "full_tensor") for parameter in model.parameters()]}

    train_two_steps(model, adapter, EARLY if rank == 0 else prompt(TEXT))
    found["gradients"] = [parameter.grad.full_tensor() for parameter in adapter.parameters()]
    found["parameters"] = [parameter.detach().full_tensor() for parameter in adapter.parameters()]
    found["logits"] = logits_of(model, EARLY)
    found["logits_of_text"] = logits_of(model, prompt(TEXT))
    adapter.save(folder / f"rank{rank}.adapter.pt")

    already_sharded = fully_shard(tiny_vlm(), mesh=mesh)
    found["refusal"] = "none"
    try:
        attach(already_sharded)
    except ValueError as refused:
        found["refusal"] = str(refused)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()  # so that neither leaves while the other still talks to it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folder that two processes have left."""
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(train_sharded, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_two_sharded_processes_train_as_one(sharded, rank):
    found = torch.load(sharded / f"rank{rank}.pt", weights_only=True)
    model = tiny_vlm()
    base_of_text = logits_of(model, prompt(TEXT))
    adapter = attach_trained(model)
    train_two_steps(model, adapter, EARLY, prompt(TEXT))
    assert all(found["is_sharded"])
    torch.testing.assert_close(found["gradients"], [parameter.grad for parameter in adapter.parameters()])
    torch.testing.assert_close(found["parameters"], [parameter.detach() for parameter in adapter.parameters()])
    torch.testing.assert_close(found["logits"], logits_of(model, EARLY))
    assert torch.equal(found["logits_of_text"], base_of_text)

    one_process = tiny_vlm()
    load(one_process, sharded / f"rank{rank}.adapter.pt")
    torch.testing.assert_close(logits_of(one_process, EARLY), found["logits"])


def test_a_sharded_model_is_refused_as_nobody_would_average_the_adapters_gradients(sharded):
    found = torch.load(sharded / "rank0.pt", weights_only=True)
    assert "attach first, then shard" in found["refusal"]


# 7. Files
def check_refusal(model, sentence, function, *args, **kwargs):
    """ValueError in one line, and the model stays as it was."""
    before = state_of(model)
    with pytest.raises(ValueError, match=f"^[^\n]*{sentence}[^\n]*$"):
        function(*args, **kwargs)
    assert state_of(model) == before


class Exploit(str):
    """Unpickled without care, it makes a file of that name."""

    def __reduce__(self):
        return Path.touch, (Path(self),)


def saved_adapter(path: Path):
    adapter = attach_trained(tiny_vlm(), r=2, heads=SOME_HEADS)
    adapter.save(path)
    return adapter


def test_the_authors_files_have_no_keys_of_ours_and_their_own_order_of_heads(tmp_path):
    path = tmp_path / "adapter.pt"
    adapter = saved_adapter(path)
    content = torch.load(path, weights_only=True)
    del content["normalize"]
    del content["head_counts"]
    content["kv_indices"]["2"] = [1, 0]
    content["layers"]["2"]["B"] = content["layers"]["2"]["B"].flip(0)
    torch.save(content, path)
    loaded = load(tiny_vlm(), path)
    assert loaded.normalize
    for parameter, expected in zip(loaded.parameters(), adapter.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def outcome_of_loading(path: Path, expected: dict) -> str:
    """'refused', if in one sentence, 'right' or 'wrong'."""
    try:
        loaded = load(tiny_vlm(), path).state_dict()
    except ValueError as error:
        return "refused" if re.fullmatch(r"[^\n]*not a PyTorch file[^\n]*", str(error)) else str(error)
    same = loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    return "right" if same else "wrong"


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """At every 53rd byte, and in each entry of the zip's directory."""
    path = tmp_path / "adapter.pt"
    expected = saved_adapter(path).state_dict()
    whole = path.read_bytes()
    places = list(range(0, len(whole), 53))
    places += [entry.start() + 33 for entry in re.finditer(b"PK\1\2", whole)]
    outcomes = set()
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        outcomes.add(outcome_of_loading(path, expected))
    assert outcomes == {"refused", "right"}


def test_what_is_no_saved_adapter_is_refused_and_runs_no_code(tmp_path):
    path = tmp_path / "adapter.pt"
    made = tmp_path / "made"
    saved_adapter(path)
    half = path.read_bytes()[: path.stat().st_size // 2]
    for content in (half, b"", b"not a model\n", pickle.dumps(Exploit(made))):
        path.write_bytes(content)
        assert outcome_of_loading(path, {}) == "refused"
    for content in ([1, 2], {"r": Exploit(made)}):
        torch.save(content, path)
        assert outcome_of_loading(path, {}) == "refused"
    assert outcome_of_loading(tmp_path / "missing.pt", {}) == "refused"
    assert not made.exists()


MISFITS = [  # a key of the file, or of its layer 0, and a value that does not fit
    ("r", 3),
    ("alpha", 0.0),
    ("normalize", "no"),
    ("head_counts", [3, 3]),
    ("layers", {}),
    ("kv_indices", None),
    ("kv_indices", {"0": [1]}),
    ("kv_indices", {"0": [3], "2": [0, 1]}),
    ("kv_indices", {"0": [1], "2": [0]}),
    ("kv_indices", {"0": [1], "2": [0, 1], "1": [0]}),
    ("A", 1),
    ("A", torch.ones(2, D)),
    ("A", torch.ones(D, 2, dtype=torch.long)),
    ("A", torch.full((D, 2), 1e300, dtype=torch.double)),
    ("B", torch.ones(1, 2, 3)),
    ("B", torch.full((1, 2, D_H), math.nan)),
    ("C", torch.ones(1)),
    ("hidden_size", 48),  # this and the next are sizes of the model
    ("num_hidden_layers", 2),
    ("num_key_value_heads", 1),
]


@pytest.mark.parametrize("key, value", MISFITS)
def test_an_adapter_file_that_does_not_fit_leaves_the_model_as_it_was(key, value, tmp_path):
    path = tmp_path / "adapter.pt"
    saved_adapter(path)
    content = torch.load(path, weights_only=True)
    model = tiny_vlm()
    if hasattr(model.config, key):
        model = tiny_vlm(**{key: value})
    elif key in ("A", "B", "C"):
        content["layers"]["0"][key] = value
    else:
        content[key] = value
    torch.save(content, path)
    check_refusal(model, r"adapter\.pt does not fit this model", load, model, path)


def test_a_file_is_not_loaded_into_a_model_without_weights(tmp_path):
    path = tmp_path / "adapter.pt"
    saved_adapter(path)
    with pytest.raises(ValueError, match="on the meta device"):
        load(tiny_vlm().to("meta"), path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "adapter.pt"
    adapter = saved_adapter(path)
    saved = path.read_bytes()

    def disk_is_full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("os.replace", disk_is_full)
        adapter.save(path)
    adapter.layers["2"].A.data.fill_(math.nan)
    with pytest.raises(ValueError, match="A of layer 2 .*not finite"):
        adapter.save(path)
    adapter.layers["2"].A.data = torch.zeros(0)  # as DeepSpeed's ZeRO-3 leaves it
    with pytest.raises(ValueError, match="GatheredParameters"):
        adapter.save(path)
    assert path.read_bytes() == saved
    assert list(tmp_path.iterdir()) == [path]


def test_an_adapter_that_was_frozen_before_its_training_is_not_saved(tmp_path):
    trained = attach_trained(tiny_vlm()).requires_grad_(False)
    trained.save(tmp_path / "adapter.pt")
    untrained = attach(tiny_vlm()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"get_peft_model\(\)"):
        untrained.save(tmp_path / "untrained.pt")


# 8. What cannot be right is refused in one sentence
X = torch.zeros(1, 7, D)


@torch.no_grad()
def v_proj_alone(model):
    attention(model, 0).v_proj(X)


def a_layer_after_a_call(model):
    model(**EARLY)
    model.language_model.layers[0](X)


def a_layer_with_a_part_of_its_input(model):
    layer = model.language_model.layers[0]
    ((x, _),) = watch(model, EARLY, layer.input_layernorm)
    layer(x[:, :5])


def the_models_forward(model):
    model.forward(**EARLY)


def a_layer_whose_input_was_offloaded(model):
    checkpoint_layers(model)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):  # offloading copies, too
        loss_of(model, EARLY).backward()


def a_checkpoint_of_several_layers(model):
    checkpoint_module(model.language_model)
    model.language_model.embed_tokens.register_forward_hook(require_gradient)
    loss_of(model, EARLY).backward()


def a_checkpoint_without_input_gradients(model):
    checkpoint_layers(model, use_reentrant=True, input_grads=False)
    loss_of(model, EARLY)


def another_v_proj(model):
    attention(model, 2).v_proj = nn.Linear(D, H * D_H)
    model(**EARLY)


def heads_split_over_devices(model):
    model.image_lora.layers["0"].add_update(X, X[..., :4], torch.tensor([0]))


def by_jit_trace(model):
    torch.jit.trace(model, (EARLY["input_ids"], EARLY["pixel_values"]))


def by_strict_export(model):
    torch.export.export(model, (EARLY["input_ids"], EARLY["pixel_values"]), strict=True)


def by_export(model):
    torch.export.export(model, (EARLY["input_ids"], EARLY["pixel_values"]), strict=False)


def called_inside_its_own_forward_pass(model):
    def call_again(layer, args, output):
        hook.remove()
        model(**LATE)

    hook = model.language_model.layers[-1].register_forward_hook(call_again)
    model(**EARLY)


def detached_twice(model):
    adapter = model.image_lora
    adapter.detach()
    adapter.detach()


def disabled_after_detach(model):
    adapter = model.image_lora
    attach(adapter.detach())
    with adapter.disabled():
        pass


TELLS_EXPORT = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="torch refuses it in its own words"
)
NOT_RIGHT = [
    (v_proj_alone, "no call of model"),
    (a_layer_after_a_call, "no call of model"),
    (a_layer_with_a_part_of_its_input, "no call of model|repeat_interleave"),
    (the_models_forward, "no call of model"),
    (a_layer_whose_input_was_offloaded, "no call of model"),
    (a_checkpoint_of_several_layers, "no call of model"),
    (a_checkpoint_without_input_gradients, "enable_input_require_grads"),
    (another_v_proj, "was not called"),
    (heads_split_over_devices, "4 features instead of 3 heads of 4"),
    (by_jit_trace, "would fix which tokens are visual"),
    pytest.param(by_strict_export, "would fix which tokens are visual", marks=TELLS_EXPORT),
    (by_export, "would fix which tokens are visual"),
    (called_inside_its_own_forward_pass, "inside its own forward pass"),
    (detached_twice, "already detached"),
    (disabled_after_detach, "is detached"),
]


@pytest.mark.parametrize("use, sentence", NOT_RIGHT)
def test_a_use_that_cannot_be_right_is_refused(use, sentence):
    model = tiny_vlm()
    attach_trained(model, heads=SOME_HEADS)
    with pytest.raises(RuntimeError, match=sentence):
        use(model)


class Wrapper(nn.Module):
    """As PEFT wraps a Linear."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def forward(self, x):
        return self.base_layer(x)


def test_a_second_adapter_is_noticed_under_what_has_wrapped_v_proj_since():
    model = tiny_vlm()
    attach(model)
    for layer in range(3):
        attention(model, layer).v_proj = Wrapper(attention(model, layer).v_proj)
    with pytest.raises(ValueError, match="already has an Image-LoRA"):
        attach(model)


def test_a_second_adapter_would_double_the_update():
    """Also under PEFT's wrapper, which tells the model inside."""
    model = tiny_vlm()
    adapter = attach(model)
    wrapped = SimpleNamespace(get_base_model=lambda: model)
    for user in (model, wrapped):
        with pytest.raises(ValueError, match="already has an Image-LoRA"):
            attach(user)
    adapter.detach()
    attach(wrapped)


OPTIONS = [
    ({"r": 0}, r"r must be an integer in 1\.\.24"),
    ({"r": True}, r"r must be an integer in 1\.\.24"),
    ({"lora_alpha": math.nan}, "lora_alpha must be"),
    ({"normalize": "no"}, "normalize and train_gamma must be"),
    ({"heads": {0: []}}, "no head is selected"),
    ({"heads": [1]}, "heads must be {layer:"),
    ({"heads": {3: [0]}}, "no layer 3;"),
    ({"heads": {-1: [0]}}, "no layer -1;"),  # would be the last layer
    ({"heads": {"0": [0]}}, "no layer '0';"),
    ({"heads": {True: [0]}}, "no layer True;"),  # would be layer 1
    ({"heads": {0: [3]}}, "layer 0 "),  # would be head 0 of the next token
    ({"heads": {0: [-1]}}, "layer 0 "),
    ({"heads": {0: [True]}}, "layer 0 "),
    ({"heads": {0: [1, 1]}}, "layer 0 "),
]


@pytest.mark.parametrize("options, sentence", OPTIONS, ids=str)
def test_an_option_of_attach_that_cannot_be_is_refused(options, sentence):
    model = tiny_vlm()
    check_refusal(model, sentence, attach, model, **options)


SELECTIONS = [  # scores, heads in all, tau
    (torch.ones(2, 2), 5, 0.5, r"num_heads must be an integer in 1\.\.4"),
    (torch.ones(2, 2), True, 0.5, r"num_heads must be an integer in 1\.\.4"),
    (torch.ones(2, 2), 2, math.nan, "tau must be"),
    (torch.ones(2), 1, 0.5, "scores must be"),
    (torch.tensor([[-1.0]]), 1, 0.5, "scores must be"),
    (torch.tensor([[math.inf]]), 1, 0.5, "scores must be"),
]


@pytest.mark.parametrize("scores, num_heads, tau, sentence", SELECTIONS)
def test_a_selection_that_cannot_be_is_refused(scores, num_heads, tau, sentence):
    with pytest.raises(ValueError, match=sentence):
        select_heads(scores, num_heads, tau)


NO_LABELS = EARLY | {"labels": torch.full((1, 7), -100)}
PROBES = [
    ([EARLY], "rank2", "must be 'rank1' or 'exact', got 'rank2'"),
    ([], "rank1", "none of the 0 probe batches"),
    ([prompt(TEXT, labels=True)], "rank1", "none of the 1 probe batches"),
    ([prompt(IMAGE)], "rank1", "loss of probe batch 0 is None"),
    ([EARLY, NO_LABELS], "rank1", "probe batch 1 is nan"),
]


@pytest.mark.parametrize("batches, probe, sentence", PROBES)
def test_a_probe_that_would_tell_nothing_is_refused(batches, probe, sentence):
    model = tiny_vlm()
    check_refusal(model, sentence, score_heads, model, batches, probe=probe)


ATTENTION = "language_model.layers.1.self_attn"
MODELS = [  # a module of the model, its attribute, and a value with which it cannot be adapted
    ("", "config", None, "config has no image_token_id"),  # as DistributedDataParallel has none
    ("", "language_model", None, "found none"),
    (ATTENTION, "v_proj", None, "layers.1 has no self_attn.v_proj"),
    (ATTENTION, "v_proj", nn.Sequential(), "has no out_features"),
    (ATTENTION, "v_norm", nn.Identity(), "after v_proj, in .*v_norm"),
    (ATTENTION, "head_dim", 5, "head_dim is 5"),
]


@pytest.mark.parametrize("module, attribute, value, sentence", MODELS)
def test_a_model_that_cannot_be_adapted_is_refused(module, attribute, value, sentence):
    model = tiny_vlm()
    setattr(model.get_submodule(module), attribute, value)
    check_refusal(model, sentence, attach, model)


def test_layers_that_share_a_v_proj_are_refused():
    model = tiny_vlm()
    attention(model, 1).v_proj = attention(model, 0).v_proj
    check_refusal(model, "share a v_proj", attach, model)
