"""The evidence: tables from the runs of tiny models (runs.csv) and of SmolLM2 (smollm.csv).

python -m data.study.compare     print those of the pages, at once; then more, and how learning rates were chosen

A number is the mean over the models, three tiny ones or two of SmolLM2, and brackets hold the lowest and the highest.

Turned down means at the smallest gamma that costs at most two points of the new task on validation screens.
"""

import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.gamma import smallest_gamma
from data.study import plan

try:
    import pandas as pd
except ImportError:
    if __name__ != "__main__":
        raise
    print('error: the tables need pandas; install it by pip install ".[study]"', file=sys.stderr)
    sys.exit(2)

TITLES = {  # {measure, a column of the files: its title in a table}
    "gamma": "γ",
    "task_acc": "new task, %",
    "validation_acc": "new task on validation screens, %",
    "other_questions_acc": "other questions, %",  # the mean of the next three
    "what_is_at_acc": "what is at, %",
    "what_is_right_of_acc": "what is right of, %",
    "click_right_of_acc": "click right of, %",
    "same_words_acc": "same words, %",
    "word_problem_after_image_acc": "word problems after an image, %",
    "word_problem_acc": "word problems without an image, %",
    "right_hint_acc": "with a right hint, %",
    "wrong_hint_acc": "with a wrong hint, %",
    "followed_acc": "wrong hints followed, %",
    "replay_answers_acc": "answers correct, %",
    "divergence_after_screen": "KL divergence after an image",
    "same_continuations": "openings continued as before, of 20",
}
LAYOUTS = {"divergence_after_screen": "{:.3f}", "same_continuations": "{:.2g}"}  # else {:.1f}
EQUAL_CLICKS = (94, 95, 96)  # percent of the switches, which all methods of equal size hit on all tiny models
CLICKS_OF_SMOLLM2 = (93, 94, 95)  # a cell is empty where a method's curve does not cross so many


# ---- Runs ------------------------------------------------------------------------------------------------------------


def read_runs() -> pd.DataFrame:
    """The rows of both files, accuracies in percent. The bases of SmolLM2 count as its models.

    turned_down: whether a row is the one of its curve that the rule takes."""
    folder = Path(__file__).parent
    smollm2 = pd.read_csv(folder / "smollm.csv")
    smollm2 = smollm2.assign(setting="SmolLM2", model=smollm2.base.map(plan.SMOLLM2_BASES), text=0)
    runs = pd.concat([pd.read_csv(folder / "runs.csv"), smollm2], ignore_index=True)
    runs["turned_down"] = False
    for _, curve in runs.groupby(["setting", "model", "method", "lr", "seed", "text"]):
        if len(curve) > 1 and curve.validation_acc.notna().all():
            gamma = smallest_gamma(curve.sort_values("gamma", ascending=False).to_dict("records"))
            runs.loc[curve.index[curve.gamma == gamma], "turned_down"] = True
    shares = [name for name in runs if name.endswith("_acc") or name.startswith("image_share")]
    runs[shares] *= 100
    return runs


def rows_where(runs: pd.DataFrame, where: dict) -> pd.DataFrame:
    """The rows whose columns hold these values."""
    for name, value in where.items():
        runs = runs[runs[name] == value]
    return runs


def at_chosen_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows at the learning rate that was chosen for their method in their setting."""
    return runs[[lr == plan.CHOSEN[setting][method] for setting, method, lr in zip(runs.setting, runs.method, runs.lr)]]


def first_seed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with seed 1, which all methods have. Models without the skill have a seed of their own."""
    return runs[runs.seed == runs.model.where(runs.setting == "unskilled, packed", 1)]


def tried(runs: pd.DataFrame, setting: str) -> pd.DataFrame:
    """The runs by which learning rates were compared: one for each method, model and rate."""
    runs = first_seed(rows_where(runs, {"setting": setting, "gamma": 1, "text": 0}))
    return runs[runs.method.isin([*plan.TRIED[setting]])]


# ---- Tables ----------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """What a table shows of a measure."""

    title: str
    measure: str
    show: str = "range"  # the mean over the models, with the lowest and the highest; or mean, without them
    where: dict = {}  # of which rows, if not of all seeds and models with gamma = 1 and no text


class Table(NamedTuple):
    """A row for each method."""

    title: str
    setting: str
    methods: list[str]
    columns: list[Column]
    all_seeds: bool = False  # or the first alone


def as_trained(*measures: str, show="range") -> list[Column]:
    return [Column(TITLES[measure], measure, show) for measure in measures]


def turned_down(*measures: str) -> list[Column]:
    """At the smallest gamma that costs at most two points of the new task on validation screens."""
    return [Column(f"turned down: {TITLES[measure]}", measure, "range", {"turned_down": True}) for measure in measures]


def of_each_model(title: str, measure: str, **where) -> list[Column]:
    return [Column(f"{title}, model {model}", measure, "mean", where | {"model": model}) for model in plan.MODELS]


def format_cells(numbers: pd.Series, measure: str) -> pd.Series:
    """As in a table: empty where nothing was measured."""
    return numbers.map(LAYOUTS.get(measure, "{:.1f}").format).astype(str).replace("nan", "")


def markdown(title: str, cells: pd.DataFrame) -> str:
    """A table with a row for each row of cells, whose index holds the rows' names."""
    rows = [[title, *cells], ["---"] * (1 + len(cells.columns)), *cells.itertuples()]
    return "".join(f"|{'|'.join(row)}|\n" for row in rows)


def show_table(table: Table, runs: pd.DataFrame) -> str:
    if not table.all_seeds:
        runs = first_seed(runs)
    cells = {}
    for column in table.columns:
        where = {"setting": table.setting, "text": 0} | column.where
        if "turned_down" not in where:
            where = {"gamma": 1.0} | where
        cells[column.title] = show_column(column, rows_where(runs, where))
    return markdown(table.title, pd.DataFrame(cells).reindex(table.methods).fillna(""))


def show_column(column: Column, runs: pd.DataFrame) -> pd.Series:
    """The cells of a column, {method: text}."""
    methods = runs.groupby(["method", "model"])[column.measure].mean().groupby("method")
    mean = format_cells(methods.mean(), column.measure)
    if column.show != "range":
        return mean
    lowest, highest = format_cells(methods.min(), column.measure), format_cells(methods.max(), column.measure)
    return mean.where(lowest == highest, mean + " (" + lowest + "–" + highest + ")")


WITH_OWN = [*plan.THREE, *plan.OWN_ANSWERS]
AFTER_TEXT = [
    Column(f"{name} after {text}, %", measure, "mean", {"text": text})
    for name, measure in (("new task", "task_acc"), ("others", "other_questions_acc"))
    for text in plan.FEW_TEXTS
]
REPLAYS = {  # {title: ending of a method's name}
    "no replay": "",
    "correct answers": " with correct answers",
    "correct answers, without 'switch'": " with correct answers but to 'switch'",
    "own answers, without 'switch'": " with own answers but to 'switch'",
    "own answers": " with own answers",
}
CLICKS = ("task_acc", "other_questions_acc")
DOWN = as_trained(*CLICKS) + turned_down("gamma", *CLICKS)
NAMES_AND_CLICKS = ("what_is_at_acc", "what_is_right_of_acc", "click_right_of_acc")
ENGLISH = ("divergence_after_screen", "same_continuations")
EACH = as_trained("task_acc", show="mean") + of_each_model("others", "other_questions_acc")
HINTED = [*plan.HINTS, *plan.HINTS_BEFORE]
PROBLEMS = ("word_problem_after_image_acc", "word_problem_acc", "same_words_acc")

PAGE_TABLES = [  # in the order of the page
    Table("tiny models, hints", "skilled", HINTED, of_each_model("wrong hint", "wrong_hint_acc"), all_seeds=True),
    Table(
        "tiny models that can repeat a place, hints",
        "copying",
        plan.COPYING_HINTS,
        of_each_model("wrong hint", "wrong_hint_acc") + as_trained("followed_acc"),
    ),
    Table("tiny models, one question in a sequence", "skilled", [*plan.THREE, *plan.IN_PART], EACH),
    Table("tiny models, packed", "packed", [*plan.THREE], EACH),
    Table("tiny models, text that varies", "skilled", [*plan.VARIED], AFTER_TEXT),
]
MORE_TABLES = [
    Table("tiny models", "skilled", ["base model", *WITH_OWN], DOWN, all_seeds=True),
    Table("SmolLM2", "SmolLM2", [*plan.SMOLLM2], DOWN),
    Table(
        "tiny models, more",
        "skilled",
        ["base model", *WITH_OWN],
        as_trained("other_questions_acc", *PROBLEMS),
        all_seeds=True,
    ),
    Table("tiny models, the upper half", "skilled", ["Image-LoRA", *plan.IN_PART], DOWN),
    Table("tiny models, other ways of training", "skilled", ["Image-LoRA", *plan.OTHER_WAYS], as_trained(*CLICKS)),
    Table("SmolLM2, more", "SmolLM2", [*plan.SMOLLM2], as_trained(*NAMES_AND_CLICKS)),
    Table("SmolLM2, English", "SmolLM2", [*plan.SMOLLM2], as_trained(*ENGLISH) + turned_down(*ENGLISH)),
    Table(
        "tiny models, replay",
        "skilled",
        [*plan.OWN_ANSWERS, *plan.REPLAYS, *plan.OLD_REPLAY],
        as_trained("replay_answers_acc", *CLICKS),
    ),
    Table(
        "tiny models, hints, more",
        "skilled",
        HINTED,
        [Column("without a hint, %", "task_acc"), *as_trained("right_hint_acc", "followed_acc")],
        all_seeds=True,
    ),
    Table(
        "SmolLM2, hints",
        "SmolLM2",
        [*plan.SMOLLM2_HINTS],
        [Column("without a hint, %", "task_acc"), *as_trained("right_hint_acc", "wrong_hint_acc", "followed_acc")],
    ),
    Table("tiny models, heads", "skilled", ["Image-LoRA", *plan.FEW_HEADS], as_trained(*CLICKS)),
    Table(
        "tiny models, referring",
        "referring",
        plan.RIVALS,
        as_trained("task_acc", "what_is_right_of_acc", "click_right_of_acc"),
    ),
]


def replay(runs: pd.DataFrame) -> str:
    """The other questions after each kind of replay."""
    runs = first_seed(rows_where(runs, {"setting": "skilled", "gamma": 1, "text": 0}))
    cells = {}
    for title, ending in REPLAYS.items():
        of_kind = runs[runs.method.isin([method + ending for method in plan.THREE])]
        of_kind = of_kind.assign(method=of_kind.method.str.removesuffix(ending))
        cells[title] = show_column(Column(title, "other_questions_acc"), of_kind)
    return markdown("other questions, %, by replay", pd.DataFrame(cells).reindex([*plan.THREE]))


def new_skill(runs: pd.DataFrame) -> str:
    """The new task on models with and without the skill."""
    cells = {}
    for method in (plan.REWORDED, *plan.RIVALS):
        cells[method] = []
        for setting, model in product(("skilled", "unskilled, packed"), plan.MODELS):
            where = {"setting": setting, "method": method, "model": model, "gamma": 1, "text": 0}
            cells[method].append(f"{first_seed(rows_where(runs, where)).task_acc.item():.1f}")
    titles = [f"model {model} {kind} the skill" for kind in ("with", "without") for model in plan.MODELS]
    return markdown("new task, %", pd.DataFrame.from_dict(cells, orient="index", columns=titles))


def equal_clicks(runs: pd.DataFrame) -> str:
    """What methods of equal size keep where they hit equally many switches: means over three models."""
    cells = kept_at_equal_clicks(runs, "skilled", plan.AS_LARGE, EQUAL_CLICKS).groupby("method", sort=False).mean()
    cells = cells.apply(format_cells, measure="other_questions_acc")
    return markdown("tiny models, others where so many switches are hit", cells)


def equal_clicks_of_smollm2(runs: pd.DataFrame) -> str:
    """What methods keep where they hit equally many switches: empty where a curve does not cross so many."""
    cells = kept_at_equal_clicks(runs, "SmolLM2", plan.THREE | plan.RANK_2 | plan.OWN_ANSWERS, CLICKS_OF_SMOLLM2)
    cells.index = [f"{method}, model {model}" for method, model in cells.index]
    cells = cells.apply(format_cells, measure="other_questions_acc")
    return markdown("SmolLM2, others where so many switches are hit", cells)


def kept_at_equal_clicks(runs: pd.DataFrame, setting: str, methods, shares: tuple[int, ...]) -> pd.DataFrame:
    """The other questions of each method and model (index: method, model), a column for each share of clicks."""
    runs = first_seed(rows_where(runs, {"setting": setting, "text": 0}))
    kept = {}
    for method in methods:
        for model, curve in rows_where(runs, {"method": method}).groupby("model"):
            kept[method, model] = {f"{clicks} %": kept_at_clicks(curve, clicks) for clicks in shares}
    return pd.DataFrame.from_dict(kept, orient="index").rename_axis(["method", "model"])


def kept_at_clicks(curve: pd.DataFrame, clicks: float) -> float:
    """The other questions where a curve, from its lowest gamma up, first reaches so many clicks. It is linear between
    two gammas. NaN if it does not get there, or has more of them at its lowest gamma already."""
    curve = curve.sort_values("gamma")
    hits, others = curve.task_acc.to_numpy(), curve.other_questions_acc.to_numpy()
    if not hits[0] < clicks <= hits.max():
        return np.nan
    after = int((hits >= clicks).argmax())
    return float(np.interp(clicks, hits[after - 1 : after + 1], others[after - 1 : after + 1]))


def text_and_attention(runs: pd.DataFrame) -> str:
    """Image-LoRA asked after more or fewer word problems than in training, with the gamma that the image's share of
    attention in the base model predicts: its share in training, divided by the one when asked."""
    runs = first_seed(rows_where(runs, {"setting": "skilled", "gamma": 1}))
    shares = rows_where(runs, {"method": "base model"}).set_index(["model", "text"])
    shares = shares.filter(like="image_share").mean(axis=1)  # over the layers
    asked = [(plan.MORE_TEXT, 9, text) for text in plan.FEWER_PROBLEMS] + [("Image-LoRA", 0, 9)]
    rows = {}
    for (method, trained, text), model in product(asked, plan.MODELS):
        (row,) = rows_where(runs, {"method": method, "model": model, "text": text}).to_dict("records")
        cells = [f"{shares[model, trained] / shares[model, text]:.2f}"]
        cells += [f"{row[name]:.1f}" for name in ("task_acc", "one_gamma_acc", "layer_gammas_acc")]
        rows[f"trained after {trained}, asked after {text}, model {model}"] = cells
    titles = ["predicted γ", "at γ = 1, %", "at the predicted γ, %", "at a γ predicted for each layer, %"]
    return markdown("Image-LoRA, new task", pd.DataFrame.from_dict(rows, orient="index", columns=titles))


def rate_tables(runs: pd.DataFrame) -> list[str]:
    """How learning rates were chosen."""
    measures = dict.fromkeys(("skilled", "SmolLM2"), ("validation_acc", "other_questions_acc"))
    measures["unskilled, packed"] = ("validation_acc",)
    tables = []
    for setting, shown in measures.items():
        compared = {setting: tried(runs, setting)}
        if setting == "SmolLM2":  # of which model 1 chose
            compared = {f"SmolLM2, model {model}": rows for model, rows in compared[setting].groupby("model")}
        for (title, rows), measure in product(compared.items(), shown):
            tables.append(markdown(f"{title}: {TITLES[measure]} at the learning rate", rates(rows, setting, measure)))
    return tables


def rates(runs: pd.DataFrame, setting: str, measure: str) -> pd.DataFrame:
    """Cells with a row for each method and a column for each learning rate; the chosen one is bold."""
    cells = runs.pivot_table(measure, "method", "lr").apply(format_cells, measure=measure)
    for method in cells.index:
        rate = plan.CHOSEN[setting][method]
        cells.loc[method, rate] = f"**{cells.loc[method, rate]}**"
    return cells.reindex([*plan.TRIED[setting]]).fillna("").rename(columns="{:g}".format)


def page_tables(runs: pd.DataFrame) -> list[str]:
    """Those of the page, which a test compares with it."""
    chosen = at_chosen_rates(runs)
    tables = [show_table(table, chosen) for table in PAGE_TABLES]
    others = replay, equal_clicks, new_skill
    return tables + [show(chosen) for show in others]


def more_tables(runs: pd.DataFrame) -> list[str]:
    """Numbers that the page tells in a sentence or a picture."""
    chosen = at_chosen_rates(runs)
    tables = [show_table(table, chosen) for table in MORE_TABLES]
    tables.append(equal_clicks_of_smollm2(chosen))
    return [*tables, text_and_attention(chosen), *rate_tables(runs)]


if __name__ == "__main__":
    runs = read_runs()
    print("\n".join(page_tables(runs) + more_tables(runs)))
