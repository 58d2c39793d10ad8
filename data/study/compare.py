"""The evidence: tables of fine-tuning runs on several base models. The runs stand in runs.csv, one a line.

python -m data.study.compare                         print the tables, at once
python -m data.study.compare --runs runs/mine.csv    make all runs anew, in some hours on two cores; if stopped, go on

The base models that the runs need are made by data.study.pretrain.
"""

import csv
import io
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from data import command, option, write_file
from data.base import base_path, screens_and_features
from data.evaluate import click_right_of, evaluate

# ---- Base models and methods -----------------------------------------------------------------------------------------

# {seed of pretraining: file}. A twin was never asked what is right of a name, so it lacks the skill. Each base model is
# fine-tuned with the seed that it was pretrained with.
BASES = {seed: f"runs/bases/{seed}.pt" for seed in (1, 2, 3, 4, 5)} | {1: "data/tiny_vlm.pt"}
TWINS = {seed: f"runs/bases/{seed}-unskilled.pt" for seed in (1, 2, 3, 4, 5, 6, 7, 8)}
SEARCH_SEEDS = (1, 2, 3)  # the base models, and twins, that learning rates were chosen on

NOTHING = "base model, not fine-tuned"
LORA = "LoRA"
VISUAL = "LoRA at visual tokens"
SMALL = "LoRA at visual tokens, rank 2"
ALL = "Image-LoRA in all heads"
HALF = "Image-LoRA in half of the heads"
WITH_REPLAY = ", with replay"
METHODS = {  # what is changed of train.Config
    NOTHING: {"method": "none"},
    LORA: {"method": "lora"},
    VISUAL: {"method": "lora", "tokens": "visual"},
    SMALL: {"method": "lora", "tokens": "visual", "r": 2},
    ALL: {"heads": "all"},
    HALF: {},
}
TUNED = [method for method in METHODS if method != NOTHING]
METHODS |= {method + WITH_REPLAY: METHODS[method] | {"replay": 1} for method in TUNED}

# The learning rates that were chosen: the lowest whose validation accuracy, in the mean over SEARCH_SEEDS, is within
# one point of the best. On base models all of GRID was tried; on twins and in referring a part of it. The runs of that
# search stand in runs.csv for the test of this rule, and are not made anew. With replay, after word problems and with
# other heads, a method keeps its rate.
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

SETTINGS = ("base", "seed", "method", "tokens", "heads", "num_heads", "r", "lr", "task", "history", "replay")
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
    """The rows of a file of runs, each a dict of texts. What is missing is run, and written at once."""

    def __init__(self, cfg: CompareConfig):
        self.cfg = cfg
        self.path = Path(cfg.runs)
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        if self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != SETTINGS + MEASURES:
                    raise ValueError(f"{self.path} is no file of runs; name another one, or move it away to start anew")
                for row in reader:
                    self.add(row)

    def of(self, method: str, bases: dict, seeds=None, **changes) -> list[dict]:
        """The rows of a method on the base models of these seeds, or on all of them. changes: of train.Config."""
        settings = {"lr": chosen_rate(method, bases, changes.get("task", "grounding")), "device": self.cfg.device}
        settings |= METHODS[method] | changes
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
                command_line = f"python -m data.study.pretrain --seed {cfg.seed} --out {cfg.base}"
                if cfg.base in TWINS.values():
                    command_line += " --unskilled"
                raise ValueError(f"there is no {cfg.base}; first make it by {command_line}")
        self.write()  # before the first run, because it may be impossible
        for row in tqdm(self.pool.imap(run, missing), "runs", len(missing)):
            self.add(row)
            self.write()

    @cached_property
    def pool(self):
        """The processes. They start with the first run that is missing."""
        return get_context("spawn").Pool(self.cfg.workers, torch.set_num_threads, (1,))

    def add(self, row: dict) -> None:
        self.rows[key(row)] = {name: text(row.get(name)) for name in SETTINGS + MEASURES}

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = io.StringIO()
        writer = csv.DictWriter(file, SETTINGS + MEASURES, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        write_file(self.path, file.getvalue().encode())


def key(row: dict) -> tuple[str, ...]:
    """What tells this run from all others."""
    return tuple(text(row[name]) for name in SETTINGS)


def text(value) -> str:
    """As it stands in the file."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def run(cfg: train.Config) -> dict:
    """What `train.run` returns, and the measures that only the study needs."""
    tuned = train.finetune(cfg)
    device = tuned.model.device
    accuracy = "action_acc" if cfg.task == "grounding" else "name_acc"
    screens, features = screens_and_features(cfg.base, "switches", "validation", cfg.test_screens, device)
    validation, _ = evaluate(tuned.model, screens, features, task=cfg.task, history=cfg.history)
    row = tuned.result | {"task_acc": tuned.result[accuracy], "validation_acc": validation[accuracy]}
    if cfg.method == "none":
        screens, features = screens_and_features(cfg.base, "switches", "test", REWORDED_SCREENS, device)
        reword = click_right_of if cfg.task == "grounding" else name_at_the_left
        reworded, _ = evaluate(tuned.model, screens, features, task=cfg.task, reword=reword)
        row["reworded_acc"] = reworded[accuracy]
    return row


def name_at_the_left(sample: dict) -> dict:
    """The question for the name at a place, asked about the left end of the same line, where the name stands."""
    return sample | {"instruction": re.sub(r"<x\d+>", "<x2>", sample["instruction"])}


# ---- Tables ----------------------------------------------------------------------------------------------------------

# What fine-tuning may damage.
AFTER_IMAGE_AND_OLD_TASK = {
    "word problems after an image, %": "word_problem_after_image_acc",
    "old task, %": "source_acc",
}
OTHER_SKILLS = {"word problems without an image, %": "word_problem_acc"} | AFTER_IMAGE_AND_OLD_TASK
TWIN_METHODS = [*TUNED, LORA + WITH_REPLAY, ALL + WITH_REPLAY]
CHOICES = {
    "top, the most influential by the probe": "top",
    "gate, by the score of the authors' release": "gate",
    "matched, random but evenly spread": "matched",
    "bottom, the least influential by the probe": "bottom",
}


def mean(rows: list[dict], measure: str) -> float:
    return float(np.mean([float(row[measure]) for row in rows]))


def percent(rows: list[dict], measure: str) -> str:
    return f"{100 * mean(rows, measure):.1f}"


def percent_of_each(rows: list[dict], measure: str) -> str:
    """The mean and, in brackets, each base model."""
    each = [percent([row], measure) for row in rows]
    if len(set(each)) == 1:
        return f"{each[0]} on each"
    return f"{percent(rows, measure)} ({', '.join(each)})"


def nats_of_each(rows: list[dict], measure: str) -> str:
    return f"{mean(rows, measure):.2f} ({', '.join(f'{mean([row], measure):.2f}' for row in rows)})"


def line(name: str, rows: list[dict], cell: Callable, *measures: str) -> tuple:
    """A line of a table that ends with the learning rate. cell: percent or percent_of_each."""
    return name, *(cell(rows, measure) for measure in measures), rows[0]["lr"]


def front_page(runs: Runs) -> Iterator[tuple]:
    """Means alone."""
    titles = (
        "switches clicked, %",
        "switches clicked without the skill, %",
        "word problems without an image, %",
        "old task, %",
    )
    yield "method", *titles
    for method in (LORA, VISUAL, SMALL, ALL, HALF, LORA + WITH_REPLAY, ALL + WITH_REPLAY):
        rows = runs.of(method, BASES)
        twins = runs.of(method, TWINS)
        clicks = percent(rows, "task_acc"), percent(twins, "task_acc")
        yield method, *clicks, percent(rows, "word_problem_acc"), percent(rows, "source_acc")


def base_models(runs: Runs) -> Iterator[tuple]:
    yield from each_model(runs, "base models 1 to 5", BASES, [*TUNED, *(method + WITH_REPLAY for method in TUNED)])


def twins(runs: Runs) -> Iterator[tuple]:
    yield from each_model(runs, "twins 1 to 8", TWINS, TWIN_METHODS)


def each_model(runs: Runs, title: str, bases: dict, methods: list[str]) -> Iterator[tuple]:
    yield title, "switches clicked, %", *OTHER_SKILLS, "learning rate"
    other_skills = OTHER_SKILLS.values()
    frozen = runs.of(NOTHING, bases)
    yield line(NOTHING, frozen, percent_of_each, "task_acc", *other_skills)
    yield line("base model, asked to click right of the name", frozen, percent_of_each, "reworded_acc", *other_skills)
    for method in methods:
        yield line(method, runs.of(method, bases), percent_of_each, "task_acc", *other_skills)


def without_an_image(runs: Runs) -> Iterator[tuple]:
    """How far LoRA moves the predictions for prompts without an image. Methods at visual tokens do not move them."""
    yield "divergence from the base, in nats a token", "word problems", "questions without an image"
    for method in (LORA, LORA + WITH_REPLAY):
        rows = runs.of(method, BASES)
        yield method, nats_of_each(rows, "word_problem_kl"), nats_of_each(rows, "question_without_image_kl")


def rates(runs: Runs) -> Iterator[tuple]:
    """The chosen rate is bold."""
    yield "learning rate", *(f"{lr:g}" for lr in GRID)
    for method, chosen in RATES.items():
        measures = {"clicks": "task_acc", "word problems after an image": "word_problem_after_image_acc"}
        if method == LORA:  # at visual tokens it is 100 % at every rate
            measures["word problems without an image"] = "word_problem_acc"
        for name, measure in measures.items():
            cells = []
            for lr in GRID:
                cell = percent(runs.of(method, BASES, SEARCH_SEEDS, lr=lr), measure)
                cells.append(f"**{cell}**" if lr == chosen else cell)
            yield f"{method}: {name}", *cells


def heads(runs: Runs) -> Iterator[tuple]:
    yield "choice of heads", "4 of 24 heads, %", "8 of 24 heads, %"
    for name, choice in CHOICES.items():
        cells = []
        for num_heads in (4, 8):
            rows = runs.of(HALF, BASES, SEARCH_SEEDS, heads=choice, num_heads=num_heads)
            cells.append(percent_of_each(rows, "task_acc"))
        yield name, *cells


def other_tasks(runs: Runs) -> Iterator[tuple]:
    """Means of the base models 1 to 3."""
    yield "other tasks", "correct answers, %", *AFTER_IMAGE_AND_OLD_TASK, "learning rate"
    other_skills = AFTER_IMAGE_AND_OLD_TASK.values()
    frozen = runs.of(NOTHING, BASES, SEARCH_SEEDS, task="referring")
    reworded = "referring: base model, asked about the left end of the line"
    yield line(f"referring: {NOTHING}", frozen, percent, "task_acc", *other_skills)
    yield line(reworded, frozen, percent, "reworded_acc", *other_skills)
    for method in (LORA, VISUAL, ALL):
        rows = runs.of(method, BASES, SEARCH_SEEDS, task="referring")
        yield line(f"referring: {method}", rows, percent, "task_acc", *other_skills)
    for method in (NOTHING, LORA, ALL):
        rows = runs.of(method, BASES, SEARCH_SEEDS, history=9)
        yield line(f"after nine word problems: {method}", rows, percent, "task_acc", *other_skills)


TABLES = (front_page, base_models, twins, without_an_image, rates, heads, other_tasks)


def markdown(header: tuple, *lines: tuple) -> str:
    rows = [header, ("---",) * len(header), *lines]
    return "".join(f"|{'|'.join(row)}|\n" for row in rows)


def compare(cfg: CompareConfig) -> None:
    runs = Runs(cfg)
    for table in TABLES:
        print(markdown(*table(runs)))


if __name__ == "__main__":
    sys.exit(command(CompareConfig, compare, __doc__))
