"""A guided walk: follows one question through every step of Image-LoRA, tensor by tensor.

python -m data.walk          takes the adapter that `python train.py` has saved

It draws two of the pictures of data/figures.py, tensors.png and look.png, into the directory of the run.
"""

import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import train
from data import pictures
from data.base import find_device, image_features, load_base, screens_and_features
from data.command import command, option
from data.evaluate import Answer, evaluate
from data.prompts import VOCABULARY, prompt_batch, training_batch
from imagelora import ImageLoRA, ValueAdapter, attach, load, visual_rows
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
    out = Path(cfg.out)
    tuned = saved_run(out, find_device(cfg.device))
    print(f"walking with {out / 'adapter.pt'}, of the run with heads={tuned.result['heads']}\n")
    show_question(tuned, out / "tensors.png")
    show_attention(tuned, out / "look.png")


def saved_run(out: Path, device: str) -> train.FinetuningRun:
    """The run that train.py has left. ValueError unless it is an Image-LoRA that clicks, and has no history."""
    path = out / "metrics.json"
    result = json.loads(path.read_text()) if path.exists() else {"method": None}
    if result["method"] != "image_lora" or result["task"] != "grounding" or result["history"] > 0:
        why = f"{out}/ holds no Image-LoRA that was trained to click without history"
        raise ValueError(f"{why}; first run python train.py --out {out}")
    model = load_base(result["base"], device)
    adapter = load(model, out / "adapter.pt")
    test = screens_and_features(model, "switches", "test", result["test_screens"])
    _, answers = evaluate(model, *test)
    with adapter.disabled():
        _, base_answers = evaluate(model, *test)
    return train.FinetuningRun(result, model, adapter, base_answers, answers)


def show_question(tuned: train.FinetuningRun, path: Path) -> None:
    """Follow a word problem, a screen and a question through the model, and draw what fine-tuning changes."""
    result, model, adapter, base_answers, answers = tuned
    screen, sample, click = answers[0]
    features = image_features(model.get_image_features, [screen], model.device)
    prompt = prompt_batch([sample], features, history=1)
    image = f"{model.config.num_patches} x <image>"
    station("1 prompt", f"<bos>, a word problem that should stay as it was, {image}, {sample['instruction']}")

    # A first backward pass, on a fresh base; it is not on the batch that the run's training began with
    base = load_base(result["base"], model.device)
    lowest = min(adapter.heads)
    torch.manual_seed(result["seed"])
    first = attach(base, adapter.r, adapter.lora_alpha, adapter.heads).layers[str(lowest)]
    station("2 attach", f"layer {lowest}: A {list(first.A.shape)}, B {list(first.B.shape)} = 0", attach)
    few_screens = screens_and_features(base, "switches", "train", 64)
    base(**training_batch(train.Config(seed=result["seed"]), few_screens, 0)).loss.backward()
    norms = f"A {first.A.grad.norm():.2g}, B {first.B.grad.norm():.2g}"
    station("", f"first backward pass, norms of the gradients: {norms}")

    # What fine-tuning has changed: the norm of the change over the base's norm; values [L, H, T], queries [L, H_q, T]
    queries, _, values = queries_keys_values(model, adapter, prompt)
    values, queries = [(after - before).norm(dim=-1) / before.norm(dim=-1) for before, after in (values, queries)]
    rows = values[lowest].sum(0).nonzero().squeeze(1)
    station("3 M X", f"after training, rows adapted: {rows[0]} .. {rows[-1]}, the image's", ValueAdapter.add_update)
    sizes = "  ".join(f"{size:.0%}" for size in values[lowest][:, rows].mean(1))
    station("4 update", f"layer {lowest}, its size relative to X W_V(h), head by head: {sizes}", ValueAdapter.forward)
    tokens = [VOCABULARY[i] for i in prompt["input_ids"][0]]
    pictures.save([pictures.changes(values, queries, adapter.heads, tokens, screen.image)], path)
    station("5 changes", f"{path}: how far each head's value and query moved at each token;")
    moves = ", ".join(f"{move:.0%} in layer {layer}" for layer, move in enumerate(queries.mean((1, 2))))
    station("", f"queries moved by {moves}:")
    station("", "the lowest adapted layer looks where it looked before")

    # The answer
    counts = []
    hook = adapter.layers[str(lowest)].register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    model.generate(**prompt, max_new_tokens=3)
    hook.remove()
    station("6 decoding", f"rows adapted as the model answers: {counts}, the image's; no generated token", visual_rows)
    clicks = f"{base_answers[0].output} before, {click} after"
    station("7 answer", f"without the word problem: {clicks}; a click in {sample['bbox']} is correct")


def show_attention(tuned: train.FinetuningRun, path: Path) -> None:
    """Find the head that has turned to the targets the most, and draw where it looks for four of the answers."""
    answers = tuned.answers
    questions = answers[:100]  # enough for a mean
    shares = [pictures.share_on(answer.sample["bbox"], attention_maps(tuned, answer)) for answer in questions]
    base_share, share = torch.stack(shares).mean(0)  # [L, H_q]
    layer, head = divmod(int((share - base_share).argmax()), share.shape[1])
    wrong = [i for i, answer in enumerate(answers) if not pictures.is_correct(answer)]
    last = max(wrong, default=len(answers) - 1)
    shown = [0, len(answers) // 5, 2 * len(answers) // 5, last]

    maps = {i: attention_maps(tuned, answers[i])[:, layer, head] for i in shown}
    panels = [pictures.attention_panel(answers[i], maps[i][moment]) for moment in (0, 1) for i in shown]
    panels += [pictures.clicks_panel(tuned.base_answers[i], answers[i]) for i in shown]
    name = f"head {head} of layer {layer}"
    before = f"Before fine-tuning: where {name} looks (bright), and how much of its attention is on the target"
    picture = pictures.page(panels, len(shown), titles=(before, "After fine-tuning", "The clicks"))
    pictures.save([picture], path)
    station("8 picture", f"{path}: where {name} looks, which has turned to the targets the most;")
    growth = f"from {base_share[layer, head]:.0%} to {share[layer, head]:.0%}"
    station("", f"their share of its attention went {growth}, the mean over {len(questions)} questions")


def attention_maps(tuned: train.FinetuningRun, answer: Answer) -> Tensor:
    """How much every head looks at each patch from the last token of a question, before and after fine-tuning:
    [2, L, H_q, rows, columns]."""
    model = tuned.model
    features = image_features(model.get_image_features, [answer.screen], model.device)
    prompt = prompt_batch([answer.sample], features)
    queries, keys, _ = queries_keys_values(model, tuned.adapter, prompt)
    keys = keys.repeat_interleave(queries.shape[2] // keys.shape[2], dim=2)  # [2, L, H_q, T, d_h]
    scores = queries[..., -1:, :] @ keys.mT / queries.shape[-1] ** 0.5  # [2, L, H_q, 1, T]
    is_visual = prompt["input_ids"][0] == model.config.image_token_id  # [T]
    side = model.config.image_size // model.config.patch_size  # patches in a row
    return scores.softmax(-1)[..., 0, is_visual].unflatten(-1, (side, side))


@torch.no_grad()
def queries_keys_values(model: TinyVLM, adapter: ImageLoRA, prompt: dict) -> list[Tensor]:
    """Queries [2, L, H_q, T, d_h], keys and values [2, L, H, T, d_h] of one sequence, before and after fine-tuning;
    queries and keys are rotated."""
    queries = []

    def keep_queries(attention, arguments):
        x, angles, *_ = arguments
        queries.append(rotate(attention.split_heads(attention.q_proj(x)), angles))

    hooks = [layer.self_attn.register_forward_pre_hook(keep_queries) for layer in model.language_model.layers]
    with adapter.disabled():
        layers = model(**prompt).past_key_values.layers
    layers += model(**prompt).past_key_values.layers
    for hook in hooks:
        hook.remove()
    return [torch.cat(tensors).unflatten(0, (2, -1)) for tensors in (queries, *zip(*layers))]


if __name__ == "__main__":
    sys.exit(command(WalkConfig, walk, __doc__))
