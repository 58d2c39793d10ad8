"""The evidence: tables of fine-tuning runs on several base models. The runs are in runs.csv, one per line.

python -m data.study.compare                         print the tables, at once
python -m data.study.compare --runs runs/mine.csv    make their runs anew, in some hours on two cores; if stopped, go on

The base models that the runs need are made by data.study.pretrain.
"""

import sys
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

import train
from data.base import base_path, screens_and_features
from data.command import command, make_directory, option
from data.evaluate import evaluate
from data.methods import ALL, HALF, LORA, METHODS, NOTHING, SMALL, VALUES, VISUAL, WITH_REPLAY
from data.questions import at_the_left, click_right_of
from data.study.tables import markdown, mean, mean_and_each, read_runs, table, write_runs

# ---- Base models and methods -----------------------------------------------------------------------------------------

# {seed of pretraining: file}. A twin was never asked what is right of a name, so it lacks the skill. Each base model is
# fine-tuned with the seed that it was pretrained with.
BASES = {1: "data/tiny_vlm.pt"} | {seed: f"runs/bases/{seed}.pt" for seed in (2, 3, 4, 5)}
TWINS = {seed: f"runs/bases/{seed}-unskilled.pt" for seed in (1, 2, 3, 4, 5, 6, 7, 8)}
SEARCH_SEEDS = (1, 2, 3)  # the base models, and twins, that learning rates were chosen on
SHIPPED = dict.fromkeys(SEARCH_SEEDS, BASES[1])  # one base model, fine-tuned with three seeds

TUNED = (LORA, VISUAL, SMALL, ALL, HALF)

# The learning rates that `choose_rate` chose, by the mean validation accuracy over SEARCH_SEEDS. On base models all of
# GRID was tried; on twins and in referring a part of it. No table shows that part, so its runs are not made anew; they
# stand in runs.csv for the test of this rule. With replay, after word problems and with other heads, a method keeps its
# rate.
GRID = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
RATES = {LORA: 0.0025, VISUAL: 0.0025, SMALL: 0.0025, ALL: 0.01, HALF: 0.02}
TWIN_RATES = {LORA: 0.005, VISUAL: 0.005, SMALL: 0.01, ALL: 0.08, HALF: 0.04}
REFERRING_RATES = {LORA: 0.00125, VISUAL: 0.00125, ALL: 0.00125}


def chosen_rate(method: str, bases: dict, task: str = "grounding") -> float:
    if method == NOTHING:
        return 0.0
    rates = TWIN_RATES if bases == TWINS else RATES
    if task == "referring":
        rates = REFERRING_RATES
    return rates[method.removesuffix(WITH_REPLAY)]


# ---- Runs ------------------------------------------------------------------------------------------------------------

SETTINGS = (
    "base",
    "seed",
    "method",
    "projections",
    "tokens",
    "heads",
    "num_heads",
    "r",
    "lr",
    "task",
    "history",
    "replay",
)
MEASURES = (
    "task_acc",  # clicks in their box, or correct names in referring
    "validation_acc",  # the same on validation screens, by which learning rates are chosen
    "word_problem_acc",
    "word_problem_after_image_acc",
    "source_acc",  # the old task
    "word_problem_kl",
    "question_without_image_kl",
    "reworded_acc",  # the task asked in other words; measured only where nothing is fine-tuned
)
REWORDED_SCREENS = 400  # test screens of the last one


@dataclass(frozen=True)
class CompareConfig:
    runs: str = option("data/study/runs.csv", "file of runs; what is found there is not made again")
    workers: int = option(2, "processes that make runs, of one thread each", least=1)
    device: str = option("cpu", "where to compute: cpu, cuda, mps, or auto")


class Runs:
    """The rows of a file of runs. What is missing is run, and written at once."""

    def __init__(self, cfg: CompareConfig):
        self.cfg = cfg
        self.path = Path(cfg.runs)
        self.rows = {key(row): row for row in read_runs(self.path, SETTINGS)}

    def of(self, method: str, bases: dict, seeds=None, **changes) -> list[dict]:
        """The rows of a method on the base models of these seeds, or on all of them. changes: of train.Config."""
        settings = {"device": self.cfg.device} | METHODS[method] | changes
        if "lr" not in changes:
            settings["lr"] = chosen_rate(method, bases, changes.get("task", "grounding"))
        if seeds is None:
            seeds = bases.keys()
        wanted = [train.Config(**settings, base=bases[seed], seed=seed) for seed in seeds]
        missing = [cfg for cfg in wanted if key(vars(cfg)) not in self.rows]
        if missing:
            self.make(missing)
        return [self.rows[key(vars(cfg))] for cfg in wanted]

    def make(self, missing: list[train.Config]) -> None:
        """Run these, and write each row at once. ValueError, before anything runs, if a base model is not there."""
        for cfg in missing:
            if not base_path(cfg.base).exists():
                raise ValueError(f"there is no {cfg.base}; first make it by data.study.pretrain, as its page says")
        make_directory(self.path.parent)
        for row in tqdm(self.pool.imap_unordered(run, missing), "runs", len(missing)):
            self.rows[key(row)] = {name: row.get(name, "") for name in SETTINGS + MEASURES}
            write_runs(self.path, [*self.rows.values()])

    @cached_property
    def pool(self):
        """The processes. They start with the first run that is missing."""
        return get_context("spawn").Pool(self.cfg.workers, torch.set_num_threads, (1,))


def key(row: dict) -> tuple:
    """What tells this run from all others."""
    return tuple(row[name] for name in SETTINGS)


def run(cfg: train.Config) -> dict:
    """What `train.run` returns, and the measures that only the study needs."""
    tuned = train.finetune(cfg)
    validation_screens = screens_and_features(tuned.model, "switches", "validation", cfg.test_screens)
    validation, _ = evaluate(tuned.model, *validation_screens, cfg.task, cfg.history)
    row = tuned.result | {"validation_acc": validation["task_acc"]}
    if cfg.method == "none":
        reword = click_right_of if cfg.task == "grounding" else at_the_left
        test_screens = screens_and_features(tuned.model, "switches", "test", REWORDED_SCREENS)
        reworded, _ = evaluate(tuned.model, *test_screens, cfg.task, cfg.history, reword)
        row["reworded_acc"] = reworded["task_acc"]
    return row


# ---- Tables ----------------------------------------------------------------------------------------------------------

CLICKS = ("switches clicked, %", "task_acc")
WITHOUT_IMAGE = ("word problems without an image, %", "word_problem_acc")
AFTER_IMAGE = ("word problems after an image, %", "word_problem_after_image_acc")
OLD_TASK = ("old task, %", "source_acc")
RATE = ("learning rate", "lr", "{:g}")
CHOICES = {
    "top, the most influential by the probe": "top",
    "gate, by the head score of the authors' released code": "gate",
    "matched, random but evenly spread": "matched",
    "bottom, the least influential by the probe": "bottom",
}


def overview(runs: Runs) -> str:
    """Means alone. The second column of numbers is of the twins, the others are of the base models."""
    lines = []
    for method in (LORA, VISUAL, SMALL, ALL, HALF, LORA + WITH_REPLAY, ALL + WITH_REPLAY):
        rows = runs.of(method, BASES)
        clicks = [mean(rows, "task_acc"), mean(runs.of(method, TWINS), "task_acc")]
        lines.append((method, *clicks, mean(rows, "word_problem_acc"), mean(rows, "source_acc")))
    titles = "switches clicked with the skill, %", "the same without the skill, %", WITHOUT_IMAGE[0], OLD_TASK[0]
    return markdown(("method", *titles), *lines)


def base_models(runs: Runs) -> str:
    return each_model(runs, "base models 1 to 5", BASES, [*TUNED, *(method + WITH_REPLAY for method in TUNED)])


def twins(runs: Runs) -> str:
    return each_model(runs, "twins 1 to 8", TWINS, [*TUNED, LORA + WITH_REPLAY, ALL + WITH_REPLAY])


def each_model(runs: Runs, title: str, bases: dict, methods: list[str]) -> str:
    frozen = runs.of(NOTHING, bases)
    lines = [(NOTHING, frozen), ("base model, asked to click right of the name", reworded(frozen))]
    lines += [(method, runs.of(method, bases)) for method in methods]
    return table(title, [CLICKS, WITHOUT_IMAGE, AFTER_IMAGE, OLD_TASK, RATE], lines)


def reworded(rows: list[dict]) -> list[dict]:
    """The same runs, with their accuracy on the reworded questions in place of the task's."""
    return [row | {"task_acc": row["reworded_acc"]} for row in rows]


def without_an_image(runs: Runs) -> str:
    """How far LoRA moves the predictions for prompts without an image. Methods at visual tokens do not move them."""
    columns = [
        ("word problems", "word_problem_kl", "{:.2f}"),
        ("questions without an image", "question_without_image_kl", "{:.2f}"),
    ]
    lines = [(method, runs.of(method, BASES)) for method in (LORA, LORA + WITH_REPLAY)]
    return table("divergence from the base model, in nats per token", columns, lines)


def rates(runs: Runs) -> str:
    """The chosen rate is bold."""
    lines = []
    for method, chosen in RATES.items():
        measures = {"clicks": "task_acc", "word problems after an image": "word_problem_after_image_acc"}
        if method == LORA:  # at visual tokens it is 100 % at every rate
            measures["word problems without an image"] = "word_problem_acc"
        for name, measure in measures.items():
            cells = [mean(runs.of(method, BASES, SEARCH_SEEDS, lr=lr), measure) for lr in GRID]
            i = GRID.index(chosen)
            cells[i] = f"**{cells[i]}**"
            lines.append((f"{method}: {name}", *cells))
    return markdown(("learning rate", *(f"{lr:g}" for lr in GRID)), *lines)


def exact_rival(runs: Runs) -> str:
    """Of equal size: LoRA on values at visual tokens is Image-LoRA in all heads without gamma / sqrt|S|."""
    grid = GRID[2:7]
    lines = []
    for method in (VALUES, ALL):
        for name, measure in (("clicks", "task_acc"), ("word problems after an image", "word_problem_after_image_acc")):
            cells = [mean_and_each(runs.of(method, SHIPPED, lr=lr), measure) for lr in grid]
            lines.append((f"{method}: {name}", *cells))
    return markdown(("shipped base model, learning rate", *(f"{lr:g}" for lr in grid)), *lines)


def heads(runs: Runs) -> str:
    lines = []
    for name, choice in CHOICES.items():
        few = runs.of(HALF, BASES, SEARCH_SEEDS, heads=choice, num_heads=4)
        more = runs.of(HALF, BASES, SEARCH_SEEDS, heads=choice, num_heads=8)
        lines.append((name, mean_and_each(few, "task_acc"), mean_and_each(more, "task_acc")))
    return markdown(("choice of heads", "4 of 24 heads, %", "8 of 24 heads, %"), *lines)


def other_tasks(runs: Runs) -> str:
    """Means of the base models 1 to 3."""
    frozen = runs.of(NOTHING, BASES, SEARCH_SEEDS, task="referring")
    lines = [(f"referring: {NOTHING}", frozen)]
    lines += [("referring: base model, asked about the left end of the line", reworded(frozen))]
    for method in (LORA, VISUAL, ALL):
        lines.append((f"referring: {method}", runs.of(method, BASES, SEARCH_SEEDS, task="referring")))
    for method in (NOTHING, LORA, ALL):
        lines.append((f"after nine word problems: {method}", runs.of(method, BASES, SEARCH_SEEDS, history=9)))
    columns = [("correct answers, %", "task_acc"), AFTER_IMAGE, OLD_TASK, RATE]
    return table("other tasks", columns, lines, mean)


TABLES = (overview, base_models, twins, without_an_image, rates, exact_rival, heads, other_tasks)


def compare(cfg: CompareConfig) -> None:
    runs = Runs(cfg)
    for table_of in TABLES:
        print(table_of(runs))


if __name__ == "__main__":
    sys.exit(command(CompareConfig, compare, __doc__))
