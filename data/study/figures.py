"""Draws the pictures of the pages anew, in about two minutes: python -m data.study.figures

training.gif    a few clicks of the demo's run, while they move to the switches
tensors.png     what this run changes, layer by layer and token by token
look.png        where a head looks before and after it
trade_off.png   models whose update is turned down after training, from runs.csv and smollm.csv
"""

import io
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import train
from data import pictures
from data.attention import attention_weights, queries_keys_values
from data.base import find_device, image_features, load_base, screens_and_features
from data.command import command, make_directory, option
from data.evaluate import Answer, evaluate
from data.pictures import BLUE, GREY, INK, ORANGE, RED
from data.prompts import IMAGE, VOCABULARY, prompt_batch
from data.screens import SIZE, Box
from data.study.plan import MODELS, SMOLLM2_BASES

try:
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap, LogNorm
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    from data.study import compare
except ImportError:
    if __name__ != "__main__":
        raise
    print('error: the pictures need pandas and matplotlib; install them by pip install ".[study]"', file=sys.stderr)
    sys.exit(2)

WIDTH = 8.3  # of a picture, in inches
STYLE = {"font.size": 10, "text.color": INK, "savefig.dpi": 200, "legend.frameon": False}
STYLE |= {"figure.constrained_layout.h_pad": 0.07}
RIM = [withStroke(linewidth=3, foreground="white")]  # around what stands on dark ground
TARGET = {"marker": "s", "markersize": 9, "color": "black", "markerfacecolor": "none", "markeredgewidth": 1.5}
CROSS = {"marker": "x", "markersize": 7, "color": ORANGE, "markeredgewidth": 2, "path_effects": RIM}
RING = {"marker": r"$\odot$", "markersize": 10, "color": BLUE, "path_effects": RIM}


@dataclass(frozen=True)
class FiguresConfig:
    out: str = option("data/figures", "directory of the pictures")
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")


@plt.rc_context(STYLE)
def make_figures(cfg: FiguresConfig) -> None:
    """The demo's run, filmed; then its pictures, and that of the study's runs."""
    out = Path(cfg.out)
    make_directory(out)
    run = train.Config(device=cfg.device)
    # Many frames at the start, where clicks move, and few at the end.
    filmed_steps = {round(run.steps * (frame / 32) ** 2) for frame in range(33)}
    film = {}  # {step: answers, ...}

    def film_step(step: int, model) -> None:
        if step in filmed_steps:
            # Every seventh of the answers about nine screens, which gives six on six screens, of words and icons.
            _, answers = evaluate(model, *screens_and_features(model, "new", "test", 9))
            film[step] = answers[::7]

    film_step(0, load_base(run.base, find_device(run.device)))
    tuned = train.finetune(run, verbose=True, after_step=film_step)
    frames = []
    for step, answers in film.items():
        hits = sum(map(pictures.hits, answers))
        headline = f"step {step:,} of {run.steps:,}:  {hits} of {len(answers)} clicks hit"
        frames.append(pictures.page(film[0], answers, 3, headline))
    pictures.save(frames, out / "training.gif")
    figures = {"tensors": draw_changes(tuned), "look": draw_attention(tuned)}
    figures["trade_off"] = draw_trade_off(compare.read_runs())
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer)
        pictures.save([Image.open(buffer).convert("RGB")], out / f"{name}.png")


# ---- What fine-tuning changes ----------------------------------------------------------------------------------------


def draw_changes(tuned: train.FinetuningRun) -> plt.Figure:
    """How far each head's value and query have moved at each token of a prompt: the norm of the change, relative to
    the norm of the base's."""
    answer = tuned.answers[0]
    ids, queries, _, values = look_inside(tuned, answer, num_problems=1)
    tokens = [VOCABULARY[i] for i in ids]
    start = tokens.index(IMAGE)
    end = start + tokens.count(IMAGE)
    spans = {"words": slice(start), "image": slice(start, end), "question": slice(end, None)}
    colours = LinearSegmentedColormap.from_list("changes", ["#244c96", "#2882cd", "#56b4e9", "#fff0be"])
    colours = colours.with_extremes(bad="black")
    grid = {"left": 0.13, "right": 0.99, "bottom": 0.03, "top": 0.97, "wspace": 0.05, "width_ratios": (19, 40, 10)}
    figure = plt.figure(figsize=(WIDTH, 5.6))
    legend, header, *parts = figure.subfigures(4, 1, height_ratios=(1, 2.5, 5, 5))

    legend.text(0.01, 0.5, "What fine-tuning changes", size=13, va="center")
    words = [(0.37, "███", "black"), (0.42, "exactly 0", INK), (0.53, "3%", INK), (0.7, "300% of the base", INK)]
    for x, text, colour in (*words, (0.865, "▶", ORANGE), (0.88, "selected head", INK)):
        legend.text(x, 0.5, text, color=colour, size=9, va="center")
    bar = legend.add_axes((0.565, 0.34, 0.125, 0.32))
    bar.imshow([np.linspace(0, 1, 256)], colours, aspect="auto")
    bar.axis("off")

    for ax, (name, span) in zip(header.subplots(1, 3, gridspec_kw=grid), spans.items()):
        words = " ".join(token for token in tokens[span] if token[0] != "<") or "patches, row by row"
        ax.text(0, 1, name, size=13, va="top")
        ax.text(0, 0.72, textwrap.fill(words, 24), color=GREY, va="top")
        ax.axis("off")
        if name == "image":
            ax.inset_axes((0.4, 0.1, 0.2, 1)).imshow(answer.screen.image)
            rows_of_patches = np.concatenate(np.split(answer.screen.image, 8), axis=1)
            ax.inset_axes((0, -0.03, 1, 0.12)).imshow(rows_of_patches)
            for inset in ax.child_axes:
                inset.axis("off")

    rows = ("values", values, tuned.adapter.heads), ("queries", queries, {})
    for part, (name, (before, after), selected) in zip(parts, rows):
        moves = ((after - before).norm(dim=-1) / before.norm(dim=-1)).cpu().numpy()  # [L, H or H_q, T]
        moves[moves == 0] = np.nan  # which is drawn black
        part.supylabel(f"{name} of {moves.shape[1]} heads", x=0.01)
        for layer, axes in enumerate(part.subplots(len(moves), 3, gridspec_kw=grid)):
            for ax, span in zip(axes, spans.values()):
                ax.imshow(moves[layer][:, span], colours, LogNorm(0.03, 3), aspect="auto")
                bare(ax)
            axes[0].set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center")
            for head in selected.get(layer, []):
                beside = {"xy": (-0.012, head), "xycoords": ("axes fraction", "data"), "ha": "center", "va": "center"}
                axes[1].annotate("▶", **beside, color=ORANGE, size=6)
    return figure


def bare(ax: plt.Axes) -> None:
    """Without ticks and frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


# ---- Where a head looks ----------------------------------------------------------------------------------------------


def draw_attention(tuned: train.FinetuningRun) -> plt.Figure:
    """Where the head that has turned to the targets the most looks for four of the questions, and the clicks."""
    answers = tuned.answers
    counted = answers[:100]  # enough for a mean
    shares = [share_on(answer.sample["bbox"], attention_maps(tuned, answer)) for answer in counted]
    base_share, share = torch.stack(shares).mean(0)  # [L, H_q]
    layer, head = divmod(int((share - base_share).argmax()), share.shape[1])
    name = f"head {head} of layer {layer}"
    growth = f"from {base_share[layer, head]:.0%} to {share[layer, head]:.0%}, averaged over {len(counted)} questions"
    print(f"look     the attention of {name} to the target grew the most: {growth}")

    wrong = [i for i, answer in enumerate(answers) if not pictures.hits(answer)]
    last_wrong = max(wrong, default=len(answers) - 1)
    shown = [0, len(answers) // 5, 2 * len(answers) // 5, last_wrong]
    figure = plt.figure(figsize=(WIDTH, 7.8), layout="constrained")
    legend, *rows = figure.subfigures(4, 1, height_ratios=(0.14, 1, 1, 1))
    before = f"Before fine-tuning: where {name} looks (bright), and how much of its attention is on the target"
    for row, title in zip(rows, (before, "After fine-tuning", "The clicks")):
        row.suptitle(title, x=0.01, ha="left", size=10)
    columns = zip(*(row.subplots(1, len(shown)) for row in rows))
    for i, (*looks, clicks) in zip(shown, columns):
        for ax, weights in zip(looks, attention_maps(tuned, answers[i])[:, layer, head].cpu()):
            draw_screen(ax, answers[i], f"{share_on(answers[i].sample['bbox'], weights):.0%}")
            shade = 0.8 - 0.8 * (weights / weights.max()).sqrt().numpy()
            ax.imshow(shade, ListedColormap(["#101828"]), alpha=shade, extent=(0, SIZE, SIZE, 0))
        draw_screen(clicks, answers[i], "correct" if pictures.hits(answers[i]) else "wrong")
        for answer, mark in ((tuned.base_answers[i], CROSS), (answers[i], RING)):
            if answer.output is not None:  # otherwise the answer is no point
                clicks.plot(*answer.output, **mark)

    marks = {"target": TARGET, "base model's click": CROSS, "tuned model's click": RING}
    handles = [Line2D([], [], label=label, linestyle="", **mark) for label, mark in marks.items()]
    legend.legend(handles=handles, loc="center left", ncols=3)
    return figure


def draw_screen(ax: plt.Axes, answer: Answer, verdict: str) -> None:
    """A screen with the target of a question; below it the question."""
    ax.imshow(answer.screen.image, extent=(0, SIZE, SIZE, 0), interpolation="bicubic")
    left, top, right, bottom = answer.sample["bbox"]
    ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, linewidth=1.5, path_effects=RIM))
    ax.set_xlabel(f"{answer.sample['instruction']}: {verdict}", loc="left", color=RED if verdict == "wrong" else INK)
    bare(ax)


def share_on(box: Box, weights: Tensor) -> Tensor:
    """How much of attention weights [..., side, side] is on the patches that this box touches, [...]."""
    size = SIZE // weights.shape[-1]  # of a patch, in pixels
    left, top, right, bottom = box
    rows = slice(top // size, (bottom - 1) // size + 1)
    columns = slice(left // size, (right - 1) // size + 1)
    return weights[..., rows, columns].sum((-2, -1))


# ---- What happens inside the model -----------------------------------------------------------------------------------


def attention_maps(tuned: train.FinetuningRun, answer: Answer) -> Tensor:
    """How much every head looks at each patch from the last token of a question, before and after fine-tuning:
    [2, L, H_q, rows, columns]."""
    ids, queries, keys, _ = look_inside(tuned, answer)
    weights = attention_weights(queries, keys, first=len(ids) - 1)  # [2, L, H_q, 1, T]
    config = tuned.model.config
    side = config.image_size // config.patch_size  # patches in a row
    return weights[..., 0, ids == config.image_token_id].unflatten(-1, (side, side))


def look_inside(tuned: train.FinetuningRun, answer: Answer, num_problems=0) -> list[Tensor]:
    """The token ids [T] of a question that was answered; and its queries [2, L, H_q, T, d_h], keys and values
    [2, L, H, T, d_h] before and after fine-tuning."""
    model = tuned.model
    features = image_features(model.get_image_features, [answer.screen], model.device)
    prompt = prompt_batch([answer.sample], features, num_problems)
    with tuned.adapter.disabled():
        before = queries_keys_values(model, prompt)
    after = queries_keys_values(model, prompt)
    return [prompt["input_ids"][0], *(torch.stack(pair)[:, :, 0] for pair in zip(before, after))]


# ---- What happens if the update is turned down -----------------------------------------------------------------------

COLOURS = {"LoRA": ORANGE, "Partial LoRA": "#009e73", "Image-LoRA": BLUE}


def draw_trade_off(runs: pd.DataFrame) -> plt.Figure:
    """The new task and the other questions where the trained update is multiplied by gamma, a panel for each model. A
    point of a tiny model is a mean over the seeds."""
    runs = compare.rows_where(compare.at_chosen_rates(runs), {"text": 0})
    shown = {f"tiny model {model}": {"setting": "skilled", "model": model} for model in MODELS}
    shown |= {setting: {"setting": setting} for setting in SMOLLM2_BASES}
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 6.4), layout="constrained", sharex=True, sharey="row")
    *panels, legend = axes.flat
    for (title, where), ax in zip(shown.items(), panels):
        of_model = compare.rows_where(runs, where).groupby(["method", "gamma"])
        points = of_model[["task_acc", "other_questions_acc"]].mean()
        ax.axhline(points.other_questions_acc["base model", 1.0], color=GREY, linewidth=1, ls="--", label="base model")
        for method, colour in COLOURS.items():
            for name, style, fill in ((method, "-", colour), (f"{method} with own answers", ":", "white")):
                if name in points.index:
                    line = points.loc[name].sort_index(ascending=False).to_numpy()  # [γ, 2]
                    mark = {"color": colour, "marker": "o", "markerfacecolor": fill}
                    ax.plot(*line.T, style, **mark, markersize=3, label=name)
                    ax.plot(*line[:1].T, **mark, markersize=8)  # γ = 1
        curve = points.loc["Image-LoRA"]
        labels = {} if title in SMOLLM2_BASES else {1.0: (-8, 0), 0.8: (-8, 0), 0.6: (-4, -9)}  # where there is room
        for gamma, offset in labels.items():
            where = {"xytext": offset, "textcoords": "offset points", "ha": "right", "va": "center"}
            point = curve.task_acc[gamma], curve.other_questions_acc[gamma]
            ax.annotate(f"γ = {gamma:g}", point, **where, color=BLUE, path_effects=RIM)
        ax.set(title=title, xlim=(79, 100.5))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e4e7ec")
    for row, bottom in zip(axes, (38, 0)):
        row[0].set(ylabel="other questions, %", ylim=(bottom, 101))
    for ax in panels[2:]:
        ax.set_xlabel("new task, %")
        ax.tick_params(labelbottom=True)
    legend.axis("off")
    legend.legend(*panels[0].get_legend_handles_labels(), loc="center left")
    return figure


if __name__ == "__main__":
    sys.exit(command(FiguresConfig, make_figures, __doc__))
