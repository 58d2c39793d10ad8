"""The evidence: the tables of the pages, from the runs of tiny models (runs.csv) and of SmolLM2 (smollm.csv).

python -m data.study.compare                                        print the tables, at once
python -m data.study.compare --method LoRA --rival "Partial LoRA"   how far one method is ahead of another

On tiny models, a number is the mean over three models, each of which is a mean over its seeds, and brackets hold the
lowest and the highest of the three. On SmolLM2, they hold those of the seeds.

We say that one method is ahead of another if it is ahead in each of the six runs, compared on the same model with the
same seed. If two methods were equal, chance would do this once in 32 comparisons. Where there is one run on each model,
the two ranges must not overlap, either.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from data.command import command, option
from data.study.plan import CHOSEN, METHODS, RIVALS, SMOLLM2_BASES, TABLES, TITLES, TRIED, Column, Table

try:
    import pandas as pd
except ImportError:
    if __name__ != "__main__":
        raise
    print('error: the tables need pandas; install it by pip install ".[study]"', file=sys.stderr)
    sys.exit(2)

LAYOUTS = {"parameters": "{:,.0f}", "divergence_after_screen": "{:.3f}", "same_continuations": "{:.2g}"}  # else {:.1f}


# ---- Runs ------------------------------------------------------------------------------------------------------------


def read_runs() -> pd.DataFrame:
    """The rows of both files, accuracies in percent. The seeds of SmolLM2 count as its models."""
    folder = Path(__file__).parent
    smollm2 = pd.read_csv(folder / "smollm.csv")
    smollm2 = smollm2.assign(setting=smollm2.base.map(SMOLLM2_BASES), model=smollm2.seed, gamma=1.0, text=0)
    runs = pd.concat([pd.read_csv(folder / "runs.csv"), smollm2], ignore_index=True)
    runs[[measure for measure, title in TITLES.items() if title.endswith("%")]] *= 100
    return runs


def rows_where(runs: pd.DataFrame, where: dict) -> pd.DataFrame:
    """The rows whose columns hold these values."""
    for name, value in where.items():
        runs = runs[runs[name] == value]
    return runs


def at_chosen_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows at the learning rate that was chosen for their method in their setting."""
    return runs[[lr == CHOSEN[setting][method] for setting, method, lr in zip(runs.setting, runs.method, runs.lr)]]


def as_trained(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each training: gamma is 1, and the model was asked after as much text as in training."""
    return runs[(runs.gamma == 1) & (runs.text == [METHODS[method].get("history", 0) for method in runs.method])]


def once(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each method, model and rate: with seed 1, but models without the skill have their own."""
    return as_trained(runs[runs.seed == runs.model.where(runs.setting == "unskilled", 1)])


# ---- Tables ----------------------------------------------------------------------------------------------------------


def text(numbers: pd.Series, measure: str) -> pd.Series:
    """As in a table: empty where nothing was measured."""
    return numbers.map(LAYOUTS.get(measure, "{:.1f}").format).replace("nan", "")


def markdown(title: str, cells: pd.DataFrame) -> str:
    """A table with a row for each row of cells, whose index holds the rows' names."""
    rows = [[title, *cells], ["---"] * (1 + len(cells.columns)), *cells.itertuples()]
    return "".join(f"|{'|'.join(row)}|\n" for row in rows)


def tables(runs: pd.DataFrame) -> list[str]:
    """Those of the pages, in their order."""
    chosen = at_chosen_rates(runs)
    shown = [show_table(table, chosen) for table in TABLES]
    return [front_page(as_trained(chosen)), *shown[:2], examples(chosen), *shown[2:]]


def show_table(table: Table, runs: pd.DataFrame) -> str:
    cells = {column.title: show_column(column, rows_where(runs, table.where(column))) for column in table.columns}
    return markdown(table.title, pd.DataFrame(cells).loc[table.methods])


def show_column(column: Column, runs: pd.DataFrame) -> pd.Series:
    """The cells of a column, {method: text}."""
    seeds = runs.groupby(["method", "model"])[column.measure]
    models = seeds.max() - seeds.min() if column.show == "spread" else seeds.mean()
    methods = models.groupby("method")
    mean = text(methods.mean(), column.measure)
    if column.show != "range":
        return mean
    lowest, highest = text(methods.min(), column.measure), text(methods.max(), column.measure)
    return mean.where(lowest == highest, mean + " (" + lowest + "–" + highest + ")")


def front_page(runs: pd.DataFrame) -> str:
    """What each method learns, and what it keeps without and with replay, in whole numbers, for each kind of model.

    * is a single run, and – was not run."""
    bases = [*SMOLLM2_BASES.values()]
    models = [*bases, "skilled"]
    columns = {  # {title: (settings, how the method's name ends, measure)}
        "new task, %": (models, "", "task_acc"),
        "other questions, %": (models, "", "other_questions_acc"),
        "others with own answers, %": (models, " with own answers", "other_questions_acc"),
        "others with replay, %": (models, " with replay", "other_questions_acc"),
        "SmolLM2's texts continued as before, of 20": (bases, "", "same_continuations"),
    }

    def number(setting: str, method: str, measure: str) -> str:
        found = rows_where(runs, {"setting": setting, "method": method})[measure].dropna()
        star = "*" if len(found) == 1 and method != "base model" else ""
        return f"{found.mean():.0f}{star}" if len(found) else "–"

    cells = pd.DataFrame(index=["base model", *RIVALS])
    for title, (settings, ending, measure) in columns.items():
        for method in cells.index:
            numbers = " / ".join(number(setting, method + ending, measure) for setting in settings)
            cells.loc[method, title] = numbers if numbers.strip("– /") else ""
    return markdown("first base / second base / tiny models", cells)


def examples(runs: pd.DataFrame) -> str:
    """What some models answer to the first question of *what is right of*."""
    first = runs[runs.setting == "SmolLM2"].groupby("method").example.first()
    shown = "base model", "Image-LoRA", "Image-LoRA with own answers"
    return "".join(f"{method:30}{first[method]}\n" for method in shown)


def rate_tables(runs: pd.DataFrame) -> list[str]:
    """How learning rates were chosen."""
    kept = rates(runs, "SmolLM2", "other_questions_acc").loc[["Image-LoRA"]].set_axis(["Image-LoRA, other questions"])
    tables = {
        "new task with the skill, % at the learning rate": rates(runs, "skilled"),
        "other questions with the skill, % at the learning rate": rates(runs, "skilled", "other_questions_acc"),
        "new task without the skill, % at the learning rate": rates(runs, "unskilled"),
        "SmolLM2, new task in % at the learning rate": pd.concat([rates(runs, "SmolLM2"), kept]).fillna(""),
    }
    return [markdown(title, cells) for title, cells in tables.items()]


def rates(runs: pd.DataFrame, setting: str, measure="validation_acc") -> pd.DataFrame:
    """Cells with a row for each method and a column for each learning rate; the chosen one is bold."""
    methods = TRIED["skilled"]
    runs = once(runs[(runs.setting == setting) & runs.method.isin(methods)])
    cells = runs.pivot_table(measure, "method", "lr").apply(text, measure=measure)
    for method in cells.index:
        rate = CHOSEN[setting][method]
        cells.loc[method, rate] = f"**{cells.loc[method, rate]}**"
    return cells.reindex(methods).dropna().rename(columns="{:g}".format)


def differences(runs: pd.DataFrame, method: str, rival: str) -> str:
    """How many points a method is ahead of its rival on each tiny model, and in how many of the runs it is ahead."""
    runs = as_trained(at_chosen_rates(runs[runs.setting == "skilled"]))
    for name in (method, rival):
        if name not in set(runs.method):
            raise ValueError(f"runs.csv has no method {name}; expected one that its column 'method' names")
    runs = runs.set_index(["method", "model", "seed"])[[*TITLES]]
    ahead = (runs.loc[method] - runs.loc[rival]).dropna(axis=1)
    cells = ahead.groupby("model").mean().T.map("{:+.1f}".format).rename(columns="model {}".format)
    cells["ahead in runs"] = (ahead > 0).sum().map(f"{{}} of {len(ahead)}".format)
    return markdown(f"{method}, points ahead of {rival}", cells.rename(lambda name: TITLES[name].removesuffix(", %")))


@dataclass(frozen=True)
class CompareConfig:
    method: str = option("", "print how many points this method is ahead of the rival")
    rival: str = option("Image-LoRA", "the method that it is compared with")


def main(cfg: CompareConfig) -> None:
    runs = read_runs()
    if cfg.method:
        print(differences(runs, cfg.method, cfg.rival))
    else:
        print("\n".join(tables(runs) + rate_tables(runs)))


if __name__ == "__main__":
    sys.exit(command(CompareConfig, main, __doc__))
