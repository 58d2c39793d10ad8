"""What engineering promises beyond the paper: masks, threads, checkpointing, copies, sharding, files, refusals."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from imagelora import attach, load, score_heads, select_heads
from test_imagelora import (
    AFTER,
    BEFORE,
    EARLY,
    IMAGE,
    IMG,
    LATE,
    TEXT,
    D,
    attach_trained,
    attention,
    logits_of,
    loss_of,
    prompt,
    slopes,
    state_of,
    tiny_vlm,
)
from tiny_vlm import TinyVLM

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


def test_a_state_dict_says_which_heads_its_tensors_belong_to():
    model = tiny_vlm()
    attach_trained(model, heads=SOME_HEADS)
    other = tiny_vlm()
    adapter = attach(other, heads={0: [2], 2: [1, 2]})
    other.load_state_dict(model.state_dict())
    assert adapter.heads == SOME_HEADS
    assert torch.equal(logits_of(other, EARLY), logits_of(model, EARLY))


# 3. Gradient checkpointing runs a layer again
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
    """The threads meet in layer 1, also where it is run again."""
    parties = 2 if model.device.type == "cpu" else 1  # on other devices all backward passes run in one thread
    barrier = threading.Barrier(parties, timeout=60)

    def meet(norm, args):
        barrier.wait()

    model.language_model.layers[1].input_layernorm.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
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


# 4. Copies
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


# 5. Two processes, one with images and one with text alone
def train_a_step(user, adapter, *batches):
    """On the mean of the losses of these batches."""
    loss = sum(loss_of(user, batch) for batch in batches) / len(batches)
    loss.backward()
    torch.optim.SGD(adapter.parameters(), lr=0.01).step()


def train_in_two_processes(rank: int, folder: Path):
    """One of two processes. It leaves an adapter and logits of each engine, and what attach() says when it is late."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for engine in ("DDP", "FSDP2"):
        model = tiny_vlm()
        adapter = attach_trained(model)
        user = model
        if engine == "DDP":
            user = nn.parallel.DistributedDataParallel(model)
        else:
            for module in (*model.language_model.layers, model):
                fully_shard(module, mesh=mesh)
            assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        train_a_step(user, adapter, EARLY if rank == 0 else prompt(TEXT))
        adapter.save(folder / f"{engine}{rank}.pt")
        logits = logits_of(user, EARLY), logits_of(user, prompt(TEXT))
        torch.save(logits, folder / f"{engine}{rank}.logits.pt")
    with pytest.raises(ValueError, match="attach first, then shard"):
        attach(fully_shard(tiny_vlm(), mesh=mesh))
    dist.barrier()  # so that neither leaves while the other still talks to it
    dist.destroy_process_group()


def test_two_processes_train_as_one_and_text_stays_the_bases_bit_for_bit(tmp_path):
    """Though one of them has no image. A model that is sharded already is refused."""
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    torch.multiprocessing.spawn(train_in_two_processes, (tmp_path,), nprocs=2)
    model = tiny_vlm()
    base_of_text = logits_of(model, prompt(TEXT))
    adapter = attach_trained(model)
    train_a_step(model, adapter, EARLY, prompt(TEXT))
    for saved in ("DDP0", "DDP1", "FSDP20", "FSDP21"):
        logits, logits_of_text = torch.load(tmp_path / f"{saved}.logits.pt")
        torch.testing.assert_close(logits, logits_of(model, EARLY))
        assert torch.equal(logits_of_text, base_of_text)
        loaded = load(tiny_vlm(), tmp_path / f"{saved}.pt")
        torch.testing.assert_close([*loaded.parameters()], [*adapter.parameters()])


# 6. Files
def saved_adapter(path: Path):
    adapter = attach_trained(tiny_vlm(), r=2, heads=SOME_HEADS)
    adapter.save(path)
    return adapter


def test_the_authors_files_have_no_keys_of_ours_and_their_own_order_of_heads(tmp_path):
    path = tmp_path / "adapter.pt"
    model = tiny_vlm()
    adapter = attach_trained(model, r=2, heads={0: [1], 2: [0, 1]})
    adapter.save(path)
    content = torch.load(path, weights_only=True)
    del content["normalize"]
    content["kv_indices"]["2"] = [1, 0]
    content["layers"]["2"]["B"] = content["layers"]["2"]["B"].flip(0)
    torch.save(content, path)
    other = tiny_vlm()
    load(other, path)
    torch.testing.assert_close(logits_of(other, EARLY), logits_of(model, EARLY))


def test_a_save_warns_if_nothing_was_learned_and_refuses_what_is_not_gathered(tmp_path):
    with pytest.warns(UserWarning, match=r"get_peft_model\(\)"):
        attach(tiny_vlm()).save(tmp_path / "untrained.pt")
    adapter = attach_trained(tiny_vlm())
    adapter.layers["2"].A.data = torch.zeros(0)  # as DeepSpeed's ZeRO-3 leaves it
    with pytest.raises(ValueError, match="GatheredParameters"):
        adapter.save(tmp_path / "adapter.pt")
    assert not (tmp_path / "adapter.pt").exists()


def test_an_adapter_of_other_sizes_does_not_load(tmp_path):
    saved_adapter(tmp_path / "adapter.pt")
    for sizes in ({"hidden_size": 48}, {"num_hidden_layers": 2}, {"num_key_value_heads": 1}):
        with pytest.raises((RuntimeError, ValueError), match="size mismatch|has no value heads"):
            load(tiny_vlm(**sizes), tmp_path / "adapter.pt")


# 7. What cannot be right is refused in one sentence
def check_refusal(model, sentence, function, *args, **kwargs):
    """ValueError in one line, and the model stays as it was."""
    before = state_of(model)
    with pytest.raises(ValueError, match=f"^[^\n]*{sentence}[^\n]*$"):
        function(*args, **kwargs)
    assert state_of(model) == before


X = torch.zeros(1, 7, D)


@torch.no_grad()
def v_proj_alone(model):
    attention(model, 0).v_proj(X)


def a_layer_after_a_call(model):
    model(**EARLY)
    model.language_model.layers[0](X)


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


def by_jit_trace(model):
    torch.jit.trace(model, (EARLY["input_ids"], EARLY["pixel_values"]))


def by_export(model):
    torch.export.export(model, (EARLY["input_ids"], EARLY["pixel_values"]), strict=False)


NOT_RIGHT = [
    (v_proj_alone, "no call of model"),
    (a_layer_after_a_call, "no call of model"),
    (the_models_forward, "no call of model"),
    (a_layer_whose_input_was_offloaded, "no call of model"),
    (a_checkpoint_of_several_layers, "no call of model"),
    (by_jit_trace, "would fix which tokens are visual"),
    (by_export, "would fix which tokens are visual"),
]


@pytest.mark.parametrize("use, sentence", NOT_RIGHT)
def test_a_use_that_cannot_be_right_is_refused(use, sentence):
    model = tiny_vlm()
    attach_trained(model, heads=SOME_HEADS)
    with pytest.raises(RuntimeError, match=sentence):
        use(model)


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


HEADS = [{3: [0]}, {-1: [0]}, {0: [3]}, {0: [-1]}]  # -1 would be the last layer, head 3 head 0 of the next token


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_that_do_not_exist_are_refused(heads):
    model = tiny_vlm()
    check_refusal(model, "has no value heads", attach, model, heads=heads)


def test_more_heads_than_there_are_cannot_be_selected():
    with pytest.raises(ValueError, match=r"num_heads must be in 1\.\.4"):
        select_heads(torch.ones(2, 2), 5)


NO_LABELS = EARLY | {"labels": torch.full((1, 7), -100)}
PROBES = [
    ([prompt(TEXT, labels=True)], "none of the 1 probe batches"),
    ([EARLY, NO_LABELS], "probe batch 1 is nan"),
]


@pytest.mark.parametrize("batches, sentence", PROBES)
def test_a_probe_that_would_tell_nothing_is_refused(batches, sentence):
    model = tiny_vlm()
    check_refusal(model, sentence, score_heads, model, batches)


ATTENTION = "language_model.layers.1.self_attn"
MODELS = [  # a module of the model, its attribute, and a value with which it cannot be adapted
    ("", "config", None, "config has no image_token_id"),  # as DistributedDataParallel has none
    ("", "language_model", None, "found none"),
    (ATTENTION, "v_proj", None, "layers.1 has no self_attn.v_proj"),
    (ATTENTION, "v_norm", nn.Identity(), "after v_proj, in .*v_norm"),
    (ATTENTION, "head_dim", 5, "head_dim is 5"),
]


@pytest.mark.parametrize("module, attribute, value, sentence", MODELS)
def test_a_model_that_cannot_be_adapted_is_refused(module, attribute, value, sentence):
    model = tiny_vlm()
    setattr(model.get_submodule(module), attribute, value)
    check_refusal(model, sentence, attach, model)
