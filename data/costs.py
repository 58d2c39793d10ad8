"""What LoRA and Image-LoRA cost in a training step, by arithmetic: python -m data.costs

It prints two models, because the comparison turns on one number: how many value heads a model has. Qwen2.5-VL-7B has 4
of them for 28 query heads, which makes values cheap. LLaVA-1.5-7B has 32 for 32.
"""

from typing import NamedTuple

from data.methods import METHODS, Method
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


def decoder_flops(shape: Shape, num_tokens: int) -> int:
    """FLOPs of a decoder's training step: its layers forward and back to their inputs, as its weights are frozen."""
    heads = 2 * shape.query_heads + 2 * shape.value_heads  # of q, o, k and v
    weights = shape.hidden_size * heads * shape.head_dim + shape.mlp_weights  # of a layer
    linear = 2 * 2 * num_tokens * weights  # forward, and back to the input
    attention = 3 * 2 * 2 * num_tokens**2 * shape.query_heads * shape.head_dim  # QK^T and PV, each with two back
    return shape.num_layers * (linear + attention)


def method_costs(settings: Method, shape: Shape, num_tokens: int, num_visual: int, heads: Heads) -> tuple[int, int]:
    """(Parameters, training FLOPs) of a method on a batch of so many tokens; heads: those of Image-LoRA."""
    D = shape.hidden_size
    parameters = flops = 0
    if settings.method == "image_lora":
        num_heads = sum(len(selected) for selected in heads.values())
        parameters = len(heads) * (D * settings.r + settings.train_gamma) + num_heads * settings.r * shape.head_dim
        flops = image_lora_flops(num_visual, D, shape.head_dim, heads, settings.r)
    elif settings.method != "none":
        q, kv = shape.query_heads * shape.head_dim, shape.value_heads * shape.head_dim
        sizes = {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D)}
        num_adapted = num_visual if settings.method == "partial_lora" else num_tokens
        for layer in range(shape.num_layers):
            for projection in settings.projections:
                parameters += settings.r * sum(sizes[projection])
                input_grad = layer > 0 or projection == "o"  # the lowest q, k and v read frozen embeddings
                flops += lora_flops(num_adapted, *sizes[projection], settings.r, input_grad)
    return parameters, flops


def print_costs() -> None:
    """For each model a table of parameters, adapter FLOPs and their share of the step; then the three factors."""
    print(f"a sequence of {VISUAL_TOKENS} visual and {TOKENS - VISUAL_TOKENS} text tokens, r = 8")
    methods = ("LoRA", "LoRA on v", "Partial LoRA", "Partial LoRA on v", "Image-LoRA")
    for model, shape in MODELS.items():
        print(f"\n{model:32}{'parameters':>12}{'adapter GFLOP':>16}{'of LoRA':>9}{'of the step':>13}")
        step = decoder_flops(shape, TOKENS)
        rows = [(name, METHODS[name], shape.value_heads) for name in methods]
        rows += [("Image-LoRA in half of the heads", METHODS["Image-LoRA"], shape.value_heads // 2)]
        flops_of = {}
        for name, settings, num_heads in rows:
            heads = {layer: range(num_heads) for layer in range(shape.num_layers)}
            parameters, flops = method_costs(Method(**settings), shape, TOKENS, VISUAL_TOKENS, heads)
            flops_of[name] = flops
            share_of_lora = flops / flops_of["LoRA"]
            share_of_step = flops / (step + flops)
            print(f"{name:32}{parameters:12,}{flops / 1e9:16.2f}{share_of_lora:9.3f}{share_of_step:13.3%}")
        visual_only = flops_of["Partial LoRA"] / flops_of["LoRA"]
        values_only = flops_of["Image-LoRA"] / flops_of["Partial LoRA"]
        half = flops_of["Image-LoRA in half of the heads"] / flops_of["Image-LoRA"]
        factors = f"visual tokens only {visual_only:.3f} x values only {values_only:.3f} x half of the heads {half:.3f}"
        print(f"{factors} = {visual_only * values_only * half:.3f}")


def run_costs(cfg: Method, model, ids, heads: Heads | None) -> dict:
    """Parameters, and training FLOPs per screen, of a run's adapter, of LoRA of rank 8 and of the whole step.

    ids [B, T] are of a batch."""
    c = model.config
    D = c.hidden_size
    head_dim = D // c.num_attention_heads
    shape = Shape(c.num_hidden_layers, D, c.num_attention_heads, c.num_key_value_heads, head_dim, 2 * D * 4 * D)
    num_visual = int((ids == c.image_token_id).sum())
    parameters, flops = method_costs(cfg, shape, ids.numel(), num_visual, heads)
    lora_parameters, flops_of_lora = method_costs(Method("lora"), shape, ids.numel(), num_visual, heads)
    return {
        "trainable_parameters": parameters,
        "lora_trainable_parameters": lora_parameters,
        "adapter_flops_per_screen": flops / len(ids),
        "lora_flops_per_screen": flops_of_lora / len(ids),
        "step_flops_per_screen": decoder_flops(shape, ids.shape[1]) + flops / len(ids),
    }


if __name__ == "__main__":
    print_costs()
