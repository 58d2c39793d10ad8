"""What engineering promises beyond the paper: types, threads, checkpointing, copies, files, refusals."""

import copy
import io
import math
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.nn.quantized import dynamic as quantized
from torch.utils.checkpoint import checkpoint

from data.rivals import LoRA
from imagelora import attach, load, score_heads, select_heads, visual_rows
from test_imagelora import (
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
    lora,
    loss_of,
    prompt,
    slopes,
    tiny_vlm,
    watch,
)
from tiny_vlm import Attention, TinyVLM

SOME_HEADS = {0: [1], 2: [0, 1]}


def state_of(model) -> tuple:
    """What must be as before once an adapter is gone: attributes, hooks, what is trainable, gradients."""
    modules = []
    for name, module in model.named_modules():
        num_hooks = sum(len(value) for attribute, value in vars(module).items() if attribute.endswith("hooks"))
        modules.append((name, sorted(vars(module)), num_hooks))
    parameters = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    return modules, parameters


def check_refusal(sentence, function, model, *args, **kwargs):
    """ValueError in one line, and the model stays as it was."""
    before = state_of(model)
    with pytest.raises(ValueError, match=f"^[^\n]*{sentence}[^\n]*$"):
        function(model, *args, **kwargs)
    assert state_of(model) == before


# 1. The base, the probe, the heads
def test_factors_of_scaled_multiply_in_this_thread_and_coroutine_alone_and_0_is_the_base_bit_for_bit():
    """An exception ends these contexts, and that of another model's adapter changes nothing."""
    model = tiny_vlm()
    base = logits_of(model, EARLY)
    adapter = attach_trained(model)
    adapted = logits_of(model, EARLY)
    with adapter.scaled(0.4):
        expected = logits_of(model, EARLY)
    other = attach(tiny_vlm())
    task = copy_context()  # as asyncio makes one for each task
    with pytest.raises(ZeroDivisionError), adapter.scaled(0.5), other.disabled(), ThreadPoolExecutor(1) as pool:
        with adapter.scaled(0.8):
            assert torch.equal(logits_of(model, EARLY), expected)
        with adapter.disabled(), adapter.scaled(0.8):
            assert torch.equal(logits_of(model, EARLY), base)
        assert torch.equal(pool.submit(logits_of, model, EARLY).result(), adapted)
        assert torch.equal(task.run(logits_of, model, EARLY), adapted)
        raise ZeroDivisionError
    assert torch.equal(logits_of(model, EARLY), adapted)


def test_inside_scaled_the_update_is_multiplied_as_by_gamma():
    """For logits and gradients, though a checkpointed layer runs again after the context."""
    model = tiny_vlm()
    adapter = attach_trained(model, train_gamma=False)
    checkpoint_layers(model)
    with adapter.scaled(-0.5):
        loss = loss_of(model, EARLY)
    gradients = slopes(model, loss)
    for value_adapter in adapter.layers.values():
        value_adapter.gamma.data.mul_(-0.5)
    torch.testing.assert_close(loss_of(model, EARLY), loss)
    torch.testing.assert_close(gradients, slopes(model, loss_of(model, EARLY)))


def test_a_probe_with_the_same_seed_gives_the_same_scores_and_touches_no_other_random_number():
    model = tiny_vlm()
    before = torch.get_rng_state()
    scores = score_heads(model, [EARLY], seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(score_heads(model, [EARLY], seed=1), scores)
    assert not hasattr(model, "image_lora")


def test_layers_may_have_different_numbers_of_heads_or_none_and_norms_of_each_head():
    """As in Gemma 3n and 4, where a layer may take the values of another. No layer is given a head that it lacks."""
    model = tiny_vlm(num_hidden_layers=4)
    attention(model, 0).v_norm = nn.RMSNorm(D_H)
    attention(model, 1).k_proj = nn.Linear(D, D_H)
    attention(model, 1).v_proj = nn.Linear(D, D_H)
    attention(model, 2).is_kv_shared_layer = True
    scores = score_heads(model, [EARLY])
    assert scores.isfinite().tolist() == [[True] * 3, [True, False, False], [False] * 3, [True] * 3]
    heads = select_heads(scores, 7.0)  # a whole number
    attention(model, 1).v_head_dim, attention(model, 1).head_dim = D_H, 5  # the latter is that of queries and keys
    adapter = attach(model, heads=heads)
    assert adapter.heads == {0: [0, 1, 2], 1: [0], 3: [0, 1, 2]}
    assert adapter.layers["1"].B.shape == (1, 8, D_H)


# 2. The visual tokens of a call
class FromEmbeddings(TinyVLM):
    """Hugging Face's other way to call a model: by inputs_embeds instead of input_ids."""

    def forward(self, input_ids=None, inputs_embeds=None, pixel_values=None, past_key_values=None):
        x = self.language_model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states, _ = self.language_model(x, torch.arange(x.shape[1])[None])
        return hidden_states


IDS = torch.tensor([[1, IMG, IMG, 5, 6, 7], [1, 5, 6, IMG, IMG, 7]])
MASK = IDS == IMG


def test_embeddings_are_adapted_under_a_mask_of_their_shape_and_refused_without_one():
    """input_ids take precedence. generate() repeats each prompt for its beams, and so must whoever gives the mask."""
    model = FromEmbeddings(tiny_vlm().config)
    x = model.language_model.embed_tokens(IDS)
    adapter = attach_trained(model)
    expected = model(input_ids=IDS)
    with adapter.scaled(0.5):
        half = model(input_ids=IDS)
    with adapter.visual_mask(MASK), adapter.scaled(0.5):
        assert torch.equal(model(inputs_embeds=x), half)
    with pytest.raises(ValueError, match="which tokens are visual"):
        model(inputs_embeds=x)
    with adapter.visual_mask(MASK.float()), pytest.raises(ValueError, match="must be bool"):
        model(inputs_embeds=x)
    with adapter.visual_mask(MASK):
        assert torch.equal(model(inputs_embeds=x), expected)
        with pytest.raises(RuntimeError, match="repeat_interleave"):
            model(inputs_embeds=x.repeat_interleave(2, 0))
        with adapter.disabled():
            assert not torch.equal(model(inputs_embeds=x), expected)
    with adapter.visual_mask(MASK.flip(0)):
        assert torch.equal(model(input_ids=IDS), expected)

    def gradients():  # the same embeddings may come again under another mask, also before one backward()
        losses = []
        for mask in (MASK, MASK.flip(0)):
            with adapter.visual_mask(mask):
                losses.append(model(inputs_embeds=x).logsumexp(-1).sum())
        return slopes(model, *losses)

    without_checkpoints = gradients()
    checkpoint_layers(model)
    torch.testing.assert_close(gradients(), without_checkpoints)


def test_a_prompt_with_an_image_and_no_placeholder_is_refused():
    """Not what follows a cache, and not the zeros that a collator pads with."""
    model = tiny_vlm()
    attach_trained(model)
    model.forward = lambda *args, **kwargs: "an answer"  # the tiny model would refuse it, too
    image, text = torch.ones(1, 3, 32, 32), torch.tensor([TEXT])
    with pytest.raises(ValueError, match="has no placeholder"):
        model(text, pixel_values=image)
    model(text[:, :1], pixel_values=image)
    model(text, pixel_values=image, past_key_values="a cache")
    model(text, pixel_values=torch.zeros_like(image))


def test_a_config_may_name_visual_tokens_in_any_of_four_ways():
    model = tiny_vlm()
    model.config = SimpleNamespace(image_token_id=1, image_token_index=2, video_token_id=3, video_token_index=4)
    assert attach(model)._tracker.image_token_ids == {1, 2, 3, 4}
    assert visual_rows(torch.tensor([[5, 1, 7], [3, 5, 4]]), {1, 3, 4}).tolist() == [1, 3, 5]


# 3. Types, devices, state dicts
def test_under_half_the_adapter_stays_in_float32():
    """TRL's QLoRA rounds A and B past that, by `.data`, and leaves gamma; they still train."""
    model = tiny_vlm()
    adapter = attach_trained(model, train_gamma=False)
    before = [parameter.clone() for parameter in adapter.parameters()]
    model.half()
    torch.testing.assert_close([*adapter.parameters()], before, rtol=0, atol=0)
    half = partial(torch.ones, dtype=torch.half)
    assert adapter.layers["0"].add_update(half(1, 7, D), half(1, 7, H * D_H), torch.tensor([3])).dtype == torch.half
    for layer in model.float().image_lora.layers.values():
        layer.A.data, layer.B.data = layer.A.data.bfloat16(), layer.B.data.bfloat16()
    assert all(gradient.any() for gradient in slopes(model, loss_of(model, EARLY)))


def test_torchs_default_type_and_device_change_nothing(request):
    model = tiny_vlm()
    request.addfinalizer(partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        tensors = score_heads(model, [EARLY]), *attach(model).parameters()
    assert {(tensor.dtype, tensor.device) for tensor in tensors} == {(torch.float32, model.device)}


@pytest.mark.parametrize("options", [{"heads": {0: [0], 2: [0, 1]}}, {"lora_alpha": 8}, {"normalize": False}], ids=str)
def test_a_state_dict_of_other_heads_or_of_another_scale_is_refused(options):
    """So is one that does not say which, as of named_parameters()."""
    adapter = attach_trained(tiny_vlm(), heads=SOME_HEADS)
    other = attach(tiny_vlm(), **{"heads": SOME_HEADS} | options)
    with pytest.raises(RuntimeError, match="attach with the same heads, r, lora_alpha and normalize"):
        other.load_state_dict(adapter.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*_extra_state"):
        other.load_state_dict(dict(adapter.named_parameters()))
    for assign in (False, True):
        rounded = {name: tensor.bfloat16() for name, tensor in adapter.state_dict().items()}
        adapter.load_state_dict(rounded, assign=assign)
        assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


# 4. Gradient checkpointing runs a layer again
def checkpoint_layers(model, use_reentrant=False):
    """Checkpoints each decoder layer, and does what enable_input_require_grads() does."""
    for layer in model.language_model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=use_reentrant)
    model.language_model.embed_tokens.register_forward_hook(lambda embed_tokens, args, x: x.requires_grad_())


def after_a_disabled_call(model):
    """Which adds a gradient of zero."""
    loss = loss_of(model, EARLY)
    with model.image_lora.disabled():
        disabled_loss = loss_of(model, LATE)
    return slopes(model, loss, disabled_loss)


def after_a_norm_was_called_alone(model):
    """Inside disabled(), on the input that the layer's checkpoint keeps."""
    first = model.language_model.layers[0]
    with patch.object(first, "forward", side_effect=first.forward) as forward:
        loss = loss_of(model, EARLY)
    with model.image_lora.disabled():
        first.input_layernorm(forward.call_args.args[0])
    return slopes(model, loss)


def in_two_threads_at_once(model):
    """Another thread calls the model in the middle of a call. A third call comes first, and there is one backward()."""
    losses = [loss_of(model, prompt(TEXT))]

    def call_in_another_thread(norm, args):
        hook.remove()
        with ThreadPoolExecutor(1) as pool:
            losses.append(pool.submit(loss_of, model, EARLY).result())

    hook = model.language_model.layers[1].post_attention_layernorm.register_forward_pre_hook(call_in_another_thread)
    losses.append(loss_of(model, LATE))
    return slopes(model, *losses)


def of_a_checkpoint_that_holds_the_model(model):
    return slopes(model, checkpoint(loss_of, model, EARLY, use_reentrant=False))


attach_to_some = partial(attach_trained, heads=SOME_HEADS)
# The rival is also in o_proj and in the MLP, whose inputs are not the layer's.
partial_lora = partial(lora, tokens="visual", projections="all", r=2)


def attach_both(model):
    """Each must find its own call on a tensor."""
    partial_lora(model)
    attach_to_some(model)


CHECKPOINTED = [  # what happens to a checkpointed model, the batches whose gradients must come of it, and its adapter
    (after_a_disabled_call, [EARLY], attach_to_some),
    (after_a_norm_was_called_alone, [EARLY], attach_to_some),
    (in_two_threads_at_once, [EARLY, LATE, prompt(TEXT)], attach_to_some),
    (in_two_threads_at_once, [EARLY, LATE, prompt(TEXT)], partial_lora),
    (in_two_threads_at_once, [EARLY, LATE, prompt(TEXT)], attach_both),
    (of_a_checkpoint_that_holds_the_model, [EARLY], attach_to_some),
]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "re-entrant"])
@pytest.mark.parametrize("gradients, batches, adapt", CHECKPOINTED)
def test_a_layer_that_is_run_again_goes_by_its_own_forward_pass(gradients, batches, adapt, use_reentrant):
    """Layer 2 has no norm before its attention, so v_proj itself reads the input that a checkpoint keeps. In layer 0,
    as in Gemma 3n, another norm reads that input, and v_proj reads what the layer has made of it."""
    model = tiny_vlm()
    first, _, last = model.language_model.layers
    del last.input_layernorm
    last.input_layernorm = lambda x: x
    forward = first.forward
    first.forward = lambda x, *args, **kwargs: forward(x + first.post_attention_layernorm(x), *args, **kwargs)
    adapt(model)
    expected = slopes(model, *[loss_of(model, batch) for batch in batches])
    model.zero_grad()
    checkpoint_layers(model, use_reentrant)
    torch.testing.assert_close(gradients(model), expected)


def test_a_layer_that_is_run_again_and_cannot_know_its_forward_pass_is_refused():
    """By Image-LoRA: because two calls gave it one tensor, or because the checkpoint of one of them kept a copy."""
    model = tiny_vlm()
    attach_to_some(model)
    checkpoint_layers(model)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copy: copy):
        copied = loss_of(model, EARLY)
    with pytest.raises(RuntimeError, match="no call of model"):
        slopes(model, copied, loss_of(model, LATE))
    outputs = []
    model.language_model.layers[1].register_forward_hook(lambda layer, args, x: outputs.append(x) or outputs[0])
    with pytest.raises(RuntimeError, match="no call of model"):
        slopes(model, loss_of(model, EARLY), loss_of(model, LATE))


# 5. Copies, and how an adapter comes off again
def test_a_copy_is_a_model_of_its_own_and_after_detach_each_is_as_it_was_down_to_the_hooks():
    model = tiny_vlm()
    model.vision_tower.requires_grad_(False)
    before = state_of(model)
    attach_trained(model, heads=SOME_HEADS)
    expected = slopes(model, loss_of(model, EARLY))
    twin = copy.deepcopy(model)
    for layer in model.image_lora.layers.values():
        layer.gamma.data.zero_()
    torch.testing.assert_close(slopes(twin, loss_of(twin, EARLY)), expected)
    for one in (twin, model):
        adapter = one.image_lora
        assert adapter.detach() is one
        assert state_of(one) == before
        with pytest.raises(ValueError, match="the adapter is not on a model"):
            adapter.detach()


def test_a_copy_of_the_adapter_alone_has_its_weights_and_no_model():
    adapter = attach_trained(tiny_vlm())
    assert "9 of 9 heads, 3 of 3 layers" in repr(adapter) and "r=8, lora_alpha=16" in repr(adapter)
    assert adapter.normalize and not attach(tiny_vlm()).train_gamma
    file = io.BytesIO()
    torch.save(adapter, file)
    assert file.tell() < 20_000  # the model has 170,000 bytes
    twin = copy.deepcopy(adapter)
    torch.testing.assert_close(twin.state_dict(), adapter.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="copied without its model"):
        twin.detach()
    assert not hasattr(adapter.detach(), "image_lora")


# 6. Files
def test_a_saved_adapter_loads_as_it_was(tmp_path):
    model = tiny_vlm()
    heads = {"0": [2.0, 0], 2: np.array([1])}  # whole numbers of any type, and JSON's names of layers
    options = {"normalize": np.bool_(False), "train_gamma": np.bool_(False)}
    adapter = attach_trained(model, r=np.int64(2), lora_alpha=np.float32(3), heads=heads, **options)
    expected = logits_of(model, EARLY)
    adapter.detach()
    adapter.save(tmp_path / "adapter.pt")  # detached, it still has its weights
    loaded = load(model, tmp_path / "adapter.pt")
    assert torch.equal(logits_of(model, EARLY), expected)
    assert [parameter.requires_grad for parameter in loaded.parameters()] == [True, True, False] * 2
    assert "3 of 9 heads, 2 of 3 layers, r=2, lora_alpha=3" in repr(loaded)
    assert loaded.heads == {0: [2, 0], 2: [1]}


def saved_adapter(folder: Path):
    """An adapter, and the path of its file, in a folder that save() has made."""
    adapter = attach_trained(tiny_vlm(), r=2, heads=SOME_HEADS)
    path = folder / "runs" / "today" / "adapter.pt"
    adapter.save(path)
    return adapter, path


def test_a_file_has_the_authors_layout_and_their_files_have_no_keys_of_ours(tmp_path):
    adapter, path = saved_adapter(tmp_path)
    content = torch.load(path, weights_only=True)
    ours = {name: content.pop(name) for name in ("normalize", "train_gamma")}
    assert ours == {"normalize": True, "train_gamma": True}
    assert content.keys() == {"model_name", "r", "alpha", "kv_indices", "layers"}
    assert content["kv_indices"] == {"0": [1], "2": [0, 1]}
    shapes = {name: tensor.shape for name, tensor in content["layers"]["2"].items()}
    assert shapes == {"A": (D, 2), "B": (2, 2, D_H), "gamma": ()}
    torch.save(content, path)
    torch.testing.assert_close(load(tiny_vlm(), path).state_dict(), adapter.state_dict(), rtol=0, atol=0)


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    adapter, path = saved_adapter(tmp_path)
    saved = path.read_bytes()
    adapter.layers["2"].B.data = torch.ones(8)  # as under FSDP1 or ZeRO-3
    with pytest.raises(ValueError, match="one rank's shard.*summon_full_params.*GatheredParameters"):
        adapter.save(path)
    adapter.layers["0"].A.data.fill_(math.inf)
    with pytest.raises(ValueError, match="diverged"):
        adapter.save(path)
    with patch("torch.save", side_effect=OSError), pytest.raises(OSError):
        attach_trained(tiny_vlm()).save(path)
    assert path.read_bytes() == saved
    assert [*path.parent.iterdir()] == [path]


def test_whoever_loads_onto_another_model_or_saves_what_has_learned_nothing_is_warned(tmp_path, recwarn):
    _, path = saved_adapter(tmp_path)
    model = tiny_vlm()
    adapter = load(model, path)
    adapter.save(path)
    assert not recwarn.list
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen"):
        adapter.save(path)
    with pytest.warns(UserWarning, match="B is zero"):
        attach(adapter.detach()).save(path)
    model.image_lora.detach()
    object.__setattr__(model.config, "_name_or_path", "models/other")  # the dataclass is frozen
    with pytest.warns(UserWarning, match="saved with 'TinyVLM', but this model is 'models/other'"):
        load(model, path)


def test_a_file_that_is_damaged_or_of_another_model_is_refused_and_runs_no_code(tmp_path):
    """A healthy one is not called damaged because the model is adapted already."""
    adapter, path = saved_adapter(tmp_path)
    check_refusal("^the model already has an Image-LoRA", load, adapter._tracker.model, path)
    check_refusal("does not fit this model", load, tiny_vlm(num_hidden_layers=2), path)
    check_refusal("on the meta device", load, tiny_vlm().to("meta"), path)
    content = torch.load(path, weights_only=True)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(adapter.layers["0"].B.detach().numpy().tobytes())] ^= 1
    path.write_bytes(damaged)  # torch.load alone would not notice a flipped bit
    check_refusal("checksum", load, tiny_vlm(), path)
    path.write_bytes(damaged[:-9])
    check_refusal("is missing, damaged", load, tiny_vlm(), path)
    for change, sentence in (
        ({"layers": {}}, "Missing key"),
        ({"r": 1.5}, "r must be a whole number .* got r=1.5"),
        ({"normalize": "False"}, "normalize and train_gamma must be True or False, got .'False'"),
        ({"note": Path()}, "Weights only load failed"),  # to make a Path, torch.load would have to run its code
    ):
        torch.save(content | change, path)
        check_refusal(sentence, load, tiny_vlm(), path)


# 7. What cannot be right is refused in one sentence
@pytest.mark.filterwarnings("error:.*always_call")  # a call that has failed has said why
def test_a_use_that_cannot_be_right_is_refused():
    """A part of the model called alone, a v_proj that gives other features or was replaced, and an export."""
    model = tiny_vlm()
    adapter = attach_trained(model, heads=SOME_HEADS)
    v_proj = attention(model, 2).v_proj
    ((x, _),) = watch(model, EARLY, v_proj)  # x still has its Call
    with pytest.raises(RuntimeError, match="no call of model"):
        v_proj(x)
    with adapter.disabled():
        assert torch.equal(v_proj(x), x @ v_proj.weight.T)  # as in BLIP-2, whose generate() calls a part alone
    with pytest.raises(ValueError, match="factor must be finite"), adapter.scaled(math.nan):
        pass
    with pytest.raises(ValueError, match="0 images"):
        model(EARLY["input_ids"])  # fails, and leaves nothing behind that would adapt what follows
    with pytest.raises(RuntimeError, match="no call of model"):
        model.forward(**EARLY)
    with pytest.raises(RuntimeError, match="would fix which tokens are visual"):
        torch.export.export(model, (EARLY["input_ids"], EARLY["pixel_values"]), strict=False)
    v_proj.register_forward_hook(lambda v_proj, args, value: value[..., :4], prepend=True)
    with pytest.raises(RuntimeError, match="4 features for 3 heads of 4"):
        model(**EARLY)
    attention(model, 2).v_proj = nn.Linear(D, H * D_H)
    with pytest.raises(RuntimeError, match="the adapted v_proj of layer 2 was not called; .* leave out its heads"):
        model(**EARLY)


NO_LABELS = EARLY | {"labels": torch.full((1, 7), -100)}
RIGHT_PADDING = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}


def select(model, scores, num_heads, tau=0.5):
    """From two layers of heads with these scores."""
    select_heads(torch.tensor([scores, scores]), num_heads, tau)


REFUSED = [  # a function, its arguments besides the model, and why that cannot be
    (attach, {"r": 10**9}, "r must be a whole number in 1..24, .* got r=1000000000"),
    (attach, {"r": 4.5}, "r must be a whole number .* got r=4.5"),  # int() would make it 4
    (attach, {"r": True}, "r must be a whole number .* got r=True"),  # and this one 1
    (partial(LoRA, lora_alpha=4), {"r": 10**9}, "r must be in 1..24, got 1000000000"),
    (attach, {"lora_alpha": 0}, "lora_alpha a positive, finite number"),  # nothing would be learned
    (attach, {"lora_alpha": math.nan}, "lora_alpha a positive, finite number"),
    (attach, {"lora_alpha": True}, "lora_alpha a positive, finite number, got r=8, lora_alpha=True"),
    (attach, {"lora_alpha": "16"}, "lora_alpha a positive, finite number, got r=8, lora_alpha='16'"),
    (attach, {"heads": {0: []}}, "no head is selected"),
    (attach, {"heads": {0: [1, 1]}}, "layer 0 has 3 heads; .* each once"),
    (attach, {"heads": {0: [1], "0": [2]}}, "name a layer once"),
    (attach, {"heads": {0: torch.tensor([True, False])}}, "not .True, False."),  # would be heads 1 and 0
    (attach, {"heads": {-1: [0]}}, "layer -1 has 0 heads"),  # would be the last layer
    (attach, {"heads": {0: [3]}}, "layer 0 has 3 heads"),  # would be head 0 of the next token
    (score_heads, {"batches": [EARLY], "probe": "rank2"}, "must be 'rank1' or 'exact', got 'rank2'"),
    (score_heads, {"batches": [prompt(IMAGE)]}, "loss of probe batch 1 is None"),
    (score_heads, {"batches": [EARLY, NO_LABELS]}, "loss of probe batch 2 is nan"),
    (score_heads, {"batches": [prompt(TEXT, labels=True)], "probe": "exact"}, "no loss of 1 probe batches"),
    (torch.no_grad()(score_heads), {"batches": [EARLY]}, "the probe needs gradients"),
    (select, {"scores": [1.0, -torch.inf], "num_heads": 3}, "num_heads must be a whole number in 1..2, got 3"),
    (select, {"scores": [1.0, 2.0], "num_heads": 0}, "num_heads must be a whole number in 1..4, got 0"),
    (select, {"scores": [1.0, 2.0], "num_heads": True}, "num_heads must be a whole number in 1..4, got True"),
    (select, {"scores": [1.0, 2.0], "num_heads": 2, "tau": -1.0}, "tau must be .* not negative, got -1.0"),
    (select, {"scores": [1.0, 2.0], "num_heads": 2, "tau": "1"}, "tau must be a number, .* got '1'"),
    (select, {"scores": [0.0, -torch.inf], "num_heads": 1}, "not all zero"),
    (select, {"scores": [1.0, -1.0], "num_heads": 1}, "not negative"),
    (select, {"scores": [1.0, math.inf], "num_heads": 1}, "must be finite"),
    (nn.Module.__call__, prompt(IMAGE) | {"pixel_values": torch.zeros(1, 3, 32, 48)}, r"\[images, 3, 32, 32\], got \["),
    (TinyVLM.generate, prompt(TEXT) | RIGHT_PADDING, "padded on the left"),
    (lambda model: tiny_vlm(image_size=36), {}, "image_size 36 is not a multiple of patch_size 16"),
]


@pytest.mark.parametrize("function, arguments, sentence", REFUSED)
def test_arguments_that_cannot_be_right_are_refused(function, arguments, sentence):
    check_refusal(sentence, function, tiny_vlm(), **arguments)


ATTENTION = "language_model.layers.1.self_attn"
MODELS = [  # a module of the model, its attribute, and a value with which it cannot be adapted
    ("", "config", None, "config has no image_token_id"),  # as DistributedDataParallel has none
    ("", "other", nn.ModuleDict({"layers": nn.ModuleList()}), "found language_model.layers, other.layers"),
    (ATTENTION, "v_proj", nn.Identity(), "v_proj must be a linear layer, got Identity"),
    (ATTENTION, "v_proj", quantized.Linear(D, H * D_H), "v_proj must be a linear layer"),  # of quantize_dynamic()
    (ATTENTION, "head_dim", 5, "head_dim must divide v_proj's 12 features, got 5"),
    (ATTENTION, "v_norm", nn.RMSNorm(H * D_H), "changes its values after v_proj, in v_norm"),  # mixes heads
    (ATTENTION, "conv1d", nn.Conv1d(1, 1, 3), "changes its values after v_proj, in conv1d"),  # mixes tokens
    ("language_model.layers.1", "encoder_attn", Attention(D, 6, H), "has self_attn and encoder_attn"),
]


@pytest.mark.parametrize("module, attribute, value, sentence", MODELS)
def test_a_model_that_cannot_be_adapted_is_refused(module, attribute, value, sentence):
    model = tiny_vlm()
    setattr(model.get_submodule(module), attribute, value)
    check_refusal(sentence, attach, model)
