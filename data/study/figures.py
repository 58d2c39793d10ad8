"""Draws the pictures of the pages anew, in some minutes: python -m data.study.figures

where.png       what each method writes
kept.png        what it keeps of the base model's other answers, from runs.csv and smollm.csv
text.png        what it hits where the text before the image is not as in training, from runs.csv
training.gif    the demo's run: clicks move to the switches, and answers about old screens go wrong
tensors.png     what this run changes, layer by layer and token by token
"""

import io
import sys
import textwrap
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

import train
from data import evaluate, pictures
from data.base import find_device, image_features, load_base, screens_and_features
from data.command import command, make_directory, option
from data.pictures import BLUE, INK, ORANGE
from data.prompts import IMAGE, VOCABULARY, prompt_batch
from data.study.attention import queries_keys_values
from data.study.film import film_frame, save_film
from data.study.plan import FEWER_PROBLEMS, MODELS, MORE_TEXT, TEXT

try:
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    from data.study import compare
except ImportError:
    if __name__ != "__main__":
        raise
    print('error: the pictures need pandas and matplotlib; install them by pip install ".[study]"', file=sys.stderr)
    sys.exit(2)

WIDTH = 8.3  # of a picture, in inches
COLOURS = {"LoRA": ORANGE, "Partial LoRA": "#009e73", "Image-LoRA": BLUE}
GREY, LIGHT = "#667085", "#e4e7ec"
STYLE = {"font.size": 10, "text.color": INK, "savefig.dpi": 200, "legend.frameon": False}
STYLE |= {"figure.constrained_layout.h_pad": 0.07, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.axisbelow": True, "grid.color": LIGHT, "hatch.linewidth": 0.6}
RIM = [withStroke(linewidth=3, foreground="white")]  # around what stands on dark ground


@dataclass(frozen=True)
class FiguresConfig:
    out: str = option("data/figures", "directory of the pictures")
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")


@plt.rc_context(STYLE)
def make_figures(cfg: FiguresConfig) -> None:
    """The pictures of the study's runs; then the demo's run, its film and its pictures."""
    out = Path(cfg.out)
    make_directory(out)
    runs = compare.at_chosen_rates(compare.read_runs())
    figures = {"where": draw_where(), "kept": draw_kept(runs), "text": draw_text(runs)}
    tuned, frames = film_training(train.Config(device=cfg.device))
    save_film(frames, out / "training.gif")
    figures["tensors"] = draw_changes(tuned)
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer)
        pictures.save(Image.open(buffer).convert("RGB"), out / f"{name}.png")


# ---- What each method writes -----------------------------------------------------------------------------------------


def draw_where() -> plt.Figure:
    """For each method a cell for each token and projection, coloured where its adapter writes."""
    spans = {"text before": (0, 2), "image": (2.3, 4), "text after": (6.6, 2)}  # {name: (left edge, number of tokens)}
    projections = "outputs", "values", "keys", "queries"  # from below
    figure, axes = plt.subplots(
        1, 3, figsize=(WIDTH, 2.1), layout="constrained", sharey=True, gridspec_kw={"wspace": 0.1}
    )
    for ax, (method, colour) in zip(axes, COLOURS.items()):
        for (row, projection), (span, (left, num_tokens)) in product(enumerate(projections), spans.items()):
            of_the_image = span == "image" and (method == "Partial LoRA" or projection == "values")
            is_written = method == "LoRA" or of_the_image
            cells = [(left + token, 0.93) for token in range(num_tokens)]  # (left edge, width)
            ax.broken_barh(cells, (row - 0.45, 0.9), color=colour if is_written else LIGHT, linewidth=0)
        bare(ax)
        ax.margins(x=0)
        ax.set_title(method, color=colour, weight="bold", size=13, loc="left")
        ax.set_xticks([left + num_tokens / 2 for left, num_tokens in spans.values()], spans)
        ax.set_yticks(range(len(projections)), projections)
        ax.tick_params(length=0)
        effect = "changed" if method == "LoRA" else "unchanged"
        ax.set_xlabel(f"without an image: {effect}", weight="bold", color=colour)
    return figure


def bare(ax: plt.Axes) -> None:
    """Without ticks and frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


# ---- What the study's runs keep --------------------------------------------------------------------------------------

CONDITIONS = {  # {title: (ending of a method's name, which of its rows)}
    "as\ntrained": ("", {"gamma": 1}),
    "turned\ndown": ("", {"turned_down": True}),
    "turned down,\nown answers": (" with own answers", {"turned_down": True}),
}


def draw_kept(runs: pd.DataFrame) -> plt.Figure:
    """The other questions that are answered correctly in each of CONDITIONS: a bar for the mean of each method, and a
    point for each model.

    runs: rows of compare.read_runs() at the chosen learning rates."""
    panels = {"three tiny models": "skilled", "SmolLM2, two models": "SmolLM2"}  # {title: setting}
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3), layout="constrained", sharey=True)
    last = len(CONDITIONS) - 1
    for ax, (title, setting) in zip(axes, panels.items()):
        of_setting = compare.rows_where(runs, {"setting": setting, "text": 0})
        base = compare.rows_where(of_setting, {"method": "base model"}).other_questions_acc.mean()
        ax.axhline(base, color=GREY, linestyle="--", linewidth=1.2)
        ax.text(last + 0.45, base + 2, f"base model {base:.0f}", color=GREY, size=9, ha="right")
        for offset, (method, colour) in zip((-0.24, 0, 0.24), COLOURS.items()):
            means = []
            for x, (ending, where) in enumerate(CONDITIONS.values()):
                rows = compare.rows_where(of_setting, {"method": method + ending} | where)
                models = rows.groupby("model").other_questions_acc.mean()
                ax.scatter([x + offset] * len(models), models, 10, "black", linewidth=0, zorder=2)
                means.append(models.mean())
            bars = ax.bar(np.arange(len(means)) + offset, means, 0.22, color=colour, alpha=0.75, label=method)
            ax.bar_label(bars, fmt="%.0f", label_type="center", color="white", weight="bold")
        ax.set(title=title, xlim=(-0.5, last + 0.5), ylim=(0, 105), yticks=range(0, 101, 20))
        ax.set_xticks(range(len(CONDITIONS)), CONDITIONS, size=8.5)
    axes[0].set_ylabel("other questions, %")
    handles, _ = axes[0].get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="", marker=".", color="black", label="one model"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


TRAINED_AFTER = {  # {name: (ending of Image-LoRA's name, style of its line)}
    "trained after 0": ("", "-"),
    "trained after 9": (" trained after 9", ":"),
    "trained after 0 to 9": (" trained after 0 to 9", "--"),
}


def draw_text(runs: pd.DataFrame) -> plt.Figure:
    """The switches that Image-LoRA hits after more or fewer word problems than in training. Left: means over models,
    a line for each kind of training. Right: what lowering gamma as the base model's attention predicts does, a line for
    each model.

    runs: as for `draw_kept`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2), layout="constrained", sharey=True)
    of_skilled = compare.rows_where(runs, {"setting": "skilled", "gamma": 1})
    for name, (ending, style) in TRAINED_AFTER.items():
        hits = compare.rows_where(of_skilled, {"method": "Image-LoRA" + ending}).groupby("text").task_acc.mean()
        places = [TEXT.index(text) for text in hits.index]
        left.plot(places, hits, style, color=BLUE, marker="o", markersize=4, linewidth=2, label=name)
    left.set(title="Means of three models", ylabel="switches hit, %", ylim=(-3, 103))
    left.set_xticks(range(len(TEXT)), TEXT)
    left.legend(loc="lower right", fontsize=9, handlelength=4)

    trained_after_9 = compare.rows_where(runs, {"setting": "skilled", "method": MORE_TEXT})
    trained_after_9 = trained_after_9.set_index(["model", "text"])
    for (i, text), (j, model) in product(enumerate(FEWER_PROBLEMS), enumerate(MODELS)):
        row = trained_after_9.loc[model, text]
        right.plot([4 * i + j] * 2, [row.task_acc, row.one_gamma_acc], color=BLUE, linewidth=1)
        right.plot(4 * i + j, row.task_acc, "o", color=BLUE, markerfacecolor="white")
        right.plot(4 * i + j, row.one_gamma_acc, "o", color=BLUE)
    right.set(title="Trained after 9, models 1 to 3")
    right.set_xticks([1, 5, 9], FEWER_PROBLEMS)  # below the second of three models
    for ax in (left, right):
        ax.set_xlabel("word problems before the image, when asked")
        ax.grid(axis="y")
    dots = {"at γ = 1": "white", "at the predicted γ": BLUE}
    handles = [Line2D([], [], ls="", marker="o", color=BLUE, mfc=fill, label=name) for name, fill in dots.items()]
    right.legend(handles=handles, loc="lower right", fontsize=9, handletextpad=0)
    return figure


# ---- The demo's run, filmed ------------------------------------------------------------------------------------------

FILMED = {  # {kind of question: the title of its row}
    "click": "New task: {:.1%} of the switches are clicked",
    "what_is_right_of": "Never asked in training: {:.1%} of 'what is right of …' are right. Three that get lost:",
}


def film_training(run: train.Config) -> tuple[train.FinetuningRun, list[Image.Image]]:
    """The run, and the frames of a film: three of the clicks on new screens, and below them three of the answers about
    old ones. The shares are of all test screens."""
    # Many frames at the start, where clicks move, and few at the end.
    filmed_steps = {round(run.steps * (frame / 20) ** 3) for frame in range(21)}
    base = load_base(run.base, find_device(run.device))
    new_test = screens_and_features(base, "new", "test", evaluate.TEST_SCREENS)
    old_test = screens_and_features(base, "old", "test", evaluate.TEST_SCREENS // 2 + 1)
    film = {}  # {step: [(share of correct answers, answers) for each of FILMED]}

    def film_step(step: int, model) -> None:
        if step in filmed_steps:
            film[step] = [evaluate.evaluate(model, *test, kind) for test, kind in zip((new_test, old_test), FILMED)]

    film_step(0, base)
    tuned = train.finetune(run, film_step)
    _, (_, first_names) = film[0]
    _, (_, last_names) = film[run.steps]
    lost = {}  # {old screen: the number of its first question whose answer gets lost}
    for i, (first, last) in enumerate(zip(first_names, last_names)):
        if pictures.is_right(first) and not pictures.is_right(last):
            lost.setdefault(last.screen, i)
    shown = [0, 7, 14], list(lost.values())[:3]  # Every seventh click is on another screen.
    frames = []
    for step, measured in film.items():
        rows = {}
        for title, numbers, (_, base_answers), (share, answers) in zip(FILMED.values(), shown, film[0], measured):
            rows[title.format(share)] = [(base_answers[i], answers[i]) for i in numbers if i < len(answers)]
        frames.append(film_frame(rows, f"step {step:,} of {run.steps:,}"))
    return tuned, frames


# ---- What fine-tuning changes ----------------------------------------------------------------------------------------


def draw_changes(tuned: train.FinetuningRun) -> plt.Figure:
    """How far each head's value and query have moved at each token of a prompt: the norm of the change, relative to
    the norm of the base's."""
    model, answer = tuned.model, tuned.answers[0]
    features = image_features(model.get_image_features, [answer.screen], model.device)
    prompt = prompt_batch([answer.sample], features, num_problems=1)
    with tuned.adapter.disabled():
        base_queries, _, base_values = queries_keys_values(model, prompt)  # [L, 1, H_q or H, T, d_h]
    queries, _, values = queries_keys_values(model, prompt)

    tokens = [VOCABULARY[i] for i in prompt["input_ids"][0]]
    start = tokens.index(IMAGE)
    end = start + tokens.count(IMAGE)
    spans = {"words": slice(start), "image": slice(start, end), "question": slice(end, None)}
    colours = LinearSegmentedColormap.from_list("changes", ["#cfe6f7", "#56b4e9", "#0072b2", "#0b2a5b"])
    colours = colours.with_extremes(bad="#00000000")  # transparent, so that the hatched ground shows
    grid = {"left": 0.13, "right": 0.99, "bottom": 0.03, "top": 0.97, "wspace": 0.05, "width_ratios": (19, 40, 10)}
    figure = plt.figure(figsize=(WIDTH, 5.9))
    legend, header, *parts = figure.subfigures(4, 1, height_ratios=(1.6, 2.6, 5, 5))

    draw_legend(legend, colours)
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

    rows = ("values", base_values, values, tuned.adapter.heads), ("queries", base_queries, queries, {})
    blocks = {}  # {(values or queries, layer): its three axes}
    for part, (name, before, after, selected) in zip(parts, rows):
        moves = ((after - before).norm(dim=-1) / before.norm(dim=-1)).squeeze(1).cpu().numpy()  # [L, H or H_q, T]
        moves[moves == 0] = np.nan  # which is transparent
        part.supylabel(f"{name} of {moves.shape[1]} heads", x=0.01)
        for layer, axes in enumerate(part.subplots(len(moves), 3, gridspec_kw=grid)):
            for ax, span in zip(axes, spans.values()):
                ax.imshow(moves[layer][:, span], colours, LogNorm(0.03, 3), aspect="auto")
                hatch(ax)
            axes[0].set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center")
            for head in selected.get(layer, []):
                beside = {"xy": (-0.012, head), "xycoords": ("axes fraction", "data"), "ha": "center", "va": "center"}
                axes[1].annotate("▶", **beside, color=ORANGE, size=6)
            blocks[name, layer] = axes

    lowest, heads = min(tuned.adapter.heads.items())
    before_image, image, _ = blocks["values", lowest]
    _, _, question = blocks["values", lowest + 1]
    centred = {"ha": "center", "va": "center", "path_effects": RIM}
    before_image.text(0.5, 0.5, "cannot change", transform=before_image.transAxes, **centred)
    image.text(0.5, heads[len(heads) // 2], "the adapter writes", transform=image.get_yaxis_transform(), **centred)
    question.text(0.5, 0.5, "follows", transform=question.transAxes, **centred)
    return figure


def draw_legend(part, colours) -> None:
    """The title of the picture of changes, and what its colours mean."""
    part.text(0.01, 0.8, "What fine-tuning changes in values and queries", size=13, va="center")
    part.text(0.01, 0.34, "change, relative to the vector's length:", size=10, va="center")
    zero = part.add_axes((0.37, 0.2, 0.05, 0.28))
    hatch(zero)
    bar = part.add_axes((0.58, 0.2, 0.14, 0.28))
    bar.imshow([np.linspace(0, 1, 256)], colours, aspect="auto")
    bare(bar)
    for x, text in ((0.43, "exactly 0"), (0.54, "3%"), (0.73, "300%"), (0.86, "adapted head")):
        part.text(x, 0.34, text, size=10, va="center")
    part.text(0.84, 0.34, "▶", color=ORANGE, size=10, va="center")


def hatch(ax: plt.Axes) -> None:
    """Hatched ground, without ticks and frame."""
    ax.patch.set(hatch="////", edgecolor="#d0d5dd")
    bare(ax)


if __name__ == "__main__":
    sys.exit(command(FiguresConfig, make_figures, __doc__))
