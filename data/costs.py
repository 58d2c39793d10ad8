"""What LoRA and Image-LoRA cost in a training step: by arithmetic for real models, and counted in a run.

    python -m data.costs

It prints two models side by side, because the comparison turns on one number: how many value heads a model has.
Qwen2.5-VL-7B has 4 of them for 28 query heads, which makes values cheap. LLaVA-1.5-7B has 32 for 32.
"""

import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import Settings, command, option
from imagelora import Heads, image_lora_flops, lora_flops, select_heads


class Shape(NamedTuple):
    """The sizes of a decoder."""

    num_layers: int
    hidden_size: int
    query_heads: int
    value_heads: int
    head_dim: int
    mlp_size: int


MODELS = {
    "Qwen2.5-VL-7B": Shape(28, 3584, 28, 4, 128, 18944),
    "LLaVA-1.5-7B": Shape(32, 4096, 32, 32, 128, 11008),
}


@dataclass(frozen=True)
class CostsConfig(Settings):
    visual_tokens: int = option(576, "of a sequence; one image of LLaVA-1.5, 672 x 672 pixels of Qwen2.5-VL", least=1)
    text_tokens: int = option(144, "of a sequence", least=0)
    r: int = option(8, "rank", least=1)


def lora_costs(shape: Shape, num_tokens: int, r: int, projections: str = "qkvo") -> tuple[int, int]:
    """(Parameters, training FLOPs over so many tokens) of LoRA on these projections of every layer."""
    D = shape.hidden_size
    q, kv = shape.query_heads * shape.head_dim, shape.value_heads * shape.head_dim
    sizes = {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D)}
    parameters = flops = 0
    for layer in range(shape.num_layers):
        for projection in projections:
            parameters += r * sum(sizes[projection])
            input_grad = layer > 0 or projection == "o"  # the lowest q, k and v read frozen embeddings
            flops += lora_flops(num_tokens, *sizes[projection], r, input_grad)
    return parameters, flops


def image_lora_costs(shape: Shape, num_visual_tokens: int, r: int, heads: Heads) -> tuple[int, int]:
    """(Parameters, training FLOPs over so many visual tokens) of Image-LoRA in these heads."""
    num_heads = sum(len(selected) for selected in heads.values())
    parameters = len(heads) * (shape.hidden_size * r + 1) + num_heads * r * shape.head_dim
    return parameters, image_lora_flops(num_visual_tokens, shape.hidden_size, shape.head_dim, heads, r)


def decoder_flops(shape: Shape, num_tokens: int) -> int:
    """FLOPs of a decoder's training step: its layers forward and back to their inputs, as its weights are frozen.

    The vision tower and the vocabulary are left out."""
    heads = 2 * shape.query_heads + 2 * shape.value_heads  # of q, o, k and v
    weights = shape.hidden_size * (heads * shape.head_dim + 3 * shape.mlp_size)  # of a layer
    linear = 2 * 2 * num_tokens * weights  # forward, and back to the input
    attention = 3 * 2 * 2 * num_tokens**2 * shape.query_heads * shape.head_dim  # QK^T and PV, each with two back
    return shape.num_layers * (linear + attention)


def even_heads(shape: Shape, num_heads: int) -> Heads:
    """So many value heads, spread evenly over the layers."""
    return select_heads(torch.ones(shape.num_layers, shape.value_heads), num_heads, tau=0.0)


def print_costs(cfg: CostsConfig) -> None:
    """For each model a table of parameters, adapter FLOPs and their share of the step; then the three factors."""
    tokens = cfg.visual_tokens + cfg.text_tokens
    print(f"a sequence of {cfg.visual_tokens} visual and {cfg.text_tokens} text tokens, r = {cfg.r}")
    for name, shape in MODELS.items():
        num_heads = shape.num_layers * shape.value_heads
        methods = {
            "LoRA on q, k, v, o": lora_costs(shape, tokens, cfg.r),
            "LoRA at visual tokens": lora_costs(shape, cfg.visual_tokens, cfg.r),
            "LoRA at visual tokens, rank 2": lora_costs(shape, cfg.visual_tokens, 2),
            "Image-LoRA in all heads": image_lora_costs(shape, cfg.visual_tokens, cfg.r, even_heads(shape, num_heads)),
            "Image-LoRA in half of the heads": image_lora_costs(
                shape, cfg.visual_tokens, cfg.r, even_heads(shape, num_heads // 2)
            ),
        }
        print(f"\n{name:32}{'parameters':>12}{'adapter GFLOP':>16}{'of LoRA':>9}{'of the step':>13}")
        step = decoder_flops(shape, tokens)
        _, lora = methods["LoRA on q, k, v, o"]
        for method, (parameters, flops) in methods.items():
            print(f"{method:32}{parameters:12,}{flops / 1e9:16.2f}{flops / lora:9.3f}{flops / (step + flops):13.3%}")
        _, at_visual_tokens = methods["LoRA at visual tokens"]
        _, of_values = lora_costs(shape, cfg.visual_tokens, cfg.r, "v")
        _, of_half = methods["Image-LoRA in half of the heads"]
        factors = f"visual tokens only {at_visual_tokens / lora:.3f} x values only {of_values / at_visual_tokens:.3f}"
        print(f"{factors} x half of the heads {of_half / of_values:.3f} = {of_half / lora:.3f}")


def shape_of(model) -> Shape:
    """The sizes of a TinyVLM."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        4 * config.hidden_size,
    )


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
    lora_parameters, of_lora = lora_costs(shape_of(model), ids.numel(), r=8)
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
    # The plain attention kernel is the only one whose FLOPs the counter sees on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch).loss.backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    sys.exit(command(CostsConfig, print_costs, __doc__))
