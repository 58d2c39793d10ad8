"""What LoRA and Image-LoRA cost: by arithmetic at the scale of real models (python train.py --costs), and as counted
in a run of the tiny one."""

import re
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import Settings, option
from imagelora import Heads, image_lora_flops, lora_flops, select_heads

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


def spread(cfg: CostsConfig) -> Heads:
    """The selected heads, evenly over the layers."""
    layers, _, _, kv_heads, *_ = cfg.sizes()
    return select_heads(torch.ones(layers, kv_heads), cfg.num_heads or -(-layers * kv_heads // 2), tau=0)


def restrictions(cfg: CostsConfig) -> dict[str, int]:
    """Training FLOPs of the adapter a sequence, from LoRA to Image-LoRA: one restriction more each time."""
    *shape, _ = cfg.sizes()
    _, D, _, _, head_dim = shape
    visual, tokens, r = cfg.visual_tokens, cfg.visual_tokens + cfg.text_tokens, cfg.r
    return {
        "LoRA on q, k, v, o": lora_costs(*shape, tokens, r)[1],
        "visual tokens only": lora_costs(*shape, visual, r)[1],
        "values only": lora_costs(*shape, visual, r, "v")[1],
        "selected heads": image_lora_flops(visual, D, head_dim, spread(cfg), r),
    }


def print_costs(cfg: CostsConfig) -> None:
    """LoRA on q, k, v, o of all tokens beside Image-LoRA.

    The decoder's step is of its layers, forward and back to all their inputs; no vision tower, no vocabulary.
    """
    *shape, mlp = cfg.sizes()
    layers, D, query_heads, kv_heads, head_dim = shape
    visual, tokens, r = cfg.visual_tokens, cfg.visual_tokens + cfg.text_tokens, cfg.r
    heads = spread(cfg)
    selected = sum(map(len, heads.values()))
    parameters = len(heads) * (D * r + 1) + selected * r * head_dim
    lora, at_visual, of_values, ours = restrictions(cfg).values()
    lora_parameters = lora_costs(*shape, tokens, r)[0]
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


# ---- What a run costs ------------------------------------------------------------------------------------------------


def shape_of(model) -> tuple[int, int, int, int, int]:
    """Layers, hidden size, query heads, value heads, head size: what `lora_costs` takes."""
    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size
    return config.num_hidden_layers, size, heads, config.num_key_value_heads, size // heads


def run_costs(model, adapter, batch: dict, all_tokens: bool) -> dict:
    """Parameters, and FLOPs of a training step a screen: the adapter's, computed and counted, and the whole step's.

    all_tokens: whether the adapter updates those of text too."""
    ids = batch["input_ids"]
    tokens = ids.numel()
    visual = int((ids == model.config.image_token_id).sum())
    lora_parameters, lora_flops = lora_costs(*shape_of(model), tokens, r=8)
    step, kept = count_step(model, batch)
    with adapter.disabled():
        floor, kept_by_backbone = count_step(model, batch)
    adapter.zero_grad()
    return {
        "trainable_parameters": sum(p.numel() for p in adapter.parameters()),
        "lora_trainable_parameters": lora_parameters,
        "adapter_flops_per_screen": adapter.flops(tokens if all_tokens else visual) / len(ids),
        "counted_flops_per_screen": (step - floor) / len(ids),
        "lora_flops_per_screen": lora_flops / len(ids),
        "step_flops_per_screen": step / len(ids),
        "vision_flops_per_screen": count_vision(model),
        "saved_bytes_per_screen": (kept - kept_by_backbone) / len(ids),
        "visual_fraction": visual / tokens,
        "changes": changes(model, adapter, batch),
    }


def changes(model, adapter, batch: dict) -> dict:
    """How far q, k and v of each layer are from the base's on a batch, as ||difference|| / ||base's||; and of the
    values also the difference itself, as root mean square over visual tokens."""
    attention = [layer.self_attn for layer in model.language_model.layers]
    parts = {f"{name}{i}": getattr(a, f"{name}_proj") for i, a in enumerate(attention) for name in "qkv"}
    tuned = watch(model, batch, **parts)
    with adapter.disabled():
        base = watch(model, batch, **parts)
    found = {name: ((tuned[name][1] - base[name][1]).norm() / base[name][1].norm()).item() for name in parts}
    visual = batch["input_ids"] == model.config.image_token_id
    for i, a in enumerate(attention):
        x, value = tuned[f"v{i}"]
        update = (value - F.linear(x, a.v_proj.weight))[visual]  # [N, H * d_h]
        found[f"update{i}"] = update.square().sum(1).mean().sqrt().item()
    return found


@torch.no_grad()
def watch(model, batch: dict, **modules: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """(What goes into a module, what comes out of it) in one forward pass."""
    found = {}

    def keep(name, module, inputs, output):
        found[name] = inputs[0], output

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def count_step(model, batch: dict) -> tuple[int, int]:
    """FLOPs of a forward and a backward pass as PyTorch counts them, and bytes kept from the first for the second."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # of the attention kernels the counter knows on a CPU only this one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch).loss
        loss.backward()
    return counter.get_total_flops(), sum(kept.values())


def count_vision(model) -> int:
    """FLOPs of the vision encoder's forward pass over a screen."""
    side = model.config.image_size
    picture = torch.zeros(1, 3, side, side, device=model.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.get_image_features(picture)
    return counter.get_total_flops()
