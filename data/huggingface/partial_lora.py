"""Partial LoRA (arXiv 2401.16420) for Hugging Face models: a LoRA of PEFT that adapts visual tokens only.

    model = partial_lora(model, r=8, lora_alpha=16)         # then train it as any model of PEFT
    model.save_pretrained("runs/partial_lora")
    model = load_partial_lora(base, "runs/partial_lora")    # later, on a fresh copy of the base model

Prompts without images and videos get the output of the base model, bit for bit. So there are no biases, no PiSSA, no
new embeddings, and no other option of PEFT that would change those outputs."""

import re

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer

# Saved as init_lora_weights, which makes PEFT refuse the folder. Otherwise PEFT would load it and adapt all tokens.
MARK = "Partial LoRA: use load_partial_lora()"


def partial_lora(model, r=8, lora_alpha=16, projections=("q_proj", "k_proj", "v_proj", "o_proj")) -> PeftModel:
    """Adds a new LoRA to these linear layers of the decoder. It starts at zero and adapts visual tokens only.

    Prints in how many layers. In hybrid models most layers have other projections, such as in_proj_qkv and out_proj in
    Qwen3.5; name them, too, if they are to be adapted."""
    check_base(model)
    targets = decoder_pattern(projections)
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=targets))
    VisualTokens(model)
    print(f"Partial LoRA adapts {', '.join(projections)} in {adapted_layers(model)}")
    return model


def decoder_pattern(projections=("q_proj", "k_proj", "v_proj", "o_proj")) -> str:
    """PEFT's target_modules for these linear layers of the decoder. Encoders of images and sound have them, too."""
    encoders = "vision|visual|audio|img|image|video|perceiver"
    return rf"(?!(.*\.)?({encoders}))(.*\.)?layers\.\d+\.(.*\.)?({'|'.join(projections)})"


def adapted_layers(model: PeftModel) -> str:
    """In how many layers of the decoder there is a LoRA, such as "8 of 32 layers"."""
    base = model.get_base_model()
    names = [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    layers = {re.match(r"(.*\.)?layers\.\d+", name)[0] for name in names}  # such as model.layers.3
    stacks = {layer.rpartition(".")[0] for layer in layers}  # one, in the models that Image-LoRA adapts
    return f"{len(layers)} of {sum(len(base.get_submodule(stack)) for stack in stacks)} layers"


def load_partial_lora(model, folder, is_trainable=False) -> PeftModel:
    """Adds to a base model the Partial LoRA that save_pretrained() has written."""
    check_base(model)
    config = PeftConfig.from_pretrained(folder)
    if getattr(config, "init_lora_weights", None) != MARK:
        raise ValueError(f"{folder} holds no Partial LoRA; load it with PeftModel.from_pretrained()")
    config.init_lora_weights = True
    model = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable, config=config)
    if load_peft_weights(folder, device="cpu").keys() != get_peft_model_state_dict(model).keys():
        model.unload()
        raise ValueError(f"{folder} has weights for other layers than this model; load it onto its own base model")
    VisualTokens(model)
    return model


def check_base(model) -> None:
    if getattr(model, "peft_config", None):
        raise ValueError("Partial LoRA is a LoRA of its own; give it a model without an adapter")


def visual_ids(config) -> list[int]:
    """The placeholders of images and videos."""
    fields = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return sorted({getattr(config, field) for field in fields if getattr(config, field, None) is not None})


class VisualTokens:
    """Remembers which tokens of a call are visual, and removes LoRA's update from all others."""

    def __init__(self, model: PeftModel):
        base = model.get_base_model()
        self.ids = visual_ids(base.config)
        if not self.ids:
            raise ValueError("Partial LoRA finds visual tokens by image_token_id in the model's config, which lacks it")
        self.is_text = None  # [B, T], of the last call
        self.is_called = False
        # In generate(), Gemma 4's layers that share keys and values get the last token of the prompt alone.
        self.may_get_the_last_tokens = any(getattr(module, "is_kv_shared_layer", False) for module in base.modules())
        base.register_forward_pre_hook(self.begin_call, with_kwargs=True)
        base.register_forward_hook(self.end_call, always_call=True)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.lora_A["default"].register_forward_hook(self.zero_at_text)
                layer.merge = refuse_to_merge
        model.peft_config["default"].init_lora_weights = MARK

    def begin_call(self, base, args, kwargs):
        configs = getattr(base, "peft_config", {})
        if [config.init_lora_weights for config in configs.values()] != [MARK]:
            what = "one was added or deleted; start again from a fresh copy of the base model"
            raise ValueError(f"Partial LoRA must be the only adapter, but {what}")
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.is_floating_point():
            raise ValueError("Partial LoRA finds visual tokens in input_ids, which this call lacks; pass them")
        # Gradient checkpointing runs a layer again in backward(), which must come before the next call.
        self.is_text = torch.isin(ids, torch.tensor(self.ids, device=ids.device), invert=True)
        self.is_called = True

    def zero_at_text(self, A, args, z):  # z = x A [B, T, r]; where z is 0, so is the update z B
        in_backward = torch._C._current_graph_task_id() != -1  # private, and what torch's own checkpointing goes by
        if not self.is_called and not in_backward:
            raise RuntimeError("no call of model(...) says which tokens are visual; do not call a part of the model")
        is_text = self.is_text
        if self.may_get_the_last_tokens:
            is_text = is_text[:, -z.shape[1] :]
        if z.shape[:-1] != is_text.shape:
            what = "call backward() before the next call of the model" if in_backward else "leave it out of projections"
            raise RuntimeError(f"a layer with Partial LoRA got other tokens than the model; {what}")
        return z.masked_fill(is_text[..., None].to(z.device), 0)

    def end_call(self, *_):
        self.is_called = False


def refuse_to_merge(*_, **__):
    raise ValueError("Partial LoRA cannot be merged, because merged weights would adapt all tokens")
