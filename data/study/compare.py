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

try:
    import pandas as pd
except ImportError:
    if __name__ != "__main__":
        raise
    print('error: the tables need pandas; install it by pip install ".[study]"', file=sys.stderr)
    sys.exit(2)

TITLES = {  # {measure, a column of the files: its title in a table}
    "parameters": "parameters",
    "task_acc": "new task, %",
    "validation_acc": "new task on validation screens, %",
    "other_questions_acc": "other questions, %",  # the mean of the next three
    "what_is_at_acc": "what is at, %",
    "what_is_right_of_acc": "what is right of, %",
    "click_right_of_acc": "click right of, %",
    "same_words_acc": "same words, %",
    "word_problem_after_image_acc": "word problems after an image, %",
    "word_problem_acc": "word problems without an image, %",
    "reworded_acc": "base model, asked to click right of the name, %",
    "places_for_names": "places given for names, %",
    "divergence_after_screen": "KL divergence after an image",
    "same_continuations": "openings continued as before, of 20",
}
HISTORIES = (0, 1, 3, 9)  # word problems before a screen
AFTER = {f"task_acc_after_{count}": f"new task after {count}, %" for count in HISTORIES}
AFTER |= {f"other_questions_acc_after_{count}": f"others after {count}, %" for count in HISTORIES}
TITLES |= AFTER
LAYOUTS = {"parameters": "{:,.0f}", "divergence_after_screen": "{:.3f}", "same_continuations": "{:.2g}"}  # else {:.1f}
ACCURACIES = ["task_acc", "other_questions_acc"]
KINDS = ["what_is_at_acc", "what_is_right_of_acc", "click_right_of_acc"]
WORDS = ["same_words_acc", "word_problem_after_image_acc", "word_problem_acc"]

# Methods, the rows of the tables
RIVALS = ["LoRA", "Partial LoRA", "Partial LoRA on v", "Image-LoRA"]
TUNED = ["LoRA", "LoRA on v", "Partial LoRA", "Partial LoRA on v", "Image-LoRA"]
TRIED_AT_RATES = [*TUNED, "LoRA, rank 2", "Partial LoRA, rank 2"]
THREE = ["LoRA", "Partial LoRA", "Image-LoRA"]
OWN_ANSWERS = [f"{method} with own answers" for method in THREE]
MAIN = ["base model", *TUNED, *OWN_ANSWERS]
REPLAYS = ["", " with replay", " with replay without what is at", " with replay without right of"]
REPLAYS += [" with replay of what is right of alone", " with own answers about old screens", " with own answers"]
REPLAYS = [method + replay for method in reversed(THREE) for replay in REPLAYS]
AS_LARGE = ["LoRA, rank 2", "LoRA on v", "Partial LoRA, rank 2", "Partial LoRA on v", "Image-LoRA"]
TRAINED_AFTER = [method + after for method in THREE for after in ("", " trained after 9", " trained after 0 to 9")]
TRAINED_AFTER = ["base model", *TRAINED_AFTER]
UNEVEN = [f"Image-LoRA in uneven heads{factor}" for factor in ("", " without the factor")]
UNEVEN += ["Image-LoRA in uneven heads without the factor at half the rate"]
GAMMA = ["Image-LoRA", "Image-LoRA with γ trained"]
GAMMA += ["Image-LoRA in 12 heads by the probe", "Image-LoRA in 12 heads with γ trained"]
LAYERS = [
    *("Image-LoRA in layer 0", "Image-LoRA in layer 1", "Image-LoRA in layer 2", "Image-LoRA in layer 3"),
    "Image-LoRA in layers 2 and 3",
]
FEW_HEADS = [
    "Image-LoRA",
    *("Image-LoRA in 12 heads by the probe", "Image-LoRA in 12 random heads", "Image-LoRA in 12 heads anywhere"),
    *("Image-LoRA in 4 heads by the probe", "Image-LoRA in 4 random heads", "Image-LoRA in 4 heads anywhere"),
    "Partial LoRA on v, rank 4",
]
WITH_REPLAY = [f"{method} with replay" for method in THREE]
ABOUT_OLD_SCREENS = "Image-LoRA with own answers about old screens"
SMOLLM2 = ["base model", *TUNED, "Partial LoRA, rank 2", *OWN_ANSWERS, ABOUT_OLD_SCREENS, *WITH_REPLAY]
SMOLLM2_BASES = {"smollm": "SmolLM2", "smollm_lora": "SmolLM2, second base"}  # {base: the setting of its runs}
ON_SECOND_BASE = ["base model", *TUNED, *OWN_ANSWERS, ABOUT_OLD_SCREENS, "Image-LoRA with replay"]
SMOLLM2_LAYERS = ["Image-LoRA in layers 0 to 9", "Image-LoRA in layers 10 to 19", "Image-LoRA in layers 20 to 29"]
SMOLLM2_FEW_HEADS = ["Image-LoRA", "Image-LoRA in 9 heads by the probe", "Image-LoRA in 9 heads anywhere"]
SMOLLM2_FEW_HEADS += ["Partial LoRA on v, rank 2"]


# ---- Runs ------------------------------------------------------------------------------------------------------------


def read_runs() -> pd.DataFrame:
    """A row for each run, accuracies in percent. The seeds of SmolLM2 count as its models."""
    folder = Path(__file__).parent
    tiny = pd.read_csv(folder / "runs.csv")
    smollm2 = pd.read_csv(folder / "smollm.csv")
    smollm2 = smollm2.assign(setting=smollm2.base.map(SMOLLM2_BASES), model=smollm2.seed)
    runs = pd.concat([tiny, smollm2], ignore_index=True)
    runs[[measure for measure, title in TITLES.items() if title.endswith("%")]] *= 100
    return runs


def once(runs: pd.DataFrame) -> pd.DataFrame:
    """One run of each method on each model at each rate: with seed 1, but models without the skill have their own."""
    return runs[runs.seed == runs.model.where(runs.setting == "unskilled", 1)]


def choose_rate(clicks: pd.Series) -> float:
    """The lowest rate whose clicks are within one point of the best: one run cannot tell a point from noise.

    clicks: {rate: clicks on validation screens, in percent}, NaN where a rate was not tried."""
    return clicks.index[clicks >= clicks.max() - 1].min()


def at_chosen_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs at the rate that was chosen for their method in their setting, or at the only one."""
    clicks = once(runs).pivot_table("validation_acc", ["setting", "method"], "lr")  # means over the models
    chosen = clicks.apply(choose_rate, axis=1).rename("lr").reset_index()
    return runs.merge(chosen, on=["setting", "method", "lr"])


# ---- Tables ----------------------------------------------------------------------------------------------------------


def text(numbers: pd.DataFrame) -> pd.DataFrame:
    """As in a table: empty where nothing was measured."""
    columns = {name: column.map(LAYOUTS.get(name, "{:.1f}").format) for name, column in numbers.items()}
    return pd.DataFrame(columns).replace("nan", "")


def markdown(title: str, cells: pd.DataFrame) -> str:
    """A table with a row for each row of cells, whose index holds the rows' names."""
    header = [title, *(TITLES.get(name, name) for name in cells)]
    rows = [header, ["---"] * len(header), *cells.itertuples()]
    return "".join(f"|{'|'.join(row)}|\n" for row in rows)


def tables(runs: pd.DataFrame) -> list[str]:
    """In the order of the pages."""
    chosen = at_chosen_rates(runs)
    models = chosen.groupby(["setting", "method", "model"])[[*TITLES]].mean()  # over the seeds
    methods = models.groupby(["setting", "method"])
    means, lowest, highest = text(methods.mean()), text(methods.min()), text(methods.max())
    ranges = means.where(lowest == highest, means + " (" + lowest + "–" + highest + ")")

    def table(title: str, setting: str, rows: list, with_range: list, without_range=()) -> str:
        """A row for each method, a column for each measure."""
        cells = ranges.loc[setting][with_range].join(means.loc[setting][[*without_range]])
        return markdown(title, cells.loc[rows])

    # Referring also asks what is at a place, so this is no other question after it.
    after_referring = ["task_acc", "what_is_right_of_acc", "click_right_of_acc", "same_words_acc"]
    english = ["divergence_after_screen", "same_continuations"]
    each_kind = [*KINDS, "same_words_acc", "places_for_names"]
    skilled, unskilled = runs[runs.setting == "skilled"], runs[runs.setting == "unskilled"]
    return [
        front_page(chosen),
        table("SmolLM2", "SmolLM2", SMOLLM2, ["parameters", *ACCURACIES, *english]),
        table("tiny models with the skill", "skilled", MAIN, ACCURACIES, KINDS + WORDS),
        examples(chosen),
        table("SmolLM2, each kind", "SmolLM2", SMOLLM2 + SMOLLM2_LAYERS, each_kind),
        table("SmolLM2, second base", "SmolLM2, second base", ON_SECOND_BASE, [*ACCURACIES, *each_kind, *english]),
        table("tiny models, replay", "skilled", REPLAYS, ACCURACIES, [*KINDS, "same_words_acc"]),
        models_table("other questions at equal size, %", AS_LARGE, models.loc["skilled"]),
        table("tiny models, layers", "skilled", LAYERS, ACCURACIES),
        table("SmolLM2, layers", "SmolLM2", SMOLLM2_LAYERS, ACCURACIES),
        table("tiny models, few heads", "skilled", FEW_HEADS, ACCURACIES),
        table("SmolLM2, few heads", "SmolLM2", SMOLLM2_FEW_HEADS, ["parameters", *ACCURACIES]),
        both_kinds_table(models),
        table("tiny models, text before the image", "skilled", TRAINED_AFTER, [], AFTER),
        table("tiny models, referring", "referring", RIVALS, after_referring),
        factor_table(chosen[chosen.setting == "skilled"]),
        table("tiny models, γ", "skilled", GAMMA, ACCURACIES),
        markdown("new task with the skill, % at the learning rate", rates(skilled)),
        markdown("other questions with the skill, % at the learning rate", rates(skilled, "other_questions_acc")),
        markdown("new task without the skill, % at the learning rate", rates(unskilled)),
        markdown("SmolLM2, new task in % at the learning rate", smollm2_rates(runs[runs.setting == "SmolLM2"])),
    ]


def front_page(chosen: pd.DataFrame) -> str:
    """What each method learns, and what it keeps without and with replay, in whole numbers, for each kind of model.

    * is a single run, and – was not run."""

    def cell(setting: str, method: str, measure: str) -> str:
        found = chosen[(chosen.setting == setting) & (chosen.method == method)][measure].dropna()
        star = "*" if len(found) == 1 and method != "base model" else ""
        return f"{found.mean():.0f}{star}" if len(found) else "–"

    def cells(settings: list, method: str, measure: str) -> str:
        found = [cell(setting, method, measure) for setting in settings]
        return "" if set(found) == {"–"} else " / ".join(found)

    bases = [*SMOLLM2_BASES.values()]
    models = [*bases, "skilled"]
    rows = {}
    for method in ["base model", *RIVALS]:
        rows[method] = {
            "new task, %": cells(models, method, "task_acc"),
            "other questions, %": cells(models, method, "other_questions_acc"),
            "others with own answers, %": cells(models, f"{method} with own answers", "other_questions_acc"),
            "others with replay, %": cells(models, f"{method} with replay", "other_questions_acc"),
            "SmolLM2's texts continued as before, of 20": cells(bases, method, "same_continuations"),
        }
    return markdown("first base / second base / tiny models", pd.DataFrame(rows).T)


def examples(runs: pd.DataFrame) -> str:
    """What some models answer to the first question of *what is right of*."""
    first = runs[runs.setting == "SmolLM2"].groupby("method").example.first()
    shown = "base model", "Image-LoRA", "Image-LoRA with own answers"
    return "".join(f"{method:30}{first[method]}\n" for method in shown)


def models_table(title: str, rows: list, models: pd.DataFrame) -> str:
    """A column for each model, of the other questions; and the mean of the new task."""
    cells = models.other_questions_acc.unstack().rename(columns="model {}".format)
    cells["task_acc"] = models.task_acc.groupby("method").mean()
    return markdown(title, text(cells.loc[rows]))


def factor_table(runs: pd.DataFrame) -> str:
    """The mean of the runs, and how far two seeds are apart, on the mean over the models."""
    runs = runs[runs.method.isin(UNEVEN)]
    of_models = runs.groupby(["method", "model"])[ACCURACIES]
    spread = (of_models.max() - of_models.min()).groupby("method").mean()
    cells = runs.groupby("method")[ACCURACIES].mean()
    for measure in ACCURACIES:
        cells[f"{TITLES[measure].removesuffix(', %')}, points between seeds"] = spread[measure]
    return markdown("tiny models, uneven heads", text(cells.loc[UNEVEN]))


def both_kinds_table(models: pd.DataFrame) -> str:
    """A column for each model, of the new task, at the learning rate that was chosen for its kind."""
    clicks = models.reworded_acc.fillna(models.task_acc)  # only the base model is asked in other words
    cells = pd.concat([clicks.loc[setting].unstack() for setting in ("skilled", "unskilled")], axis=1)
    cells.columns = [f"model {model} {kind} the skill" for kind in ("with", "without") for model in (1, 2, 3)]
    asked = {"base model": "base model, asked to click right of the name"}
    return markdown("new task, %", text(cells.loc[["base model", *RIVALS]]).rename(asked))


def rates(runs: pd.DataFrame, measure="validation_acc") -> pd.DataFrame:
    """Cells with a row for each method and a column for each learning rate; the chosen one is bold."""
    runs = once(runs[runs.method.isin(TRIED_AT_RATES)])
    chosen = runs.pivot_table("validation_acc", "method", "lr").apply(choose_rate, axis=1)
    cells = text(runs.pivot_table(measure, "method", "lr"))
    for method, rate in chosen.items():
        cells.loc[method, rate] = f"**{cells.loc[method, rate]}**"
    return cells.loc[[method for method in TRIED_AT_RATES if method in chosen]].rename(columns="{:g}".format)


def smollm2_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The same of SmolLM2, with a row for what Image-LoRA keeps of the other questions."""
    kept = rates(runs, "other_questions_acc").loc[["Image-LoRA"]]
    return pd.concat([rates(runs), kept.set_axis(["Image-LoRA, other questions"])]).fillna("")


def differences(runs: pd.DataFrame, method: str, rival: str) -> str:
    """How many points a method is ahead of its rival on each tiny model, and in how many of the runs it is ahead."""
    runs = at_chosen_rates(runs[runs.setting == "skilled"])
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
        print("\n".join(tables(runs)))


if __name__ == "__main__":
    sys.exit(command(CompareConfig, main, __doc__))
