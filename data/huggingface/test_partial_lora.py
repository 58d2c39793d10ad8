"""partial_lora.py on tiny random models: what it adapts, how it is saved and loaded, and what it refuses."""

import copy
from functools import partial

import pytest
import torch
from test_huggingface import PICTURE, TEXT, VIDEO, hf_prompt, tiny_hf_vlm

from test_imagelora import logits_of, loss_of, slopes

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
from partial_lora import load_partial_lora, partial_lora  # noqa: E402

CHOICES = [
    {},  # the four projections of attention
    {"projections": ["v_proj"], "r": 2, "lora_alpha": 3},
    {"projections": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]},
]
CONFIG = {"target_modules": r".*language_model.*_proj"}


def lora(family="Llava", **options):
    """A LoRA of PEFT at all tokens."""
    return peft.get_peft_model(tiny_hf_vlm(family), peft.LoraConfig(**CONFIG | options))


def train(model):
    """Gives lora_B values, as training would."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def trained(family="Llava", **options):
    return train(partial_lora(tiny_hf_vlm(family), **options))


def updates_of(model, batch):
    """What lora_B adds in each layer, [B, T, features]."""
    updates = []
    layers = [module for name, module in model.named_modules() if name.endswith("lora_B.default")]
    hooks = [layer.register_forward_hook(lambda _, args, update: updates.append(update)) for layer in layers]
    logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    return updates


# 1. What it adapts
@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_text_alone_stays_the_bases_bit_for_bit_and_an_image_changes_the_output(options):
    base = tiny_hf_vlm()
    model = partial_lora(tiny_hf_vlm(), **options)
    assert torch.equal(logits_of(model, hf_prompt()), logits_of(base, hf_prompt()))  # the start
    train(model)
    assert torch.equal(logits_of(model, TEXT), logits_of(base, TEXT))
    assert not torch.equal(logits_of(model, hf_prompt()), logits_of(base, hf_prompt()))


@pytest.mark.parametrize("family, kind", [("Llava", PICTURE), ("Qwen2_5_VL", PICTURE), ("Qwen2_5_VL", VIDEO)])
def test_it_is_lora_at_the_tokens_of_images_and_videos_and_nothing_elsewhere(family, kind):
    batch = hf_prompt(family, kind)
    visual = batch["input_ids"] == kind
    model = trained(family)
    ours = updates_of(model, batch)
    plain = lora(family, target_modules=model.peft_config["default"].target_modules)
    plain.load_state_dict(model.state_dict())
    plain = updates_of(plain, batch)
    assert torch.equal(ours[0][visual], plain[0][visual])  # in the first layer, whose input is the same
    for update in ours:
        assert update[visual].any()
        assert not update[~visual].any()


def test_gradient_checkpointing_changes_no_gradient():
    model = trained()
    expected = slopes(model, loss_of(model, hf_prompt()))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(slopes(model, loss_of(model, hf_prompt())), expected)


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


def test_a_saved_one_is_loaded_to_be_used_or_to_be_trained_further(tmp_path):
    """What is trained is A and B of the chosen layers of the decoder, and nothing else."""

    def names_of_trainable(model):
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    model = partial_lora(tiny_hf_vlm(), projections=["v_proj"])  # the vision tower has one, too
    layers = "base_model.model.model.language_model.layers"
    expected = [f"{layers}.{i}.self_attn.v_proj.lora_{part}.default.weight" for i in (0, 1) for part in "AB"]
    assert names_of_trainable(model) == expected
    model.save_pretrained(tmp_path)
    assert names_of_trainable(load_partial_lora(tiny_hf_vlm(), tmp_path, is_trainable=True)) == expected
    assert names_of_trainable(load_partial_lora(tiny_hf_vlm(), tmp_path)) == []


def test_lora_at_all_tokens_is_not_loaded_as_partial_lora(tmp_path):
    lora().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no Partial LoRA; load it with PeftModel.from_pretrained\(\)"):
        load_partial_lora(tiny_hf_vlm(), tmp_path)


def test_one_of_another_model_is_refused_and_the_model_stays_the_base(tmp_path):
    """It has weights for layers that this model lacks, or none for layers that it has."""
    trained().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = safetensors.load_file(file)
    more = {name.replace("layers.1", "layers.2"): weight.clone() for name, weight in weights.items()}
    fewer = {name: weight for name, weight in weights.items() if "layers.1" not in name}
    for other in (more | weights, fewer):
        safetensors.save_file(other, file)
        base = tiny_hf_vlm()
        with pytest.raises(ValueError, match="has weights for other layers than this model"):
            load_partial_lora(base, tmp_path)
        assert not hasattr(base, "peft_config")


def test_a_base_of_another_name_is_warned_of(tmp_path):
    base = tiny_hf_vlm()
    base.name_or_path = base.config.name_or_path = "Qwen"
    partial_lora(base).save_pretrained(tmp_path)
    other = tiny_hf_vlm()
    other.config.name_or_path = "Llava"
    with pytest.warns(UserWarning, match="was saved with 'Qwen', but this model is 'Llava'"):
        load_partial_lora(other, tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    """They would change text as well, because 0 times infinity is NaN."""
    model = trained()
    model.get_base_model().model.language_model.layers[0].self_attn.v_proj.lora_B["default"].weight.data[0] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds weights that are not finite"):
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
    partial_lora(model)  # a new one


# 3. What it refuses
OTHER_LORAS = [  # these would change text, or would not survive saving
    {"lora_bias": True},
    {"bias": "all"},
    {"init_lora_weights": "pissa"},
    {"trainable_token_indices": [3]},
    {"modules_to_save": ["lm_head"]},
    {"use_dora": True},
    {"target_modules": None, "target_parameters": ["model.language_model.layers.0.self_attn.v_proj.weight"]},
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["v_proj"]},  # of the vision tower, too
]


@pytest.mark.parametrize("options", OTHER_LORAS, ids=str)
def test_it_takes_no_lora_but_its_own(options):
    sentence = r"Partial LoRA is a LoRA of its own; give it a model without an adapter, and r, lora_alpha and proj.*"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        partial_lora(lora(**options))


@pytest.mark.parametrize("projections", [["embed_tokens"], ["lm_head"], "all-linear", ["vision_tower"]])
def test_other_layers_than_linear_ones_of_the_decoder_are_not_found(projections):
    with pytest.raises(ValueError, match="not found in the base model"):
        partial_lora(tiny_hf_vlm(), projections=projections)


def add(model, projection="v_proj"):
    model.add_adapter("other", peft.LoraConfig(target_modules=rf".*language_model.*{projection}"))


def add_and_set(model):
    add(model)
    model.set_adapter("other")


def delete_and_add_again(model):
    model.delete_adapter("default")
    model.add_adapter("default", peft.LoraConfig(**CONFIG))


def add_past_peft_model(model):
    peft.inject_adapter_in_model(peft.LoraConfig(**CONFIG), model.get_base_model(), "other")


@pytest.mark.parametrize(
    "add", [partial(add, projection="down_proj"), add_and_set, delete_and_add_again, add_past_peft_model]
)
def test_a_second_adapter_is_refused_at_the_next_call(add):
    model = trained()
    add(model)
    train(model)
    with pytest.raises(ValueError, match="Partial LoRA must be the only adapter"):
        model(**TEXT)


def test_it_is_not_added_to_an_adapted_model(tmp_path):
    trained().save_pretrained(tmp_path)
    for model in (trained(), lora(), lora().get_base_model()):
        for add in (partial_lora, partial(load_partial_lora, folder=tmp_path)):
            with pytest.raises(ValueError, match="Partial LoRA is a LoRA of its own"):
                add(model)


def test_it_never_takes_the_mask_of_another_call():
    """A part of the model is refused, in training as well."""
    model = trained()
    logits_of(model, hf_prompt())
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="no call of model"):
            model.get_base_model().model(**hf_prompt())


def test_it_needs_input_ids_by_name_or_as_the_first_argument():
    model = trained()
    batch = hf_prompt()
    expected = logits_of(model, batch)
    ids = batch.pop("input_ids")
    assert torch.equal(model(ids, **batch).logits, expected)
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="Partial LoRA finds visual tokens in input_ids"):
        model(inputs_embeds=embeddings, **batch)


def test_a_model_whose_config_names_no_visual_token_is_refused():
    model = tiny_hf_vlm()
    for field in ("image_token_id", "video_token_id", "video_token_index"):
        setattr(model.config, field, None)
    with pytest.raises(ValueError, match="by image_token_id in the model's config, which lacks it"):
        partial_lora(model)


def test_layers_that_see_other_tokens_are_refused():
    model = trained()
    layer = model.get_base_model().model.language_model.layers[0].self_attn.v_proj
    layer.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1),))
    with pytest.raises(RuntimeError, match=r"got \[20\] instead of \[2, 10\] tokens"):
        model(**hf_prompt())


def test_with_checkpointing_a_call_before_backward_is_named_as_the_cause():
    model = trained().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(model, hf_prompt())
    model(**TEXT)
    with pytest.raises(RuntimeError, match=r"call backward\(\) before the next call of the model"):
        loss.backward()
