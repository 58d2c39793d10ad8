"""What LoRA and Image-LoRA cost at the scale of real models: python train.py --costs."""

import re
from dataclasses import dataclass

import torch

from data import Settings, option
from imagelora import image_lora_flops, lora_flops, select_heads

SHAPES = {  # layers, hidden size, query heads, value (KV) heads, head size, MLP size
    "qwen2.5-vl-7b": "28 3584 28 4 128 18944",
    "qwen2.5-vl-72b": "80 8192 64 8 128 29568",
}


@dataclass(frozen=True)
class CostsConfig(Settings):
    model: str = option("qwen2.5-vl-7b", "whose shape", tuple(SHAPES))
    shape: str = option(
        "", "another: layers, hidden size, query heads, KV heads, head size, MLP size, as '28 3584 ...'"
    )
    visual_tokens: int = option(1024, "of a sequence", least=1)
    text_tokens: int = option(256, "of a sequence", least=0)
    r: int = option(8, "rank", least=1)
    num_heads: int = option(0, "value heads that Image-LoRA adapts; 0 is half of all", least=0)

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"[1-9]\d*( [1-9]\d*){5}", self.shape or SHAPES[self.model]):
            raise ValueError(f"shape must be six numbers above 0, like {SHAPES[self.model]!r}, got {self.shape!r}")
        layers, _, _, kv_heads, *_ = self.sizes()
        if self.num_heads > layers * kv_heads:
            raise ValueError(f"num_heads must be at most {layers * kv_heads}, got {self.num_heads}")

    def sizes(self) -> list[int]:
        return [int(size) for size in (self.shape or SHAPES[self.model]).split()]


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
    """LoRA on q, k, v, o of all tokens beside Image-LoRA.

    The decoder's step is of its layers, forward and back to all their inputs; no vision tower, no vocabulary.
    """
    *shape, mlp = cfg.sizes()
    layers, D, query_heads, kv_heads, head_dim = shape
    visual, tokens, r = cfg.visual_tokens, cfg.visual_tokens + cfg.text_tokens, cfg.r
    selected = cfg.num_heads or -(-layers * kv_heads // 2)
    heads = select_heads(torch.ones(layers, kv_heads), selected, tau=0)
    parameters = len(heads) * (D * r + 1) + selected * r * head_dim
    ours = image_lora_flops(visual, D, head_dim, heads, r)
    lora_parameters, lora = lora_costs(*shape, tokens, r)
    _, at_visual = lora_costs(*shape, visual, r)
    _, of_values = lora_costs(*shape, visual, r, "v")
    # Frozen weights take part forward and back to their inputs; so do QK^T and PV, each with two products back.
    weights = D * (2 * (query_heads + kv_heads) * head_dim + 3 * mlp)  # of a layer
    step = layers * (4 * tokens * weights + 12 * tokens**2 * query_heads * head_dim)
    print(f"{visual} visual and {tokens - visual} text tokens, r = {r}, {selected} of {layers * kv_heads} value heads")
    print(f"{'':38}{'LoRA':>16}{'Image-LoRA':>16}{'saved':>9}")
    for name, theirs, mine, form in (
        ("trainable parameters", lora_parameters, parameters, ","),
        ("adapter training FLOP a sequence", lora, ours, ","),
        ("their share of the decoder's step", lora / (step + lora), ours / (step + ours), ".3%"),
    ):
        print(f"{name:38}{theirs:16{form}}{mine:16{form}}{1 - mine / theirs:9.1%}")
    factors = at_visual / lora, of_values / at_visual, ours / of_values, ours / lora
    print("\nvisual tokens only {:.3f} x values only {:.3f} x selected heads {:.3f} = {:.3f}".format(*factors))
