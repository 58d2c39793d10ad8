"""LoRA at visual tokens for Hugging Face models, by PEFT and three hooks.

    model = get_peft_model(model, LoraConfig(r=8, target_modules=r".*(language|text)_model.*\.[qkvo]_proj"))
    at_visual_tokens(model)                          # then train it as any model of PEFT
    model.save_pretrained("runs/lora")
    model = load_at_visual_tokens(base, "runs/lora")    # later, on a fresh copy of the base model

Prompts without an image get the output of the base model, bit for bit."""

import torch
from peft import PeftConfig, PeftModel


def at_visual_tokens(model: PeftModel) -> PeftModel:
    """Restricts the LoRA of a PEFT model to the tokens of images, not of videos; PEFT cannot do this."""
    base = model.get_base_model()
    base.is_called = False

    def begin_call(_, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.is_floating_point():
            raise ValueError("LoRA at visual tokens finds them in input_ids, which this call lacks; pass them")
        # Gradient checkpointing runs a layer again in backward(), which must come before the next call.
        base.is_text = ids != base.config.image_token_id  # [B, T]
        base.is_called = True

    def end_call(*_):
        base.is_called = False

    def zero_at_text(_, args, z):  # z = x A, [B, T, r], and with it the update z B
        in_backward = torch._C._current_graph_task_id() != -1  # torch's checkpointing asks like this, too
        if not base.is_called and not in_backward:
            raise RuntimeError("no call of model(...) says which tokens are visual; do not call a part of the model")
        return z.masked_fill(base.is_text[..., None].to(z.device), 0)

    def refuse_to_merge(*_, **__):
        raise ValueError("LoRA at visual tokens cannot be merged, because merged weights would adapt all tokens")

    base.register_forward_pre_hook(begin_call, with_kwargs=True)
    base.register_forward_hook(end_call, always_call=True)
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(zero_at_text)
    model.base_model.merge_and_unload = refuse_to_merge
    model.base_model.merge_adapter = refuse_to_merge
    # PEFT saves this option in every folder, and refuses to open a folder whose value it does not know. That is what we
    # want, because PEFT alone would adapt all tokens.
    model.peft_config["default"].init_lora_weights = "at visual tokens: use load_at_visual_tokens()"
    return model


def load_at_visual_tokens(model, folder, is_trainable=False) -> PeftModel:
    config = PeftConfig.from_pretrained(folder)
    if "at visual tokens" not in str(config.init_lora_weights):
        raise ValueError(f"the LoRA of {folder} adapts all tokens; load it with PeftModel.from_pretrained()")
    config.init_lora_weights = True
    return at_visual_tokens(PeftModel.from_pretrained(model, folder, is_trainable=is_trainable, config=config))
