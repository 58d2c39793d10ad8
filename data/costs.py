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
VISUAL_TOKENS = 576  # of an image in LLaVA-1.5, or of 672 x 672 pixels in Qwen2.5-VL
TOKENS = 720


def lora_flops(num_tokens, in_features, out_features, r, input_grad=True):
    """FLOPs of LoRA on one Linear in a training step; a product of m x n and n x k counts 2 m n k.

    input_grad: whether the input of this Linear needs a gradient."""
    product_with_A = 2 * num_tokens * r * in_features
    product_with_B = 2 * num_tokens * r * out_features
    forward = product_with_A + product_with_B  # z = x A, y = z B
    backward = 2 * product_with_B + product_with_A  # the gradients of B and of z, and that of A
    if input_grad:
        backward += product_with_A  # the gradient of x
    return forward + backward


def image_lora_flops(num_visual_tokens, hidden_size, head_dim, heads: Heads, r, input_grad=False):
    """FLOPs of a whole Image-LoRA in a training step over this many visual tokens.

    input_grad: whether the input of the lowest adapted layer needs a gradient. That of the others always does."""
    flops = 0
    for selected in heads.values():
        flops += lora_flops(num_visual_tokens, hidden_size, len(selected) * head_dim, r, input_grad)
        input_grad = True
    return flops


def decoder_flops(shape: Shape, num_tokens: int) -> int:
    """FLOPs of a decoder's training step: its layers forward and back to their inputs, as its weights are frozen."""
    heads = 2 * shape.query_heads + 2 * shape.value_heads  # of q, o, k and v
    weights = shape.hidden_size * heads * shape.head_dim + shape.mlp_weights  # of a layer
    linear = 2 * 2 * num_tokens * weights  # forward, and back to the input
    attention = 3 * 2 * 2 * num_tokens**2 * shape.query_heads * shape.head_dim  # QK^T and PV, each with two back
    return shape.num_layers * (linear + attention)


def image_lora_costs(shape: Shape, num_visual: int, heads: Heads, r=8, train_gamma=False) -> tuple[int, int]:
    """(Parameters, training FLOPs) of Image-LoRA in these heads, on a batch of so many visual tokens."""
    num_heads = sum(len(selected) for selected in heads.values())
    parameters = len(heads) * (shape.hidden_size * r + train_gamma) + num_heads * r * shape.head_dim
    return parameters, image_lora_flops(num_visual, shape.hidden_size, shape.head_dim, heads, r)


def lora_costs(shape: Shape, num_tokens: int, projections="qkvo", r=8) -> tuple[int, int]:
    """(Parameters, training FLOPs) of LoRA on these projections; num_tokens are those that it adapts, in the batch."""
    D, q, kv = shape.hidden_size, shape.query_heads * shape.head_dim, shape.value_heads * shape.head_dim
    sizes = {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D)}
    parameters = flops = 0
    for layer in range(shape.num_layers):
        for projection in projections:
            parameters += r * sum(sizes[projection])
            input_grad = layer > 0 or projection == "o"  # the lowest q, k and v read frozen embeddings
            flops += lora_flops(num_tokens, *sizes[projection], r, input_grad)
    return parameters, flops


def print_costs() -> None:
    """For each model a table of parameters, adapter FLOPs and their share of the step; then the three factors."""
    print(f"a sequence of {VISUAL_TOKENS} visual and {TOKENS - VISUAL_TOKENS} text tokens, r = 8")
    for model, shape in MODELS.items():
        print(f"\n{model:32}{'parameters':>12}{'adapter GFLOP':>16}{'of LoRA':>9}{'of the step':>13}")
        step = decoder_flops(shape, TOKENS)
        all_heads = {layer: range(shape.value_heads) for layer in range(shape.num_layers)}
        half_of_them = {layer: range(shape.value_heads // 2) for layer in range(shape.num_layers)}
        rows = {
            "LoRA": lora_costs(shape, TOKENS),
            "LoRA on v": lora_costs(shape, TOKENS, "v"),
            "Partial LoRA": lora_costs(shape, VISUAL_TOKENS),
            "Partial LoRA on v": lora_costs(shape, VISUAL_TOKENS, "v"),
            "Image-LoRA": image_lora_costs(shape, VISUAL_TOKENS, all_heads),
            "Image-LoRA in half of the heads": image_lora_costs(shape, VISUAL_TOKENS, half_of_them),
        }
        for name, (parameters, flops) in rows.items():
            share_of_lora = flops / rows["LoRA"][1]
            share_of_step = flops / (step + flops)
            print(f"{name:32}{parameters:12,}{flops / 1e9:16.2f}{share_of_lora:9.3f}{share_of_step:13.3%}")
        flops_of = {name: flops for name, (_, flops) in rows.items()}
        visual_only = flops_of["Partial LoRA"] / flops_of["LoRA"]
        values_only = flops_of["Image-LoRA"] / flops_of["Partial LoRA"]
        half = flops_of["Image-LoRA in half of the heads"] / flops_of["Image-LoRA"]
        factors = f"visual tokens only {visual_only:.3f} x values only {values_only:.3f} x half of the heads {half:.3f}"
        print(f"{factors} = {visual_only * values_only * half:.3f}")


def run_costs(cfg, model, ids, heads: Heads | None) -> dict:
    """Parameters, and training FLOPs per screen, of a run's adapter, of LoRA of rank 8 and of the whole step.

    cfg: a train.Config. ids [B, T] are of a batch."""
    c = model.config
    D = c.hidden_size
    head_dim = D // c.num_attention_heads
    shape = Shape(c.num_hidden_layers, D, c.num_attention_heads, c.num_key_value_heads, head_dim, 2 * D * 4 * D)
    num_visual = int((ids == c.image_token_id).sum())
    parameters = flops = 0
    if cfg.method == "image_lora":
        parameters, flops = image_lora_costs(shape, num_visual, heads, cfg.r, cfg.train_gamma)
    elif cfg.method != "none":
        num_tokens = {"lora": ids.numel(), "partial_lora": num_visual, "text_lora": ids.numel() - num_visual}
        parameters, flops = lora_costs(shape, num_tokens[cfg.method], cfg.projections, cfg.r)
    lora_parameters, flops_of_lora = lora_costs(shape, ids.numel())
    return {
        "trainable_parameters": parameters,
        "lora_trainable_parameters": lora_parameters,
        "adapter_flops_per_screen": flops / len(ids),
        "lora_flops_per_screen": flops_of_lora / len(ids),
        "step_flops_per_screen": decoder_flops(shape, ids.shape[1]) + flops / len(ids),
    }


if __name__ == "__main__":
    print_costs()
