"""A guided walk: follows one question through every step of Image-LoRA, tensor by tensor.

python -m data.walk          after `python train.py`, whose adapter it takes
"""

import inspect
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from data import command, option
from data.base import load_base, screens_and_features
from data.evaluate import evaluate, generate_answers
from data.prompts import prompt_batch, training_batch, training_data
from imagelora import ValueAdapter, attach, load, visual_rows
from tiny_vlm import TinyVLM
from train import Config


@dataclass(frozen=True)
class WalkConfig:
    adapter: str = option("runs/switches/adapter.pt", "the adapter to walk with")
    base: str = option("data/tiny_vlm.pt", "the model that it was trained on")


def station(title: str, text: str, code=None) -> None:
    """Prints a line of the walk; `code` is the function of imagelora.py that has just run."""
    where = f"   [imagelora.py:{inspect.getsourcelines(code)[1]}]" if code else ""
    print(f"{title:13}{text}{where}")


def walk(cfg: WalkConfig) -> None:
    """Print, station by station, the tensors of the method, their shapes and the numbers that matter."""
    model = load_base(cfg.base)
    screens, features = screens_and_features(cfg.base, "switches", "test", 1, "cpu")
    _, base_answers = evaluate(model, screens, features)
    _, sample, base_click = base_answers[0]
    prompt = prompt_batch([sample], features)
    base = queries_and_values(model, prompt)
    station("1 prompt", f"<bos>, {model.config.num_patches} x <image>, {sample['instruction']}")
    station("", f"a click in the box {sample['bbox']} is correct; the base model clicks {base_click}")

    adapter = load(model, cfg.adapter)
    heads, r = adapter.heads, adapter.r
    lowest = min(heads)
    tuned = queries_and_values(model, prompt)
    counts = rows_adapted(model, adapter.layers[str(lowest)], sample, features)
    _, answers = evaluate(model, screens, features)

    values = attach(adapter.detach(), r, 2 * r, heads).layers[str(lowest)]
    station("2 attach", f"layer {lowest}: A {list(values.A.shape)}, B {list(values.B.shape)} = 0", attach)
    data = training_data(Config(steps=1, base=cfg.base), "cpu")
    model(**training_batch(Config(), data, 0).inputs).loss.backward()
    norms = ", ".join(f"{name} {parameter.grad.norm():.2g}" for name, parameter in values.named_parameters())
    station("", f"first step, norms of the gradients: {norms}; while B = 0, those of A and gamma are zero")

    _, base_values = base[lowest]  # X W_V [T, H, d_h]; X is the base's, because no layer below is adapted
    _, tuned_values = tuned[lowest]
    update = tuned_values - base_values
    rows = update.abs().sum((1, 2)).nonzero().squeeze(1)
    station("3 M X", f"after training, rows adapted: {rows[0]} .. {rows[-1]}, the image's", ValueAdapter.add_update)
    station("4 update", f"layer {lowest}, norms over these rows by head:", ValueAdapter.forward)
    station("", "X W_V(h) " + "  ".join(f"{norm:6.2f}" for norm in base_values[rows].norm(dim=(0, 2))))
    station("", "update   " + "  ".join(f"{norm:6.2f}" for norm in update.norm(dim=(0, 2))))

    moves = []
    for layer, ((query, _), (base_query, _)) in enumerate(zip(tuned, base)):
        moves.append(f"{(query - base_query).norm() / base_query.norm():.0%} in layer {layer}")
    station("5 looking", f"queries moved by {', '.join(moves)}:")
    station("", "the lowest adapted layer looks where it looked before")
    station("6 decoding", f"rows adapted, by forward pass: {counts}", visual_rows)
    station("7 answer", f"{base_click} before, {answers[0].output} after; a click in {sample['bbox']} is correct")


@torch.no_grad()
def queries_and_values(model: TinyVLM, prompt: dict) -> list[tuple[Tensor, Tensor]]:
    """Queries and values [T, H, d_h] of one sequence in every layer."""
    outputs = []
    hooks = []
    for layer in model.language_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            hooks.append(projection.register_forward_hook(lambda module, args, output: outputs.append(output)))
    model(**prompt)
    for hook in hooks:
        hook.remove()
    split = [output[0].unflatten(-1, (-1, layer.self_attn.head_dim)) for output in outputs]
    return list(zip(split[::2], split[1::2]))


def rows_adapted(model: TinyVLM, lowest: ValueAdapter, sample: dict, features: Tensor) -> list[int]:
    """How many rows are adapted in each forward pass of an answer."""
    counts = []
    hooks = [
        model.register_forward_pre_hook(lambda module, args: counts.append(0)),
        lowest.register_forward_pre_hook(lambda module, args: counts.append(counts.pop() + len(args[0]))),
    ]
    generate_answers(model, [sample], features)
    for hook in hooks:
        hook.remove()
    return counts


if __name__ == "__main__":
    sys.exit(command(WalkConfig, walk, __doc__))
