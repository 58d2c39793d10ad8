"""partial_lora.py on tiny random models: what it adapts, how it is saved and loaded, and what it refuses."""

import re

import pytest
import torch
from test_huggingface import PICTURE, TEXT, VIDEO, hf_prompt, tiny_hf_vlm

from test_imagelora import logits_of, loss_of, slopes, watch

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
from partial_lora import adapted_layers, decoder_pattern, load_partial_lora, partial_lora  # noqa: E402


def lora(family="Llava", targets=r".*language_model.*_proj"):
    """A LoRA of PEFT at all tokens."""
    return peft.get_peft_model(tiny_hf_vlm(family), peft.LoraConfig(target_modules=targets))


def trained(family="Llava", **options):
    """A Partial LoRA whose B has values, as after training."""
    model = partial_lora(tiny_hf_vlm(family), **options)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


# 1. What it adapts
@pytest.mark.parametrize("family, kind", [("Llava", PICTURE), ("Qwen2_5_VL", PICTURE), ("Qwen2_5_VL", VIDEO)])
def test_its_update_is_zero_but_at_the_tokens_of_images_and_videos(family, kind):
    batch = hf_prompt(family, kind)
    visual = batch["input_ids"] == kind
    model = trained(family)
    Bs = [module for name, module in model.named_modules() if name.endswith("lora_B.default")]
    for _, update in watch(model, batch, *Bs):  # [B, T, features]
        assert update[visual].any()
        assert not update[~visual].any()


def test_it_generates_where_layers_that_share_values_get_the_last_token_alone():
    """In Gemma 4. Token by token without a cache, all layers get all tokens."""
    model = trained("Gemma4")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": [PICTURE, VIDEO]}
    batch = hf_prompt("Gemma4")
    with_a_cache = model.generate(**batch, **options)
    ids = batch["input_ids"]
    for _ in range(3):
        batch["mm_token_type_ids"] = (ids == PICTURE).int()
        logits = logits_of(model, batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, -1]
        logits[:, [PICTURE, VIDEO]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(with_a_cache, ids)


def test_it_trains_the_decoder_alone_and_gradient_checkpointing_changes_no_gradient():
    model = trained(projections=["v_proj"])  # the vision tower has one, too
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = "base_model.model.model.language_model.layers"
    assert names == [f"{layers}.{i}.self_attn.v_proj.lora_{part}.default.weight" for i in (0, 1) for part in "AB"]
    expected = slopes(model, loss_of(model, hf_prompt()))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(slopes(model, loss_of(model, hf_prompt())), expected)


@pytest.mark.parametrize("family, layers", [("Llava", "2 of 2 layers"), ("Qwen3_5", "2 of 4 layers")])
def test_it_says_in_how_many_layers_it_is(family, layers, capsys):
    """In a hybrid model only some have these projections. Those of the other layers may be named, too."""
    partial_lora(tiny_hf_vlm(family))
    assert capsys.readouterr().out == f"Partial LoRA adapts q_proj, k_proj, v_proj, o_proj in {layers}\n"
    if family == "Qwen3_5":
        model = trained(family, projections=["o_proj", "out_proj"])
        assert adapted_layers(model) == "4 of 4 layers"
        with model.disable_adapter():
            base = logits_of(model, TEXT)
        assert torch.equal(logits_of(model, TEXT), base)


@pytest.mark.parametrize("family", ["Idefics2", "Gemma4", "NemotronH_Omni"])
def test_its_pattern_finds_the_decoder_by_any_name_and_no_encoder(family):
    names = [name for name, _ in tiny_hf_vlm(family).named_modules() if re.fullmatch(decoder_pattern(), name)]
    assert names
    assert all(
        re.match(r"(model\.)?(language|text)_model\.(model\.)?layers\.\d\.(self_attn|mixer)\.", n) for n in names
    )


# 2. Saving and loading
def test_it_stays_partial_lora_however_often_it_is_saved(tmp_path):
    model = trained()
    expected = logits_of(model, hf_prompt())
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        model = load_partial_lora(tiny_hf_vlm(), folder)
        assert torch.equal(logits_of(model, hf_prompt()), expected)
        with pytest.raises(ValueError, match=r"Partial LoRA: use load_partial_lora\(\)"):
            peft.PeftModel.from_pretrained(tiny_hf_vlm(), folder)
        with pytest.raises(ValueError, match=r"Partial LoRA: use load_partial_lora\(\)"):
            tiny_hf_vlm().load_adapter(folder)


def test_one_of_other_layers_is_refused(tmp_path):
    """PEFT alone would ignore them."""
    trained().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = safetensors.load_file(file)
    more = {name.replace("layers.1", "layers.2"): weight.clone() for name, weight in weights.items()}
    safetensors.save_file(more | weights, file)
    with pytest.raises(ValueError, match="has weights for other layers than this model"):
        load_partial_lora(tiny_hf_vlm(), tmp_path)


# 3. What is refused
def test_it_is_never_merged():
    with pytest.raises(ValueError, match="cannot be merged"):
        trained().merge_and_unload()


def test_it_is_not_added_to_an_adapted_model_and_lora_at_all_tokens_is_not_loaded_as_one(tmp_path):
    with pytest.raises(ValueError, match="give it a model without an adapter"):
        partial_lora(lora())
    lora().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no Partial LoRA; load it with PeftModel.from_pretrained\(\)"):
        load_partial_lora(tiny_hf_vlm(), tmp_path)


def test_a_second_adapter_is_refused_at_the_next_call():
    model = trained()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down_proj"]), model.get_base_model(), "other")
    with pytest.raises(ValueError, match="Partial LoRA must be the only adapter"):
        model(**TEXT)


def test_it_never_takes_the_mask_of_another_call():
    """A part of the model is refused, and so is a call before backward() with checkpointing."""
    model = trained()
    logits_of(model, hf_prompt())
    with pytest.raises(RuntimeError, match="no call of model"):
        model.get_base_model().model(**hf_prompt())
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(model, hf_prompt())
    model(**TEXT)
    with pytest.raises(RuntimeError, match=r"call backward\(\) before the next call of the model"):
        loss.backward()


def test_it_needs_input_ids_and_a_config_that_names_visual_tokens():
    model = trained()
    with pytest.raises(ValueError, match="Partial LoRA finds visual tokens in input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(TEXT["input_ids"]))
    base = tiny_hf_vlm()
    base.config.image_token_id = base.config.video_token_id = base.config.video_token_index = None
    with pytest.raises(ValueError, match="by image_token_id in the model's config, which lacks it"):
        partial_lora(base)
