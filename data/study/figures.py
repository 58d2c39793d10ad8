"""Draws the pictures of the pages anew, in some minutes: python -m data.study.figures

where.png       what each method changes directly
method.png      how Image-LoRA does it: one token, all tokens of a layer, all layers
tradeoff.png    switches hit against other questions kept, from runs.csv and smollm.csv
text.png        switches hit where the text before the image is not as in training, from runs.csv
training.gif    the demo's run: clicks move to the switches, and answers about old screens go wrong
tensors.png     what this run changes, layer by layer and token by token
patches.png     which patches carry a click of this run
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
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image

import imagelora
import train
from data import evaluate, pictures, questions
from data.base import find_device, image_features, load_base, screens_and_features
from data.command import command, make_directory, option, write_file
from data.pictures import BLUE, INK, ORANGE, RED
from data.prompts import IMAGE, VOCABULARY, prompt_batch
from data.screens import SIZE
from data.study import compare
from data.study.attention import queries_keys_values

WIDTH = 8.3  # of a picture, in inches
COLOURS = {"LoRA": ORANGE, "Partial LoRA": "#009e73", "Image-LoRA": BLUE}
GREY, LIGHT, PALE = "#667085", "#e4e7ec", "#a9cfe8"
RIM = [withStroke(linewidth=3, foreground="white")]  # around what stands on dark ground
STYLE = {"font.size": 10, "text.color": INK, "savefig.dpi": 200, "legend.frameon": False, "hatch.linewidth": 0.6}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": LIGHT}


@dataclass(frozen=True)
class FiguresConfig:
    only: str = option("", "one picture, such as where.png, instead of all")
    out: str = option("data/figures", "directory of the pictures")
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")


@plt.rc_context(STYLE)
def make_figures(cfg: FiguresConfig) -> None:
    out = Path(cfg.out)
    make_directory(out)
    if cfg.only not in ("", *PICTURES):
        raise ValueError(f"there is no picture {cfg.only}; expected one of {', '.join(PICTURES)}")
    for name in [cfg.only] if cfg.only else PICTURES:
        frames = [frame if isinstance(frame, Image.Image) else as_image(frame) for frame in PICTURES[name](cfg)]
        save(frames, out / name)
        print(f"saved {out / name}, {(out / name).stat().st_size / 1000:.0f} KB")


def as_image(figure: plt.Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer)
    plt.close(figure)
    return Image.open(buffer).convert("RGB")


def bare(ax: plt.Axes) -> None:
    """Without ticks and frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


# ---- What each method changes, and how Image-LoRA does it ------------------------------------------------------------

SPANS = {"text before": (0, 2), "image": (2.3, 4), "text after": (6.6, 2)}  # {name: (left edge, number of tokens)}


def draw_where() -> plt.Figure:
    """For each method a cell for each projection and token, coloured where its adapter adds something."""
    projections = "outputs", "values", "keys", "queries"  # from below
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 3.1), layout="constrained", sharey=True, gridspec_kw={"wspace": 0.08})
    prompts = {"with an image": SPANS, "text alone": {"text": (0, 4)}}
    for (prompt, spans), row_of_axes in zip(prompts.items(), axes):
        for ax, (method, colour) in zip(row_of_axes, COLOURS.items()):
            for row, projection in enumerate(projections):
                for span, (left, num_tokens) in spans.items():
                    of_the_image = span == "image" and (method == "Partial LoRA" or projection == "values")
                    is_changed = method == "LoRA" or of_the_image
                    draw_cells(ax, left, row - 0.5, num_tokens, colour if is_changed else LIGHT)
            bare(ax)
            ax.set_xticks([left + num_tokens / 2 for left, num_tokens in spans.values()], spans)
            ax.set_xlim(0, 8.6)
            ax.tick_params(length=0)
        row_of_axes[0].set_yticks(range(len(projections)), projections)
        row_of_axes[0].set_ylabel(prompt, weight="bold", size=11)
    for (method, colour), top, bottom in zip(COLOURS.items(), *axes):
        top.set_title(method, color=colour, weight="bold", size=13, loc="left")
        verdict = "changed" if method == "LoRA" else "the base model,\nbit for bit"
        bottom.text(4.4, 1.5, verdict, size=9.5, weight="bold", color=colour, va="center")
    return figure


def draw_cells(ax: plt.Axes, left: float, bottom: float, count: int, colour: str) -> None:
    """A row of cells of width 1."""
    ax.bar(left + np.arange(count), 0.9, 0.93, bottom, align="edge", color=colour)


HEADS, SELECTED = 6, (1, 3, 4)  # of the picture's layer
CENTRED = {"ha": "center", "va": "center"}


def draw_method() -> plt.Figure:
    """One token through a layer, then all tokens, then all layers."""
    sizes = {"width_ratios": (4.5, 2.5, 3)}
    figure, (token, layer, model) = plt.subplots(1, 3, figsize=(WIDTH, 2.9), layout="constrained", gridspec_kw=sizes)
    for ax, title in ((token, "One token in one layer"), (layer, "All tokens of this layer"), (model, "All layers")):
        ax.set_title(title, loc="left", size=10.5, weight="bold")
        ax.set_ylim(-1.5, 6.6)
        bare(ax)
    draw_token(token)
    for span, (left, num_tokens) in SPANS.items():
        M, colour = (1, BLUE) if span == "image" else (0, GREY)
        for x in left + np.arange(num_tokens):
            layer.text(x + 0.46, 6, M, ha="center", color=colour, weight="bold")
        for head in range(HEADS):
            draw_cells(layer, left, 5 - head, num_tokens, BLUE if M and head in SELECTED else LIGHT)
        in_lowest = ("written", BLUE, "white") if M else ("", LIGHT, INK)
        above = ("cannot\nchange", LIGHT, INK) if span == "text before" else ("follows", PALE, INK)
        for row, (effect, fill, ink) in enumerate((("", LIGHT, INK), in_lowest, above)):
            model.bar(left, 1.9, num_tokens - 0.07, 2 * row, align="edge", color=fill)
            model.text(left + num_tokens / 2, 2 * row + 0.95, effect, color=ink, size=8.5, **CENTRED)
        for ax in (layer, model):
            ax.text(left + num_tokens / 2, -0.3, span.replace(" ", "\n"), ha="center", va="top", size=9)
    layer.text(-0.3, 6, "M", ha="right", color=BLUE, weight="bold")
    model.set_yticks((0.95, 2.95, 4.95), ("below", "lowest\nadapted", "above"), size=9)
    model.tick_params(length=0)
    return figure


def draw_token(ax: plt.Axes) -> None:
    """The path of x through W_V into all heads, and the path through M, A and B(h) into the selected ones."""
    ax.set_xlim(0, 10.3)
    places = [5.45 - head for head in range(HEADS)]
    middle = places[3]
    ax.bar([0.25] * 12, 0.42, 0.5, 0.49 * np.arange(12), color=GREY)  # the features of x
    ax.text(0.25, 6, "x", style="italic", ha="center", size=11)
    ax.plot((0.5, 7.6, 7.6), (places[0], places[0], places[-1]), color=GREY)
    ax.text(3, places[0], "$W_V$, frozen", bbox={"facecolor": LIGHT, "edgecolor": GREY, "pad": 5}, **CENTRED)
    ax.plot((0.5, 1), (middle, middle), color=BLUE)
    ax.plot((1, 1.8), (middle, middle), color=BLUE, marker="o", markersize=4)  # M, closed
    ax.plot((1, 1.7), (middle, middle + 0.8), color=BLUE, alpha=0.4)  # M, open
    ax.text(0.8, middle - 1.2, "M: closed at an image\ntoken, open at text", va="top", color=BLUE, size=9)
    ax.plot((1.8, 5), (middle, middle), color=BLUE)
    ax.fill((2.2, 3.1, 3.1, 2.2), middle + np.array([1, 0.45, -0.45, -1]), color=BLUE)
    ax.text(2.68, middle, "A", color="white", weight="bold", **CENTRED)
    ax.text(3.25, middle + 0.15, r"$\gamma\;\frac{\alpha}{r}\;\frac{1}{\sqrt{|S|}}$", color=BLUE, size=11, va="bottom")
    for head, y in enumerate(places):
        is_selected = head in SELECTED
        ax.annotate("", (8.2, y), (7.6, y), arrowprops={"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0})
        draw_cells(ax, 8.2, y - 0.45, 1, BLUE if is_selected else LIGHT)
        ax.text(9.25, y, f"head {head}", va="center", size=9, color=INK if is_selected else GREY)
        if is_selected:
            ax.plot((5, 5, 7.6), (middle, y, y), color=BLUE)
            ax.fill((5.4, 6.8, 6.8, 5.4), y + np.array([0.22, 0.4, -0.4, -0.22]), color=BLUE)
            ax.text(6.1, y, f"B({head})", color="white", weight="bold", size=9, **CENTRED)
            ax.plot(7.6, y, "o", color=BLUE, markersize=10, zorder=5)
            ax.plot(7.6, y, "+", color="white", markersize=7, zorder=6)
    ax.text(0, -1.2, "Without an image, M stays open: no blue.", weight="bold", size=9, color=BLUE)


# ---- What the study's runs hit and keep ------------------------------------------------------------------------------


@cache
def study_runs() -> pd.DataFrame:
    return compare.at_chosen_rates(compare.read_runs())


def draw_curves(ax: plt.Axes, runs: pd.DataFrame, ending: str, x: str, y: str, along: str, each: str, style="-") -> dict:
    """For each method a thick line of means and, if several runs are drawn, a thin one for each of them.

    ending: of the methods' names. along: what changes along a line. each: what tells the thin lines apart.
    Returns {method: the points of its thick line}."""
    means = {}
    for method, colour in COLOURS.items():
        rows = runs[runs.method == method + ending]
        if rows.empty:
            continue
        points = rows.groupby([each, along], as_index=False)[[x, y]].mean()
        if points[each].nunique() > 1 and style == "-":
            for _, run in points.groupby(each):
                ax.plot(run[x], run[y], color=colour, linewidth=0.7, alpha=0.5)
        means[method] = points.groupby(along)[[x, y]].mean()
        width = 2 if style == "-" else 1.2
        ax.plot(means[method][x], means[method][y], style, color=colour, linewidth=width, marker=".", markersize=2 * width)
    return means


def draw_tradeoff() -> plt.Figure:
    """Switches hit against other questions kept, along gamma: a column for each model, below it with own answers."""
    runs = study_runs()[study_runs().text == 0]
    panels = {f"tiny model {model}": ("skilled", model) for model in (1, 2, 3)}
    panels |= {f"SmolLM2, model {model}": ("SmolLM2", model) for model in (1, 2)}
    rows = {"trained on\nthe new task alone": "", "trained on\nown answers, too": " with own answers"}
    figure, axes = plt.subplots(2, 5, figsize=(WIDTH, 4.6), layout="constrained", sharex=True, sharey=True)
    for row_of_axes, (name, ending) in zip(axes, rows.items()):
        for ax, (title, (setting, model)) in zip(row_of_axes, panels.items()):
            of_model = runs[(runs.setting == setting) & (runs.model == model)]
            base = of_model[of_model.method == "base model"].other_questions_acc.mean()
            ax.axhline(base, color=GREY, linestyle=":")
            ax.axvline(95, color=GREY, linewidth=0.8)
            draw = {"x": "task_acc", "y": "other_questions_acc", "along": "gamma", "each": "seed"}
            draw_curves(ax, of_model, " on the MLP" + ending, **draw, style="--")
            for method, curve in draw_curves(ax, of_model, ending, **draw).items():
                trained = curve.loc[1.0]
                ax.plot(trained.task_acc, trained.other_questions_acc, "o", color=COLOURS[method], markerfacecolor="white")
            ax.set(xlim=(87.5, 100), ylim=(30, 100), xticks=(88, 92, 96, 100))
            ax.set_title(title if ending == "" else "", size=10)
        row_of_axes[0].set_ylabel(name)
    axes[0, 0].text(87.8, 98, "base model", color=GREY, size=8.5)
    axes[0, 0].text(94.7, 32, "95 %", color=GREY, size=8.5, ha="right")
    axes[0, 1].annotate("", (91, 84), (97.6, 66), arrowprops={"arrowstyle": "-|>", "color": GREY, "connectionstyle": "arc3,rad=-0.25"})
    axes[0, 1].text(88, 62, "γ turned\ndown", color=GREY, size=8.5)
    figure.supxlabel("switches hit, %", size=10)
    figure.supylabel("other questions right, %", size=10)
    lines = {method: {"color": colour, "linewidth": 2} for method, colour in COLOURS.items()}
    lines |= {"on the MLP": {"color": GREY, "linestyle": "--"}, "as trained (γ = 1)": {"color": GREY, "marker": "o", "mfc": "white", "linestyle": ""}}
    handles = [Line2D([], [], label=label, **look) for label, look in lines.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=5, columnspacing=1.4)
    return figure


def draw_text() -> plt.Figure:
    """Switches hit after 0, 3 and 9 word problems: a panel for each kind of training."""
    runs = study_runs()
    runs = runs[(runs.setting == "skilled") & (runs.gamma == 1)].assign(asked_after=runs.text)
    panels = {
        "trained after none": "",
        "trained after 9": " trained after 9",
        "trained after 0 to 9,\nwith own answers": " trained after 0 to 9 with own answers",
    }
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.9), layout="constrained", sharex=True, sharey=True)
    for ax, (title, ending) in zip(axes, panels.items()):
        draw_curves(ax, runs[runs.text != 1], ending, "asked_after", "task_acc", "text", "model")
        ax.set(title=title, ylim=(-3, 103), xticks=(0, 3, 9))
        ax.grid(axis="y")
    axes[0].set_ylabel("switches hit, %")
    axes[1].set_xlabel("word problems before the image when it is asked")
    figure.legend(COLOURS, loc="outside upper left", ncols=3)
    return figure
