"""partial_lora.py on tiny random models: what it adapts, how it is saved and loaded, and what it refuses."""

import re

import pytest
import torch
from test_huggingface import PICTURE, TEXT, VIDEO, hf_prompt, tiny_hf_vlm

from data.test_guarantees import check_refusal
from test_imagelora import logits_of, loss_of, slopes, watch

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
from partial_lora import MARK, VisualTokens, adapted_layers, decoder_pattern, load_partial_lora, partial_lora  # noqa: E402

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(targets=r".*language_model.*_proj"):  # at all tokens
    return peft.get_peft_model(tiny_hf_vlm(), peft.LoraConfig(target_modules=targets))


def trained(family="Llava", **options):
    """A Partial LoRA whose B has values, as after training."""
    model = partial_lora(tiny_hf_vlm(family), **options)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("family, kind", [("Llava", PICTURE), ("Qwen2_5_VL", VIDEO), ("Qwen3_5", PICTURE)])
def test_its_update_is_zero_but_at_the_tokens_of_images_and_videos(family, kind):
    """In the attention, in the MLP and in the linear attention of hybrid models."""
    batch = hf_prompt(family, kind)
    visual = batch["input_ids"] == kind
    model = trained(family, projections=[*ALL, "in_proj_qkv", "out_proj"])
    Bs = [module for name, module in model.named_modules() if name.endswith("lora_B.default")]
    assert len(Bs) == {"Llava": 14, "Qwen2_5_VL": 14, "Qwen3_5": 24}[family]
    assert adapted_layers(model) == ("4 of 4 layers" if family == "Qwen3_5" else "2 of 2 layers")
    for _, update in watch(model, batch, *Bs):  # [B, T, features]
        assert update[visual].any()
        assert not update[~visual].any()
    with model.disable_adapter():
        base = logits_of(model, TEXT)
    assert torch.equal(logits_of(model, TEXT), base)


def test_it_generates_where_layers_that_share_values_get_the_last_token_alone():
    """In Gemma 4. Token by token without a cache, all layers get all tokens."""
    model = trained("Gemma4")
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "suppress_tokens": [PICTURE, VIDEO]}
    batch = hf_prompt("Gemma4")
    with_a_cache = model.generate(**batch, **options)
    ids = batch["input_ids"]
    for _ in range(2):
        batch["mm_token_type_ids"] = (ids == PICTURE).int()
        logits = logits_of(model, batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, -1]
        logits[:, [PICTURE, VIDEO]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(with_a_cache, ids)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_it_trains_the_decoder_alone_and_gradient_checkpointing_changes_no_gradient(use_reentrant):
    """Nor do two calls before one backward()."""
    model = trained(projections=ALL)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    batches = hf_prompt(), {name: tensor.flip(0) for name, tensor in hf_prompt().items()}
    expected = slopes(model, *[loss_of(model, batch) for batch in batches])
    model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(slopes(model, *[loss_of(model, batch) for batch in batches]), expected)


@pytest.mark.parametrize("family", ["Idefics2", "Gemma4", "NemotronH_Omni"])
def test_its_pattern_finds_the_decoder_by_any_name_and_no_encoder(family):
    names = [name for name, _ in tiny_hf_vlm(family).named_modules() if re.fullmatch(decoder_pattern(), name)]
    decoder = r"(model\.)?(language|text)_model\.(model\.)?layers\.\d\.(self_attn|mixer)\."
    assert names
    assert all(re.match(decoder, name) for name in names)


def test_it_stays_partial_lora_however_often_it_is_saved_and_no_server_reads_it_as_a_lora(tmp_path):
    model = trained()
    expected = logits_of(model, hf_prompt())
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        names = safetensors.load_file(folder / "adapter_model.safetensors").keys()
        assert all(re.search(r"\.lora_visual_[AB]\.weight$", name) for name in names)
        model = load_partial_lora(tiny_hf_vlm(), folder, is_trainable=True)
        assert any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(logits_of(model, hf_prompt()), expected)
        with pytest.raises(ValueError, match=re.escape(MARK)):
            peft.PeftModel.from_pretrained(tiny_hf_vlm(), folder)
    other = partial_lora(tiny_hf_vlm(), projections=["v_proj"])
    with pytest.raises(ValueError, match="has weights for other layers than this model"):
        other.load_adapter(folder, "default", is_trainable=True)  # as TRL does to resume


def test_unload_gives_the_base_model_back_as_it_was():
    """In calls with input_ids, images and embeddings alone. No hook stays on it, and it can be adapted again."""
    base = tiny_hf_vlm()
    x = base.get_input_embeddings()(TEXT["input_ids"])
    batches = TEXT, hf_prompt(), {"inputs_embeds": x}
    expected = [logits_of(base, batch) for batch in batches]  # in the first call, transformers adds hooks of its own
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in base.modules()]
    model = partial_lora(base)
    with pytest.raises(ValueError, match="which tokens are visual"):
        model(inputs_embeds=x)
    assert model.unload() is base
    assert all(map(torch.equal, [logits_of(base, batch) for batch in batches], expected))
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in base.modules()]
    partial_lora(base)(**hf_prompt())


def test_what_is_no_rank_or_would_adapt_text_is_refused(tmp_path):
    for options in ({"r": 4.5}, {"r": True}, {"r": "4"}, {"lora_alpha": True}, {"lora_alpha": "16"}):
        check_refusal("r must be a whole number in 1..32, and lora_alpha", partial_lora, tiny_hf_vlm(), **options)
    with pytest.raises(ValueError, match="cannot be merged"):
        trained().merge_and_unload()
    with pytest.raises(ValueError, match="must be the only adapter"):
        partial_lora(lora())
    with pytest.raises(ValueError, match="adapts the decoder alone"):
        VisualTokens(lora(["q_proj"]))
    for options in ({"init_lora_weights": "pissa"}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}):
        config = peft.LoraConfig(target_modules=decoder_pattern(), **options)
        with pytest.raises(ValueError, match=f"{[*options][0]} could change text"):
            VisualTokens(peft.get_peft_model(tiny_hf_vlm(), config))
    lora().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no Partial LoRA; load it with PeftModel.from_pretrained\(\)"):
        load_partial_lora(tiny_hf_vlm(), tmp_path)
    model = trained()
    with pytest.raises(RuntimeError, match="no call of model"):
        model.get_base_model().model(**hf_prompt())
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down_proj"]), model.get_base_model(), "other")
    with pytest.raises(ValueError, match="Partial LoRA must be the only adapter"):
        model(**TEXT)
