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
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

import imagelora
import train
from data.base import find_device, image_features, load_base, screens_and_features
from data.command import command, make_directory, option
from data.evaluate import Answer, evaluate, is_right
from data.pictures import BLUE, INK, ORANGE, RED
from data.prompts import IMAGE, VOCABULARY, prompt_batch
from data.screens import SIZE
from data.study import compare
from data.study.attention import queries_keys_values

WIDTH = 8.3  # of a picture, in inches
COLOURS = {"LoRA": ORANGE, "Partial LoRA": "#009e73", "Image-LoRA": BLUE}
GREY, LIGHT, PALE = "#667085", "#e4e7ec", "#a9cfe8"  # light grey: as in the base model
CENTRED = {"ha": "center", "va": "center"}
RIM = [withStroke(linewidth=3, foreground="white")]  # around what stands on dark ground
STYLE = {"font.size": 10, "text.color": INK, "savefig.dpi": 200, "legend.frameon": False, "hatch.linewidth": 0.6}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": LIGHT}


@dataclass(frozen=True)
class FiguresConfig:
    only: str = option("", "the one picture to draw, such as where.png, instead of all")
    out: str = option("data/figures", "directory of the pictures")
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")


@plt.rc_context(STYLE)
def make_figures(cfg: FiguresConfig) -> None:
    out = Path(cfg.out)
    make_directory(out)
    if cfg.only not in ("", *PICTURES):
        raise ValueError(f"there is no picture {cfg.only!r}; expected one of {', '.join(PICTURES)}")
    for name in [cfg.only] if cfg.only else PICTURES:
        save(PICTURES[name](cfg), out / name)
        print(f"saved {out / name}, {(out / name).stat().st_size / 1000:.0f} KB")


def save(figures: list[plt.Figure], path: Path) -> None:
    """One figure as a picture; several as an endless film, whose first frame stays for one second, its last for three.
    128 colours make a small file."""
    frames = []
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer)
        plt.close(figure)
        frames.append(Image.open(buffer).convert("RGB"))
    last = frames.pop().quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1)
    first, *others = [frame.quantize(palette=last, dither=Image.Dither.NONE) for frame in frames] + [last]
    durations = [1000] + [160] * (len(others) - 1) + [3000]  # milliseconds
    film = {"save_all": True, "append_images": others, "duration": durations, "loop": 0} if others else {}
    first.save(path, optimize=True, **film)


def bare(ax: plt.Axes) -> None:
    """Without ticks and frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def legend(figure: plt.Figure, looks: dict[str, dict]) -> None:
    """Above the picture. looks: {label: how its line is drawn}"""
    handles = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1.4)


# ---- What each method changes, and how Image-LoRA does it ------------------------------------------------------------

SPANS = {"text before": (0, 2), "image": (2.3, 4), "text after": (6.6, 2)}  # {name: (left edge, number of tokens)}


def draw_cells(ax: plt.Axes, rows: dict[str, list], spans=SPANS) -> None:
    """A cell for each row and token. rows: {name: the colour of each span}, from below."""
    for row, colours in enumerate(rows.values()):
        for (left, num_tokens), colour in zip(spans.values(), colours):
            ax.bar(left + np.arange(num_tokens), 0.9, 0.93, row - 0.45, align="edge", color=colour)
    bare(ax)
    ax.set_xticks([left + num_tokens / 2 for left, num_tokens in spans.values()], spans)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)


def draw_where(cfg) -> list[plt.Figure]:
    """For each method, what its adapter adds something to: above with an image, below without."""
    sizes = {"figsize": (WIDTH, 3.1), "gridspec_kw": {"wspace": 0.08}}
    figure, axes = plt.subplots(2, 3, **sizes, layout="constrained", sharey=True)
    for (method, colour), above, below in zip(COLOURS.items(), *axes):
        text = colour if method == "LoRA" else LIGHT
        values = [text, colour, text]
        others = [text, LIGHT if method == "Image-LoRA" else colour, text]
        draw_cells(above, {"outputs": others, "values": values, "keys": others, "queries": others})
        draw_cells(below, dict.fromkeys(("outputs", "values", "keys", "queries"), [text]), {"text": (0, 4)})
        below.set_xlim(above.get_xlim())
        above.set_title(method, color=colour, weight="bold", size=13, loc="left")
        verdict = "changed" if method == "LoRA" else "the base model,\nbit for bit"
        below.text(4.4, 1.5, verdict, size=9.5, weight="bold", color=colour, va="center")
    axes[0, 0].set_ylabel("with an image", weight="bold", size=11)
    axes[1, 0].set_ylabel("text alone", weight="bold", size=11)
    return [figure]


def draw_method(cfg) -> list[plt.Figure]:
    """One token's way into the heads of a layer, then all tokens, then all layers."""
    selected = 1, 2, 4  # of six heads, from below
    sizes = {"figsize": (WIDTH, 2.7), "gridspec_kw": {"width_ratios": (4, 3, 3)}}
    figure, (token, layer, model) = plt.subplots(1, 3, **sizes, layout="constrained")
    heads = {f"head {5 - row}": [LIGHT, BLUE if row in selected else LIGHT, LIGHT] for row in range(6)}
    layers = {"below": [LIGHT] * 3, "lowest\nadapted": [LIGHT, BLUE, LIGHT], "above": [LIGHT, PALE, PALE]}
    draw_cells(layer, heads)
    draw_cells(model, layers)
    for x, M in ((1, "0"), (4.3, "1"), (7.6, "0")):
        layer.text(x, 5.75, f"M = {M}", ha="center", color=BLUE if M == "1" else GREY, weight="bold")
    for x, row, effect in ((4.3, 1, "written"), (1, 2, "cannot\nchange"), (4.3, 2, "follows"), (7.6, 2, "follows")):
        model.text(x, row, effect, size=9, color="white" if effect == "written" else INK, **CENTRED)
    for ax, title in ((token, "One token"), (layer, "All tokens of the layer"), (model, "All layers")):
        ax.set_title(title, loc="left", size=10.5, weight="bold", pad=16)

    bare(token)
    token.set(xlim=(0, 8), ylim=layer.get_ylim())
    token.bar([0.2] * 12, 0.43, 0.4, np.arange(-0.45, 5.4, 0.5), align="edge", color=GREY)
    token.text(0.4, 5.75, "x", style="italic", ha="center")
    token.plot((0.6, 7.4, 7.4), (5, 5, 0), color=GREY)
    token.text(3, 5, "$W_V$, frozen", bbox={"facecolor": LIGHT, "edgecolor": GREY}, **CENTRED)
    token.plot((0.6, 5), (2, 2), color=BLUE)
    token.plot((1, 1.8), (2, 2), "o", color=BLUE, markersize=4)  # M, closed
    token.plot((1, 1.7), (2, 2.7), color=BLUE, alpha=0.4)  # M, open
    token.text(0.8, 0.85, "M: closed at an image\ntoken, open at text", va="top", color=BLUE, size=9)
    token.fill((2.2, 3.1, 3.1, 2.2), (3, 2.45, 1.55, 1), color=BLUE)
    token.text(2.65, 2, "A", color="white", weight="bold", **CENTRED)
    token.text(3.2, 2.1, r"$\gamma\;\frac{\alpha}{r}\;\frac{1}{\sqrt{|S|}}$", color=BLUE, size=11, va="bottom")
    for row, head in enumerate(heads):
        token.annotate("", (8, row), (7.4, row), arrowprops={"arrowstyle": "-|>", "color": GREY})
        if row in selected:
            token.plot((5, 5, 7.4), (2, row, row), color=BLUE)
            token.fill((5.3, 6.7, 6.7, 5.3), row + np.array([0.22, 0.4, -0.4, -0.22]), color=BLUE)
            token.text(6, row, f"B({head[-1]})", color="white", weight="bold", size=9, **CENTRED)
            token.plot(7.4, row, "o", color=BLUE, markersize=10, zorder=5)
            token.plot(7.4, row, "+", color="white", markersize=7, zorder=5)
    return [figure]


# ---- What the study's runs hit and keep ------------------------------------------------------------------------------


def draw_curves(ax: plt.Axes, runs: pd.DataFrame, x: str, y: str, along: str, each: str, ending="", style="-") -> None:
    """For each method a thick line of means, and a thin one for each of several runs. A ring is gamma = 1.

    along: what changes along a line. each: what tells the thin lines apart. ending: of the methods' names."""
    for method, colour in COLOURS.items():
        points = runs[runs.method == method + ending].groupby([each, along], as_index=False)[[x, y]].mean()
        if points.empty:
            continue
        means = points.groupby(along)[[x, y]].mean()
        if style == "-":
            for _, run in points.groupby(each):
                ax.plot(run[x], run[y], color=colour, linewidth=0.7, alpha=0.5)
            if along == "gamma":
                ax.plot(*means.loc[1.0], "o", color=colour, markerfacecolor="white", zorder=3)
        ax.plot(means[x], means[y], style, color=colour, linewidth=2 if style == "-" else 1.2, marker=".", markersize=4)


def draw_tradeoff(cfg) -> list[plt.Figure]:
    """Other questions kept against switches hit, along gamma: a column for each model, below it with own answers."""
    runs = compare.at_chosen_rates(compare.read_runs())
    runs = runs[runs.text == 0]
    models = [("tiny model", "skilled", model) for model in (1, 2, 3)]
    models += [("SmolLM2, model", "SmolLM2", model) for model in (1, 2)]
    figure, axes = plt.subplots(2, 5, figsize=(WIDTH, 4.6), layout="constrained", sharex=True, sharey=True)
    for row, ending in zip(axes, ("", " with own answers")):
        for ax, (_, setting, model) in zip(row, models):
            of_model = runs[(runs.setting == setting) & (runs.model == model)]
            base = of_model[of_model.method == "base model"].other_questions_acc.mean()
            ax.axhline(base, color=GREY, linestyle=":")
            ax.axvline(95, color=GREY, linewidth=0.8)
            curves = ax, of_model, "task_acc", "other_questions_acc", "gamma", "seed"
            draw_curves(*curves, " on the MLP" + ending, "--")
            draw_curves(*curves, ending)
        row[0].set(xlim=(87.5, 100), ylim=(30, 101), xticks=(88, 92, 96, 100), ylabel="other questions right, %")
    for ax, (name, _, model) in zip(axes[0], models):
        ax.set_title(f"{name} {model}", size=10)
    notes = {(0, 0): "trained on the\nnew task alone", (1, 0): "trained on own\nanswers, too"}
    notes |= {(0, 1): "γ turned\ndown", (1, 1): "better: up\nand right"}
    for place, note in notes.items():
        axes[place].text(88, 62, note, color=GREY, size=9, va="center", bbox={"color": "white", "pad": 0})
    axes[0, 0].text(95.3, 32, "95 %", color=GREY, size=8.5)
    axes[0, 3].text(87.8, 91, "base model", color=GREY, size=8.5)
    look = {"arrowstyle": "-|>", "color": GREY, "connectionstyle": "arc3,rad=-0.25"}
    axes[0, 1].annotate("", (91, 84), (97.4, 66), arrowprops=look)
    figure.supxlabel("switches hit, %", size=10)
    looks = {method: {"color": colour, "linewidth": 2} for method, colour in COLOURS.items()}
    looks["on the MLP"] = {"color": GREY, "linestyle": "--"}
    looks["as trained (γ = 1)"] = {"color": GREY, "marker": "o", "markerfacecolor": "white", "linestyle": ""}
    legend(figure, looks)
    return [figure]


def draw_text(cfg) -> list[plt.Figure]:
    """Switches hit after 0, 3 and 9 word problems: a panel for each kind of training, a thin line for each model."""
    runs = compare.at_chosen_rates(compare.read_runs())
    runs = runs[(runs.setting == "skilled") & (runs.gamma == 1) & runs.text.isin((0, 3, 9))].assign(asked=runs.text)
    trained_after = {"none": "", "nine": " trained after 9"}
    trained_after["0 to 9,\nwith own answers"] = " trained after 0 to 9 with own answers"
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.7), layout="constrained", sharex=True, sharey=True)
    for ax, (text, ending) in zip(axes, trained_after.items()):
        draw_curves(ax, runs, "asked", "task_acc", "text", "model", ending)
        ax.set_title(f"trained after {text}", size=10)
        ax.grid(axis="y")
    axes[0].set(ylim=(-3, 103), xticks=(0, 3, 9), ylabel="switches hit, %")
    axes[1].set_xlabel("word problems before the image when asked")
    legend(figure, {method: {"color": colour, "linewidth": 2} for method, colour in COLOURS.items()})
    return [figure]


# ---- The demo's run, filmed ------------------------------------------------------------------------------------------

FILMED = {  # {kind of question: the title of its row}
    "click": "New task: {:.1%} of the switches are clicked",
    "what_is_right_of": "Never asked in training: {:.1%} of 'what is right of …' are right. Three that get lost:",
}
MARKS = {  # {label: look}
    "target": {"color": INK, "marker": "s", "markerfacecolor": "none", "markersize": 11},
    "base model's click": {"color": ORANGE, "marker": "x", "markersize": 8, "markeredgewidth": 2.5},
    "tuned model's click": {"color": BLUE, "marker": "o", "markersize": 8, "markeredgecolor": "white"},
}


@cache
def demo(device: str) -> tuple[train.FinetuningRun, dict]:
    """The run, and at some of its steps {step: [(share of correct answers, answers) for each of FILMED]}."""
    cfg = train.Config(device=device)
    # Many frames at the start, where clicks move, and few at the end.
    filmed_steps = {round(cfg.steps * (frame / 20) ** 3) for frame in range(21)}
    base = load_base(cfg.base, find_device(device))
    new_test = screens_and_features(base, "new", "test", cfg.test_screens)
    old_test = screens_and_features(base, "old", "test", cfg.test_screens // 2 + 1)
    film = {}

    def film_step(step: int, model) -> None:
        if step in filmed_steps:
            film[step] = [evaluate(model, *test, kind) for test, kind in zip((new_test, old_test), FILMED)]

    film_step(0, base)
    return train.finetune(cfg, verbose=True, after_step=film_step), film


def draw_training(cfg) -> list[plt.Figure]:
    """Frames with three of the clicks on new screens, and three of the answers about old ones that get lost."""
    _, film = demo(cfg.device)
    (_, base_clicks), (_, base_names) = film[0]
    _, (_, last_names) = film[max(film)]
    lost = {}  # {old screen: the number of its first question whose answer gets lost}
    for i, (first, last) in enumerate(zip(base_names, last_names)):
        if is_right(first) and not is_right(last):
            lost.setdefault(last.screen, i)
    shown = [0, 7, 14], list(lost.values())[:3]  # Every seventh click is on another screen.
    figures = []
    for step, measured in film.items():
        figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 3.7))
        figure.subplots_adjust(0.015, 0.01, 1, 0.83, 0, 0.28)
        for ax in axes.flat:
            ax.axis("off")
        for row, title, numbers, (share, answers) in zip(axes, FILMED.values(), shown, measured):
            row[0].set_title(title.format(share), loc="left", size=10)
            for ax, i in zip(row, numbers):
                if i < len(answers):
                    draw_answer(ax, base_clicks[i], answers[i])
        legend(figure, {label: look | {"linestyle": ""} for label, look in MARKS.items()})
        figure.text(0.99, 0.945, f"step {step:,} of {max(film):,}", ha="right")
        figures.append(figure)
    return figures


def draw_answer(ax: plt.Axes, base_click: Answer, answer: Answer) -> None:
    """The screen of an answer, of a click also the target and both clicks; right of it the question and the answer."""
    ax.imshow(answer.screen.image, extent=(0, SIZE, SIZE, 0))
    ax.set_anchor("W")
    verdict = "correct" if is_right(answer) else f"{answer.output or 'nothing'},\nnot {answer.sample['answer']}"
    if "bbox" in answer.sample:
        verdict = "correct" if is_right(answer) else "wrong"
        draw_box(ax, answer, margin=4)
        _, *looks = MARKS.values()
        for click, look in zip((base_click.output, answer.output), looks):
            if click is not None:  # otherwise the answer is no point
                ax.plot(*click, **look)
    beside = {"transform": ax.transAxes, "va": "top"}
    ax.text(1.06, 1, textwrap.fill(answer.sample["instruction"], 18), **beside)
    ax.text(1.06, 0.55, verdict.replace(" <x", "\n<x"), color=INK if is_right(answer) else RED, **beside)


def draw_box(ax: plt.Axes, answer: Answer, margin=0) -> None:
    """Around the target of a click."""
    left, top, right, bottom = np.add(answer.sample["bbox"], (-margin, -margin, margin, margin))
    ax.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, linewidth=1.5))


# ---- What the run changes, and which patches carry a click -----------------------------------------------------------


def draw_tensors(cfg) -> list[plt.Figure]:
    """How far each head's value and query have moved at each token of a prompt: the norm of the change, relative to the
    norm of the base's."""
    tuned, _ = demo(cfg.device)
    model, answer = tuned.model, tuned.answers[0]
    features = image_features(model.get_image_features, [answer.screen], model.device)
    prompt = prompt_batch([answer.sample], features, num_problems=1)
    with tuned.adapter.disabled():
        base_queries, _, base_values = queries_keys_values(model, prompt)  # [L, 1, H_q or H, T, d_h]
    queries, _, values = queries_keys_values(model, prompt)
    changes = {}  # {title of a row: [H or H_q, T]}
    for name, before, after in (("values", base_values, values), ("queries", base_queries, queries)):
        moves = ((after - before).norm(dim=-1) / before.norm(dim=-1)).squeeze(1).cpu().numpy()  # [L, H or H_q, T]
        changes |= {f"{name}, layer {layer}": of_layer for layer, of_layer in enumerate(moves)}

    tokens = [VOCABULARY[i] for i in prompt["input_ids"][0]]
    start = tokens.index(IMAGE)
    end = start + tokens.count(IMAGE)
    spans = {"words": slice(start), "image": slice(start, end), "question": slice(end, None)}
    sizes = {"width_ratios": (19, 40, 10), "height_ratios": [2.2] + [1] * len(changes)}
    figure, axes = plt.subplots(1 + len(changes), 3, figsize=(WIDTH, 6.2), layout="constrained", gridspec_kw=sizes)
    header, *rows = axes
    for ax, (name, span) in zip(header, spans.items()):
        words = " ".join(token for token in tokens[span] if token[0] != "<") or "patches, row by row"
        ax.set_title(name, loc="left", size=13)
        ax.text(0, 1, textwrap.fill(words, 24), color=GREY, va="top", transform=ax.transAxes)
        ax.axis("off")
    patches = np.concatenate(np.split(answer.screen.image, 8), axis=1)  # row by row
    for image, place in ((answer.screen.image, (0.4, 0.2, 0.3, 0.8)), (patches, (0, 0, 1, 0.16))):
        inset = header[1].inset_axes(place)
        inset.imshow(image)
        inset.axis("off")
    colours = LinearSegmentedColormap.from_list("changes", ["#cfe6f7", "#56b4e9", "#0072b2", "#0b2a5b"])
    for row, (name, moves) in zip(rows, changes.items()):
        for ax, span in zip(row, spans.values()):
            shown = ax.imshow(np.ma.masked_equal(moves[:, span], 0), colours, LogNorm(0.03, 3), aspect="auto")
            ax.patch.set(facecolor="#f2f4f7", hatch="////", edgecolor="#c3c9d3")  # where nothing is drawn
            ax.hlines(np.arange(1, len(moves)) - 0.5, *ax.get_xlim(), color="white", linewidth=1)  # between heads
            bare(ax)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for layer, heads in tuned.adapter.heads.items():
        rows[layer][1].set_yticks(heads, ["▶"] * len(heads), color=ORANGE, size=6)
        rows[layer][1].tick_params(length=0, pad=1)
    lowest = min(tuned.adapter.heads)
    places = {"cannot change": rows[lowest][0], "the adapter writes": rows[lowest][1], "follows": rows[lowest + 1][2]}
    for text, ax in places.items():
        ax.text(0.5, 0.5, text, transform=ax.transAxes, path_effects=RIM, **CENTRED)
    bar = figure.colorbar(shown, ax=axes, location="bottom", aspect=60, ticks=[0.03, 0.1, 0.3, 1, 3], format="{x:.0%}")
    bar.set_label("change, relative to the vector's length (hatched: exactly 0; orange triangles: adapted heads)")
    return [figure]


def draw_patches(cfg) -> list[plt.Figure]:
    """Screens, painted where the correct answer becomes less likely if this patch alone is left out of M; and below,
    where it becomes more likely if this patch alone is in M."""
    tuned, _ = demo(cfg.device)
    figure, axes = plt.subplots(2, 4, figsize=(WIDTH, 4), layout="constrained")
    for (above, below), answer in zip(axes.T, tuned.answers[::7]):  # each about another screen
        above.set_title(answer.sample["instruction"], size=10)
        falls, rises = patch_effects(tuned, answer)
        for ax, effects, colour, most in ((above, falls, ORANGE, 2), (below, rises, BLUE, 4)):
            shades = LinearSegmentedColormap.from_list("shades", [f"{colour}00", f"{colour}cc"])
            place = (0, SIZE, SIZE, 0)
            ax.imshow(answer.screen.image, extent=place)
            ax.imshow(effects.view(8, 8).cpu().numpy(), shades, extent=place, vmin=most / 10, vmax=most)
            draw_box(ax, answer)
            bare(ax)
            ax.set_xlabel(f"largest: {effects.max():.2f}", color=colour)
    axes[0, 0].set_ylabel("falls without this patch", color=ORANGE, weight="bold")
    axes[1, 0].set_ylabel("rises with it alone", color=BLUE, weight="bold")
    return [figure]


@torch.no_grad()
def patch_effects(tuned: train.FinetuningRun, answer: Answer) -> tuple[Tensor, Tensor]:
    """What each patch does to the log-probability of the correct answer, [P]: how far it falls if this patch's row of M
    is zero, and how far it rises from the base model's if all other rows are."""
    model = tuned.model
    features = image_features(model.get_image_features, [answer.screen], model.device)  # [1, P, D]
    patch = torch.eye(features.shape[1], dtype=torch.bool, device=model.device)  # [P, P], in sequence i it is patch i
    question = {"instruction": f"{answer.sample['instruction']} {answer.sample['answer']}"}
    prompt = prompt_batch([question] * len(patch), features.expand(len(patch), -1, -1))
    visual_rows = imagelora.visual_rows

    def log_probability(kept: Tensor) -> Tensor:
        """Of the answer's two tokens, in each sequence, if only these rows of M are kept."""
        with mock.patch.object(imagelora, "visual_rows", lambda *args: visual_rows(*args).view(kept.shape)[kept]):
            logits = model(**prompt).logits[:, -3:-1]
        return logits.log_softmax(-1).gather(2, prompt["input_ids"][:, -2:, None]).sum((1, 2))

    none, alone, all_others, all_of_them = map(log_probability, (patch & False, patch, ~patch, patch | True))
    return all_of_them - all_others, alone - none


PICTURES = {"where.png": draw_where, "method.png": draw_method, "tradeoff.png": draw_tradeoff, "text.png": draw_text}
PICTURES |= {"training.gif": draw_training, "tensors.png": draw_tensors, "patches.png": draw_patches}
if __name__ == "__main__":
    sys.exit(command(FiguresConfig, make_figures, __doc__))
