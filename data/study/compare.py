"""The comparison: tables whose cells are fine-tuning runs, each on several base models.

    python -m data.study.compare                     all tables; the bases that are missing are made first
    python -m data.study.compare --out data/study    the same from the runs in data/study/compare.json, at once

A cell is a method and what is changed of it: fields of `train.Config`, and two more, `seeds` and `twins`. One replicate
is one seed: the base model that was pretrained with it is fine-tuned with it, too. Learning rates are chosen on
validation screens; the tables show test screens. A run is known by its Config, which names the device, and by a
fingerprint of its base. What is in compare.json is not run again.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train
from data import DEVICES, Settings, command, option, progress
from data.evaluate import evaluate
from data.prompts import base_path, find_device, screens_and_features
from data.study import BASES, TWINS
from data.study.pretrain import PretrainConfig, pretrain
from imagelora import safe_write

# ---- Methods and tables ----------------------------------------------------------------------------------------------

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
TUNED = [method for method in METHODS if method != NOTHING]
GRID = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)  # learning rates
TOLERANCE = 0.01  # the chosen rate is the lowest whose validation accuracy is this close to the best
HAVE_OWN_RATE = ("twins", "domain", "task", "r")  # a cell that changes one of these has a rate chosen for it
SEARCH_SEEDS = (1, 2, 3)  # rates are chosen on these base models and twins
HARD_TWINS = (1, 2, 3, 8)  # on these Image-LoRA falls far behind


class Cell(NamedTuple):
    """Runs of one method, on the base models of SEARCH_SEEDS if it names no seeds."""

    method: str
    changes: tuple = ()  # ((field, value), ...), sorted


class Column(NamedTuple):
    title: str
    measure: Callable[[list[dict]], str]  # of a cell's rows
    changes: dict = {}


class Table(NamedTuple):
    title: str
    lines: dict[str, tuple[str, dict]]  # {name: (method, changes)}
    columns: list[Column]

    def cell(self, line: str, column: Column) -> Cell:
        method, changes = self.lines[line]
        return Cell(method, tuple(sorted((changes | column.changes).items())))


def mean(rows: list[dict], field: str) -> float:
    return float(np.mean([row[field] for row in rows]))


def accuracy(field: str) -> Callable:
    """A measure: the mean over bases, in %."""
    return lambda rows: f"{100 * mean(rows, field):.1f}"


def accuracy_on_each(field: str) -> Callable:
    """A measure: the mean over bases and, in brackets, each base's own, in %."""

    def measure(rows: list[dict]) -> str:
        each = ", ".join(f"{100 * row[field]:.1f}" for row in rows)
        return f"{100 * mean(rows, field):.1f} ({each})"

    return measure


def nats(field: str) -> Callable:
    """A measure: the mean and each base's, in nats."""

    def measure(rows: list[dict]) -> str:
        each = ", ".join(f"{row[field]:.2f}" for row in rows)
        return f"{mean(rows, field):.2f} ({each})"

    return measure


def rate(rows: list[dict]) -> str:
    return f"{rows[0]['lr']:g}"


def parameters(rows: list[dict]) -> str:
    return f"{mean(rows, 'trainable_parameters'):,.0f}"


def adapter_flops(rows: list[dict]) -> str:
    """In % of LoRA's, rank 8."""
    return f"{100 * mean(rows, 'adapter_flops_per_screen') / mean(rows, 'lora_flops_per_screen'):.0f}"


def other_skills(measure: Callable) -> list[Column]:
    """What fine-tuning may damage, a column for each skill. measure: `accuracy` or `accuracy_on_each`."""
    return [
        Column("word problems without an image, %", measure("word_problem_acc")),
        Column("word problems after an image, %", measure("word_problem_after_image_acc")),
        Column("old task, %", measure("source_acc")),
    ]


OTHER_SKILLS = other_skills(accuracy_on_each)
MEANS_OF_OTHER_SKILLS = other_skills(accuracy)
AFTER_IMAGE_AND_OLD_TASK = OTHER_SKILLS[1:]
CLICKS = Column("switches clicked, %", accuracy_on_each("action_acc"))
MEAN_CLICKS = Column("switches clicked, %", accuracy("action_acc"))
RATE = Column("learning rate", rate)
FLOPS = Column("adapter's training FLOPs, % of LoRA's", adapter_flops)
NAMES_CLICKED = Column("names clicked, %", accuracy_on_each("action_acc"))
NAMES_TOLD = Column("correct names, %", accuracy_on_each("name_acc"))
ALL_BASES = {"seeds": tuple(BASES)}
ALL_TWINS = {"seeds": tuple(TWINS), "twins": True}
EACH_METHOD = {method: (method, {}) for method in METHODS}
REPLAY = {f"{method}, with replay": (method, {"replay": 1}) for method in TUNED}
LORA_REPLAY = f"{LORA}, with replay"
ALL_REPLAY = f"{ALL}, with replay"
MAIN_LINES = EACH_METHOD | {LORA_REPLAY: REPLAY[LORA_REPLAY], ALL_REPLAY: REPLAY[ALL_REPLAY]}
TASK_METHODS = {method: (method, {}) for method in (NOTHING, LORA, VISUAL, ALL)}
SETTINGS = {
    "r = 8, τ = 0, γ at a tenth of A's rate": {},
    "r = 4": {"r": 4},
    "r = 16": {"r": 16},
    "τ = 0.5": {"tau": 0.5},
    "γ at A's rate": {"gamma_lr": 1.0},
    "γ stays 1": {"gamma_lr": 0.0},
}
CHOICES = {
    "top, the most influential by the probe": "top",
    "gate, by the score of the authors' release": "gate",
    "matched, random but evenly spread": "matched",
    "random": "random",
    "bottom, the least influential by the probe": "bottom",
}


def with_changes(columns: list[Column], **changes) -> list[Column]:
    return [column._replace(changes=column.changes | changes) for column in columns]


def on_twins(seeds: Iterable[int]) -> list[Column]:
    """The clicks on each of these twins, a column for each."""
    return [Column(f"{seed}", accuracy("action_acc"), {"seeds": (seed,), "twins": True}) for seed in seeds]


TABLES = [
    Table(
        "fine-tuned with",
        MAIN_LINES,
        [
            *with_changes([Column("trained parameters", parameters), FLOPS, MEAN_CLICKS], **ALL_BASES),
            Column("the same on twins, %", accuracy("action_acc"), ALL_TWINS),
            *with_changes(MEANS_OF_OTHER_SKILLS, **ALL_BASES),
        ],
    ),
    Table("base models 1 to 5", EACH_METHOD, with_changes([CLICKS, *OTHER_SKILLS, RATE], **ALL_BASES)),
    Table("with replay", REPLAY, with_changes([CLICKS, *OTHER_SKILLS, RATE], **ALL_BASES)),
    Table(
        "divergence from the base, in nats",
        {LORA: EACH_METHOD[LORA], LORA_REPLAY: REPLAY[LORA_REPLAY]},
        with_changes(
            [
                Column("word problems", nats("word_problem_kl")),
                Column("questions without an image", nats("question_without_image_kl")),
            ],
            **ALL_BASES,
        ),
    ),
    Table(
        "switches clicked on twin, %",
        MAIN_LINES,
        on_twins(TWINS) + with_changes([MEAN_CLICKS._replace(title="mean"), RATE], **ALL_TWINS),
    ),
    Table("mean of the twins", MAIN_LINES, with_changes([MEAN_CLICKS, *MEANS_OF_OTHER_SKILLS, RATE], **ALL_TWINS)),
    Table(
        "more parameters or more steps, switches clicked on twin, %",
        {
            ALL: (ALL, {}),
            f"{ALL}, rank 32": (ALL, {"r": 32}),
            f"{ALL}, 2,000 steps": (ALL, {"steps": 2000}),
            VISUAL: (VISUAL, {}),
            f"{VISUAL}, 2,000 steps": (VISUAL, {"steps": 2000}),
        },
        [Column("trained parameters", parameters, {"seeds": HARD_TWINS, "twins": True}), *on_twins(HARD_TWINS)],
    ),
    Table("dark screens", TASK_METHODS, with_changes([NAMES_CLICKED, *AFTER_IMAGE_AND_OLD_TASK, RATE], domain="dark")),
    Table("referring", TASK_METHODS, with_changes([NAMES_TOLD, *AFTER_IMAGE_AND_OLD_TASK, RATE], task="referring")),
    Table(
        "after nine word problems",
        {method: (method, {}) for method in (NOTHING, LORA, ALL)},
        with_changes([FLOPS, CLICKS, *AFTER_IMAGE_AND_OLD_TASK], history=9),
    ),
    Table(
        "choice of heads",
        {choice: (HALF, {"heads": heads}) for choice, heads in CHOICES.items()},
        [Column(f"{count} of 24, %", accuracy_on_each("action_acc"), {"num_heads": count}) for count in (4, 8)],
    ),
    Table("half of the heads", {name: (HALF, changes) for name, changes in SETTINGS.items()}, [CLICKS]),
]


@dataclass(frozen=True)
class CompareConfig(Settings):
    workers: int = option(2, "processes, of one thread each", least=1)
    device: str = option("cpu", "where to compute", DEVICES)
    out: str = option("runs/compare", "directory of compare.json; the runs found there are kept")


def configs(cell: Cell, lr: float, device: str) -> list[train.Config]:
    """The runs of a cell at this learning rate, one on each of its bases."""
    settings = {"lr": lr, "device": device} | METHODS[cell.method] | dict(cell.changes)
    seeds = settings.pop("seeds", SEARCH_SEEDS)
    bases = TWINS if settings.pop("twins", False) else BASES
    return [train.Config(**settings, base=bases[seed], seed=seed) for seed in seeds]


# ---- Learning rates --------------------------------------------------------------------------------------------------


def best_rate(tried: dict[float, list[dict]]) -> float:
    """The rate with the highest validation accuracy, in the mean over the bases; of equals the lowest."""
    return max(sorted(tried), key=lambda lr: mean(tried[lr], "validation_acc"))


def chosen_rate(tried: dict[float, list[dict]]) -> float:
    """The lowest rate whose mean validation accuracy is within one point of the best."""
    best = mean(tried[best_rate(tried)], "validation_acc")
    return min(lr for lr, rows in tried.items() if mean(rows, "validation_acc") >= best - TOLERANCE)


class Rates:
    """The learning rates that have been tried for each method, and with each change that has a rate of its own."""

    def __init__(self, runs: "Runs"):
        self.runs = runs
        self.tried: dict[Cell, dict[float, list[dict]]] = {}

    def rate_of(self, cell: Cell) -> float:
        """The learning rate of a cell. What has no rate of its own takes that of its method."""
        if cell.method == NOTHING:
            return 0.0
        own = {field: value for field, value in cell.changes if field in HAVE_OWN_RATE}
        return chosen_rate(self.search(Cell(cell.method, tuple(sorted(own.items())))))

    def search(self, cell: Cell) -> dict[float, list[dict]]:
        """{rate: rows} of all rates that are tried for this cell.

        A method with nothing changed tries the whole grid. Elsewhere it tries its best rate there and both neighbours,
        and goes on within the grid as long as the chosen rate is the lowest or the best rate the highest."""
        if cell not in self.tried:
            rates = GRID
            if cell.changes:
                centre = best_rate(self.search(Cell(cell.method)))
                rates = (centre / 2, centre, 2 * centre)
            tried = self.runs.finish_all(cell, rates)
            while chosen_rate(tried) == min(tried) > GRID[0]:
                tried |= self.runs.finish_all(cell, (min(tried) / 2,))
            while best_rate(tried) == max(tried) < GRID[-1]:
                tried |= self.runs.finish_all(cell, (2 * max(tried),))
            self.tried[cell] = tried
        return self.tried[cell]


# ---- Bases and runs --------------------------------------------------------------------------------------------------


def make_base(base: str) -> None:
    """Pretrain a base or a twin. A twin goes on from what its base was before the last stage, where that exists."""
    name = Path(base).stem  # such as 2 or 2-unskilled
    seed = int(name.split("-")[0])
    grounded = Path(base).with_name(f"{seed}.grounded.pt")
    start = str(grounded) if grounded.exists() else ""
    pretrain(PretrainConfig(seed=seed, unskilled=base in TWINS.values(), start=start, out=base))


def run(cfg: train.Config) -> dict:
    """`train.run`, and what the tuned model gets right on validation screens, and the fingerprint of its base."""
    tuned = train.finetune(cfg)
    validation = screens_and_features(cfg.base, cfg.domain, "validation", cfg.test_screens, tuned.model.device)
    metrics, _ = evaluate(tuned.model, *validation, cfg.task, cfg.history)
    validation_acc = metrics["action_acc" if cfg.task == "grounding" else "name_acc"]
    return tuned.result | {"validation_acc": validation_acc, "base_fingerprint": fingerprint(cfg.base)}


def fingerprint(base: str) -> str:
    """Twelve digits that no other base has; "" if there is no such file."""
    path = base_path(base)
    if not path.exists():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


class Runs:
    """The rows of compare.json, by their Config and the fingerprint of their base."""

    def __init__(self, path: Path, pool, device: str):
        self.path, self.pool, self.device = path, pool, device
        self.rows: dict[tuple[train.Config, str], dict] = {}
        self.lines: list[str] = []  # of the file, one for each row
        self.last_fingerprint: dict[str, str] = {}  # of each base that has a row
        try:
            for row in json.loads(path.read_text()) if path.exists() else []:
                cfg = train.Config(**{f.name: row[f.name] for f in fields(train.Config)})
                self.last_fingerprint[cfg.base] = row["base_fingerprint"]
                self.add(cfg, row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a comparison of this project; move it away to start anew") from error

    def add(self, cfg: train.Config, row: dict) -> None:
        self.rows[cfg, row["base_fingerprint"]] = row
        self.lines.append(json.dumps(row))

    def key(self, cfg: train.Config) -> tuple[train.Config, str]:
        """Where a row is kept. If a base is not on this machine, the rows of the last base of its name count."""
        return cfg, fingerprint(cfg.base) or self.last_fingerprint.get(cfg.base, "")

    def finish_all(self, cell: Cell, rates: tuple[float, ...]) -> dict[float, list[dict]]:
        """{rate: the rows of the cell at this rate}. What is missing is run."""
        wanted = {lr: configs(cell, lr, self.device) for lr in rates}
        self.finish([cfg for some in wanted.values() for cfg in some])
        return {lr: [self.rows[self.key(cfg)] for cfg in some] for lr, some in wanted.items()}

    def finish(self, wanted: list[train.Config]) -> None:
        """Run what is missing, on bases that may first have to be made. Each row is written at once."""
        missing = list(dict.fromkeys(cfg for cfg in wanted if self.key(cfg) not in self.rows))
        if not missing:
            return
        to_make = [base for base in dict.fromkeys(cfg.base for cfg in missing) if not fingerprint(base)]
        if to_make:
            Path(to_make[0]).parent.mkdir(parents=True, exist_ok=True)
            list(progress(self.pool.imap(make_base, to_make), "bases", len(to_make)))
            missing = [cfg for cfg in missing if self.key(cfg) not in self.rows]
        for cfg, row in zip(missing, progress(self.pool.imap(run, missing), "runs", len(missing))):
            self.add(cfg, row)
            lines = ",\n".join(self.lines)
            safe_write(f"[\n{lines}\n]\n".encode(), self.path)


def compare(cfg: CompareConfig) -> None:
    """Run the comparison, or go on with it, and print its tables."""
    path = Path(cfg.out) / "compare.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(cfg.workers, torch.set_num_threads, (1,)) as pool:
        runs = Runs(path, pool, find_device(cfg.device))
        rates = Rates(runs)
        texts = [markdown_of(table, runs, rates) for table in TABLES]
        texts.append(markdown_of_rates(rates))
    print("\n" + "\n\n".join(texts) + f"\n\nruns     {path}")


# ---- Tables in Markdown ----------------------------------------------------------------------------------------------


def markdown(titles: list[str], lines: dict[str, list[str]]) -> str:
    rows = [titles, ["---"] * len(titles)]
    rows += [[name, *texts] for name, texts in lines.items()]
    return "\n".join(f"|{'|'.join(row)}|" for row in rows)


def markdown_of(table: Table, runs: Runs, rates: Rates) -> str:
    lines = {}
    for line in table.lines:
        lines[line] = []
        for column in table.columns:
            cell = table.cell(line, column)
            lr = rates.rate_of(cell)
            lines[line].append(column.measure(runs.finish_all(cell, (lr,))[lr]))
    return markdown([table.title, *(column.title for column in table.columns)], lines)


def markdown_of_rates(rates: Rates) -> str:
    """Clicks, word problems after an image and without one, at each rate of the grid; the chosen rate is bold."""
    lines = {}
    for method in TUNED:
        tried = rates.search(Cell(method))
        chosen = chosen_rate(tried)
        measures = {"clicks": "action_acc", "after an image": "word_problem_after_image_acc"}
        if method == LORA:
            measures["without an image"] = "word_problem_acc"
        for name, field in measures.items():
            texts = [accuracy(field)(tried[lr]) for lr in GRID]
            lines[f"{method}: {name}"] = [f"**{text}**" if lr == chosen else text for lr, text in zip(GRID, texts)]
    return markdown(["learning rate", *(f"{lr:g}" for lr in GRID)], lines)


if __name__ == "__main__":
    sys.exit(command(CompareConfig, compare, __doc__))
