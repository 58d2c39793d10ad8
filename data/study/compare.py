"""The numbers of the pages, from the rows of tiny models (runs.csv) and of SmolLM2 (smollm.csv).

python -m data.study.compare     the tables of the page, each also by model and as differences; then all other numbers

A number is the mean over models and seeds, and brackets hold the lowest and the highest run. *Kept at 95 %* is the
share of other questions that a run answers correctly at the gamma where it hits 95 % of the switches, interpolated.
A difference is a mean over pairs of runs on the same model with the same seed, and how many of them have its sign.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from data.costs import run_costs
from data.prompts import SCREENS_PER_STEP, VOCABULARY, training_batch
from data.screens import SIZE, draw_screen
from data.study import methods
from data.study.methods import REWORDED, THREE, Row, config
from tiny_vlm import TinyVLMConfig

FILES = [Path(__file__).parent / name for name in ("runs.csv", "smollm.csv")]
CLICKS = (93, 94, 95, 96)  # percent of the switches, at which methods are compared
RUN = ["setting", "method", "text", "model", "seed"]  # at the chosen rate; text is how it was asked

# ---- From rows to runs -----------------------------------------------------------------------------------------------


def read_runs(*more_files: Path) -> pd.DataFrame:
    """The rows of both files and of more, where they exist; accuracies and shares in percent."""
    runs = pd.concat([pd.read_csv(path) for path in (*FILES, *more_files) if path.exists()], ignore_index=True)
    runs = runs.drop_duplicates([*Row._fields], ignore_index=True)
    runs["image_share"] = runs.filter(like="image_share").mean(axis="columns")
    shares = [name for name in runs if name.endswith("_acc") or name == "image_share"]
    runs[shares] *= 100
    return runs


def choose_rates(runs: pd.DataFrame) -> dict[tuple[str, str], float]:
    """{(setting, method): the lowest learning rate that is within one point of the best on validation screens}.

    A rate counts with its first seed on each model. Of SmolLM2, model 1 chooses."""
    compared = runs[(runs.gamma == 1) & ((runs.setting != "SmolLM2") | (runs.model == 1))].sort_values(["seed", "text"])
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
    for clicks in CLICKS:
        kept = {run: kept_at_clicks(curve, clicks) for run, curve in chosen.groupby(RUN) if len(curve) > 1}
        numbers[f"kept_at_{clicks}"] = pd.Series(kept)
    costs = pd.DataFrame({method: adapter_costs(method) for method in {*methods.COSTS, *methods.LADDER}}).T
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
    model = SimpleNamespace(config=TinyVLMConfig(vocab_size=len(VOCABULARY), image_size=SIZE))
    num_layers, H = model.config.num_hidden_layers, model.config.num_key_value_heads
    heads = list(range(H if cfg.heads == "all" else cfg.num_heads // num_layers))
    screens = [draw_screen("new", "train", i) for i in range(SCREENS_PER_STEP)]
    batch = training_batch(cfg, (screens, torch.zeros(len(screens), model.config.num_patches, 1)), 0)
    costs = run_costs(cfg, model, batch["input_ids"], dict.fromkeys(range(num_layers), heads))
    flops = 100 * costs["adapter_flops_per_screen"] / costs["lora_flops_per_screen"]
    identical = "no" if cfg.method == "lora" else "yes"
    return {"parameters": costs["trainable_parameters"], "adapter_flops": flops, "identical": identical}


# ---- Tables ----------------------------------------------------------------------------------------------------------


def spread(runs: pd.Series, _=None) -> str:
    """The mean, with the lowest and the highest run."""
    if runs.count() < 2:
        return f"{runs.mean():.1f}".replace("nan", "–")
    return f"{runs.mean():.1f} ({runs.min():.1f}–{runs.max():.1f})"


def by_model(runs: pd.Series, _=None) -> str:
    return " · ".join(spread(of_model) for _, of_model in runs.groupby("model"))


def difference(runs: pd.Series, others: pd.Series | None) -> str:
    """To the runs of another method, in pairs."""
    pairs = runs.sub(others).dropna() if others is not None else runs[:0]
    num_same = (pairs * pairs.mean() > 0).sum()
    return f"{pairs.mean():+.1f} ({num_same} of {len(pairs)})" if pairs.any() else ""


class Column(NamedTuple):
    title: str
    measure: str  # a column of what `compare` returns
    show: Callable | None = None  # what tells the runs of a method; None: it depends on the view of the table
    setting: str = "skilled"
    text: int = 0


class Table(NamedTuple):
    title: str
    methods: list[str]  # a line for each that was measured
    columns: list[Column]
    other: Callable = lambda method: "Image-LoRA"  # the method that a method is compared with


def show_table(numbers: pd.DataFrame, table: Table, view: Callable = spread) -> str:
    """Markdown. view: what tells the runs of a method in the columns that do not say it."""
    columns = [column for column in table.columns if view is spread or not column.show]
    lines = [[table.title, *(column.title for column in columns)], ["---"] * (1 + len(columns))]
    for method in table.methods:
        cells = []
        for column in columns:
            measured = numbers[column.measure]
            runs = measured.get((column.setting, method, column.text))
            others = measured.get((column.setting, table.other(method), column.text))
            is_measured = runs is not None and runs.notna().any()
            cells.append((column.show or view)(runs, others) if is_measured else "")
        if any(cells):
            lines.append([method.replace("|", r"\|"), *cells])
    return "".join(f"|{'|'.join(line)}|\n" for line in lines)


def of_model(title: str, measure: str) -> list[Column]:
    """A column for each tiny model: means over its seeds."""
    columns = []
    for model in methods.SKILLED:
        show = lambda runs, _, model=model: f"{runs[model].mean():.1f}".replace("nan", "")  # noqa: E731
        columns.append(Column(f"{title}model {model}", measure, show))
    return columns


COST = Column("parameters", "parameters", lambda runs, _: f"{runs.iloc[0]:,.0f}")
FLOPS = Column("adapter FLOPs, % of LoRA's", "adapter_flops", lambda runs, _: f"{runs.iloc[0]:.0f}")
IDENTICAL = Column("text identical", "identical", lambda runs, _: runs.iloc[0])
RANGE = Column("lowest and highest run", "kept_at_95", lambda runs, _: f"{runs.min():.1f}–{runs.max():.1f}")
NUM_RUNS = Column("runs that hit so many", "kept_at_95", lambda runs, _: f"{runs.count()} of {len(runs)}")
HITS = Column("new task, %", "task_acc")
OTHERS = Column("other questions, %", "other_questions_acc")
KEPT = {clicks: Column(f"kept at {clicks} %", f"kept_at_{clicks}") for clicks in CLICKS}
AS_HINTED = [Column("wrong hint", "wrong_hint_acc"), Column("right hint", "right_hint_acc"), Column("none", "task_acc")]
TASKS = {"skilled": "right of a name", "unskilled": "right of a name, without the skill", "below": "the line below"}
ON_SMOLLM2 = [column._replace(show=by_model, setting="SmolLM2") for column in (HITS, KEPT[93], KEPT[94], KEPT[95])]
TABLES = [
    Table(
        "other questions, %, where 95 % are hit",
        methods.COSTS,
        [COST, *of_model("", "kept_at_95"), RANGE, NUM_RUNS],
    ),
    Table("at equal clicks", methods.COSTS, [HITS, OTHERS, KEPT[94], KEPT[95], KEPT[96]]),
    Table("one step at a time", methods.LADDER, [IDENTICAL, COST, FLOPS, HITS, KEPT[95]]),
    Table("SmolLM2, models 1 · 2", methods.ON_SMOLLM2, [COST._replace(setting="SmolLM2"), *ON_SMOLLM2]),
    Table(
        "what else is trained on",
        THREE + methods.OWN + methods.CORRECTED,
        [HITS, OTHERS, KEPT[95]],
        lambda method: method.replace("own", "correct"),
    ),
    Table(
        "new task, %",
        [REWORDED, *methods.NEW_SKILL],
        [Column(title, "task_acc", setting=setting) for setting, title in TASKS.items()],
    ),
    Table(
        "switches hit, %",
        methods.HINTS,
        of_model("wrong hint, ", "wrong_hint_acc") + of_model("none, ", "task_acc"),
    ),
    Table(
        "before fine-tuning",
        ["base model"],
        [OTHERS, OTHERS._replace(title="SmolLM2, other questions, %", setting="SmolLM2")],
    ),
    Table(
        "models that can repeat a place",
        [f"{method} with hints" for method in ("LoRA", "LoRA on v", "Image-LoRA")],
        [column._replace(setting="copying") for column in AS_HINTED],
    ),
    Table("hints", methods.HINTS + methods.FASTER_HINTS, AS_HINTED, lambda method: "Image-LoRA with hints"),
    Table(
        "switches hit after word problems, %",
        THREE + methods.AFTER_9 + methods.VARIED,
        [Column(f"asked after {text}", "task_acc", text=text) for text in methods.TEXTS],
        lambda method: re.sub("^(Partial )?LoRA", "Image-LoRA", method),
    ),
    Table(
        "which heads",
        ["Image-LoRA", *methods.BY_PROBE, *methods.RANDOM],
        [HITS, OTHERS],
        lambda method: method.replace("heads by the probe", "random heads"),
    ),
]


def page_tables(numbers: pd.DataFrame) -> dict[str, str]:
    """{title: markdown}. A test compares those that the page shows."""
    return {table.title: show_table(numbers, table) for table in TABLES}


def print_all(runs: pd.DataFrame) -> None:
    numbers = compare(runs)
    for table in TABLES:
        for view in (spread, by_model, difference):
            if view is spread or not all(column.show for column in table.columns):
                print(show_table(numbers, table, view))
    measures = numbers.filter(regex="_acc$|_share$|divergence")
    for setting, lines in measures.groupby("setting"):
        print_numbers(f"{setting}: means", lines.groupby(["method", "text"]).mean())
    shares = numbers.image_share.dropna().groupby(["text", "model"]).mean().unstack()
    for trained in (0, 9):
        print_numbers(f"gamma that attention predicts after training after {trained}", shares.loc[trained] / shares)
    predicted = numbers.dropna(subset="one_gamma_acc").filter(regex="^task_acc|one_gamma")
    print_numbers("at gamma 1 and at the predicted one", predicted.groupby(["method", "text", "model"]).mean())
    tried = runs[(runs.gamma == 1) & (runs.text == 0)].groupby(["setting", "method"])
    tried = tried.filter(lambda rows: rows.lr.nunique() > 1)
    print_numbers("learning rates", tried.pivot_table("validation_acc", ["setting", "method", "lr"], "model"))
    missing = {*methods.planned_rows(choose_rates(runs))} - {*methods.rows_of(runs)}
    print(f"\n{len(missing)} rows of the plan are missing")


def print_numbers(title: str, numbers: pd.DataFrame) -> None:
    print(f"\n{title}\n{numbers.dropna(axis='columns', how='all').to_string(float_format='{:.3g}'.format, na_rep='')}")


if __name__ == "__main__":
    print_all(read_runs())
