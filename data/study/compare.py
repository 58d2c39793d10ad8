"""The numbers of the pages, from the rows of tiny models (runs.csv) and of SmolLM2 (smollm.csv).

python -m data.study.compare     the tables of the pages; then each measure of each method: by model, lowest, highest

A number is the mean over models and seeds, and brackets hold the lowest and the highest run. *Kept at 95 %* is the
share of other questions that a run answers correctly at the gamma where it hits 95 % of the switches, interpolated.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from data.costs import run_costs
from data.prompts import SCREENS_PER_STEP, VOCABULARY, training_batch
from data.screens import SIZE, draw_screen
from data.study.methods import METHODS, REWORDED, SKILLED, Row, config
from tiny_vlm import TinyVLM, TinyVLMConfig

FILES = [Path(__file__).parent / name for name in ("runs.csv", "smollm.csv")]
CLICKS = (94, 95, 96)  # percent of the switches, at which methods are compared
RUN = ["setting", "method", "text", "model", "seed"]  # at the chosen rate; text is how it was asked

# ---- From rows to runs -----------------------------------------------------------------------------------------------


def read_runs() -> pd.DataFrame:
    """The rows of both files; accuracies in percent."""
    runs = pd.concat([pd.read_csv(path) for path in FILES], ignore_index=True)
    runs[[name for name in runs if name.endswith("_acc")]] *= 100
    return runs


def choose_rates(runs: pd.DataFrame) -> dict[tuple[str, str], float]:
    """{(setting, method): the lowest learning rate that is within one point of the best on validation screens}.

    A rate counts with its first seed on each model: by the mean of the models on which it was tried."""
    compared = runs[runs.gamma == 1].sort_values(["seed", "text"])
    compared = compared.drop_duplicates(["setting", "method", "lr", "model"])
    clicks = compared.groupby(["setting", "method", "lr"]).validation_acc.mean()
    best = clicks.groupby(["setting", "method"]).transform("max")
    good = clicks[(clicks >= best - 1) | best.isna()]  # where nothing was chosen, there may be no such measure
    return good.reset_index("lr").groupby(["setting", "method"]).lr.min().to_dict()


def at_chosen_rates(runs: pd.DataFrame) -> pd.DataFrame:
    rates = choose_rates(runs)
    return runs[[lr == rates[setting, method] for setting, method, lr in zip(runs.setting, runs.method, runs.lr)]]


def compare(runs: pd.DataFrame) -> pd.DataFrame:
    """A line for each RUN: its measures as trained, what it keeps at so many clicks, and what its method costs."""
    chosen = at_chosen_rates(runs)
    numbers = chosen[chosen.gamma == 1].set_index(RUN).sort_index()
    numbers["gammas"] = chosen.groupby(RUN).size()  # at how many strengths
    for clicks in CLICKS:
        kept = {run: kept_at_clicks(curve, clicks) for run, curve in chosen.groupby(RUN) if len(curve) > 1}
        numbers[f"kept_at_{clicks}"] = pd.Series(kept)
    costs = pd.DataFrame({method: adapter_costs(method) for method in {*COSTS, *OWN, *LADDER}}).T
    for name in costs:
        of_tiny_models = pd.Series(numbers.index.get_level_values("method").map(costs[name]), numbers.index)
        numbers[name] = numbers[name].fillna(of_tiny_models) if name in numbers else of_tiny_models
    return numbers


def kept_at_clicks(curve: pd.DataFrame, clicks: float) -> float:
    """The other questions where a curve, from its lowest gamma up, first reaches so many clicks. It is linear between
    two gammas. NaN if it does not get there, or has more of them at its lowest gamma already."""
    curve = curve.sort_values("gamma")
    hits, others = curve.task_acc.to_numpy(), curve.other_questions_acc.to_numpy()
    if not hits[0] < clicks <= hits.max():
        return np.nan
    after = int((hits >= clicks).argmax())
    return float(np.interp(clicks, hits[after - 1 : after + 1], others[after - 1 : after + 1]))


def adapter_costs(method: str) -> dict:
    """What an adapter costs on a tiny model. Selected heads count as if each layer had equally many."""
    cfg = config(Row("skilled", 1, method, 0.01, 1, 1.0, 0))
    model = TinyVLM(TinyVLMConfig(vocab_size=len(VOCABULARY), image_size=SIZE))
    num_layers, H = model.config.num_hidden_layers, model.config.num_key_value_heads
    heads = list(range(H if cfg.heads == "all" else cfg.num_heads // num_layers))
    screens = [draw_screen("new", "train", i) for i in range(SCREENS_PER_STEP)]
    batch = training_batch(cfg, (screens, torch.zeros(len(screens), model.config.num_patches, 1)), 0)
    costs = run_costs(cfg, model, batch["input_ids"], dict.fromkeys(range(num_layers), heads))
    flops = 100 * costs["adapter_flops_per_screen"] / costs["lora_flops_per_screen"]
    identical = "no" if cfg.method == "lora" else "yes"
    return {"parameters": costs["trainable_parameters"], "adapter_flops": flops, "identical": identical}


# ---- Tables of the pages ---------------------------------------------------------------------------------------------

PLACES = ["", " on the MLP", " on all linear layers", ", rank 2", " on the MLP, rank 2"]  # that rivals write to
COSTS = [*(f"LoRA{place}" for place in PLACES), *(f"Partial LoRA{place}" for place in PLACES), "Image-LoRA"]
OWN = [f"{method} with own answers" for method in METHODS]
SMOLLM2 = [f"{method}{place}" for method in ("LoRA", "Partial LoRA") for place in ("", " on the MLP, rank 5")]
SMOLLM2 += ["Partial LoRA, rank 2", "Image-LoRA"]
LADDER = ["LoRA", "Partial LoRA", "Partial LoRA on v", "Image-LoRA", "Image-LoRA in 12 heads by the probe"]
HINTED = ["LoRA", "LoRA on the MLP", "LoRA on q and k", "LoRA on v", "Partial LoRA", "Image-LoRA"]
HINTS = [f"{method} with hints" for method in HINTED]
NEW_SKILL = ["LoRA", "LoRA, rank 2", "Partial LoRA", "Partial LoRA, rank 2", "Image-LoRA"]


def mean(runs: pd.Series) -> str:
    return f"{runs.mean():.1f}"


def spread(runs: pd.Series) -> str:
    """The mean, with the lowest and the highest run; of a single run, its number."""
    return f"{runs.mean():.1f} ({runs.min():.1f}–{runs.max():.1f})" if runs.count() > 1 else mean(runs)


def count(runs: pd.Series) -> str:
    return f"{runs.count()} of {len(runs)}"


class Column(NamedTuple):
    title: str
    measure: str  # a column of what `compare` returns
    show: Callable = spread  # what tells the runs of a method
    setting: str = "skilled"
    model: int | None = None  # None: all of them


def of_model(title: str, measure: str, show=mean, models=SKILLED, setting="skilled") -> list[Column]:
    """A column for each model."""
    return [Column(f"{title}model {model}", measure, show, setting, model) for model in models]


COST = Column("parameters", "parameters", lambda runs: f"{runs.iloc[0]:,.0f}")
FLOPS = Column("adapter FLOPs, % of LoRA's", "adapter_flops", lambda runs: f"{runs.iloc[0]:.0f}")
IDENTICAL = Column("text identical", "identical", lambda runs: runs.iloc[0])
RANGE = Column("lowest and highest run", "kept_at_95", lambda runs: f"{runs.min():.1f}–{runs.max():.1f}")
NUM_RUNS = Column("runs that cross 95 %", "kept_at_95", count)
TASKS = {"skilled": "right of a name", "below": "the line below", "unskilled": "right of a name, without the skill"}
TABLES = {  # {title: (methods, columns)}
    "other questions, %, where 95 % are hit": ([*COSTS, *OWN], [COST, *of_model("", "kept_at_95"), RANGE, NUM_RUNS]),
    "other questions of SmolLM2, %, where 95 % are hit": (
        SMOLLM2,
        [
            COST._replace(setting="SmolLM2"),
            *of_model("", "kept_at_95", spread, (1, 2), "SmolLM2"),
            NUM_RUNS._replace(setting="SmolLM2", show=lambda runs: ", ".join(runs.groupby("model").apply(count))),
            Column("English, nats", "divergence_after_screen", lambda runs: f"{runs.mean():.2f}", "SmolLM2"),
        ],
    ),
    "one change at a time": (
        LADDER,
        [IDENTICAL, COST, FLOPS, Column("new task at γ = 1, %", "task_acc"), Column("kept at 95 %", "kept_at_95")],
    ),
    "new task, %": (
        [REWORDED, *NEW_SKILL],
        [Column(title, "task_acc", setting=setting) for setting, title in TASKS.items()],
    ),
    "switches hit, %": (HINTS, of_model("wrong hint, ", "wrong_hint_acc") + of_model("none, ", "task_acc")),
}


def page_tables(numbers: pd.DataFrame) -> list[str]:
    """The tables in markdown."""
    tables = []
    for title, (methods, columns) in TABLES.items():
        lines = [[title, *(column.title for column in columns)], ["---"] * (1 + len(columns))]
        for method in methods:
            lines.append([method.replace("|", r"\|"), *(cell(numbers, method, column) for column in columns)])
        tables.append("".join(f"|{'|'.join(line)}|\n" for line in lines))
    return tables


def cell(numbers: pd.DataFrame, method: str, column: Column) -> str:
    """What the column tells of runs without text before the image, or why it cannot. Empty: nothing was measured."""
    runs = numbers.query("setting == @column.setting and method == @method and text == 0")
    if column.model is not None:
        runs = runs.query("model == @column.model")
    if runs[column.measure].notna().any():
        return column.show(runs[column.measure])
    if column.measure != "kept_at_95" or not (runs.gammas > 1).any():
        return ""
    return "never hits 95 %" if (runs.task_acc < 95).all() else "above 95 % at each γ"


# ---- All other numbers -----------------------------------------------------------------------------------------------


def print_all(runs: pd.DataFrame) -> None:
    numbers = compare(runs)
    print(*page_tables(numbers), sep="\n")
    for measure in numbers.filter(regex="_acc$|divergence|^kept_at"):
        for setting, measured in numbers[measure].dropna().groupby("setting"):
            by_method = measured.groupby(["method", "text"])
            models = measured.groupby(["method", "text", "model"]).mean().unstack()
            print_numbers(f"{setting}, {measure}", models.join(by_method.agg(["min", "max", "count"])))
    tried = runs[(runs.gamma == 1) & (runs.text == 0)].groupby(["setting", "method"])
    tried = tried.filter(lambda rows: rows.lr.nunique() > 1)
    print_numbers("learning rates", tried.pivot_table("validation_acc", ["setting", "method", "lr"], "model"))


def print_numbers(title: str, numbers: pd.DataFrame) -> None:
    print(f"\n{title}\n{numbers.to_string(float_format='{:.3g}'.format, na_rep='')}")


if __name__ == "__main__":
    print_all(read_runs())
