"""The evidence: the tables of the pages, from the runs of tiny models (runs.csv) and of SmolLM2 (smollm.csv).

python -m data.study.compare     print the tables, at once; then how learning rates were chosen

On tiny models, a number is the mean over three models, each of which is a mean over its seeds, and brackets hold the
lowest and the highest of the three. SmolLM2 was run with seeds 1 and 2, and brackets hold both; with own answers, with
seed 1 alone.

Turned down means at the smallest gamma that costs at most two points of the new task on validation screens.
"""

import sys
from pathlib import Path

import numpy as np

from data.evaluate import smallest_gamma
from data.study import plan

try:
    import pandas as pd
except ImportError:
    if __name__ != "__main__":
        raise
    print('error: the tables need pandas; install it by pip install ".[study]"', file=sys.stderr)
    sys.exit(2)

LAYOUTS = {"parameters": "{:,.0f}", "divergence_after_screen": "{:.3f}", "same_continuations": "{:.2g}"}  # else {:.1f}
EQUAL_CLICKS = 95  # percent of the switches, at which methods of equal size are compared


# ---- Runs ------------------------------------------------------------------------------------------------------------


def read_runs() -> pd.DataFrame:
    """The rows of both files, accuracies in percent. The seeds of SmolLM2 count as its models.

    turned_down: whether a row is the one of its curve that the rule takes."""
    folder = Path(__file__).parent
    smollm2 = pd.read_csv(folder / "smollm.csv")
    settings = [plan.SMOLLM2_SETTINGS[key] for key in zip(smollm2.base, smollm2.dtype)]
    smollm2 = smollm2.assign(setting=settings, model=smollm2.seed, text=0)
    runs = pd.concat([pd.read_csv(folder / "runs.csv"), smollm2], ignore_index=True)
    runs["turned_down"] = False
    for _, curve in runs.groupby(["setting", "model", "method", "lr", "seed", "text"]):
        if len(curve) > 1:
            gamma = smallest_gamma(curve.sort_values("gamma", ascending=False).to_dict("records"))
            runs.loc[curve.index[curve.gamma == gamma], "turned_down"] = True
    runs[[measure for measure, title in plan.TITLES.items() if title.endswith("%")]] *= 100
    return runs


def rows_where(runs: pd.DataFrame, where: dict) -> pd.DataFrame:
    """The rows whose columns hold these values."""
    for name, value in where.items():
        runs = runs[runs[name] == value]
    return runs


def at_chosen_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows at the learning rate that was chosen for their method in their setting."""
    return runs[[lr == plan.CHOSEN[setting][method] for setting, method, lr in zip(runs.setting, runs.method, runs.lr)]]


def tried(runs: pd.DataFrame, setting: str) -> pd.DataFrame:
    """The runs by which learning rates were compared: one for each method, model and rate, with seed 1 (models without
    the skill have their own). Those of SmolLM2 were in bfloat16, except one."""
    runs = runs[runs.setting.str.startswith(setting)]
    runs = runs[runs.seed == runs.model.where(runs.setting == "unskilled", 1)]
    runs = runs[(runs.gamma == 1) & (runs.text == [plan.METHODS[method].get("text", 0) for method in runs.method])]
    return runs.sort_values("dtype", kind="stable").drop_duplicates(["method", "model", "lr"])  # bfloat16 comes first


# ---- Tables ----------------------------------------------------------------------------------------------------------


def format_cells(numbers: pd.Series, measure: str) -> pd.Series:
    """As in a table: empty where nothing was measured."""
    return numbers.map(LAYOUTS.get(measure, "{:.1f}").format).astype(str).replace("nan", "")


def markdown(title: str, cells: pd.DataFrame) -> str:
    """A table with a row for each row of cells, whose index holds the rows' names."""
    rows = [[title, *cells], ["---"] * (1 + len(cells.columns)), *cells.itertuples()]
    return "".join(f"|{'|'.join(row)}|\n" for row in rows)


def tables(runs: pd.DataFrame) -> list[str]:
    """Those of the pages."""
    chosen = at_chosen_rates(runs)
    shown = [show_table(table, chosen) for table in plan.TABLES]
    return [front_page(chosen), equal_clicks(chosen), text_and_attention(chosen), examples(chosen), *shown]


def show_table(table: plan.Table, runs: pd.DataFrame) -> str:
    cells = {column.title: show_column(column, rows_where(runs, table.where(column))) for column in table.columns}
    return markdown(table.title, pd.DataFrame(cells).reindex(table.methods).fillna(""))


def show_column(column: plan.Column, runs: pd.DataFrame) -> pd.Series:
    """The cells of a column, {method: text}."""
    seeds = runs.groupby(["method", "model"])[column.measure]
    models = seeds.max() - seeds.min() if column.show == "spread" else seeds.mean()
    methods = models.groupby("method")
    mean = format_cells(methods.mean(), column.measure)
    if column.show != "range":
        return mean
    lowest, highest = format_cells(methods.min(), column.measure), format_cells(methods.max(), column.measure)
    return mean.where(lowest == highest, mean + " (" + lowest + "–" + highest + ")")


def front_page(runs: pd.DataFrame) -> str:
    """The other questions in whole numbers, one in a cell. A row stands there if all three methods were run."""
    settings = {"skilled": "tiny models"} | {setting: setting for setting in plan.SMOLLM2_BASES}
    titles, rows = [], []
    for setting, models in settings.items():
        of_setting = rows_where(runs, {"setting": setting, "text": 0})
        base = rows_where(of_setting, {"method": "base model"}).other_questions_acc.mean()
        for title, ending, where in (
            (f"**{models}** (base model: {base:.0f}), as trained", "", {"gamma": 1}),
            ("turned down", "", {"turned_down": True}),
            ("turned down, with own answers", " with own answers", {"turned_down": True}),
        ):
            shown = rows_where(of_setting, where)
            rows.append([shown.other_questions_acc[shown.method == method + ending].mean() for method in plan.THREE])
            titles.append(title)
    cells = pd.DataFrame(rows, titles, plan.THREE)
    return markdown("other questions, %", cells.dropna().map("{:.0f}".format))


def equal_clicks(runs: pd.DataFrame) -> str:
    """What methods of equal size keep where they hit equally many switches: a mean over seeds, for each model."""
    cells = pd.DataFrame(index=plan.AS_LARGE)
    runs = rows_where(runs, {"setting": "skilled", "text": 0})
    for model in plan.MODELS:
        for method in plan.AS_LARGE:
            seeds = rows_where(runs, {"model": model, "method": method}).groupby("seed")
            cells.loc[method, f"model {model}"] = np.mean([kept_at_clicks(curve) for _, curve in seeds])
    cells["mean"] = cells.mean(axis=1)
    return markdown(f"other questions where {EQUAL_CLICKS} % of the switches are hit", cells.map("{:.1f}".format))


def kept_at_clicks(curve: pd.DataFrame) -> float:
    """The other questions where a curve, from its lowest gamma up, first reaches EQUAL_CLICKS. It is linear
    between two gammas."""
    curve = curve.sort_values("gamma")
    clicks, others = curve.task_acc.to_numpy(), curve.other_questions_acc.to_numpy()
    after = int((clicks >= EQUAL_CLICKS).argmax())
    return float(np.interp(EQUAL_CLICKS, clicks[after - 1 : after + 1], others[after - 1 : after + 1]))


def text_and_attention(runs: pd.DataFrame) -> str:
    """Image-LoRA, trained after nine word problems and asked after fewer: the gamma that the image's share of attention
    in the base model predicts, the best one on validation screens, and what they hit on test screens."""
    runs = rows_where(runs, {"setting": "skilled", "seed": 1})
    rows = {}
    for model in plan.MODELS:
        of_model = runs[runs.model == model]
        share = of_model[of_model.method == "base model"].set_index("text").image_share
        for num_problems in plan.FEWER_PROBLEMS:
            curve = rows_where(of_model, {"method": plan.MORE_TEXT, "text": num_problems}).set_index("gamma")
            predicted = share[9] / share[num_problems]
            best = curve.validation_acc.idxmax()
            nearest = min(curve.index, key=lambda gamma: abs(gamma - predicted))
            cells = [f"{share[num_problems]:.0f}", f"{predicted:.2f}", f"{curve.task_acc[1.0]:.1f}"]
            cells += [f"{curve.task_acc[gamma]:.1f} (γ = {gamma})" for gamma in (nearest, best)]
            rows[f"model {model}, after {num_problems}"] = cells
    titles = ["attention to the image, %", "predicted γ", "new task at γ = 1, %"]
    titles += ["at the γ nearest to the prediction, %", "at the best γ on validation screens, %"]
    return markdown("trained after 9", pd.DataFrame.from_dict(rows, orient="index", columns=titles))


def examples(runs: pd.DataFrame) -> str:
    """What some models answer to the first question of *what is right of*."""
    first = rows_where(runs, {"setting": plan.FIRST_BASE, "gamma": 1}).groupby("method").example.first()
    shown = "base model", "LoRA", "Image-LoRA"
    return "".join(f"{method:30}{first[method]}\n" for method in shown)


def rate_tables(runs: pd.DataFrame) -> list[str]:
    """How learning rates were chosen."""
    tables = {
        "new task with the skill, % at the learning rate": rates(runs, "skilled"),
        "other questions with the skill, % at the learning rate": rates(runs, "skilled", "other_questions_acc"),
        "new task without the skill, % at the learning rate": rates(runs, "unskilled"),
        "SmolLM2, new task in % at the learning rate": rates(runs, plan.FIRST_BASE),
    }
    return [markdown(title, cells) for title, cells in tables.items()]


def rates(runs: pd.DataFrame, setting: str, measure="validation_acc") -> pd.DataFrame:
    """Cells with a row for each method and a column for each learning rate; the chosen one is bold."""
    methods = plan.TRIED["skilled"]
    runs = tried(runs, setting)
    cells = runs[runs.method.isin(methods)].pivot_table(measure, "method", "lr").apply(format_cells, measure=measure)
    for method in cells.index:
        rate = plan.CHOSEN[setting][method]
        cells.loc[method, rate] = f"**{cells.loc[method, rate]}**"
    return cells.reindex(methods).dropna(how="all").fillna("").rename(columns="{:g}".format)


if __name__ == "__main__":
    runs = read_runs()
    print("\n".join(tables(runs) + rate_tables(runs)))
