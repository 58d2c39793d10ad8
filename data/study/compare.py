"""The evidence: tables of fine-tuning runs on several base models. The runs stand in runs.csv, one a line.

python -m data.study.compare                         print the tables, at once
python -m data.study.compare --runs runs/mine.csv    make all runs anew, or go on with them: some hours on two cores

Base models that are not here are made by data.study.pretrain.
"""

import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import train
from data import command, option
from data.base import ROOT, base_path, screens_and_features
from data.evaluate import evaluate

# {seed of pretraining: file}. A twin was never asked what is right of a name, so it lacks the skill.
BASES = {seed: f"runs/bases/{seed}.pt" for seed in (1, 2, 3, 4, 5)} | {1: "data/tiny_vlm.pt"}
TWINS = {seed: f"runs/bases/{seed}-unskilled.pt" for seed in (1, 2, 3, 4, 5, 6, 7, 8)}
SEARCH_SEEDS = (1, 2, 3)  # the base models that learning rates were chosen on

NOTHING = "nothing"
LORA = "LoRA"
VISUAL = "LoRA at visual tokens"
SMALL = "LoRA at visual tokens, rank 2"
ALL = "Image-LoRA in all heads"
HALF = "Image-LoRA in half of the heads"
METHODS = {
    NOTHING: {"method": "none"},
    LORA: {"method": "lora"},
    VISUAL: {"method": "lora", "tokens": "visual"},
    SMALL: {"method": "lora", "tokens": "visual", "r": 2},
    ALL: {"heads": "all"},
    HALF: {},
}
GRID = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
# The rates on base models and on twins: the lowest whose validation accuracy is within one point of the best.
RATES = {NOTHING: (0, 0), LORA: (0.0025, 0.005), VISUAL: (0.0025, 0.005), SMALL: (0.0025, 0.01)}
RATES |= {ALL: (0.01, 0.08), HALF: (0.02, 0.04)}

KEY = ("base", "seed", "method", "tokens", "heads", "num_heads", "r", "lr", "replay")
MEASURES = ("action_acc", "validation_acc", "word_problem_acc", "word_problem_after_image_acc", "source_acc")
MEASURES += ("word_problem_kl", "question_without_image_kl")
MEASURES += ("trainable_parameters", "adapter_flops_per_screen", "lora_flops_per_screen")


@dataclass(frozen=True)
class CompareConfig:
    runs: str = option("data/study/runs.csv", "file of runs; those found there are not made again")
    workers: int = option(2, "processes, of one thread each")


class Runs:
    """The rows of a file of runs; what is missing is run and added."""

    def __init__(self, path: Path, pool):
        self.path, self.pool = path, pool
        self.rows = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self.rows[tuple(row[name] for name in KEY)] = row

    def of(self, method: str, bases: dict, seeds=None, **changes) -> list[dict]:
        """The rows of a method on these base models, one for each seed."""
        settings = {"lr": RATES[method][bases is TWINS], "device": "cpu"} | METHODS[method] | changes
        wanted = [train.Config(**settings, base=bases[seed], seed=seed) for seed in seeds or bases]
        missing = [cfg for cfg in wanted if key(cfg) not in self.rows]
        for cfg, row in zip(missing, self.pool.imap(run, missing)):
            self.rows[key(cfg)] = row
            self.write()
        return [self.rows[key(cfg)] for cfg in wanted]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, KEY + MEASURES, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows.values())


def key(cfg: train.Config) -> tuple[str, ...]:
    return tuple(f"{getattr(cfg, name):g}" if name == "lr" else str(getattr(cfg, name)) for name in KEY)


def run(cfg: train.Config) -> dict:
    """A run, and what the tuned model clicks on validation screens, by which rates are chosen."""
    if not base_path(cfg.base).exists():
        raise ValueError(f"there is no {cfg.base}; make it by data.study.pretrain")
    train.torch.set_num_threads(1)
    tuned = train.finetune(cfg)
    validation = screens_and_features(cfg.base, "switches", "validation", cfg.test_screens, "cpu")
    metrics, _ = evaluate(tuned.model, *validation)
    return tuned.result | {"lr": f"{cfg.lr:g}", "validation_acc": metrics["action_acc"]}


# ---- Tables ----------------------------------------------------------------------------------------------------------

WORDS, AFTER, OLD = "word_problem_acc", "word_problem_after_image_acc", "source_acc"
LINES = {method: (method, {}) for method in METHODS}
REPLAY = {f"{method}, with replay": (method, {"replay": 1}) for method in METHODS if method != NOTHING}
MAIN = LINES | {line: REPLAY[line] for line in (f"{LORA}, with replay", f"{ALL}, with replay")}
CHOICES = {
    "top, the most influential by the probe": "top",
    "gate, by the score of the authors' release": "gate",
    "random but evenly spread": "random",
    "bottom, the least influential by the probe": "bottom",
}


def mean(rows: list[dict], name: str) -> float:
    return float(np.mean([float(row[name]) for row in rows]))


def percent(rows: list[dict], name="action_acc") -> str:
    return f"{100 * mean(rows, name):.1f}"


def percent_of_each(rows: list[dict], name="action_acc") -> str:
    """The mean and, in brackets, each base's own."""
    return f"{percent(rows, name)} ({', '.join(percent([row], name) for row in rows)})"


FRONT_PAGE_ACCURACIES = (
    "switches clicked, %",
    "the same on twins, %",
    "word problems without an image, %",
    "word problems after an image, %",
    "old task, %",
)


def front_page(runs: Runs) -> Iterator[tuple]:
    yield "fine-tuned with", "trained parameters", "adapter's training FLOPs, % of LoRA's", *FRONT_PAGE_ACCURACIES
    for line, (method, changes) in MAIN.items():
        rows = runs.of(method, BASES, **changes)
        flops = mean(rows, "adapter_flops_per_screen") / mean(rows, "lora_flops_per_screen")
        costs = f"{mean(rows, 'trainable_parameters'):,.0f}", f"{100 * flops:.0f}"
        twins = percent(runs.of(method, TWINS, **changes))
        yield line, *costs, percent(rows), twins, *(percent(rows, name) for name in (WORDS, AFTER, OLD))


def each_model(bases: dict, title: str, lines: dict) -> Callable:
    def table(runs: Runs) -> Iterator[tuple]:
        yield title, "switches clicked, %", "word problems after an image, %", "old task, %", "learning rate"
        for line, (method, changes) in lines.items():
            rows = runs.of(method, bases, **changes)
            yield line, *(percent_of_each(rows, name) for name in ("action_acc", AFTER, OLD)), rows[0]["lr"]

    return table


def rates(runs: Runs) -> Iterator[tuple]:
    yield "learning rate", *(f"{lr:g}" for lr in GRID)
    for method in METHODS:
        if method == NOTHING:
            continue
        for name, measure in (("clicks", "action_acc"), ("after an image", AFTER)):
            tried = [percent(runs.of(method, BASES, SEARCH_SEEDS, lr=lr), measure) for lr in GRID]
            bold = [f"**{text}**" if lr == RATES[method][0] else text for lr, text in zip(GRID, tried)]
            yield f"{method}: {name}", *bold


def heads(runs: Runs) -> Iterator[tuple]:
    yield "choice of heads", "4 of 24, %", "8 of 24, %"
    for line, choice in CHOICES.items():
        few, more = (runs.of(HALF, BASES, SEARCH_SEEDS, heads=choice, num_heads=count) for count in (4, 8))
        yield line, percent_of_each(few), percent_of_each(more)


TABLES = (
    front_page,
    each_model(BASES, "base models 1 to 5", LINES | REPLAY),
    each_model(TWINS, "twins 1 to 8", MAIN),
    rates,
    heads,
)


def compare(cfg: CompareConfig) -> None:
    path = Path(cfg.runs)
    with get_context("spawn").Pool(cfg.workers) as pool:
        runs = Runs(path if path.exists() else ROOT / path if (ROOT / path).exists() else path, pool)
        for table in TABLES:
            header, *lines = table(runs)
            for line in (header, ["---"] * len(header), *lines):
                print(f"|{'|'.join(line)}|")
            print()


if __name__ == "__main__":
    sys.exit(command(CompareConfig, compare, __doc__))
