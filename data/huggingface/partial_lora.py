"""Partial LoRA (arXiv 2401.16420) for Hugging Face models: a LoRA of PEFT that adapts visual tokens only.

    model = partial_lora(model, r=8, lora_alpha=16)         # then train it as any model of PEFT
    model.save_pretrained("runs/partial_lora")
    model = load_partial_lora(base, "runs/partial_lora")    # later, on a fresh copy of the base model

Prompts without images and videos get the output of the base model, bit for bit. So there are no biases, no PiSSA, no
new embeddings, and no other option of PEFT that would change those outputs."""

import re
from functools import partial
from pathlib import Path

import peft
import safetensors.torch
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from imagelora import Call, CallTracker, adaptable_parts

# Saved as init_lora_weights, which makes PEFT refuse the folder. Otherwise PEFT would load it and adapt all tokens.
MARK = "Partial LoRA: use load_partial_lora()"
# With another value than PEFT's default, each of these options could change text.
CHANGE_TEXT = "bias init_lora_weights lora_bias modules_to_save target_parameters trainable_token_indices use_dora"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def partial_lora(model, r=8, lora_alpha=16, projections=ATTENTION) -> PeftModel:
    """Adds a new LoRA to these linear layers of the decoder. It starts at zero and adapts visual tokens only.

    projections: may also name those of the MLP, gate_proj, up_proj and down_proj. In hybrid models most layers have
    others, such as in_proj_qkv and out_proj in Qwen3.5. Prints in how many layers the LoRA is."""
    config = peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=decoder_pattern(projections))
    model = add_lora(model, config)
    print(f"Partial LoRA adapts {', '.join(projections)} in {adapted_layers(model)}")
    return model


def decoder_pattern(projections=ATTENTION) -> str:
    """PEFT's target_modules for these linear layers of the decoder. Encoders of images and sound have them, too."""
    encoders = "vision|visual|audio|img|image|video|perceiver"
    return rf"(?!(.*\.)?({encoders}))(.*\.)?layers\.\d+\.(.*\.)?({'|'.join(projections)})"


def adapted_layers(model: PeftModel) -> str:
    """In how many layers of the decoder there is a LoRA, such as "8 of 32 layers"."""
    layers = {re.search(r"layers\.\d+", name)[0] for name in model.targeted_module_names}
    return f"{len(layers)} of {model.config.get_text_config().num_hidden_layers} layers"


def load_partial_lora(model, folder, is_trainable=False) -> PeftModel:
    """Adds to a base model the Partial LoRA that save_pretrained() has written."""
    config = peft.PeftConfig.from_pretrained(folder)
    if getattr(config, "init_lora_weights", None) != MARK:
        raise ValueError(f"{folder} holds no Partial LoRA; load it with PeftModel.from_pretrained()")
    config.init_lora_weights = True
    config.inference_mode = not is_trainable
    model = add_lora(model, config)
    model.load_adapter(folder)
    return model


def add_lora(model, config: peft.LoraConfig) -> PeftModel:
    if getattr(model, "peft_config", None):
        raise ValueError("Partial LoRA must be the only adapter; give it a fresh copy of the base model")
    adaptable_parts(model, config.r, config.lora_alpha)  # refuses what is no rank or no alpha
    model = peft.get_peft_model(model, config)
    VisualTokens(model)
    return model


class VisualTokens:
    """Removes the update of a LoRA of PEFT from all tokens but visual ones, also in what is saved and loaded."""

    def __init__(self, model: PeftModel):
        config, default = model.peft_config["default"], peft.LoraConfig
        changed = [name for name in CHANGE_TEXT.split() if getattr(config, name, None) != getattr(default, name, None)]
        if changed:
            raise ValueError(f"{', '.join(changed)} could change text; leave it out")
        base, decoder, _, image_token_ids = adaptable_parts(model)
        layers = {str(i): layer for i, layer in enumerate(decoder)}
        self.tracker = CallTracker(base, image_token_ids, layers)
        # In generate(), Gemma 4's layers that share keys and values get the last token of the prompt alone.
        self.may_get_the_last_tokens = any(getattr(module, "is_kv_shared_layer", False) for module in base.modules())
        config.init_lora_weights = MARK
        self.tracker.hooks.append(base.register_forward_pre_hook(check_adapters))
        loras = {lora: i for i, layer in layers.items() for lora in layer.modules() if isinstance(lora, LoraLayer)}
        if len(loras) < sum(isinstance(module, LoraLayer) for module in base.modules()):
            raise ValueError("Partial LoRA adapts the decoder alone; take target_modules=decoder_pattern()")
        for lora, layer in loras.items():
            lora.register_forward_hook(partial(self.tracker.pass_on, layer))
            lora.lora_A["default"].register_forward_hook(partial(self.zero_at_text, layer))
            lora.merge = refuse_to_merge
        model.save_pretrained = partial(save_pretrained, model)
        model.load_adapter = partial(load_adapter, model)
        model.base_model.unload = partial(unload, model.base_model, self.tracker.hooks)

    def zero_at_text(self, layer: str, A, args, z):
        """The hook of A: z = x A [B, T, r], but zero at text tokens. Where z is zero, so is the update z B."""
        call: Call = self.tracker.call_of(layer, args[0])
        is_visual = torch.zeros(call.shape, dtype=torch.bool, device=call.rows.device)  # [B, T]
        is_visual.view(-1)[call.rows] = True
        if self.may_get_the_last_tokens:
            is_visual = is_visual[:, -z.shape[1] :]
        if z.shape[:-1] != is_visual.shape:
            raise RuntimeError("a layer with Partial LoRA got other tokens than the model; leave it out of projections")
        return z.masked_fill(~is_visual[..., None].to(z.device), 0)


def check_adapters(base, args) -> None:
    if [config.init_lora_weights for config in base.peft_config.values()] != [MARK]:
        raise ValueError("Partial LoRA must be the only adapter; start again from a fresh copy of the base model")


def refuse_to_merge(*_, **__):
    raise ValueError("Partial LoRA cannot be merged, because merged weights would adapt all tokens")


def unload(lora_model: peft.LoraModel, hooks: list):
    """PEFT's, which gives the base model back, and takes our hooks off it, too."""
    for hook in hooks:
        hook.remove()
    return type(lora_model).unload(lora_model)


# What is saved must not read as a LoRA at all tokens. PEFT goes by MARK, but servers read no such field. They go by the
# names of weights, so lora_A and lora_B are named lora_visual_A and lora_visual_B in a folder.
def save_pretrained(model: PeftModel, folder, is_main_process=True, **options) -> None:
    PeftModel.save_pretrained(model, folder, is_main_process=is_main_process, **options)
    if is_main_process:
        file = Path(folder, "adapter_model.safetensors")
        weights = safetensors.torch.load(file.read_bytes())
        renamed = {name.replace(".lora_", ".lora_visual_"): weight for name, weight in weights.items()}
        safetensors.torch.save_file(renamed, file, metadata={"format": "pt"})


def load_adapter(model: PeftModel, folder, *_, **__) -> None:
    """Also for TRL, which resumes from a checkpoint by it. ValueError if weights are missing or left over."""
    saved = peft.load_peft_weights(folder, device="cpu")
    weights = {name.replace(".lora_visual_", ".lora_"): weight for name, weight in saved.items()}
    if weights.keys() != peft.get_peft_model_state_dict(model).keys():
        raise ValueError(f"{folder} has weights for other layers than this model; load it onto its own base model")
    peft.set_peft_model_state_dict(model, weights)
