"""On Hugging Face's models: the pages' code, tiny random models of every family, and what trains or wraps them."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import imagelora
from data.test_guarantees import check_refusal, state_of
from imagelora import attach, load, score_heads, select_heads
from test_imagelora import attach_trained, logits_of, loss_of, slopes

ROOT = Path(imagelora.__file__).parent
close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


# 1. The pages' code
PAGES = ("README.md", "data/README.md", "data/huggingface/README.md")


def block(text: str) -> str:
    """The pages' one block that holds this text."""
    pages = "\n".join((ROOT / page).read_text() for page in PAGES)
    (found,) = [block for block in re.findall(r"^```\w*\n(.*?)^```", pages, re.M | re.S) if text in block]
    return found


def adapt_by_the_front_page(model, adapter, visual, heads, r, lora_alpha):
    """Puts the front page's class around each v_proj, with the adapter's weights; visual [B, T] says where M is 1."""
    lines = {}
    exec(block("class NaiveImageLoRA"), lines)
    model.requires_grad_(False)
    stack = re.compile(r"(language|text)_model(\.model)?\.layers$")
    decoder = next(module for name, module in model.named_modules() if stack.search(name))
    for layer, selected in heads.items():
        attention = next(part for part in decoder[layer].children() if hasattr(part, "v_proj"))
        naive = lines["NaiveImageLoRA"](attention.v_proj, attention.head_dim, selected, r, lora_alpha)
        naive.load_state_dict(adapter.layers[str(layer)].state_dict(), strict=False)
        naive.M = visual[..., None]
        attention.v_proj = naive


def test_the_example_of_the_manual_runs_on_a_tiny_llava(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    for saved in (tiny_hf_vlm("Llava"), processor_for("Llava")):
        saved.save_pretrained(tmp_path / "llava-hf" / "llava-1.5-7b-hf")
    monkeypatch.chdir(tmp_path)
    lines = {}
    with pytest.warns(UserWarning, match="may have learned nothing"):  # as it was not trained
        exec(block("AutoProcessor.from_pretrained(name)"), lines)
    prompt, output = lines["inputs"]["input_ids"], lines["output"]
    assert torch.equal(output[:, : prompt.shape[1]], prompt)
    assert output.shape[1] > prompt.shape[1]
    assert lines["model"].image_lora.layers["0"].B.shape == (2, 8, 8)
    assert not (output[:, prompt.shape[1] :] == PICTURE).any()


# 2. Every family
PICTURE = 90  # the id of an image's placeholder
VIDEO = 91
START = 92  # stands before an image
IDS = {"image_token_id": PICTURE, "image_token_index": PICTURE, "video_token_id": VIDEO, "video_token_index": VIDEO}
DECODER = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
MROPE = {"rope_parameters": ROPE, "rope_scaling": ROPE}  # the names of transformers 5 and 4
VIT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
CLIP = VIT | {"model_type": "clip_vision_model"}
SIGLIP = VIT | {"model_type": "siglip_vision_model"}
GRID = {"depth": 1, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "hidden_size": 16, "image_size": 16}
GRID |= {"intermediate_size": 16, "out_hidden_size": 32, "spatial_merge_size": 2}
LLAMA, MISTRAL, QWEN, COHERE = ({"model_type": name} for name in ("llama", "mistral", "qwen2", "cohere2"))
# Models in which only some layers have a v_proj. In Gemma 4, the third takes its keys as values, and the fourth takes
# the keys and values of the third.
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
HYBRID |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID |= {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
CONVOLUTIONS = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2}
SHARED |= {"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 96}
SHARED |= {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "global_head_dim": 8}
MAMBA = {"layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"], "n_routed_experts": 4}
MAMBA |= {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "moe_intermediate_size": 8}
MAMBA |= {"moe_shared_expert_intermediate_size": 8, "num_hidden_layers": 4}
RADIO = {"image_size": 16, "max_img_size": 16, "video_temporal_patch_size": 2, "model_type": "radio"}
LAST_LAYER = {"vision_feature_layer": -1}
CROPS = {"vision_feature_layer": -1, "image_grid_pinpoints": [[8, 8]]}
FAMILIES = {  # what differs from DECODER; the vision config; other settings
    "Qwen2VL": (MROPE, GRID | {"embed_dim": 16, "hidden_size": 32}, {}),
    "Qwen2_5_VL": (MROPE, GRID | {"window_size": 16, "fullatt_block_indexes": [0]}, {}),
    "Qwen3VL": (MROPE, GRID | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, {}),
    "Glm4v": (MROPE, GRID, {"image_start_token_id": START, "image_end_token_id": 93}),
    "Llava": (LLAMA, CLIP, LAST_LAYER),
    "LlavaNext": (LLAMA, CLIP, CROPS),
    "LlavaOnevision": (QWEN, SIGLIP, CROPS),
    "VideoLlava": (LLAMA, CLIP, LAST_LAYER),
    "PaliGemma": ({"model_type": "gemma"}, SIGLIP | {"projection_dim": 32}, {"projection_dim": 32}),
    "Gemma3": ({}, SIGLIP, {"boi_token_index": START, "eoi_token_index": 93, "mm_tokens_per_image": 4}),
    "Idefics2": (MISTRAL, VIT, {"perceiver_config": {"hidden_size": 32, "resampler_n_latents": 4}}),
    "Idefics3": (LLAMA, VIT, {"scale_factor": 1, "pad_token_id": 0}),
    "SmolVLM": (LLAMA, VIT, {"scale_factor": 1, "pad_token_id": 0}),
    "InternVL": (QWEN, VIT | {"image_size": [16, 16], "patch_size": [4, 4]}, {"image_seq_length": 4}),
    "Mistral3": (MISTRAL, VIT | {"model_type": "pixtral", "image_size": 16, "head_dim": 8}, LAST_LAYER),
    "AyaVision": (COHERE, SIGLIP | {"image_size": 16}, LAST_LAYER),
    "Qwen3_5": (HYBRID, GRID | {"num_position_embeddings": 16}, {}),
    "Qwen3_5Moe": (HYBRID | EXPERTS, GRID | {"num_position_embeddings": 16}, {}),
    "Gemma4": (SHARED, VIT | {"model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 2}, {}),
    "Lfm2Vl": (CONVOLUTIONS | {"model_type": "lfm2"}, VIT | {"num_patches": 16}, {"downsample_factor": 2}),
    "NemotronH_Omni": (MAMBA, VIT | RADIO, {"vision_hidden_size": 16, "projector_hidden_size": 16}),
}
HEAD_COUNTS = {"Qwen3_5": [0, 2, 0, 2], "Qwen3_5Moe": [0, 2, 0, 2], "Gemma4": [2, 2, 0, 0], "Lfm2Vl": [0, 2, 0, 2]}
HEAD_COUNTS |= {"NemotronH_Omni": [0, 2, 0, 2]}  # of each layer; in all others [2, 2]
WALKS = [(family, PICTURE) for family in FAMILIES]
WALKS += [(family, VIDEO) for family in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [PICTURE, VIDEO]}
GREEDY |= {"output_logits": True, "return_dict_in_generate": True}
TEXT = {"input_ids": torch.arange(10, 22)[None]}


def tiny_hf_vlm(family="Llava"):
    """A few decoder layers of four query heads and two value heads, with random weights."""
    transformers = pytest.importorskip("transformers")
    text, vision, other = FAMILIES[family]
    config_name, name = f"{family}Config", f"{family}ForConditionalGeneration"
    if family == "NemotronH_Omni":
        config_name, name = "NemotronH_Omni_Reasoning_V3_Config", "NemotronH_Omni_Reasoning_V3"
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(text_config=DECODER | text, vision_config=vision, **IDS, **other)
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("newline"):  # so large that a change anywhere shows in every logit
            parameter.data.normal_(0, 0.15)
    return model


def hf_prompt(family="Llava", kind=PICTURE):
    """Two rows of text with an image or a video in it, which starts at the fourth or at the second token."""
    _, vision, other = FAMILIES[family]
    has_crops = "image_grid_pinpoints" in other
    N = 10 if has_crops else 4  # placeholders of an image
    ids = torch.arange(10, 16 + N).repeat(2, 1)
    ids[0, 2 : 3 + N] = torch.tensor([START] + [kind] * N)
    ids[1, : 1 + N] = torch.tensor([START] + [kind] * N)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generator = torch.Generator().manual_seed(1)
    if "depth" in vision:
        pixels = "pixel_values" if kind == PICTURE else "pixel_values_videos"
        grid = "image_grid_thw" if kind == PICTURE else "video_grid_thw"
        batch |= {pixels: torch.randn(32, 96, generator=generator), grid: torch.tensor([[1, 4, 4]] * 2)}
        if pytest.importorskip("transformers").__version__ >= "5":  # transformers 4 refuses to generate with it
            batch["mm_token_type_ids"] = (ids == kind) * (1 if kind == PICTURE else 2)
        return batch
    if family == "NemotronH_Omni":
        batch["image_grid_hw"] = torch.tensor([[4, 4]] * 2)
        return batch | {"pixel_values": torch.randn(32, 48, generator=generator)}
    if family == "Lfm2Vl":
        batch["pixel_attention_mask"] = torch.ones(2, 16, dtype=torch.long)
        batch["spatial_shapes"] = torch.tensor([[4, 4]] * 2)
        return batch | {"pixel_values": torch.randn(2, 16, 48, generator=generator)}
    if family == "Gemma4":
        batch["mm_token_type_ids"] = (ids == PICTURE).int()
        batch["image_position_ids"] = torch.cartesian_prod(torch.arange(6), torch.arange(6)).repeat(2, 1, 1)
        return batch | {"pixel_values": torch.rand(2, 36, 48, generator=generator)}
    size = 8 if vision["image_size"] == 8 else 16
    if has_crops or family == "Mistral3":
        batch["image_sizes"] = torch.tensor([[size, size]] * 2)
    if family in ("PaliGemma", "Gemma3"):
        batch["token_type_ids"] = (ids == PICTURE).int()
    shape = [2, 3, size, size]
    if has_crops:
        shape = [2, 2, 3, size, size]  # each image in two parts, the whole and its crop
    elif family in ("Idefics2", "Idefics3", "SmolVLM"):
        shape = [2, 1, 3, size, size]
    name = "pixel_values_images" if family == "VideoLlava" else "pixel_values"
    return batch | {name: torch.randn(shape, generator=generator)}


def processor_for(family):
    """Knows a few words and numbers. That of Qwen3.5 has the model's own chat template, which opens a thought."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", "<unk>"]
    marks = {"<image>": PICTURE}
    split = tokenizers.pre_tokenizers.WhitespaceSplit()
    if family == "Qwen3_5":
        words = ["<pad>", "<|endoftext|>", "<|im_end|>", "<unk>", "<|im_start|>", "<think>", "</think>"]
        words += ["system", "user", "assistant", " ", "\n", "\n\n"]
        marks = {"<|image_pad|>": PICTURE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": 93}
        pattern = tokenizers.Regex(r"<\|?/?\w+\|?>|\w+|\n\n|[\s\S]")
        split = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    vocabulary = {word: i for i, word in enumerate([*words, "a", "cat", *map(str, range(60))])} | marks
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    options = {"pad_token": "<pad>", "eos_token": words[2], "additional_special_tokens": list(marks)}
    options["model_input_names"] = ["input_ids", "attention_mask"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    if family == "Qwen3_5":
        tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Fuse()
        template = Path(pytest.importorskip("trl").__file__).parent / "chat_templates/qwen3_5_think.jinja"
        sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64}
        pictures, videos = transformers.Qwen2VLImageProcessor(**sizes), transformers.Qwen3VLVideoProcessor(**sizes)
        return transformers.Qwen3VLProcessor(pictures, tokenizer, videos, chat_template=template.read_text())
    said = "{% for part in m['content'] %}{{ part['text'] or 'a <image> a' }} {% endfor %}"
    template = "{% for m in messages %}" + said + "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(pictures, tokenizer, chat_template=template, **options)


@pytest.mark.parametrize("family, kind", WALKS)
def test_every_family_is_adapted_as_the_class_of_the_front_page_says(family, kind):
    """In training, checkpointed or not, and in generate(). Without an image or detached it is the base."""
    batch = hf_prompt(family, kind)
    model = tiny_hf_vlm(family)
    model.requires_grad_(False)  # torch chooses some kernels, and so their rounding, by it
    base, base_of_text = logits_of(model, batch), logits_of(model, TEXT)
    first, last = [layer for layer, count in enumerate(HEAD_COUNTS.get(family, [2, 2])) if count > 0]
    options = {"r": 2, "lora_alpha": 3, "heads": {first: [1], last: [0, 1]}}
    adapter = attach_trained(model, **options)
    assert torch.equal(logits_of(model, TEXT), base_of_text)
    ours = logits_of(model, batch)
    cached = model.generate(**batch, **GREEDY, use_cache=True).logits
    uncached = model.generate(**batch, **GREEDY, use_cache=False).logits
    gradients = [slopes(model, loss_of(model, batch))]
    model.train().enable_input_require_grads()
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        gradients.append(slopes(model, loss_of(model, batch)))
    model.disable_input_require_grads()
    model.eval().gradient_checkpointing_disable()
    assert adapter.detach() is model
    assert torch.equal(logits_of(model, batch), base)

    adapt_by_the_front_page(model, adapter, batch["input_ids"] == kind, **options)
    assert (ours - base).abs().max() > 1e-2
    close(ours, logits_of(model, batch))
    if family == "Gemma4":  # its layers share values, whose gradients re-entrant checkpoints lose, the base's, too
        gradients.pop()
    expected = slopes(model, loss_of(model, batch))
    close(gradients, [expected] * len(gradients))
    close(cached[0], ours[:, -1])
    if family != "PaliGemma":  # without a cache, transformers 4 lets its prompt see the answer
        close(cached, uncached)


@pytest.mark.parametrize("family", HEAD_COUNTS)
def test_layers_that_make_no_values_in_a_v_proj_have_no_heads(family, tmp_path):
    """Linear attention, convolutions and state-space layers, and Gemma's layers that take other values."""
    model = tiny_hf_vlm(family)
    batch = hf_prompt(family)
    counts = HEAD_COUNTS[family]
    scores = score_heads(model, [batch], loss_of)
    assert (scores > 0).sum(1).tolist() == counts
    assert scores.isneginf().sum(1).tolist() == [2 - count for count in counts]
    adapter = attach_trained(model, heads=select_heads(scores, 3))
    adapter.save(tmp_path / "adapter.pt")
    expected = logits_of(model, batch)
    model = tiny_hf_vlm(family)
    assert load(model, tmp_path / "adapter.pt").heads == adapter.heads
    assert torch.equal(logits_of(model, batch), expected)


# 3. What trains or wraps them
@pytest.mark.parametrize("injected", [False, True])
def test_a_lora_of_peft_that_was_there_before_is_left_alone_by_a_probe_and_trained_beside_it(injected):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj")
    base = tiny_hf_vlm()
    model = peft.inject_adapter_in_model(config, base) if injected else peft.get_peft_model(base, config)
    loras = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _, before = state_of(model)
    score_heads(model, [hf_prompt()], loss_of)
    assert state_of(model)[1] == before
    adapter = attach(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert set(trainable) == {*loras, *[parameter for parameter in adapter.parameters() if parameter.requires_grad]}
    check_refusal("already has an Image-LoRA", attach, model)
    loss_of(model, hf_prompt()).backward()
    torch.optim.SGD(trainable, lr=0.1).step()
    assert all(parameter.any() for parameter in trainable)  # both B have left zero


def test_accelerates_hooks_may_come_first_or_later_and_an_adapter_that_they_offload_is_not_trained():
    """Where accelerate has put A and B on the meta device, their gradients would be lost."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_hf_vlm(), torch.device("cpu"))
    attach_trained(model)
    expected = logits_of(model, hf_prompt())
    assert all(gradient.any() for gradient in slopes(model, loss_of(model, hf_prompt())))
    model = tiny_hf_vlm()
    attach_trained(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    close(logits_of(model, hf_prompt()), expected)
    with pytest.raises(RuntimeError, match="offload the model before you attach"):
        loss_of(model, hf_prompt())


def test_a_base_loaded_in_four_bits_is_probed_adapted_and_trained_by_a_plain_loop(tmp_path):
    """Its text stays the quantized base's."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    tiny_hf_vlm().save_pretrained(tmp_path)
    four_bits = {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True), "device_map": {"": "cpu"}}
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16, **four_bits)
    model.train()  # in evaluation bitsandbytes wants more features than there are, on some CPUs
    base_of_text = logits_of(model, TEXT)
    adapter = attach(model, heads=select_heads(score_heads(model, [hf_prompt()], loss_of), 3))
    loss_of(model, hf_prompt()).backward()
    torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    assert all(layer.B.flatten(1).any(1).all() for layer in adapter.layers.values())
    assert torch.equal(logits_of(model, TEXT), base_of_text)


# 4. What is refused
REFUSED = {  # the config
    "MllamaForConditionalGeneration": {"text_config": DECODER | MROPE | {"cross_attention_layers": [1]}},
    "Phi4MultimodalForCausalLM": DECODER | {"vision_config": {}, "audio_config": {}},  # fused qkv
    "DeepseekV3ForCausalLM": DECODER | {"q_lora_rank": 8, "kv_lora_rank": 8},  # latent values
    "IdeficsForVisionText2Text": DECODER,  # names no placeholder
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_model_that_cannot_be_adapted_is_refused_in_one_sentence(architecture):
    model_class = getattr(pytest.importorskip("transformers"), architecture)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**REFUSED[architecture]))
    with pytest.raises(
        ValueError, match="^[^\n]*(cross-attention|no layer .* has a v_proj|has no image_token_id)[^\n]*$"
    ):
        attach(model)
