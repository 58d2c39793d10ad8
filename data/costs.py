"""What LoRA and Image-LoRA cost in a training step, by arithmetic. `python -m data.study.costs` measures it, too.

A product of m x n and n x k counts 2 m n k FLOPs. Norms, softmax and the optimizer count nothing. FLOPs misprice small
products and say nothing about memory.
"""

from imagelora import Heads
from tiny_vlm import TinyVLMConfig


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


def lora_costs(config: TinyVLMConfig, num_tokens: int, projections="qkvo", r=8, lowest_adapted=0) -> tuple[int, int]:
    """(Parameters, training FLOPs) of LoRA on these projections of the layers from lowest_adapted upwards; num_tokens
    are those that it adapts, in the batch."""
    D = config.hidden_size
    kv_size = config.num_key_value_heads * D // config.num_attention_heads
    out_features = {"q": D, "k": kv_size, "v": kv_size, "o": D}
    parameters = flops = 0
    for layer in range(lowest_adapted, config.num_hidden_layers):
        for projection in projections:
            parameters += r * (D + out_features[projection])
            input_grad = layer > lowest_adapted or projection == "o"  # below, everything is frozen
            flops += lora_flops(num_tokens, D, out_features[projection], r, input_grad)
    return parameters, flops


def decoder_flops(config: TinyVLMConfig, mlp_weights: int, num_tokens: int, lowest_adapted: int) -> int:
    """FLOPs of the frozen decoder in a training step on one sequence: forward through all of it, and back to the
    outputs of q, k and v in the lowest adapted layer. Nothing below them needs a gradient, whatever the method.

    Weights are frozen, so a Linear is one product forward, and one back if its input needs a gradient. Attention is two
    forward and four back, as a fused kernel computes them, also where only values need a gradient; all pairs of tokens
    count, masked or not. The logits of all tokens are included. The vision tower is not, nor what a kernel or a
    checkpoint computes a second time."""
    D = config.hidden_size
    kv_size = config.num_key_value_heads * D // config.num_attention_heads
    qkv = 2 * num_tokens * D * (D + 2 * kv_size)
    o_and_mlp = 2 * num_tokens * (D * D + mlp_weights)
    logits = 2 * num_tokens * D * config.vocab_size
    attention = 2 * num_tokens**2 * D  # one product, such as QK^T or PV

    forward = config.num_hidden_layers * (qkv + 2 * attention + o_and_mlp) + logits
    layers_above = config.num_hidden_layers - 1 - lowest_adapted
    backward = logits + layers_above * (o_and_mlp + 4 * attention + qkv) + o_and_mlp + 4 * attention
    return forward + backward


def run_costs(cfg, model, adapter, ids) -> dict:
    """Parameters, and training FLOPs per screen, of a run's adapter, of LoRA of rank 8 and of the whole step.

    cfg: a train.Config. ids [B, T] are of a batch."""
    config = model.config
    D = config.hidden_size
    num_visual = int((ids == config.image_token_id).sum())
    lowest = 0
    if cfg.method == "image_lora":
        flops = image_lora_flops(num_visual, D, D // config.num_attention_heads, adapter.heads, cfg.r)
        lowest = min(adapter.heads)
    else:
        num_tokens = num_visual if cfg.method == "partial_lora" else ids.numel()
        _, flops = lora_costs(config, num_tokens, cfg.projections, cfg.r)
    lora_parameters, flops_of_lora = lora_costs(config, ids.numel())
    mlp_weights = 2 * D * 4 * D
    return {
        "trainable_parameters": sum(p.numel() for p in adapter.parameters() if p.requires_grad),
        "lora_trainable_parameters": lora_parameters,
        "adapter_flops_per_screen": flops / len(ids),
        "lora_flops_per_screen": flops_of_lora / len(ids),
        "step_flops_per_screen": decoder_flops(config, mlp_weights, ids.shape[1], lowest) + flops / len(ids),
    }
