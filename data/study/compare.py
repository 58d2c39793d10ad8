"""The comparison: tables whose cells are fine-tuning runs, each on three bases.

    python -m data.study.compare                     all tables; bases of seeds 2 and 3, and twins, are made first
    python -m data.study.compare --out data/study    the same of the runs in data/study/compare.json, at once

A cell is a method and what is changed of it: fields of `train.Config`, and two more, `bases` and `draws`. One replicate
is one base and one seed: base i is fine-tuned with seed i; further draws have seeds 10 + i and 20 + i. Learning rates
are chosen on validation screens, the tables are of test screens. A run is known by its Config, which names the device,
and by a fingerprint of its base; what is in compare.json is not run again.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import train
from data import DEVICES, Settings, command, option, progress
from data.evaluate import evaluate
from data.prompts import ROOT, find_device, screens_and_features
from data.study import BASES, TWINS
from data.study.pretrain import PretrainConfig, pretrain
from imagelora import safe_write

LORA, VISUAL = "LoRA (q, k, v, o), all tokens", "LoRA (q, k, v, o), visual tokens"
SMALL = f"{VISUAL}, rank 2"
ALL, HALF, FROZEN = "Image-LoRA, all heads", "Image-LoRA, half of the heads", "frozen"
METHODS = {
    FROZEN: {"method": "none"},
    LORA: {"method": "lora"},
    VISUAL: {"method": "lora", "tokens": "visual"},
    SMALL: {"method": "lora", "tokens": "visual", "r": 2},
    ALL: {"heads": "all"},
    HALF: {},
}
GRID = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)  # learning rates
SEARCHED = ("bases", "domain", "task", "r")  # a change of these has a search of its own for the learning rate
EACH = {method: (method, {}) for method in METHODS}  # a line a method, nothing changed
TUNED = {method: EACH[method] for method in METHODS if method != FROZEN}
FEW = {method: EACH[method] for method in (FROZEN, LORA, ALL, HALF)}
CHOICES = {choice: (HALF, {"heads": choice, "draws": 3}) for choice in ("top", "gate", "matched", "random")}
OPTIONS = {
    "r = 8, τ = 0, γ at a tenth of A's rate": (HALF, {}),
    "r = 4": (HALF, {"r": 4}),
    "r = 16": (HALF, {"r": 16}),
    "τ = 0.5": (HALF, {"tau": 0.5}),
    "γ at A's rate": (HALF, {"gamma_lr": 1.0}),
    "γ stays 1": (HALF, {"gamma_lr": 0.0}),
}
CLICKS, ALONE, AFTER = "correct clicks %", "text alone %", "text after an image %"
SOURCE, KFLOP, RATE = "source clicks %", "kFLOP", "rate"
OUTCOMES = (CLICKS, ALONE, AFTER, SOURCE, RATE)
FIRST = {CLICKS: {}, "without the skill %": {"bases": TWINS}, ALONE: {}, AFTER: {}, "parameters": {}, KFLOP: {}}
TABLES = {  # title -> (its lines, its columns); where both change a field, the column does
    "switch screens": (EACH, FIRST | {SOURCE: {}, RATE: {}}),
    "without the skill": (EACH, dict.fromkeys(OUTCOMES, {"bases": TWINS})),
    "one of eight sequences replays": (TUNED, dict.fromkeys(OUTCOMES, {"replay": 1})),
    "dark screens": (EACH, dict.fromkeys((CLICKS, RATE), {"domain": "dark"})),
    "referring": (EACH, dict.fromkeys(("correct names %", RATE), {"task": "referring"})),
    "after nine word problems": (FEW, dict.fromkeys((CLICKS, KFLOP), {"history": 9})),
    "choice of heads": (CHOICES, {"4 of 24 %": {"num_heads": 4}, "8 of 24 %": {"num_heads": 8}}),
    "half of the heads": (OPTIONS, {CLICKS: {}, RATE: {}}),
}


@dataclass(frozen=True)
class CompareConfig(Settings):
    workers: int = option(2, "processes, of one thread each", least=1)
    device: str = option("cpu", "where to compute", DEVICES)
    out: str = option("runs/compare", "directory of compare.json; the runs found there are kept")


Cell = tuple[str, tuple]  # a method's name, what is changed of it as sorted pairs


def cells() -> dict[tuple, Cell]:
    """(table, line, column) -> cell."""
    found = {}
    for table, (lines, columns) in TABLES.items():
        for (line, (method, changes)), (column, more) in product(lines.items(), columns.items()):
            found[table, line, column] = method, tuple(sorted((changes | more).items()))
    return found


def configs(cell: Cell, lr: float, device: str) -> list[train.Config]:
    """The runs of a cell at this rate, draw by draw, each on all bases."""
    method, changes = cell
    settings = {"lr": lr, "device": device} | METHODS[method] | dict(changes)
    bases, draws = settings.pop("bases", BASES), settings.pop("draws", 1)
    places = product(range(draws), enumerate(bases, 1))
    return [train.Config(**settings, base=base, seed=10 * draw + i) for draw, (i, base) in places]


# ---- Learning rates --------------------------------------------------------------------------------------------------


def search_of(cell: Cell) -> Cell:
    """The cell that a learning rate is chosen for; cells that differ in other changes take the same."""
    method, changes = cell
    return method, tuple((name, value) for name, value in changes if name in SEARCHED)


def choose_rates(searches: dict, finish: Callable) -> tuple[dict, dict]:
    """(search -> its best rate in the mean over bases, of equals the lower; (search, rate) -> the rows of all tried).

    For a method with nothing changed the whole grid is tried, elsewhere that one's rate and both neighbours.
    finish([(cell, rate), ...]) gives the rows of each."""
    best, tried = {}, {}
    for whole in (True, False):
        some = [search for search in searches if whole == (not search[1])]
        at = []
        for search in some:
            own = best.get((search[0], ()))
            at += [(search, lr) for lr in (GRID if whole else (own / 2, own, 2 * own))]
        tried |= zip(at, finish(at))
        for search in some:
            scores = {lr: mean(rows, "validation_acc") for (of, lr), rows in tried.items() if of == search}
            best[search] = max(sorted(scores), key=scores.get)
    return best, tried


# ---- Bases and runs --------------------------------------------------------------------------------------------------


def make_bases(pool) -> None:
    """One for each seed; then for each its twin, which differs in what it was asked last."""
    Path(BASES[1]).parent.mkdir(parents=True, exist_ok=True)
    whole = [PretrainConfig(seed=seed, out=f"runs/bases/{seed}.pt") for seed in (1, 2, 3)]
    twins = []  # the shipped base is made, too, for what it was before its last stage
    for base, twin in zip(whole, TWINS):
        twins.append(replace(base, unskilled=True, start=base.out.replace(".pt", ".grounded.pt"), out=twin))
    for made in (whole, twins):
        missing = [cfg for cfg in made if not Path(cfg.out).with_suffix(".json").exists()]
        list(progress(pool.imap(pretrain, missing), "bases", len(missing)))


def run(cfg: train.Config) -> dict:
    """`train.run`, what the tuned model gets right on validation screens, and the fingerprint of its base."""
    tuned = train.finetune(cfg)
    validation = screens_and_features(cfg.base, cfg.domain, "validation", cfg.test_screens, tuned.model.device)
    metrics, _ = evaluate(tuned.model, *validation, cfg.task, cfg.history)
    accuracy = metrics["action_acc" if cfg.task == "grounding" else "name_acc"]
    return tuned.result | {"validation_acc": accuracy, "base_fingerprint": fingerprint(cfg.base)}


def fingerprint(base: str) -> str:
    """Twelve digits that another file has not; "" where there is no such file."""
    for path in (Path(base), ROOT / base):
        if path.exists():
            return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return ""


class Runs:
    """What was run: the rows of compare.json, by their Config and the fingerprint of their base."""

    def __init__(self, path: Path, pool, device: str):
        self.path, self.pool, self.device = path, pool, device
        self.known, self.last = {}, {}  # last: base -> the fingerprint of its last row
        try:
            for row in json.loads(path.read_text()) if path.exists() else []:
                cfg = train.Config(**{f.name: row[f.name] for f in fields(train.Config)})
                self.known[cfg, row["base_fingerprint"]] = row
                self.last[cfg.base] = row["base_fingerprint"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a comparison of this project; move it away to start anew") from None

    def keys(self, configs: list) -> list[tuple]:
        """Where a base is not on this machine, the rows of the last one of its name count."""
        bases = {cfg.base for cfg in configs}
        prints = {base: fingerprint(base) or self.last.get(base) for base in bases}
        return [(cfg, prints[cfg.base]) for cfg in configs]

    def finish(self, at: list[tuple[Cell, float]]) -> list[list[dict]]:
        """Of each (cell, rate) the rows. What is missing is run, on bases that may first have to be made, and written
        at once."""
        cells = [configs(cell, lr, self.device) for cell, lr in at]
        wanted = [cfg for cell in cells for cfg in cell]
        missing = dict.fromkeys(cfg for cfg, base in self.keys(wanted) if (cfg, base) not in self.known)
        if not all(fingerprint(base) for base in {cfg.base for cfg in missing}):
            make_bases(self.pool)
        for cfg, row in zip(missing, progress(self.pool.imap(run, missing), "runs", len(missing), quiet=not missing)):
            self.known[cfg, row["base_fingerprint"]] = row
            lines = ",\n".join(map(json.dumps, self.known.values()))
            safe_write(f"[\n{lines}\n]\n".encode(), self.path)
        rows = {cfg: self.known[cfg, base] for cfg, base in self.keys(wanted)}
        return [[rows[cfg] for cfg in cell] for cell in cells]


def compare(cfg: CompareConfig) -> None:
    """Run (or go on with) the comparison, print its tables."""
    path, device = Path(cfg.out) / "compare.json", find_device(cfg.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = cells()
    with get_context("spawn").Pool(cfg.workers, torch.set_num_threads, (1,)) as pool:
        runs = Runs(path, pool, device)
        searches = dict.fromkeys(search_of(cell) for cell in wanted.values() if cell[0] != FROZEN)
        rates, tried = choose_rates(searches, runs.finish)
        rows = runs.finish([(cell, rates.get(search_of(cell), 0.0)) for cell in wanted.values()])
    printed = tables(dict(zip(wanted, rows))) + [table_of_rates(tried, rates)]
    print("\n" + "\n\n".join(printed) + f"\n\nruns     {path}")


# ---- Tables: each is a function of the rows --------------------------------------------------------------------------


def mean(rows: list[dict], field: str) -> float:
    return np.mean([row[field] for row in rows])


def percent(rows: list[dict], field="") -> str:
    """An accuracy in %, by default the task's: its mean over bases ± standard deviation, or each base's in brackets
    where they are over 3 points apart."""
    field = field or ("name_acc" if "name_acc" in rows[0] else "action_acc")
    draws = np.reshape([row[field] for row in rows], (-1, len({row["base"] for row in rows})))
    values = 100 * draws.mean(axis=0)
    text = f"{np.mean(values):.1f}".removesuffix(".0")
    if max(values) == min(values):
        return text
    if max(values) - min(values) > 3:
        return f"{text} ({', '.join(f'{value:.1f}' for value in values)})"
    return f"{text} ±{np.std(values, ddof=1):.1f}"


MEASURES = {  # of columns that are no accuracy of the task
    ALONE: lambda rows: percent(rows, "word_problem_acc"),
    AFTER: lambda rows: percent(rows, "word_problem_after_image_acc"),
    "parameters": lambda rows: f"{mean(rows, 'trainable_parameters'):,.0f}",
    KFLOP: lambda rows: f"{mean(rows, 'adapter_flops_per_screen') / 1e3:,.0f}",
    SOURCE: lambda rows: percent(rows, "source_acc"),
    RATE: lambda rows: f"{rows[0]['lr']:g}",
}


def markdown(title: str, columns: list, lines: dict) -> str:
    body = [[f"**{title}**", *columns], ["---"] * (len(columns) + 1)]
    body += [[line, *texts] for line, texts in lines.items()]
    return "\n".join(f"|{'|'.join(texts)}|" for texts in body)


def tables(rows: dict) -> list[str]:
    """rows: (table, line, column) -> the draws of each base."""
    printed = []
    for title, (lines, columns) in TABLES.items():
        texts = {}
        for line in lines:
            texts[line] = [MEASURES.get(column, percent)(rows[title, line, column]) for column in columns]
        printed.append(markdown(title, list(columns), texts))
    return printed


def table_of_rates(tried: dict, best: dict) -> str:
    lines = {method: [] for method in TUNED}
    for method, lr in product(TUNED, GRID):
        rows, mark = tried[(method, ()), lr], "**" * (best[method, ()] == lr)
        clicks, after = (100 * mean(rows, field) for field in ("action_acc", "word_problem_after_image_acc"))
        lines[method].append(f"{mark}{clicks:.1f}{mark} · {after:.0f}")
    lines[f"{LORA}: text alone"] = [f"{100 * mean(tried[(LORA, ()), lr], 'word_problem_acc'):.0f}" for lr in GRID]
    return markdown("clicks · text after an image, by rate", [f"{lr:g}" for lr in GRID], lines)


if __name__ == "__main__":
    sys.exit(command(CompareConfig, compare, __doc__))
