"""On Hugging Face's models: the README's code, and tiny random models of every family, built offline."""

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import imagelora
from imagelora import attach, load, score_heads, select_heads
from test_imagelora import EARLY, IMG, LATE, attach_trained, logits_of, loss_of, slopes, tiny_vlm

ROOT = Path(imagelora.__file__).parent


def block(text: str) -> str:
    """The README's block that holds this text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (found,) = (block for block in blocks if text in block)
    return found


# 1. The README's code
def adapt_by_the_readme(model, adapter, visual, **options):
    """Its few lines in place of the adapter, with its weights, where `visual` [B, T] is true."""
    exec(block("class NaiveImageLoRA"), lines := {})
    decoder = next(m for name, m in model.named_modules() if re.search(r"(language|text)_model$", name))
    layers = lines["adapt"](nn.ModuleDict({"model": model, "language_model": decoder}), **options)
    for a, layer in zip(adapter.layers.values(), layers, strict=True):
        layer.load_state_dict(a.state_dict(), strict=False)
        layer.M = visual[..., None]


def test_the_few_lines_of_the_readme_compute_what_imagelora_does():
    batch = {name: torch.cat([EARLY[name], LATE[name]]) for name in EARLY}
    options = {"r": 4, "lora_alpha": 6, "heads": {0: [1], 1: [0, 2], 2: [0, 1, 2]}}
    adapter = attach_trained(model := tiny_vlm(), **options)
    ours = logits_of(model, batch), slopes(model, loss_of(model, batch))
    adapt_by_the_readme(adapter.detach(), adapter, batch["input_ids"] == IMG, **options)
    theirs = logits_of(model, batch), slopes(model, loss_of(model, batch))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_the_lines_of_the_readme_are_all_that_a_trainer_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"model": tiny_vlm(), "batches": [EARLY], "Trainer": Mock(), "args": 0, "collate": 0, "examples": 0}
    exec(block('adapter.save("adapter.pt")'), given)
    assert given["Trainer"].call_args.args[0] is given["model"] and given["Trainer"].return_value.train.called
    assert load(given["adapter"].detach(), "adapter.pt").heads == given["adapter"].heads


# 2. Every family
PICTURE, VIDEO = 90, 91
IDS = {"image_token_id": PICTURE, "image_token_index": PICTURE, "video_token_id": VIDEO, "video_token_index": VIDEO}
DECODER = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
MROPE = {"rope_parameters": ROPE, "rope_scaling": ROPE}  # transformers 5's name and 4's
VIT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
GRID = {"depth": 1, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "hidden_size": 16}
GRID |= {"image_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "spatial_merge_size": 2}
CLIP, SIGLIP = VIT | {"model_type": "clip_vision_model"}, VIT | {"model_type": "siglip_vision_model"}
LLAMA, MISTRAL, QWEN, COHERE = ({"model_type": name} for name in ("llama", "mistral", "qwen2", "cohere2"))
LAST_LAYER, CROPS = {"vision_feature_layer": -1}, {"vision_feature_layer": -1, "image_grid_pinpoints": [[8, 8]]}
FAMILIES = {  # what differs from DECODER; the vision config; other settings
    "Qwen2VL": (MROPE, GRID | {"embed_dim": 16, "hidden_size": 32}, {}),
    "Qwen2_5_VL": (MROPE, GRID | {"window_size": 16, "fullatt_block_indexes": [0]}, {}),
    "Qwen3VL": (MROPE, GRID | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, {}),
    "Glm4v": (MROPE, GRID, {"image_start_token_id": 92, "image_end_token_id": 93}),
    "Llava": (LLAMA, CLIP, LAST_LAYER),
    "LlavaNext": (LLAMA, CLIP, CROPS),
    "LlavaOnevision": (QWEN, SIGLIP, CROPS),
    "VideoLlava": (LLAMA, CLIP, LAST_LAYER),
    "PaliGemma": ({"model_type": "gemma"}, SIGLIP | {"projection_dim": 32}, {"projection_dim": 32}),
    "Gemma3": ({}, SIGLIP, {"boi_token_index": 92, "eoi_token_index": 93, "mm_tokens_per_image": 4}),
    "Idefics2": (MISTRAL, VIT, {"perceiver_config": {"hidden_size": 32, "resampler_n_latents": 4}}),
    "Idefics3": (LLAMA, VIT, {"scale_factor": 1, "pad_token_id": 0}),
    "SmolVLM": (LLAMA, VIT, {"scale_factor": 1, "pad_token_id": 0}),
    "InternVL": (QWEN, VIT | {"image_size": [16, 16], "patch_size": [4, 4]}, {"image_seq_length": 4}),
    "Mistral3": (MISTRAL, VIT | {"model_type": "pixtral", "image_size": 16, "head_dim": 8}, LAST_LAYER),
    "AyaVision": (COHERE, SIGLIP | {"image_size": 16}, LAST_LAYER),
}
WALKS = [(family, PICTURE, "bare") for family in FAMILIES] + [(family, VIDEO, "bare") for family in list(FAMILIES)[:3]]
WALKS += [("Llava", PICTURE, "PEFT"), ("Llava", PICTURE, "inner")]  # inner: as under a reward head
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [PICTURE, VIDEO]}
GREEDY |= {"output_logits": True, "return_dict_in_generate": True}


def tiny_hf_vlm(family="Llava"):
    transformers, (text, vision, other) = pytest.importorskip("transformers"), FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(text_config=DECODER | text, vision_config=vision, **IDS, **other)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("newline"):  # large enough that a change anywhere shows in every logit
            parameter.data.normal_(0, 0.15)
    return model


def hf_prompt(family="Llava", kind=PICTURE):
    """Two rows: text, an image from the 4th or 2nd token on, and text."""
    vision, other = FAMILIES[family][1:]
    crops, pixels = "image_grid_pinpoints" in other, torch.Generator().manual_seed(1)
    N = 10 if crops else 4
    ids = torch.arange(10, 16 + N).repeat(2, 1)
    ids[0, 2 : 3 + N] = ids[1, : 1 + N] = torch.tensor([92] + [kind] * N)  # 92: the start of vision
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "depth" in vision:
        names = ("pixel_values", "image_grid_thw") if kind == PICTURE else ("pixel_values_videos", "video_grid_thw")
        batch |= zip(names, (torch.randn(32, 96, generator=pixels), torch.tensor([[1, 4, 4]] * 2)))
        if pytest.importorskip("transformers").__version__ >= "5":  # 4 refuses to generate with it
            batch["mm_token_type_ids"] = (ids == kind) * (1 if kind == PICTURE else 2)
        return batch
    size = 8 if vision["image_size"] == 8 else 16
    if crops or family == "Mistral3":
        batch["image_sizes"] = torch.tensor([[size, size]] * 2)
    if family in ("PaliGemma", "Gemma3"):
        batch["token_type_ids"] = (ids == PICTURE).int()
    parts = [2] if crops else [1] * (family in ("Idefics2", "Idefics3", "SmolVLM"))  # 2: the whole image and its crop
    images = torch.randn(2, *parts, 3, size, size, generator=pixels)
    return batch | {"pixel_values_images" if family == "VideoLlava" else "pixel_values": images}


@pytest.mark.parametrize("family, kind, wrapper", WALKS)
def test_every_family_is_adapted_as_the_few_lines_of_the_readme_say(family, kind, wrapper):
    """In training, checkpointed or not, and in generate(); without an image, disabled, detached it is the base."""
    model, batch, text = tiny_hf_vlm(family), hf_prompt(family, kind), {"input_ids": torch.arange(10, 22)[None]}
    model.requires_grad_(False)  # torch chooses some kernels, and so their rounding, by it
    base, base_text, user = logits_of(model, batch), logits_of(model, text), model
    if wrapper == "PEFT":
        peft = pytest.importorskip("peft")
        user = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*q_proj"))
    options = {"r": 2, "lora_alpha": 3, "heads": {0: [1], 1: [0, 1]}}
    adapter = attach_trained(model.model if wrapper == "inner" else user, **options)
    assert torch.equal(logits_of(user, text), base_text)
    with adapter.disabled():
        assert torch.equal(logits_of(user, batch), base)
    got, steps = logits_of(user, batch), slopes(user, loss_of(user, batch))
    cached, whole = (user.generate(**batch, **GREEDY, use_cache=use_cache).logits for use_cache in (True, False))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    again = slopes(user, loss_of(user, batch))
    model.eval().gradient_checkpointing_disable()
    assert adapter.detach() in (model, model.model) and torch.equal(logits_of(model, batch), base)
    adapt_by_the_readme(model, adapter, batch["input_ids"] == kind, **options)
    expected, theirs = logits_of(model, batch), slopes(model, loss_of(model, batch))
    assert (got - base).abs().max() > 1e-2
    torch.testing.assert_close((got, steps, again), (expected, theirs, theirs), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cached[0], got[:, -1], atol=1e-4, rtol=1e-4)
    if family != "PaliGemma":  # without a cache, transformers 4 lets its prompt see the answer
        torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)


def test_on_visual_tokens_alone_it_is_pefts_lora_on_v_proj():
    """Where every token is visual M is the identity, so without 1/sqrt|S| it is PEFT's LoRA of alpha = gamma alpha."""
    ours, theirs, peft = tiny_hf_vlm(), tiny_hf_vlm(), pytest.importorskip("peft")
    batch = {"input_ids": torch.full((2, 4), PICTURE), "pixel_values": hf_prompt()["pixel_values"]}
    attach_trained(ours, r=4, lora_alpha=10, normalize=False)
    peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=7, target_modules=r".*language_model.*v_proj"))
    mine, loras = ([p for p in m.parameters() if p.requires_grad and p.ndim > 1] for m in (ours, theirs))  # A, B, A, B
    for p, lora in zip(mine, loras, strict=True):
        lora.data.copy_(p.mT.flatten(0, -2))  # [r, D], [H * d_h, r]
    torch.testing.assert_close(logits_of(ours, batch), logits_of(theirs, batch))


@pytest.mark.parametrize("family", ["Llava", "Qwen2_5_VL"])
def test_a_base_loaded_in_four_bits_is_probed_adapted_and_trained_by_a_plain_loop(family, tmp_path):
    """Its text stays the quantized base's."""
    transformers, _, _ = map(pytest.importorskip, ("transformers", "accelerate", "bitsandbytes"))
    tiny_hf_vlm(family).save_pretrained(tmp_path)
    how = {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True), "device_map": {"": "cpu"}}
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16, **how)
    model.train()  # outside of training bitsandbytes wants more features than there are, on some CPUs
    batch, text = hf_prompt(family), {"input_ids": torch.arange(10, 22)[None]}
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == PICTURE, -100)
    base, base_text = logits_of(model, batch), logits_of(model, text)
    adapter = attach(model, heads=select_heads(score_heads(model, [batch]), 3))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
    model(**batch).loss.backward()
    optimizer.step()
    assert all(a.B.flatten(1).any(1).all() for a in adapter.layers.values())
    tuned = logits_of(model, batch)
    assert torch.equal(logits_of(model, text), base_text) and not torch.equal(tuned, base)
    adapter.save(tmp_path / "adapter.pt")
    load(adapter.detach(), tmp_path / "adapter.pt")
    assert torch.equal(logits_of(model, batch), tuned)


@pytest.mark.parametrize("attach_first", [True, False])
def test_accelerates_wrappers_may_come_before_or_after_and_the_removal_of_earlier_ones_is_noticed(attach_first):
    accelerate = pytest.importorskip("accelerate")
    bf16 = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare
    dispatch = partial(accelerate.dispatch_model, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)
    attach_trained(other := tiny_vlm())
    for wrap in (bf16, dispatch):
        model = tiny_vlm()
        for step in (attach_trained, wrap) if attach_first else (wrap, attach_trained):
            step(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=wrap is bf16):
            torch.testing.assert_close(model(**EARLY).logits, other(**EARLY).logits)
    accelerate.hooks.remove_hook_from_submodules(model)
    noticed = pytest.raises(RuntimeError, match="v_proj or its input_layernorm was not called")
    with nullcontext() if attach_first else noticed:
        assert torch.equal(model(**EARLY).logits, other(**EARLY).logits)


# 3. What is refused
REFUSED = {  # the config, a part of the sentence
    "LlamaForCausalLM": (DECODER, "no image_token_id"),
    "Gemma3nForCausalLM": (DECODER | {"layer_types": None, "num_kv_shared_layers": 0}, "after v_proj, in .*v_norm"),
    "MllamaForConditionalGeneration": ({"text_config": DECODER | MROPE | {"cross_attention_layers": [1]}}, "cross-att"),
    "Phi4MultimodalForCausalLM": (DECODER | {"vision_config": {}, "audio_config": {}}, "fused qkv"),
    "Lfm2VlForConditionalGeneration": ({"text_config": DECODER | {"layer_types": ["conv", "full_attention"]}}, "hybr"),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_model_that_cannot_be_adapted_is_refused_in_one_sentence(architecture):
    model, (config, sentence) = getattr(pytest.importorskip("transformers"), architecture), REFUSED[architecture]
    with torch.device("meta"), pytest.raises(ValueError, match=f"^[^\n]*{sentence}[^\n]*$"):
        attach(model(model.config_class(**config)))
