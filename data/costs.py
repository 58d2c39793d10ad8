"""What LoRA and Image-LoRA cost in a training step, by arithmetic: python -m data.costs

A product of m x n and n x k counts 2 m n k FLOPs. Norms, softmax and the optimizer count nothing.
"""

from types import SimpleNamespace

import torch

from data.rivals import linears_of
from imagelora import Heads
from tiny_vlm import TinyVLM, TinyVLMConfig


def lora_flops(num_tokens, in_features, out_features, r, input_grad=True):
    """FLOPs of LoRA on one Linear in a training step.

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


def lora_costs(model: TinyVLM, num_tokens: int, projections="qkvo", r=8) -> tuple[int, int]:
    """(Parameters, training FLOPs) of LoRA on these projections of all layers, see data.rivals.LoRA; num_tokens are
    those that it adapts, in the batch."""
    parameters = flops = 0
    for i, layer in enumerate(model.language_model.layers):
        attention, linears = layer.self_attn, linears_of(layer, projections)
        # In the lowest layer, what q, k and v read is frozen, and what an MLP reads if it alone is adapted.
        first = (attention.q_proj, attention.k_proj, attention.v_proj, linears[0]) if i == 0 else ()
        for linear in linears:
            parameters += r * (linear.in_features + linear.out_features)
            flops += lora_flops(num_tokens, linear.in_features, linear.out_features, r, input_grad=linear not in first)
    return parameters, flops


def decoder_flops(model: TinyVLM, num_tokens: int, lowest_adapted=0, only_mlp=False) -> int:
    """FLOPs of the frozen decoder in a training step on one sequence: forward through all of it, and back to the
    outputs of q, k and v in the lowest adapted layer; or of its MLP's first Linear, if only MLPs are adapted.

    Weights are frozen, so a Linear is one product forward, and one back if its input needs a gradient. Attention is two
    forward and four back, as a fused kernel computes them, and all pairs of tokens count, masked or not. The logits of
    all tokens are included. The vision tower is not, nor what a kernel or a checkpoint computes a second time."""
    config, layers = model.config, model.language_model.layers
    q, k, v, o, up, down = [2 * num_tokens * linear.weight.numel() for linear in linears_of(layers[0], "all")]
    attention = 2 * num_tokens**2 * config.hidden_size  # one product, such as QK^T or PV
    logits = 2 * num_tokens * config.hidden_size * config.vocab_size
    forward = len(layers) * (q + k + v + 2 * attention + o + up + down) + logits
    backward = logits + (len(layers) - 1 - lowest_adapted) * (down + up + o + 4 * attention + v + k + q)
    backward += down if only_mlp else down + up + o + 4 * attention
    return forward + backward


def run_costs(cfg, model, ids, heads: Heads | None) -> dict:
    """Parameters, and training FLOPs per screen, of a run's adapter, of LoRA of rank 8 and of the whole step.

    cfg: a train.Config. ids [B, T] are of a batch; if text varies, another batch may cost twice as much."""
    config = model.config
    num_visual = int((ids == config.image_token_id).sum())
    lowest = 0
    if cfg.method == "image_lora":
        D, d_h = config.hidden_size, config.hidden_size // config.num_attention_heads
        parameters = sum(D * cfg.r + len(selected) * cfg.r * d_h for selected in heads.values())  # of A and B
        flops = image_lora_flops(num_visual, D, d_h, heads, cfg.r)
        lowest = min(heads)
    else:
        num_tokens = num_visual if cfg.method == "partial_lora" else ids.numel()
        parameters, flops = lora_costs(model, num_tokens, cfg.projections, cfg.r)
    lora_parameters, flops_of_lora = lora_costs(model, ids.numel())
    decoder = decoder_flops(model, ids.shape[1], lowest, only_mlp=cfg.projections == "mlp")
    return {
        "trainable_parameters": parameters,
        "lora_trainable_parameters": lora_parameters,
        "adapter_flops_per_screen": flops / len(ids),
        "lora_flops_per_screen": flops_of_lora / len(ids),
        "step_flops_per_screen": decoder + flops / len(ids),
    }


# LLaVA-1.5-7B's decoder, whose MLP of three matrices is as large as two here
LLAVA = TinyVLMConfig(32064, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)


def main() -> None:
    """Print a table of a step of LLaVA-1.5-7B, with 576 visual and 144 text tokens."""
    ids = torch.tensor([[LLAVA.image_token_id] * 576 + [LLAVA.eos_token_id] * 144])
    with torch.device("meta"):  # without memory
        llava = TinyVLM(LLAVA)
    heads = {layer: list(range(LLAVA.num_key_value_heads)) for layer in range(LLAVA.num_hidden_layers)}
    print("a training step     GFLOP of the adapter     and of all")
    for name, method in (("LoRA", "lora"), ("Partial LoRA", "partial_lora"), ("Image-LoRA", "image_lora")):
        costs = run_costs(SimpleNamespace(method=method, projections="qkvo", r=8), llava, ids, heads)
        of_adapter, of_step = costs["adapter_flops_per_screen"] / 1e9, costs["step_flops_per_screen"] / 1e9
        print(f"{name:16}{of_adapter:24.1f}{of_step:15,.0f}")


if __name__ == "__main__":
    main()
