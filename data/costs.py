"""What LoRA and Image-LoRA cost in a training step: by arithmetic at the scale of a real model, and counted in a run.

python -m data.costs [--model qwen2.5-vl-72b]
"""

import sys
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import Settings, command, option
from imagelora import image_lora_flops, lora_flops, select_heads

SHAPES = {  # layers, hidden size, query heads, value (KV) heads, head size; MLP size
    "qwen2.5-vl-7b": ((28, 3584, 28, 4, 128), 18944),
    "qwen2.5-vl-72b": ((80, 8192, 64, 8, 128), 29568),
}


@dataclass(frozen=True)
class CostsConfig(Settings):
    model: str = option("qwen2.5-vl-7b", "whose shape", tuple(SHAPES))
    visual_tokens: int = option(1024, "of a sequence", least=1)
    text_tokens: int = option(256, "of a sequence", least=0)
    r: int = option(8, "rank", least=1)


def lora_costs(layers, hidden_size, query_heads, kv_heads, head_dim, num_tokens, r, names="qkvo") -> tuple[int, int]:
    """(Parameters, training FLOPs over so many tokens) of standard LoRA on these projections of every layer."""
    q, kv = query_heads * head_dim, kv_heads * head_dim
    shapes = {"q": (hidden_size, q), "k": (hidden_size, kv), "v": (hidden_size, kv), "o": (q, hidden_size)}
    parameters = flops = 0
    for layer in range(layers):
        for name in names:
            parameters += r * sum(shapes[name])
            input_grad = layer > 0 or name == "o"  # the lowest q, k, v read frozen embeddings
            flops += lora_flops(num_tokens, *shapes[name], r, input_grad)
    return parameters, flops


def print_costs(cfg: CostsConfig) -> None:
    """LoRA on q, k, v, o of all tokens beside Image-LoRA in half of the heads.

    The decoder's step is of its layers, forward and back to all their inputs; no vision tower, no vocabulary."""
    shape, mlp = SHAPES[cfg.model]
    layers, D, query_heads, kv_heads, head_dim = shape
    visual, tokens, r = cfg.visual_tokens, cfg.visual_tokens + cfg.text_tokens, cfg.r
    selected = layers * kv_heads // 2
    heads = select_heads(torch.ones(layers, kv_heads), selected, tau=0)
    parameters = len(heads) * (D * r + 1) + selected * r * head_dim
    lora_parameters, lora = lora_costs(*shape, tokens, r)
    _, at_visual = lora_costs(*shape, visual, r)
    _, of_values = lora_costs(*shape, visual, r, "v")
    ours = image_lora_flops(visual, D, head_dim, heads, r)
    # Frozen weights take part forward and back to their inputs; so do QK^T and PV, each with two products back.
    weights = D * (2 * (query_heads + kv_heads) * head_dim + 3 * mlp)  # of a layer
    step = layers * (4 * tokens * weights + 12 * tokens**2 * query_heads * head_dim)
    print(f"{visual} visual and {tokens - visual} text tokens, r = {r}, {selected} of {layers * kv_heads} value heads")
    print(f"{'':38}{'LoRA':>16}{'Image-LoRA':>16}{'saved':>9}")
    for name, theirs, mine, form in (
        ("trainable parameters", lora_parameters, parameters, ","),
        ("adapter training FLOP per sequence", lora, ours, ","),
        ("their share of the decoder's step", lora / (step + lora), ours / (step + ours), ".3%"),
    ):
        print(f"{name:38}{theirs:16{form}}{mine:16{form}}{1 - mine / theirs:9.1%}")
    factors = at_visual / lora, of_values / at_visual, ours / of_values, ours / lora
    print("\nvisual tokens only {:.3f} x values only {:.3f} x selected heads {:.3f} = {:.3f}".format(*factors))


def shape_of(model) -> tuple[int, int, int, int, int]:
    """Layers, hidden size, query heads, value heads, head size: what `lora_costs` takes."""
    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size
    return config.num_hidden_layers, size, heads, config.num_key_value_heads, size // heads


def run_costs(model, adapter, batch: dict, all_tokens: bool) -> dict:
    """Parameters, and FLOPs of a training step a screen: the adapter's, computed and counted, and the whole step's.

    all_tokens: whether the adapter updates those of text too. Without an adapter (None) nothing is trained."""
    ids = batch["input_ids"]
    visual = int((ids == model.config.image_token_id).sum())
    parameters = flops = step = floor = 0
    if adapter is not None:
        parameters = sum(p.numel() for p in adapter.parameters())
        flops = adapter.flops(ids.numel() if all_tokens else visual)
        step = count_step(model, batch)
        with adapter.disabled():
            floor = count_step(model, batch)
        adapter.zero_grad()
    lora_parameters, of_lora = lora_costs(*shape_of(model), ids.numel(), r=8)
    return {
        "trainable_parameters": parameters,
        "lora_trainable_parameters": lora_parameters,
        "adapter_flops_per_screen": flops / len(ids),
        "lora_flops_per_screen": of_lora / len(ids),
        "counted_flops_per_screen": (step - floor) / len(ids),
        "step_flops_per_screen": step / len(ids),
    }


def count_step(model, batch: dict) -> int:
    """FLOPs of a forward and a backward pass as PyTorch counts them."""
    # of the attention kernels the counter knows on a CPU only this one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch).loss.backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    sys.exit(command(CostsConfig, print_costs, __doc__))
