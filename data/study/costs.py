"""What LoRA and Image-LoRA cost in a training step, by arithmetic and on this machine: python -m data.study.costs

The arithmetic is in data/costs.py. The command also measures steps of a small decoder for half a minute.
"""

import sys
import time
from dataclasses import dataclass
from statistics import median

import torch
from torch.autograd.graph import saved_tensors_hooks

from data.base import find_device
from data.command import command, option
from data.costs import decoder_flops, image_lora_flops, lora_costs, run_costs
from data.rivals import LoRA
from imagelora import attach
from tiny_vlm import TinyVLM, TinyVLMConfig
from train import Config

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
            adapter = attach(model, heads=heads)
        else:
            adapter = model.lora = LoRA(model, r=8, lora_alpha=16, tokens="all" if method == "lora" else "visual")
        flops[name] = run_costs(Config(method=method), model, adapter, ids)["step_flops_per_screen"]

    saved = {name: saved_bytes(model, batch) for name, model in models.items()}
    rounds = []  # of a step with each method in turn, so that whatever else runs here slows all of them
    end = time.perf_counter() + limit
    while len(rounds) < 4 or time.perf_counter() < end:
        rounds.append({name: seconds_of_step(model, batch) for name, model in models.items()})
    seconds = {name: median(times[name] for times in rounds[1:]) for name in models}  # the first round warms up
    return {name: (flops[name], seconds[name], saved[name]) for name in models}


def main(cfg: CostsConfig, limit: float = 20) -> None:
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
