"""Partial LoRA (arXiv 2401.16420) for Hugging Face models: a LoRA of PEFT that adapts visual tokens only.

    model = get_peft_model(model, LoraConfig(r=8, target_modules=r".*(language|text)_model.*\\.[qkvo]_proj"))
    partial_lora(model)                                     # then train it as any model of PEFT
    model.save_pretrained("runs/partial_lora")
    model = load_partial_lora(base, "runs/partial_lora")    # later, on a fresh copy of the base model

Prompts without images and videos get the output of the base model, bit for bit."""

import re

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# The queries, keys, values and outputs of the decoder, and none of the vision tower.
TARGETS = r".*(language|text)_model.*\.[qkvo]_proj"

# These options of LoraConfig say which layers are adapted, how strongly, and where the adapter comes from. All others
# must have their defaults, because they could change text or the base.
FREE = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
FREE |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
FREE |= {"task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"}

# Saved as init_lora_weights. PEFT refuses to open a folder where it does not know this value, and so it should, because
# PEFT alone would adapt all tokens.
MARK = "Partial LoRA: use load_partial_lora()"


def partial_lora(model: PeftModel) -> PeftModel:
    """Restricts a new LoRA to the tokens of images and videos. ValueError if it could change anything else."""
    layers = lora_layers(model)
    if any(B.weight.any() for layer in layers for B in layer.lora_B.values()):
        raise ValueError("Partial LoRA starts as the base model; call get_peft_model() again for a LoRA that is new")
    VisualTokens(model, layers)
    return model


def load_partial_lora(model, folder, is_trainable=False) -> PeftModel:
    """Adds the Partial LoRA that save_pretrained() has written to a base model."""
    config = PeftConfig.from_pretrained(folder)
    if getattr(config, "init_lora_weights", None) != MARK:
        raise ValueError(f"{folder} holds no Partial LoRA; load it with PeftModel.from_pretrained()")
    config.init_lora_weights = True
    model = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable, config=config)
    VisualTokens(model, lora_layers(model))
    return model


def lora_layers(model: PeftModel) -> list[BaseTunerLayer]:
    """The adapted layers. ValueError if anything is adapted but linear layers of the decoder, by one plain LoRA."""
    targets = f'target_modules=r"{TARGETS}"'
    if not isinstance(model, PeftModel):
        raise ValueError(f"Partial LoRA needs a model of PEFT; call get_peft_model(model, LoraConfig({targets})) first")
    config, *others = model.peft_config.values()
    default = LoraConfig().to_dict()
    options = config.to_dict()
    changed = [name for name in options if name not in FREE and options[name] != default.get(name)]
    if changed:
        raise ValueError(f"Partial LoRA cannot have {', '.join(changed)}; leave it out, and give LoraConfig({targets})")
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            in_decoder = re.search(r"(language|text)_model\.layers\.", name)
            if not in_decoder or not isinstance(layer.get_base_layer(), nn.Linear):
                raise ValueError(f"Partial LoRA is for linear layers of the decoder, not for {name}; give {targets}")
            if others or len(layer.lora_A) > 1:
                raise ValueError("Partial LoRA must be the only adapter; call unload() and get_peft_model() again")
            layers.append(layer)
    trained = {parameter for layer in layers for parameter in [*layer.lora_A.parameters(), *layer.lora_B.parameters()]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in trained:
            raise ValueError(f"Partial LoRA trains lora_A and lora_B alone; call requires_grad_(False) on {name}")
    return layers


class VisualTokens:
    """Knows which tokens of a call are visual, and sets what LoRA adds to all others to zero."""

    def __init__(self, model: PeftModel, layers: list[BaseTunerLayer]):
        base = model.get_base_model()
        fields = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        self.ids = {getattr(base.config, field, None) for field in fields} - {None}
        if not self.ids:
            raise ValueError("Partial LoRA finds visual tokens by config.image_token_id, which this model lacks")
        self.is_text = None  # [B, T], of the last call
        self.is_called = False
        self.hooks = [base.register_forward_pre_hook(self.begin_call, with_kwargs=True)]
        self.hooks += [base.register_forward_hook(self.end_call, always_call=True)]
        for layer in layers:
            (A,) = layer.lora_A.values()
            A.register_forward_hook(self.zero_at_text)
            layer.merge = refuse_to_merge
        self.lora_model = model.base_model
        self.lora_model.unload = self.unload
        (config,) = model.peft_config.values()
        config.init_lora_weights = MARK

    def begin_call(self, base, args, kwargs):
        if [config.init_lora_weights for config in base.peft_config.values()] != [MARK]:
            names = list(base.peft_config)
            raise ValueError(f"Partial LoRA must be the only adapter, but now there are {names}; delete what was added")
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.is_floating_point():
            raise ValueError("Partial LoRA finds visual tokens in input_ids, which this call lacks; pass them")
        # Gradient checkpointing runs a layer again in backward(), which must come before the next call.
        self.is_text = torch.ones_like(ids, dtype=torch.bool)
        for visual_id in self.ids:
            self.is_text &= ids != visual_id
        self.is_called = True

    def zero_at_text(self, A, args, z):  # z = x A, [B, T, r], and with it the update z B
        in_backward = torch._C._current_graph_task_id() != -1  # torch's checkpointing asks like this, too
        if not self.is_called and not in_backward:
            raise RuntimeError("no call of model(...) says which tokens are visual; do not call a part of the model")
        if z.shape[:-1] != self.is_text.shape:
            shapes = f"{list(z.shape[:-1])} tokens instead of {list(self.is_text.shape)}"
            raise RuntimeError(f"a layer with Partial LoRA got {shapes}; leave it out of target_modules")
        return z.masked_fill(self.is_text[..., None].to(z.device), 0)

    def end_call(self, *_):
        self.is_called = False

    def unload(self):
        """PEFT's own, which would leave the hooks on the base."""
        for hook in self.hooks:
            hook.remove()
        return type(self.lora_model).unload(self.lora_model)


def refuse_to_merge(*_, **__):
    raise ValueError("Partial LoRA cannot be merged, because merged weights would adapt all tokens")
