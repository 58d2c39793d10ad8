"""What LoRA and Image-LoRA cost in a training step, by arithmetic and on this machine: python -m data.costs

A product of m x n and n x k counts 2 m n k FLOPs. Norms, softmax and the optimizer count nothing. FLOPs misprice small
products and say nothing about memory, so the command also measures steps of a small decoder for half a minute.
"""

import sys
import time
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace

import torch
from torch.autograd.graph import saved_tensors_hooks

from data.command import command, option
from data.rivals import LoRA
from imagelora import Heads, attach
from tiny_vlm import TinyVLM, TinyVLMConfig

# The decoder of Qwen2.5-VL-7B, and an image of 672 x 672 pixels in a sequence
QWEN = TinyVLMConfig(
    hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064
)
QWEN_MLP = 3 * QWEN.hidden_size * 18944  # weights of the MLP in a layer
VISUAL_TOKENS = 576
TOKENS = 720

# The decoder of LLaVA-1.5-7B with an eighth of its layers and of its width, and a vocabulary to scale
SMALL = TinyVLMConfig(vocab_size=500, image_size=384, hidden_size=512, num_attention_heads=8, num_key_value_heads=8)


@dataclass
class CostsConfig:
    device: str = option("auto", "where to measure: cpu, cuda, mps, or auto")


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


def print_costs() -> None:
    """What a step costs with adapters in all layers and in the upper half of them; then Image-LoRA's three savings."""

    num_layers, D = QWEN.num_hidden_layers, QWEN.hidden_size

    def image_lora_costs(lowest_adapted=0, num_heads=QWEN.num_key_value_heads) -> int:
        heads = dict.fromkeys(range(lowest_adapted, num_layers), range(num_heads))
        return image_lora_flops(VISUAL_TOKENS, D, D // QWEN.num_attention_heads, heads, r=8)

    print(f"Qwen2.5-VL-7B, r = 8, a sequence of {VISUAL_TOKENS} visual and {TOKENS - VISUAL_TOKENS} text tokens\n")
    print(f"{'GFLOP of a training step':42}{'adapter':>10}{'whole step':>13}")
    for where, lowest in (("all layers", 0), ("the upper half of the layers", num_layers // 2)):
        _, lora = lora_costs(QWEN, TOKENS, lowest_adapted=lowest)
        for method, flops in (("LoRA", lora), ("Image-LoRA", image_lora_costs(lowest))):
            step = decoder_flops(QWEN, QWEN_MLP, TOKENS, lowest) + flops
            print(f"{f'{method} in {where}':42}{flops / 1e9:10.2f}{step / 1e9:13,.0f}")

    _, lora = lora_costs(QWEN, TOKENS)
    _, partial_lora = lora_costs(QWEN, VISUAL_TOKENS)
    image_lora, in_half = image_lora_costs(), image_lora_costs(num_heads=QWEN.num_key_value_heads // 2)
    savings = f"visual tokens only {partial_lora / lora:.3f} x values only {image_lora / partial_lora:.3f}"
    print(f"\n{savings} x half of the heads {in_half / image_lora:.3f} = {in_half / lora:.3f}")


def saved_bytes(model, batch: dict) -> int:
    """What a forward pass saves for the backward pass. Each storage counts once, and parameters do not count."""
    sizes = {}  # {address of a storage: its bytes}

    def note_size(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note_size, lambda tensor: tensor):
        model(**batch)
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def seconds_of_step(model, batch: dict) -> float:
    """Of a forward and a backward pass."""
    start = time.perf_counter()
    model(**batch).loss.backward()
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def measured_costs(device: str, dtype: torch.dtype, limit: float) -> dict[str, tuple]:
    """{method: (FLOPs, seconds, saved bytes)} of a step of SMALL. Steps are repeated for `limit` seconds."""
    ids = torch.full((1, TOKENS), SMALL.eos_token_id, device=device)
    ids[:, :VISUAL_TOKENS] = SMALL.image_token_id
    features = torch.randn(1, VISUAL_TOKENS, SMALL.hidden_size, device=device)
    batch = {"input_ids": ids, "labels": ids, "image_features": features}
    models = {}
    flops = {}
    for name, method, lowest_adapted in (
        ("LoRA in all layers", "lora", 0),
        ("Partial LoRA in all layers", "partial_lora", 0),
        ("Image-LoRA in all layers", "image_lora", 0),
        ("Image-LoRA in the upper half of the layers", "image_lora", SMALL.num_hidden_layers // 2),
    ):
        models[name] = model = TinyVLM(SMALL).to(device, dtype)
        all_heads = list(range(SMALL.num_key_value_heads))
        heads = dict.fromkeys(range(lowest_adapted, SMALL.num_hidden_layers), all_heads)
        if method == "image_lora":
            attach(model, heads=heads)
        else:
            model.lora = LoRA(model, r=8, lora_alpha=16, tokens="all" if method == "lora" else "visual")
        run = SimpleNamespace(method=method, projections="qkvo", r=8, train_gamma=False)
        flops[name] = run_costs(run, model, ids, heads)["step_flops_per_screen"]

    saved = {name: saved_bytes(model, batch) for name, model in models.items()}
    rounds = []  # of a step with each method in turn, so that whatever else runs here slows all of them
    end = time.perf_counter() + limit
    while len(rounds) < 4 or time.perf_counter() < end:
        rounds.append({name: seconds_of_step(model, batch) for name, model in models.items()})
    seconds = {name: median(times[name] for times in rounds[1:]) for name in models}  # the first round warms up
    return {name: (flops[name], seconds[name], saved[name]) for name in models}


def run_costs(cfg, model, ids, heads: Heads | None) -> dict:
    """Parameters, and training FLOPs per screen, of a run's adapter, of LoRA of rank 8 and of the whole step.

    cfg: a train.Config. ids [B, T] are of a batch: with --vary-text, another one may cost twice as much."""
    config = model.config
    D = config.hidden_size
    num_visual = int((ids == config.image_token_id).sum())
    parameters = flops = lowest = 0
    if cfg.method == "image_lora":
        head_dim = D // config.num_attention_heads
        num_heads = sum(len(selected) for selected in heads.values())
        num_gammas = len(heads) if cfg.train_gamma else 0
        parameters = len(heads) * D * cfg.r + num_heads * cfg.r * head_dim + num_gammas
        flops = image_lora_flops(num_visual, D, head_dim, heads, cfg.r)
        lowest = min(heads)
    elif cfg.method != "none":
        num_tokens = num_visual if cfg.method == "partial_lora" else ids.numel()
        parameters, flops = lora_costs(config, num_tokens, cfg.projections, cfg.r)
    lora_parameters, flops_of_lora = lora_costs(config, ids.numel())
    mlp_weights = 2 * D * 4 * D
    return {
        "trainable_parameters": parameters,
        "lora_trainable_parameters": lora_parameters,
        "adapter_flops_per_screen": flops / len(ids),
        "lora_flops_per_screen": flops_of_lora / len(ids),
        "step_flops_per_screen": decoder_flops(config, mlp_weights, ids.shape[1], lowest) + flops / len(ids),
    }


def main(cfg: CostsConfig, limit: float = 20) -> None:
    from data.base import find_device  # here, because it needs Pillow, and the arithmetic does not

    device = find_device(cfg.device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # because many CPUs are slow in bfloat16
    print_costs()
    costs = measured_costs(device, dtype, limit)
    our_flops, our_seconds, our_bytes = costs["Image-LoRA in all layers"]
    print(f"\nLLaVA-1.5-7B's decoder in small, measured on this machine ({device}, {dtype}), forward and backward.")
    print(f"Image-LoRA takes {our_seconds:.2g} s, and saves {our_bytes / 2**20:.0f} MiB for the backward pass.")
    print("Times are medians of a few steps, and mean little while other programs are running.\n")
    print(f"{'relative to Image-LoRA in all layers':42}{'FLOPs':>10}{'time':>8}{'saved':>8}")
    for name, (flops, seconds, saved) in costs.items():
        print(f"{name:42}{flops / our_flops:10.3f}{seconds / our_seconds:8.2f}{saved / our_bytes:8.2f}")


if __name__ == "__main__":
    sys.exit(command(CostsConfig, main, __doc__))
