"""What LoRA and Image-LoRA cost in a training step, by arithmetic: python -m data.costs

It prints two models, because the comparison turns on one number: how many value heads a model has. Qwen2.5-VL-7B has 4
of them for 28 query heads, which makes values cheap. LLaVA-1.5-7B has 32 for 32.
"""

from typing import NamedTuple

from imagelora import Heads


class Shape(NamedTuple):
    """The sizes of a decoder."""

    num_layers: int
    hidden_size: int
    query_heads: int
    value_heads: int
    head_dim: int
    mlp_weights: int  # in a layer


MODELS = {
    "Qwen2.5-VL-7B": Shape(28, 3584, 28, 4, 128, 3 * 3584 * 18944),
    "LLaVA-1.5-7B": Shape(32, 4096, 32, 32, 128, 3 * 4096 * 11008),
}
VISUAL_TOKENS = 576  # one image of LLaVA-1.5, 672 x 672 pixels of Qwen2.5-VL
TOKENS = 720


def lora_flops(num_tokens, in_features, out_features, r, input_grad=True):
    """FLOPs of LoRA on one Linear in a training step; a product of m x n and n x k counts 2 m n k.

    input_grad: whether the input of this Linear needs a gradient."""
    z = dA = dx = 2 * num_tokens * r * in_features  # forward z = x A, backward dA and dx
    y = dB = dz = 2 * num_tokens * r * out_features  # forward y = z B, backward dB and dz
    return z + y + dB + dz + dA + dx * input_grad


def image_lora_flops(num_visual_tokens, hidden_size, head_dim, heads: Heads, r, input_grad=False):
    """FLOPs of a whole Image-LoRA in a training step over this many visual tokens.

    input_grad: whether the input of the lowest adapted layer needs a gradient. That of the others always does."""
    flops = 0
    for selected in heads.values():
        flops += lora_flops(num_visual_tokens, hidden_size, len(selected) * head_dim, r, input_grad)
        input_grad = True
    return flops


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
    """FLOPs of a decoder's training step: its layers forward and back to their inputs, as its weights are frozen."""
    heads = 2 * shape.query_heads + 2 * shape.value_heads  # of q, o, k and v
    weights = shape.hidden_size * heads * shape.head_dim + shape.mlp_weights  # of a layer
    linear = 2 * 2 * num_tokens * weights  # forward, and back to the input
    attention = 3 * 2 * 2 * num_tokens**2 * shape.query_heads * shape.head_dim  # QK^T and PV, each with two back
    return shape.num_layers * (linear + attention)


def print_costs(r=8) -> None:
    """For each model a table of parameters, adapter FLOPs and their share of the step; then the three factors."""
    print(f"a sequence of {VISUAL_TOKENS} visual and {TOKENS - VISUAL_TOKENS} text tokens, r = {r}")
    for name, shape in MODELS.items():
        all_heads = {layer: range(shape.value_heads) for layer in range(shape.num_layers)}
        half = {layer: range(shape.value_heads // 2) for layer in range(shape.num_layers)}
        methods = {
            "LoRA on q, k, v, o": lora_costs(shape, TOKENS, r),
            "LoRA at visual tokens": lora_costs(shape, VISUAL_TOKENS, r),
            "LoRA at visual tokens, rank 2": lora_costs(shape, VISUAL_TOKENS, 2),
            "Image-LoRA in all heads": image_lora_costs(shape, VISUAL_TOKENS, r, all_heads),
            "Image-LoRA in half of the heads": image_lora_costs(shape, VISUAL_TOKENS, r, half),
        }
        print(f"\n{name:32}{'parameters':>12}{'adapter GFLOP':>16}{'of LoRA':>9}{'of the step':>13}")
        step = decoder_flops(shape, TOKENS)
        _, lora = methods["LoRA on q, k, v, o"]
        for method, (parameters, flops) in methods.items():
            print(f"{method:32}{parameters:12,}{flops / 1e9:16.2f}{flops / lora:9.3f}{flops / (step + flops):13.3%}")
        _, at_visual_tokens = methods["LoRA at visual tokens"]
        _, of_values = lora_costs(shape, VISUAL_TOKENS, r, "v")
        _, of_half = methods["Image-LoRA in half of the heads"]
        factors = f"visual tokens only {at_visual_tokens / lora:.3f} x values only {of_values / at_visual_tokens:.3f}"
        print(f"{factors} x half of the heads {of_half / of_values:.3f} = {of_half / lora:.3f}")


def run_costs(cfg, model, ids, heads: Heads | None) -> dict:
    """Parameters, and training FLOPs a screen, of a run's adapter and of LoRA of rank 8; FLOPs of the whole step, too.

    ids [B, T] are of a batch."""
    c = model.config
    D = c.hidden_size
    head_dim = D // c.num_attention_heads
    shape = Shape(c.num_hidden_layers, D, c.num_attention_heads, c.num_key_value_heads, head_dim, 2 * D * 4 * D)
    num_visual = int((ids == c.image_token_id).sum())
    lora_parameters, of_lora = lora_costs(shape, ids.numel(), r=8)
    parameters = flops = 0
    if cfg.method == "image_lora":
        parameters, flops = image_lora_costs(shape, num_visual, cfg.r, heads)
    if cfg.method == "lora":
        num_tokens = ids.numel() if cfg.tokens == "all" else num_visual
        parameters, flops = lora_costs(shape, num_tokens, cfg.r, cfg.projections)
    return {
        "trainable_parameters": parameters,
        "lora_trainable_parameters": lora_parameters,
        "adapter_flops_per_screen": flops / len(ids),
        "lora_flops_per_screen": of_lora / len(ids),
        "step_flops_per_screen": decoder_flops(shape, ids.shape[1]) + flops / len(ids),
    }


if __name__ == "__main__":
    print_costs()
