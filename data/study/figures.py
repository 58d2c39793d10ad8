"""Draws the pictures of the pages anew, in some minutes: python -m data.study.figures

Runs of the study come from runs.csv and smollm.csv. Three pictures show a run of the demo, which takes about a minute.
"""

import io
import sys
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

import train
from data.base import find_device, image_features, load_base, screens_and_features
from data.command import command, make_directory, option
from data.evaluate import Answer, evaluate, is_right, patch_effects
from data.pictures import BLUE, INK, ORANGE, RED
from data.prompts import IMAGE, VOCABULARY, prompt_batch
from data.screens import SIZE
from data.study import compare

WIDTH = 8.3  # of a picture, in inches
COLOURS = {"LoRA": ORANGE, "Partial LoRA": "#009e73", "Image-LoRA": BLUE}
GREY, LIGHT, PALE = "#667085", "#e4e7ec", "#a9cfe8"  # light grey: as in the base model
POINTER = [(0, 0), (0, -9), (2, -7), (4, -11), (5, -10), (4, -6), (6, -6)]  # as a mouse's; its tip is where it clicks
EXTENT = (0, SIZE, SIZE, 0)  # of a screen in its axes: left, right, bottom, top
CENTRED = {"ha": "center", "va": "center"}
STYLE = {"font.size": 10, "text.color": INK, "savefig.dpi": 200, "legend.frameon": False, "hatch.linewidth": 0.6}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": LIGHT}
STYLE |= {"axes.titlelocation": "left", "axes.titlesize": 10.5, "figure.constrained_layout.use": True}


def bare(ax: plt.Axes) -> None:
    """Without ticks and frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def draw_screen(ax: plt.Axes, answer: Answer) -> None:
    """The screen that an answer is about, with a frame around the target of a click."""
    ax.imshow(answer.screen.image, extent=EXTENT)
    bare(ax)
    if "bbox" in answer.sample:
        left, top, right, bottom = answer.sample["bbox"]
        look = {"fill": False, "linewidth": 1.5, "label": "target"}
        ax.add_patch(plt.Rectangle((left - 2, top - 2), right - left + 4, bottom - top + 4, **look))


# ---- What each method changes, and how Image-LoRA does it ------------------------------------------------------------

SPANS = {"text before": (0, 2), "image": (2.3, 4), "text after": (6.6, 2)}  # {name: (left edge, number of tokens)}
PROJECTIONS = "outputs", "values", "keys", "queries"  # from below


def draw_cells(ax: plt.Axes, rows: dict[str, list]) -> None:
    """A cell for each row and token. rows: {name: the colour of each of SPANS}, from below."""
    for row, colours in enumerate(rows.values()):
        for (left, num_tokens), colour in zip(SPANS.values(), colours):
            ax.bar(left + np.arange(num_tokens), 0.9, 0.93, row - 0.45, align="edge", color=colour)
    bare(ax)
    ax.set_xticks([left + num_tokens / 2 for left, num_tokens in SPANS.values()], SPANS)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)


def draw_where(cfg) -> list[plt.Figure]:
    """For each method, what its adapter adds something to: above with an image, below without."""
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 3.1), sharey=True)
    for (method, colour), above, below in zip(COLOURS.items(), *axes):
        text = colour if method == "LoRA" else LIGHT
        with_image = dict.fromkeys(PROJECTIONS, [text, colour, text])
        if method == "Image-LoRA":
            with_image = dict.fromkeys(PROJECTIONS, [LIGHT] * 3) | {"values": [LIGHT, colour, LIGHT]}
        draw_cells(above, with_image)
        draw_cells(below, dict.fromkeys(PROJECTIONS, [text, "white", "white"]))
        below.set_xticks([1], ["text"])
        above.set_title(method, color=colour, weight="bold", size=13)
        verdict = "changed" if method == "LoRA" else "the base model,\nbit for bit"
        below.text(2.4, 1.5, verdict, weight="bold", color=colour, va="center")
    axes[0, 0].set_ylabel("with an image", weight="bold", size=11)
    axes[1, 0].set_ylabel("text alone", weight="bold", size=11)
    return [figure]


def draw_method(cfg) -> list[plt.Figure]:
    """One token's way into the heads of a layer, then all tokens, then all layers."""
    figure, (token, layer, model) = plt.subplots(1, 3, figsize=(WIDTH, 2.7), width_ratios=(4, 3, 3))
    for ax, title in ((token, "One token"), (layer, "All tokens of the layer"), (model, "All layers")):
        ax.set_title(title, weight="bold", pad=16)
    draw_cells(layer, {f"head {head}": [LIGHT, BLUE if head in (1, 3, 4) else LIGHT, LIGHT] for head in range(6)})
    layer.set_ylim(5.5, -0.6)  # head 0 is on top
    for x, M in ((1, "0"), (4.3, "1"), (7.6, "0")):
        layer.text(x, -0.7, f"M = {M}", ha="center", color=BLUE if M == "1" else GREY, weight="bold")
    layers = {"below": [LIGHT] * 3, "lowest\nadapted": [LIGHT, BLUE, LIGHT], "above": [LIGHT, PALE, PALE]}
    draw_cells(model, layers)
    for x, row, effect in ((4.3, 1, "written"), (1, 2, "cannot\nchange"), (4.3, 2, "follows"), (7.6, 2, "follows")):
        model.text(x, row, effect, size=9, color="white" if effect == "written" else INK, **CENTRED)

    bare(token)
    token.set(xlim=(0, 8), ylim=layer.get_ylim())
    token.bar(0.2, 5.9, 0.4, -0.45, color=GREY)
    token.text(0.2, -0.7, "x", style="italic", ha="center")
    token.plot((0.4, 7.4, 7.4), (0, 0, 5), color=GREY)
    token.text(3, 0, "$W_V$, frozen", bbox={"facecolor": LIGHT, "edgecolor": GREY}, **CENTRED)
    token.plot((0.4, 5.2), (3, 3), color=BLUE)
    added = CENTRED | {"color": "white", "weight": "bold", "bbox": {"color": BLUE}}
    token.text(1.3, 3, "M", **added)
    token.text(2.5, 3, "A", **added)
    token.text(3.1, 2.6, r"$\gamma\;\frac{\alpha}{r}\;\frac{1}{\sqrt{|S|}}$", color=BLUE, size=11)
    token.text(0.8, 3.7, "M is 1 at an image\ntoken, and 0 at text", va="top", color=BLUE, size=9)
    for head in range(6):
        token.annotate("", (8, head), (7.4, head), arrowprops={"arrowstyle": "-|>", "color": GREY})
        if head in (1, 3, 4):
            token.plot((5.2, 5.2, 7.4), (3, head, head), color=BLUE)
            token.text(6.1, head, f"B({head})", **added)
            token.text(7.4, head, "+", **added | {"bbox": {"boxstyle": "circle,pad=0.1", "color": BLUE}})
    return [figure]


# ---- What the study's runs hit and keep ------------------------------------------------------------------------------


def draw_curves(ax: plt.Axes, runs: pd.DataFrame, x: str, y: str, along: str, each: str, ending="", style="-") -> None:
    """For each method a thin line for each of several runs, and a thick one of their means. A ring is gamma = 1.

    along: what changes along a line. each: what tells the thin lines apart. ending: of the methods' names."""
    for method, colour in COLOURS.items():
        of_method = runs[runs.method == method + ending]
        if len(of_method):
            points = of_method.pivot_table([x, y], along, each)  # means over all else
            ax.plot(points[x], points[y], style, color=colour, linewidth=0.7, alpha=0.5)
            means = points.T.groupby(level=0).mean().T
            look = {"color": colour, "linewidth": 2, "marker": ".", "markersize": 4}
            ax.plot(means[x], means[y], style, label=method + ending, **look)
            if along == "gamma":
                ax.plot(*means.loc[1.0, [x, y]], "o", color=colour, markerfacecolor="white")


def draw_tradeoff(cfg) -> list[plt.Figure]:
    """Other questions kept against switches hit, along gamma, of each model; of tiny ones also with own answers."""
    runs = compare.at_chosen_rates(compare.read_runs())
    runs = runs[runs.text == 0]
    # {titles of a row: (setting, models, ending of the methods, ending of those on the MLP, lowest of the y axis)}
    rows = {
        "tiny model {}": ("skilled", (1, 2, 3), "", " on the MLP", 60),
        "tiny model {}, own answers": ("skilled", (1, 2, 3), " with own answers", " on the MLP with own answers", 60),
        "SmolLM2, model {}": ("SmolLM2", (1, 2), "", " on the MLP, rank 5", 20),
    }
    figure, axes = plt.subplots(3, 3, figsize=(WIDTH, 7), sharex=True, sharey="row")
    for row, (title, (setting, models, ending, on_the_mlp, lowest)) in zip(axes, rows.items()):
        for ax, model in zip(row, models):
            of_model = runs[(runs.setting == setting) & (runs.model == model)]
            base = of_model[of_model.method == "base model"].other_questions_acc.mean()
            ax.axhline(base, color=GREY, linestyle=":", label="base model")
            ax.axvline(95, color=GREY, linewidth=0.8)
            curves = "task_acc", "other_questions_acc", "gamma", "seed"
            draw_curves(ax, of_model, *curves, ending)
            draw_curves(ax, of_model, *curves, on_the_mlp, "--")
            ax.set_title(title.format(model))
        row[0].set(xlim=(87.5, 100), ylim=(lowest, 101), xticks=(90, 95, 100))
    figure.supxlabel("switches hit, %", size=10)
    figure.supylabel("other questions right, %", size=10)
    axes[0, 0].plot([], [], "o", color=GREY, markerfacecolor="white", label="as trained, γ = 1")
    axes[1, 2].tick_params(labelbottom=True)
    axes[2, 2].axis("off")
    axes[2, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center")
    return [figure]


def draw_text(cfg) -> list[plt.Figure]:
    """Switches hit after 0, 3 and 9 word problems: a panel for each kind of training, a thin line for each model."""
    runs = compare.at_chosen_rates(compare.read_runs())
    runs = runs[(runs.setting == "skilled") & (runs.gamma == 1) & runs.text.isin((0, 3, 9))].assign(asked=runs.text)
    endings = {"none": "", "nine": " trained after 9"}
    endings["none to nine,\nwith own answers"] = " trained after 0 to 9 with own answers"
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.7), sharex=True, sharey=True)
    for ax, (text, ending) in zip(axes, endings.items()):
        draw_curves(ax, runs, "asked", "task_acc", "text", "model", ending)
        ax.set_title(f"in training: {text}")
        ax.grid(axis="y")
    axes[0].set(ylim=(-3, 103), xticks=(0, 3, 9), ylabel="switches hit, %")
    axes[1].set_xlabel("word problems before the image in the test")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return [figure]


# ---- The demo's run, filmed ------------------------------------------------------------------------------------------


@cache
def demo(device: str) -> tuple[train.FinetuningRun, dict]:
    """The run, and what `evaluate` returns of new and of old screens at some of its steps: {step: (clicks, names)}."""
    cfg = train.Config(device=device)
    # Many frames at the start, where clicks move, and few at the end.
    filmed_steps = {round(cfg.steps * (frame / 20) ** 3) for frame in range(21)}
    base = load_base(cfg.base, find_device(device))
    new_test = screens_and_features(base, "new", "test", cfg.test_screens)
    old_test = screens_and_features(base, "old", "test", cfg.test_screens // 2 + 1)
    film = {}

    def film_step(step: int, model) -> None:
        if step in filmed_steps:
            film[step] = evaluate(model, *new_test), evaluate(model, *old_test, "what_is_right_of")

    film_step(0, base)
    return train.finetune(cfg, verbose=True, after_step=film_step), film


def draw_training(cfg) -> list[plt.Figure]:
    """Frames with three of the clicks on new screens, and three of the answers about old ones that get lost."""
    _, film = demo(cfg.device)
    (_, base_clicks), (_, base_names) = film[0]
    _, (_, last_names) = film[max(film)]
    lost = {}  # {old screen: the number of a question about it whose answer gets lost}
    for i, (first, last) in enumerate(zip(base_names, last_names)):
        if is_right(first) and not is_right(last):
            lost.setdefault(last.screen, i)
    figures = []
    for step, ((share_clicked, clicks), (share_named, names)) in film.items():
        figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 3.7), layout="none")
        figure.subplots_adjust(0.015, 0.01, 1, 0.83, 0, 0.28)
        figure.text(0.99, 0.945, f"step {step:,} of {max(film):,}", ha="right")
        axes[0, 0].set_title(f"New task: {share_clicked:.1%} of the switches are clicked")
        named = f"{share_named:.1%} of 'what is right of …' are right"
        axes[1, 0].set_title(f"Never asked in training: {named}. Three that get lost:")
        for ax, i in zip(axes[0], range(len(clicks))[::7]):  # Every seventh click is on another screen.
            draw_answer(ax, base_clicks[i], clicks[i])
        for ax, i in zip(axes[1], lost.values()):
            draw_answer(ax, base_names[i], names[i])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
        figures.append(figure)
    return figures


def draw_answer(ax: plt.Axes, base_answer: Answer, answer: Answer) -> None:
    """The screen of an answer, of a click also the target and both clicks; right of it the question and the verdict."""
    draw_screen(ax, answer)
    ax.set_anchor("W")
    verdict = "correct" if is_right(answer) else "wrong"
    if "bbox" in answer.sample:
        if base_answer.output is not None:  # otherwise the answer is no point
            ax.scatter(*base_answer.output, 80, ORANGE, marker="x", linewidth=2.5, label="base model's click")
        if answer.output is not None:
            ax.scatter(*answer.output, 900, BLUE, marker=POINTER, edgecolor="white", label="tuned model's click")
    else:
        verdict = f"{answer.output}:\n{verdict}"
    beside = {"transform": ax.transAxes, "va": "top"}
    ax.text(1.06, 1, textwrap.fill(answer.sample["instruction"], 18), **beside)
    ax.text(1.06, 0.55, verdict, color=INK if is_right(answer) else RED, **beside)


# ---- What the run changes, and which patches carry a click -----------------------------------------------------------


def draw_tensors(cfg) -> list[plt.Figure]:
    """How far each head's value and query have moved at each token of a prompt. A row is a head."""
    tuned, _ = demo(cfg.device)
    tokens, changes = measure_changes(tuned)
    start = tokens.index(IMAGE)
    end = start + tokens.count(IMAGE)
    spans = {"words": slice(start), "image": slice(start, end), "question": slice(end, None)}
    sizes = {"width_ratios": (19, 40, 10), "height_ratios": [2.2] + [1] * len(changes)}
    figure, (header, *rows) = plt.subplots(1 + len(changes), 3, figsize=(WIDTH, 6.2), **sizes)
    for ax, (name, span) in zip(header, spans.items()):
        words = " ".join(token for token in tokens[span] if token[0] != "<") or "patches, row by row"
        ax.set_title(name, size=13)
        ax.text(0, 1, textwrap.fill(words, 24), color=GREY, va="top", transform=ax.transAxes)
        ax.axis("off")
    inset = header[1].inset_axes((0.4, 0, 0.4, 1))
    inset.imshow(tuned.answers[0].screen.image)
    inset.axis("off")
    for row, (name, moves) in zip(rows, changes.items()):
        for ax, span in zip(row, spans.values()):
            shown = ax.imshow(np.ma.masked_equal(moves[:, span], 0), "Blues", LogNorm(0.01, 3), aspect="auto")
            ax.patch.set(facecolor="#f2f4f7", hatch="////", edgecolor="#c3c9d3")  # where nothing is drawn
            ax.hlines(np.arange(1, len(moves)) - 0.5, *ax.get_xlim(), color="white", linewidth=1)  # between heads
            bare(ax)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for layer, heads in tuned.adapter.heads.items():
        rows[layer][1].set_yticks(heads, ["▶"] * len(heads), color=ORANGE, size=6)
        rows[layer][1].tick_params(length=0, pad=1)
    rim = [withStroke(linewidth=3, foreground="white")]  # because some of the words stand on dark ground
    lowest, above, *_ = rows[min(tuned.adapter.heads) :]
    for ax, text in ((lowest[0], "cannot change"), (lowest[1], "the adapter writes"), (above[2], "follows")):
        ax.text(0.5, 0.5, text, transform=ax.transAxes, path_effects=rim, **CENTRED)
    bar = figure.colorbar(shown, ax=figure.axes, location="bottom", aspect=60, ticks=[0.01, 0.1, 1], format="{x:.0%}")
    bar.set_label("change, relative to the vector's length (hatched: exactly 0; orange triangles: adapted heads)")
    return [figure]


def measure_changes(tuned: train.FinetuningRun) -> tuple[list[str], dict[str, np.ndarray]]:
    """The tokens of a prompt, and how far each head's value and query have moved, {title: [H or H_q, T]}: the norm of
    the change, relative to the norm of the base's."""
    answer = tuned.answers[0]
    features = image_features(tuned.model.get_image_features, [answer.screen], tuned.model.device)
    prompt = prompt_batch([answer.sample], features, num_problems=1)
    with tuned.adapter.disabled():
        base_queries, base_values = queries_and_values(tuned.model, prompt)  # [L, 1, H_q or H, T, d_h]
    queries, values = queries_and_values(tuned.model, prompt)
    changes = {}
    for name, before, after in (("values", base_values, values), ("queries", base_queries, queries)):
        moves = ((after - before).norm(dim=-1) / before.norm(dim=-1)).squeeze(1).cpu().numpy()  # [L, H or H_q, T]
        changes |= {f"{name}, layer {layer}": of_layer for layer, of_layer in enumerate(moves)}
    return [VOCABULARY[i] for i in prompt["input_ids"][0]], changes


@torch.no_grad()
def queries_and_values(model, prompt: dict) -> tuple[Tensor, Tensor]:
    """What all layers make of a prompt: queries [L, B, H_q, T, d_h] and values [L, B, H, T, d_h]."""
    queries = []

    def keep_queries(attention, arguments):
        queries.append(attention.split_heads(attention.q_proj(arguments[0])))

    hooks = [layer.self_attn.register_forward_pre_hook(keep_queries) for layer in model.language_model.layers]
    _, values = zip(*model(**prompt).past_key_values.layers)
    for hook in hooks:
        hook.remove()
    return torch.stack(queries), torch.stack(values)


def draw_patches(cfg) -> list[plt.Figure]:
    """Screens, painted where the correct answer becomes less likely if this patch alone is left out of M; and below,
    where it becomes more likely if this patch alone is in M."""
    tuned, _ = demo(cfg.device)
    figure, axes = plt.subplots(2, 4, figsize=(WIDTH, 4))
    for (above, below), answer in zip(axes.T, tuned.answers[::7]):  # each about another screen
        above.set_title(answer.sample["instruction"])
        falls, rises = patch_effects(tuned.model, answer)
        for ax, effects, colour, most in ((above, falls, ORANGE, 2), (below, rises, BLUE, 4)):
            shades = LinearSegmentedColormap.from_list("shades", [f"{colour}00", f"{colour}cc"])
            draw_screen(ax, answer)
            ax.imshow(effects.view(8, 8).cpu().numpy(), shades, extent=EXTENT, vmin=most / 10, vmax=most)
            ax.set_xlabel(f"largest: {effects.max():.2f}", color=colour)
    axes[0, 0].set_ylabel("falls without this patch", color=ORANGE, weight="bold")
    axes[1, 0].set_ylabel("rises with it alone", color=BLUE, weight="bold")
    return [figure]


# ---- The command -----------------------------------------------------------------------------------------------------

PICTURES = {"where.png": draw_where, "method.png": draw_method, "tradeoff.png": draw_tradeoff, "text.png": draw_text}
PICTURES |= {"training.gif": draw_training, "tensors.png": draw_tensors, "patches.png": draw_patches}


@dataclass(frozen=True)
class FiguresConfig:
    only: str = option("", "the one picture to draw, instead of all", ("", *PICTURES))
    out: str = option("data/figures", "directory of the pictures")
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")


@plt.rc_context(STYLE)
def make_figures(cfg: FiguresConfig) -> None:
    out = Path(cfg.out)
    make_directory(out)
    for name in [cfg.only] if cfg.only else PICTURES:
        save(PICTURES[name](cfg), out / name)
        print(f"saved {out / name}")


def save(figures: list[plt.Figure], path: Path) -> None:
    """One figure as a picture; several as an endless film, whose first frame stays for one second, its last for three.
    128 colours, the same in all frames, make a small file."""
    frames = []
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer)
        plt.close(figure)
        frames.append(Image.open(buffer).convert("RGB"))
    last = frames.pop().quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1)
    first, *others = [frame.quantize(palette=last, dither=Image.Dither.NONE) for frame in frames] + [last]
    durations = [1000] + [160] * (len(others) - 1) + [3000]  # milliseconds
    first.save(path, optimize=True, save_all=True, append_images=others, duration=durations, loop=0)


if __name__ == "__main__":
    sys.exit(command(FiguresConfig, make_figures, __doc__))
