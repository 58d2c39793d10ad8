"""Draws the diagrams of the pages, from the runs of tiny models with the skill: python -m data.study.diagrams"""

import sys
from pathlib import Path

try:
    import matplotlib.pyplot as plt
    import pandas as pd

    from data.study import compare
except ImportError:
    if __name__ != "__main__":
        raise
    print('error: the diagrams need pandas and matplotlib; install them by pip install ".[study]"', file=sys.stderr)
    sys.exit(2)

FIGURES = Path(__file__).parents[1] / "figures"
COLOURS = {  # of each method, Okabe and Ito's
    "LoRA": "#d55e00",
    "LoRA on v": "#e69f00",
    "Partial LoRA": "#009e73",
    "Partial LoRA on v": "#56b4e9",
    "Image-LoRA": "#0072b2",
}
REPLAY = {"LoRA": 0.93, "Partial LoRA": 1, "Image-LoRA": 1.075}  # {method: where across}, side by side
LAYER_COLOURS = ("#0072b2", "#007a5a", "#b5610a", "#7b4b94")
GREY = "#667085"
STYLE = {"figure.figsize": (8.3, 4.8), "figure.constrained_layout.use": True, "savefig.dpi": 200, "font.size": 11}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
STYLE |= {"axes.edgecolor": "#98a2b3", "grid.color": "#e4e7ec", "legend.frameon": False}


def trade_off(runs: pd.DataFrame) -> plt.Figure:
    """The new task and the other questions at each learning rate: means over the models, with seed 1.

    Rates are relative to the chosen one, at which the other questions after replay are shown, too."""
    chosen = compare.at_chosen_rates(runs).groupby("method").mean(numeric_only=True)
    figure, axes = plt.subplots()
    for method, colour in COLOURS.items():
        at_rates = compare.once(runs[runs.method == method]).groupby("lr").mean(numeric_only=True)
        at_rates.index /= chosen.lr[method]
        axes.plot(at_rates.task_acc, ":", color=colour, marker=".")
        axes.plot(at_rates.other_questions_acc, color=colour, marker="o", label=method)
    for method, across in REPLAY.items():
        up = chosen.other_questions_acc[f"{method} with replay"]
        axes.plot(across, up, "D", color=COLOURS[method], markeredgecolor="white")
    for x, y, words in ((0.25, 93, "new task"), (0.25, 72, "other questions"), (1.14, 92, "with replay")):
        axes.text(x, y, words, color=GREY, va="center")
    axes.set(xlabel="learning rate, relative to the chosen one", ylabel="correct answers, %", ylim=(0, 102))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def heads(runs: pd.DataFrame) -> plt.Figure:
    """Each head of model 1, layer.head: how many switches it clicks alone, and its influence before training."""
    runs = runs[runs.influence.notna()]
    figure, axes = plt.subplots()
    axes.scatter(runs.influence, runs.task_acc, s=0)  # for the range of the axes
    for method, influence, clicks in zip(runs.method, runs.influence, runs.task_acc):
        name = method.split()[-1]  # Image-LoRA in head 1.3
        colour = LAYER_COLOURS[int(name[0])]
        circle = {"boxstyle": "circle, pad=0.2", "facecolor": colour, "edgecolor": "white"}
        axes.text(influence, clicks, name, color="white", size=8, ha="center", va="center", bbox=circle)
    correlation = runs.influence.rank().corr(runs.task_acc.rank())  # Spearman's
    axes.text(0.003, 94, f"rank correlation {correlation:.2f}", color=GREY)
    axes.set(xlabel="influence of the head before training", ylabel="switches clicked with this head alone, %")
    axes.set(xscale="log", ylim=(-3, 100))
    axes.xaxis.set_major_formatter("{x:g}")
    return figure


@plt.rc_context(STYLE)
def main() -> None:
    runs = compare.read_runs()
    runs = runs[runs.setting == "skilled"]
    trade_off(runs).savefig(FIGURES / "trade_off.png")
    heads(runs).savefig(FIGURES / "heads.png")


if __name__ == "__main__":
    main()
