"""partial_lora.py on tiny random models: what it adapts, how it is saved and loaded, and what it refuses."""

import copy
from functools import partial

import pytest
import torch
from test_huggingface import PICTURE, TEXT, VIDEO, hf_prompt, tiny_hf_vlm

from test_imagelora import logits_of, loss_of

peft = pytest.importorskip("peft")
from partial_lora import TARGETS, load_partial_lora, partial_lora  # noqa: E402

CHOICES = {  # that change only where and how strongly it adapts
    "defaults": {},
    "v alone": {"target_modules": r".*language_model.*v_proj"},
    "the feed-forward layers": {"target_modules": r".*language_model.*\.(gate|up|down)_proj"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "language_model.layers"},
    "ranks and scales": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
}


def lora(family="Llava", **options):
    """A new LoRA at all tokens."""
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_hf_vlm(family), peft.LoraConfig(**{"target_modules": TARGETS} | options))


def train(model):
    """Gives lora_B values, as training would."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def trained(family="Llava", **options):
    return train(partial_lora(lora(family, **options)))


def updates_of(model, batch):
    """What lora_B adds in each layer, [B, T, features]."""
    updates = []
    hooks = []
    for name, module in model.named_modules():
        if ".lora_B." in name:
            hooks.append(module.register_forward_hook(lambda _, args, update: updates.append(update)))
    logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    return updates


# 1. What it adapts
@pytest.mark.parametrize("name", CHOICES)
def test_text_alone_stays_the_bases_bit_for_bit_and_an_image_changes_the_output(name):
    base, model = tiny_hf_vlm(), partial_lora(lora(**CHOICES[name]))
    assert torch.equal(logits_of(model, hf_prompt()), logits_of(base, hf_prompt()))  # the start
    train(model)
    assert torch.equal(logits_of(model, TEXT), logits_of(base, TEXT))
    assert not torch.equal(logits_of(model, hf_prompt()), logits_of(base, hf_prompt()))


@pytest.mark.parametrize("family, kind", [("Llava", PICTURE), ("Qwen2_5_VL", PICTURE), ("Qwen2_5_VL", VIDEO)])
def test_it_is_lora_at_the_tokens_of_images_and_videos_and_nothing_elsewhere(family, kind):
    batch = hf_prompt(family, kind)
    visual = batch["input_ids"] == kind
    plain = updates_of(train(lora(family)), batch)
    ours = updates_of(trained(family), batch)
    assert torch.equal(ours[0][visual], plain[0][visual])  # in the first layer, whose input is the same
    for update in ours:
        assert update[visual].any()
        assert not update[~visual].any()


def gradients(model, batch):
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient():
    model = trained()
    expected = gradients(model, hf_prompt())
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, hf_prompt()), expected)


def test_a_copy_is_partial_lora_of_its_own():
    model = trained()
    expected = logits_of(model, hf_prompt())
    other = copy.deepcopy(model)
    logits_of(model, TEXT)
    assert torch.equal(logits_of(other, hf_prompt()), expected)
    other.unload()
    assert torch.equal(logits_of(model, hf_prompt()), expected)


# 2. Saving and loading, and the way back
def test_it_stays_partial_lora_however_often_it_is_saved(tmp_path):
    model = trained()
    expected = logits_of(model, hf_prompt())
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        model = load_partial_lora(tiny_hf_vlm(), folder)
        assert torch.equal(logits_of(model, hf_prompt()), expected)
        for open_alone in (partial(peft.PeftModel.from_pretrained, tiny_hf_vlm()), tiny_hf_vlm().load_adapter):
            with pytest.raises(ValueError, match=r"Partial LoRA: use load_partial_lora\(\)"):
                open_alone(folder)


def test_lora_at_all_tokens_is_not_loaded_as_partial_lora(tmp_path):
    lora().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no Partial LoRA; load it with PeftModel.from_pretrained\(\)"):
        load_partial_lora(tiny_hf_vlm(), tmp_path)


def test_it_is_never_merged():
    model = trained()
    layer = model.get_base_model().model.language_model.layers[0].self_attn.v_proj
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()


def test_after_unload_nothing_of_it_stays():
    base = tiny_hf_vlm()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules()]
    attributes = set(vars(base))
    model = trained().unload()
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert set(vars(model)) == attributes
    assert torch.equal(logits_of(model, hf_prompt()), logits_of(base, hf_prompt()))
    embeddings = model.get_input_embeddings()(TEXT["input_ids"])
    model(inputs_embeds=embeddings)


# 3. What it refuses
PARAMETERS = {"target_modules": None, "target_parameters": ["model.language_model.layers.0.self_attn.v_proj.weight"]}
REFUSED = {  # the options of LoraConfig, the sentence
    "biases of LoRA": ({"lora_bias": True}, "cannot have lora_bias"),
    "biases of the base": ({"bias": "all"}, "cannot have bias"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "cannot have init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "cannot have init_lora_weights"),
    "a random lora_B": ({"init_lora_weights": False}, "cannot have init_lora_weights"),
    "new tokens": ({"trainable_token_indices": [3]}, "cannot have trainable_token_indices"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "cannot have modules_to_save"),
    "DoRA": ({"use_dora": True}, "cannot have use_dora"),
    "parameters": (PARAMETERS, "cannot have target_parameters"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "not for .*embed_tokens; give target_modules"),
    "all linear layers": ({"target_modules": "all-linear"}, "not for .*; give target_modules"),
    "the vision tower": ({"target_modules": ["v_proj"]}, "not for .*vision_tower.*; give target_modules"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_change_text_is_refused_in_one_sentence(name):
    options, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=f"^Partial LoRA [^\n]*{sentence}[^\n]*$"):
        partial_lora(lora(**options))


def test_every_option_of_peft_that_is_not_allowed_must_have_its_default():
    """Those of a later PEFT as well."""
    model = lora()
    model.peft_config["default"].to_dict = lambda: peft.LoraConfig().to_dict() | {"changes_text": 1}
    with pytest.raises(ValueError, match="Partial LoRA cannot have changes_text"):
        partial_lora(model)


def test_only_a_new_lora_and_nothing_else_may_be_trained():
    with pytest.raises(ValueError, match="starts as the base model"):
        partial_lora(train(lora()))
    model = lora()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"call requires_grad_\(False\) on base_model.model.lm_head.weight"):
        partial_lora(model)
    with pytest.raises(ValueError, match=r"needs a model of PEFT; call get_peft_model\("):
        partial_lora(tiny_hf_vlm())
    with pytest.raises(ValueError, match="cannot have init_lora_weights"):
        partial_lora(trained())  # it is one


def add(model):
    model.add_adapter("other", peft.LoraConfig(target_modules=TARGETS))


def add_elsewhere(model):
    model.add_adapter("other", peft.LoraConfig(target_modules=r".*language_model.*down_proj"))


def add_and_set(model):
    add(model)
    model.set_adapter("other")


def delete_and_add_again(model):
    model.delete_adapter("default")
    model.add_adapter("default", peft.LoraConfig(target_modules=TARGETS))


def add_past_peft_model(model):
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TARGETS), model.get_base_model(), "other")


SECOND = [add, add_elsewhere, add_and_set, delete_and_add_again, add_past_peft_model]


@pytest.mark.parametrize("add", SECOND)
def test_a_second_adapter_is_refused_at_the_next_call(add):
    model = trained()
    add(model)
    train(model)
    for batch in (TEXT, hf_prompt()):
        with pytest.raises(ValueError, match="Partial LoRA must be the only adapter"):
            model(**batch)


def test_there_may_be_no_other_adapter_before_and_a_deleted_one_is_forgotten():
    model = lora()
    add(model)
    with pytest.raises(ValueError, match="Partial LoRA must be the only adapter"):
        partial_lora(model)
    model = trained()
    expected = logits_of(model, hf_prompt())
    add(model)
    model.delete_adapter("other")
    assert torch.equal(logits_of(model, hf_prompt()), expected)


def test_its_name_is_free():
    model = peft.get_peft_model(tiny_hf_vlm(), peft.LoraConfig(target_modules=TARGETS), adapter_name="mine")
    train(partial_lora(model))
    assert torch.equal(logits_of(model, TEXT), logits_of(tiny_hf_vlm(), TEXT))
    assert not torch.equal(logits_of(model, hf_prompt()), logits_of(tiny_hf_vlm(), hf_prompt()))


def test_it_never_takes_the_mask_of_another_call():
    """A part of the model is refused, in training as well."""
    model = trained()
    logits_of(model, hf_prompt())
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="no call of model"):
            model.get_base_model().model(**hf_prompt())


def test_it_needs_input_ids_by_name_or_as_the_first_argument():
    model, batch = trained(), hf_prompt()
    expected = logits_of(model, batch)
    ids = batch.pop("input_ids")
    assert torch.equal(model(ids, **batch).logits, expected)
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="Partial LoRA finds visual tokens in input_ids"):
        model(inputs_embeds=embeddings, **batch)


def test_layers_that_see_other_tokens_are_refused():
    model = trained()
    layer = model.get_base_model().model.language_model.layers[0].self_attn.v_proj
    layer.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1),))
    with pytest.raises(RuntimeError, match=r"got \[20\] tokens instead of \[2, 10\]"):
        model(**hf_prompt())
