"""A guided walk: follows one question through every step of Image-LoRA, tensor by tensor.

python -m data.walk          takes the adapter that `python train.py` has saved, and trains one if there is none

It draws two pictures into the directory of the run: tensors.png, what fine-tuning has changed in every value and query,
and look.png, where a head looks before and after fine-tuning.
"""

import inspect
import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import train
from data import pictures
from data.base import find_device, image_features, load_base, screens_and_features
from data.command import command, make_directory, option
from data.evaluate import Answer, evaluate, generate_answers
from data.methods import attach_adapter
from data.prompts import prompt_batch, training_batch
from data.questions import parse_point
from data.tokens import VOCABULARY
from imagelora import Heads, ImageLoRA, ValueAdapter, attach, load, visual_rows
from tiny_vlm import TinyVLM, rotate


@dataclass(frozen=True)
class WalkConfig:
    out: str = option("runs/switches", "directory of the run to walk with, and of the pictures")
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")


def station(title: str, text: str, code=None) -> None:
    """Prints a line of the walk; `code` is the function of imagelora.py that has just run."""
    where = f"   [imagelora.py:{inspect.getsourcelines(code)[1]}]" if code else ""
    print(f"{title:13}{text}{where}")


def walk(cfg: WalkConfig) -> None:
    """Print, station by station, the tensors of the method, their shapes and the numbers that matter."""
    device = find_device(cfg.device)
    out = Path(cfg.out)
    make_directory(out)
    run = saved_run(out)
    if run:
        print(f"walking with {out / 'adapter.pt'}\n")
        model = load_base(run.base, device)
        adapter = load(model, out / "adapter.pt")
        test = screens_and_features(model, "switches", "test", run.test_screens)
        _, answers = evaluate(model, *test)
        with adapter.disabled():
            _, base_answers = evaluate(model, *test)
    else:
        print(f"train.py has left no Image-LoRA that clicks in {out}/, so here is its run, which is not saved\n")
        run = train.Config(device=cfg.device)
        tuned = train.finetune(run, verbose=True)
        model, adapter = tuned.model, tuned.adapter
        base_answers, answers = tuned.base_answers, tuned.answers
        print()

    sample = answers[0].sample
    features = image_features(model.get_image_features, [answers[0].screen], model.device)
    station("1 prompt", f"<bos>, a word problem, {model.config.num_patches} x <image>, {sample['instruction']}")
    show_start(run, load_base(run.base, device), adapter.heads)
    show_changes(model, adapter, answers[0], out / "tensors.png")
    show_decoding(model, adapter, sample, features)
    show_attention(model, adapter, base_answers, answers, out / "look.png")


def saved_run(out: Path) -> train.Config | None:
    """The Config of the run that train.py has left; None unless it is an Image-LoRA that clicks, and has no history."""
    if not (out / "adapter.pt").exists() or not (out / "metrics.json").exists():
        return None
    result = json.loads((out / "metrics.json").read_text())
    if result["task"] != "grounding" or result["history"] > 0:
        return None
    return train.Config(**{f.name: result[f.name] for f in fields(train.Config)})


def show_start(run: train.Config, model: TinyVLM, heads: Heads) -> None:
    """The first backward pass, on a fresh base."""
    adapter = attach_adapter(run, model, heads, run.seed)
    lowest = min(heads)
    values = adapter.layers[str(lowest)]
    station("2 attach", f"layer {lowest}: A {list(values.A.shape)}, B {list(values.B.shape)} = 0", attach)
    data = train.training_data(replace(run, steps=1), model)  # few screens are enough for one batch
    model(**training_batch(run, data, 0)).loss.backward()
    norms = f"A {values.A.grad.norm():.2g}, B {values.B.grad.norm():.2g}"
    station("", f"first backward pass, norms of the gradients: {norms}")


def show_changes(model: TinyVLM, adapter: ImageLoRA, answer: Answer, path: Path) -> None:
    """What fine-tuning changes while the model reads a word problem, a screen and a question; and its picture."""
    features = image_features(model.get_image_features, [answer.screen], model.device)
    prompt = prompt_batch([answer.sample], features, history=1)
    values, queries = relative_changes(model, adapter, prompt)
    lowest = min(adapter.heads)
    rows = values[lowest].sum(0).nonzero().squeeze(1)
    station("3 M X", f"after training, rows adapted: {rows[0]} .. {rows[-1]}, the image's", ValueAdapter.add_update)
    sizes = "  ".join(f"{size:.0%}" for size in values[lowest][:, rows].mean(1))
    station("4 update", f"layer {lowest}, its size relative to X W_V(h), head by head: {sizes}", ValueAdapter.forward)

    tokens = [VOCABULARY[i] for i in prompt["input_ids"][0]]
    pictures.save([pictures.changes(values, queries, adapter.heads, tokens, answer.screen.image)], path)
    station("5 changes", f"{path}: how far each head's value and query moved at each token;")
    moves = ", ".join(f"{move:.0%} in layer {layer}" for layer, move in enumerate(queries.mean((1, 2))))
    station("", f"queries moved by {moves}:")
    station("", "the lowest adapted layer looks where it looked before")


def relative_changes(model: TinyVLM, adapter: ImageLoRA, prompt: dict) -> tuple[Tensor, Tensor]:
    """How far the adapter moves values [L, H, T] and queries [L, H_q, T]: norm of the change over the base's norm."""
    queries, _, values = queries_keys_values(model, prompt)
    with adapter.disabled():
        base_queries, _, base_values = queries_keys_values(model, prompt)
    value_changes = (values - base_values).norm(dim=-1) / base_values.norm(dim=-1)
    query_changes = (queries - base_queries).norm(dim=-1) / base_queries.norm(dim=-1)
    return value_changes, query_changes


@torch.no_grad()
def queries_keys_values(model: TinyVLM, prompt: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [L, H_q, T, d_h], keys and values [L, H, T, d_h] of one sequence, queries and keys rotated."""
    layers = []

    def keep(attention, arguments, output):
        x, angles, *_ = arguments
        _, (keys, values) = output
        queries = rotate(attention.split_heads(attention.q_proj(x)), angles)
        layers.append((queries[0], keys[0], values[0]))

    hooks = [layer.self_attn.register_forward_hook(keep) for layer in model.language_model.layers]
    model(**prompt)
    for hook in hooks:
        hook.remove()
    queries, keys, values = zip(*layers)
    return torch.stack(queries), torch.stack(keys), torch.stack(values)


def show_decoding(model: TinyVLM, adapter: ImageLoRA, sample: dict, features: Tensor) -> None:
    """How many rows are adapted while the model answers, and the answers before and after fine-tuning."""
    counts = []

    def count_rows(layer_adapter, inputs):
        (x_vis,) = inputs  # [N, D]
        counts.append(len(x_vis))

    hook = adapter.layers[str(min(adapter.heads))].register_forward_pre_hook(count_rows)
    (after,) = generate_answers(model, [sample], features, history=1)
    hook.remove()
    station("6 decoding", f"rows adapted as the model answers: {counts} (a generated token would add 1)", visual_rows)
    with adapter.disabled():
        (before,) = generate_answers(model, [sample], features, history=1)
    clicks = f"{parse_point(before)} before, {parse_point(after)} after"
    station("7 answer", f"{clicks}; a click in {sample['bbox']} is correct")


def show_attention(
    model: TinyVLM, adapter: ImageLoRA, base_answers: list[Answer], answers: list[Answer], path: Path
) -> None:
    """Find the head that has turned to the targets the most, and draw where it looks for four of the answers."""
    questions = answers[:100]  # enough for a mean
    shares = mean_share(model, questions)
    with adapter.disabled():
        base_shares = mean_share(model, questions)
    layer, head = divmod(int((shares - base_shares).argmax()), shares.shape[1])

    wrong = [i for i, answer in enumerate(answers) if not pictures.is_correct(answer)]
    last = max(wrong, default=len(answers) - 1)
    columns = []
    for i in (0, len(answers) // 5, 2 * len(answers) // 5, last):
        weights = attention_maps(model, answers[i])[layer, head]
        with adapter.disabled():
            base_weights = attention_maps(model, answers[i])[layer, head]
        columns.append((base_answers[i], answers[i], base_weights, weights))

    name = f"head {head} of layer {layer}"
    pictures.save([pictures.attention_picture(columns, name)], path)
    station("8 picture", f"{path}: where {name} looks, which has turned to the targets the most;")
    growth = f"from {base_shares[layer, head]:.0%} to {shares[layer, head]:.0%}"
    station("", f"their share of its attention went {growth}, the mean over {len(questions)} questions")


def mean_share(model: TinyVLM, answers: list[Answer]) -> Tensor:
    """The share of its attention that each head gives to the targets, [L, H_q]; the mean over questions."""
    shares = [pictures.share_on(answer.sample["bbox"], attention_maps(model, answer)) for answer in answers]
    return torch.stack(shares).mean(0)


def attention_maps(model: TinyVLM, answer: Answer) -> Tensor:
    """Where every head looks from the last token of a question: its weights on visual tokens [L, H_q, P]."""
    features = image_features(model.get_image_features, [answer.screen], model.device)  # [1, P, D]
    prompt = prompt_batch([answer.sample], features)
    queries, keys, _ = queries_keys_values(model, prompt)
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)  # [L, H_q, T, d_h]
    scores = queries[:, :, -1:] @ keys.mT / queries.shape[-1] ** 0.5  # [L, H_q, 1, T]
    is_visual = prompt["input_ids"][0] == model.config.image_token_id  # [T]
    return scores.softmax(-1)[:, :, 0, is_visual]


if __name__ == "__main__":
    sys.exit(command(WalkConfig, walk, __doc__))
