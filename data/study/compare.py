"""The comparison: tables whose cells are fine-tuning runs, each on three bases.

    python -m data.study.compare --quick             the first table alone: the shipped base, train.py's rates
    python -m data.study.compare                     all tables; bases of seeds 2 and 3, and twins, are made first
    python -m data.study.compare --out data/study    the same of the runs in data/study/compare.json, at once

A cell is what its line's settings and its column's say: fields of `train.Config`, and two more, `bases` and `draws`.
A new line of a table is a new entry of METHODS, CHOICES or OPTIONS; TABLES says which lines meet which columns.
One replicate is one base and one seed: base i is fine-tuned with seed i, further draws have seeds 10 + i and 20 + i.
Learning rates are chosen on validation screens, the tables are of test screens. What is in compare.json is not run
again.
"""

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
from data import Settings, command, option, progress
from data.evaluate import evaluate
from data.prompts import seen
from data.study import BASES, TWINS
from data.study.pretrain import PretrainConfig, pretrain
from imagelora import safe_write

LORA, VISUAL = "LoRA (q, k, v, o), all tokens", "LoRA (q, k, v, o), visual tokens"
SMALL = f"{VISUAL}, rank 2"
ALL, HALF = "Image-LoRA, all heads", "Image-LoRA, half of the heads"
FROZEN, VALUES = "frozen", "LoRA (v), visual tokens"
METHODS = {
    FROZEN: {"method": "none", "lr": 0.0},
    LORA: {"method": "lora", "draws": 3},
    VISUAL: {"method": "lora", "tokens": "visual"},
    SMALL: {"method": "lora", "tokens": "visual", "r": 2, "draws": 3},
    VALUES: {"method": "lora", "tokens": "visual", "projections": "v"},
    ALL: {"heads": "all", "draws": 3},
    HALF: {"draws": 3},
}
CHOICES = {name: {"heads": name, "draws": 3} for name in ("top", "gate", "matched", "random")}
OPTIONS = {
    "r = 8, τ = 0, γ at a tenth of A's rate": {},
    "r = 4": {"r": 4},
    "r = 16": {"r": 16},
    "τ = 0.5": {"tau": 0.5},
    "γ at A's rate": {"gamma_lr": 1.0},
    "γ stays 1": {"gamma_lr": 0.0},
}
EACH = {name: METHODS[name] for name in METHODS if name != VALUES}
DARK = {name: METHODS[name] for name in EACH if name != VISUAL}
FEW = {name: METHODS[name] for name in (FROZEN, LORA, HALF)}
CLICKS, AFTER = "correct clicks %", "text after an image %"
KEPT = {"text alone %": {}, AFTER: {}, "source clicks %": {}, "parameters": {}, "kFLOP": {}, "rate": {}}
TABLES = {  # title -> (its lines, its columns); where both set a field, the column does
    "switch screens": (METHODS, {CLICKS: {}} | KEPT),
    "bases without the skill": (EACH, {CLICKS: {"bases": TWINS, "draws": 1}}),
    "dark screens": (DARK, {CLICKS: {"domain": "dark", "draws": 1}}),
    "after nine word problems": (FEW, {CLICKS: {"history": 9, "draws": 1}}),
    "choice of heads": (CHOICES, {"4 of 24 %": {"num_heads": 4}, "8 of 24 %": {"num_heads": 8}}),
    "half of the heads": (OPTIONS, {CLICKS: {}}),
}


@dataclass(frozen=True)
class CompareConfig(Settings):
    quick: bool = option(False, "the first table alone, on the shipped base, at train.py's rates")
    workers: int = option(2, "processes, of one thread each", least=1)
    out: str = option("runs/compare", "directory of compare.json; the runs found there are kept")


def cells() -> dict[tuple[str, str, str], dict]:
    """(table, line, column) -> settings."""
    found = {}
    for table, (lines, columns) in TABLES.items():
        for line, column in product(lines, columns):
            found[table, line, column] = lines[line] | columns[column]
    return found


def configs(settings: dict, lr: float | None) -> list[list[train.Config]]:
    """The runs of a cell, at this rate if its settings name none (None: at train.py's): for each base its draws."""
    own = {"lr": lr or train.RATES[settings.get("method", "image_lora")]} | settings
    bases, draws = own.pop("bases", BASES), own.pop("draws", 1)
    runs = []
    for i, base in enumerate(bases, 1):
        runs.append([train.Config(**own, base=base, seed=10 * draw + i) for draw in range(draws)])
    return runs


# ---- Learning rates --------------------------------------------------------------------------------------------------


def search_of(settings: dict) -> tuple:
    """The settings that a learning rate is chosen for; what differs in others takes the same."""
    names = ("method", "tokens", "projections", "r", "domain", "bases")
    searched = {name: settings[name] for name in names if name in settings}
    if settings.get("heads") == "all":
        searched["heads"] = "all"
    return tuple(searched.items())


def choose_rates(searches: list[tuple], finish: Callable) -> dict[tuple, float]:
    """The rate of each search that is best in the mean over its bases, of equals the lower.

    The grid is 0.02 times powers of two, and both neighbours of the best are tried. finish(cells) gives their rows."""
    scores = {search: {} for search in searches}
    untried = [(search, lr) for search in searches for lr in (0.02, 0.04)]
    while untried:
        cells = finish([configs(dict(search), lr) for search, lr in untried])
        for (search, lr), rows in zip(untried, cells):
            scores[search][lr] = mean(rows, "validation_acc")
        best = {search: max(sorted(tried), key=tried.get) for search, tried in scores.items()}
        near = [(search, lr) for search in searches for lr in (best[search] / 2, best[search] * 2)]
        untried = [(search, lr) for search, lr in near if lr not in scores[search] and 0.001 < lr < 1]
    return best


# ---- Bases and runs --------------------------------------------------------------------------------------------------


def make_base(cfg: PretrainConfig) -> None:
    if not Path(cfg.out).with_suffix(".json").exists():
        pretrain(cfg)


def make_bases(pool) -> None:
    """One for each seed; then for each its twin, which differs in what it was asked last."""
    Path(BASES[1]).parent.mkdir(parents=True, exist_ok=True)
    whole = [PretrainConfig(seed=seed, out=f"runs/bases/{seed}.pt") for seed in (1, 2, 3)]
    twins = []  # the shipped base is made, too, for what it was before its last stage
    for base, twin in zip(whole, TWINS):
        grounded = str(Path(base.out).with_suffix(".grounded.pt"))
        twins.append(replace(base, unskilled=True, start=grounded, out=twin))
    for made in (whole, twins):
        for _ in progress(pool.imap(make_base, made), "bases", len(made)):
            pass


def run(cfg: train.Config) -> dict:
    """`train.run`, and what the tuned model gets right on validation screens."""
    done = train.finetune(cfg, say=lambda line: None)
    validation = seen(cfg.base, cfg.domain, "validation", cfg.test_screens, done.model.device)
    metrics, _ = evaluate(done.model, *validation, cfg.task, cfg.history)
    return done.result | {"validation_acc": metrics["action_acc" if cfg.task == "grounding" else "name_acc"]}


class Rows:
    """The rows of compare.json, by their settings."""

    def __init__(self, path: Path):
        self.path, names = path, [f.name for f in fields(train.Config) if f.name != "device"]
        try:
            rows = json.loads(path.read_text()) if path.exists() else []
            told = [{name: row[name] for name in names} for row in rows]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a comparison of this project; move it away to start anew") from None
        self.known = {train.Config(**settings): row for settings, row in zip(told, rows)}

    def finish(self, cells: list, pool, name: str) -> list:
        """Of each cell the rows of its `configs`. What is missing is run, on bases that may first have to be made, and
        written at once."""
        wanted = dict.fromkeys(cfg for bases in cells for draws in bases for cfg in draws)
        missing = [cfg for cfg in wanted if cfg not in self.known]
        if any(cfg.base != BASES[0] for cfg in missing):
            make_bases(pool)
        for cfg, row in zip(missing, progress(pool.imap(run, missing), name, len(missing), quiet=not missing)):
            self.known[cfg] = row
            lines = ",\n".join(map(json.dumps, self.known.values()))
            safe_write(f"[\n{lines}\n]\n".encode(), self.path)
        return [[[self.known[cfg] for cfg in draws] for draws in bases] for bases in cells]


def compare(cfg: CompareConfig) -> None:
    """Run (or go on with) the comparison, print its tables."""
    path = Path(cfg.out) / "compare.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    done, wanted, rates = Rows(path), cells(), {}
    if cfg.quick:
        first = next(iter(TABLES))
        wanted = {place: of | {"bases": BASES[:1], "draws": 1} for place, of in wanted.items() if place[0] == first}
    with get_context("spawn").Pool(cfg.workers, torch.set_num_threads, (1,)) as pool:
        if not cfg.quick:
            searches = dict.fromkeys(search_of(of) for of in wanted.values() if "lr" not in of)
            rates = choose_rates([*searches], lambda cells: done.finish(cells, pool, "rates"))
        runs = [configs(of, rates.get(search_of(of))) for of in wanted.values()]
        rows = dict(zip(wanted, done.finish(runs, pool, "runs")))
    print("\n" + "\n\n".join(tables(rows)) + f"\n\nruns     {path}")


# ---- Tables: each is a function of the rows --------------------------------------------------------------------------


def mean(rows: list[list[dict]], field: str) -> float:
    return np.mean([row[field] for draws in rows for row in draws])


def percent(rows: list[list[dict]], field="") -> str:
    """An accuracy in %, by default the task's: its mean over bases ± standard deviation, or each base's in brackets
    where they are over 3 points apart. rows: for each base its draws."""
    field = field or ("name_acc" if "name_acc" in rows[0][0] else "action_acc")
    values = [100 * mean([draws], field) for draws in rows]
    text = f"{np.mean(values):.1f}".removesuffix(".0")
    if max(values) == min(values):
        return text
    if max(values) - min(values) > 3:
        return f"{text} ({', '.join(f'{value:.1f}' for value in values)})"
    return f"{text} ±{np.std(values, ddof=1):.1f}"


MEASURES = {  # of columns that are no accuracy of the task
    "text alone %": lambda rows: percent(rows, "word_problem_acc"),
    AFTER: lambda rows: percent(rows, "word_problem_after_image_acc"),
    "source clicks %": lambda rows: percent(rows, "source_acc"),
    "parameters": lambda rows: f"{mean(rows, 'trainable_parameters'):,.0f}",
    "kFLOP": lambda rows: f"{mean(rows, 'adapter_flops_per_screen') / 1e3:,.0f}",
    "rate": lambda rows: f"{mean(rows, 'lr'):g}",
}


def tables(rows: dict[tuple, list]) -> list[str]:
    """Markdown; rows: (table, line, column) -> for each base its draws."""
    found, columns = {}, {}
    for (table, line, column), of_bases in rows.items():
        measure = MEASURES.get(column, percent)
        found.setdefault(table, {}).setdefault(line, []).append(measure(of_bases))
        columns.setdefault(table, {})[column] = None
    markdown = []
    for table, lines in found.items():
        body = [[f"**{table}**", *columns[table]], ["---"] * (len(columns[table]) + 1)]
        body += [[line, *texts] for line, texts in lines.items()]
        markdown.append("\n".join(f"|{'|'.join(texts)}|" for texts in body))
    return markdown


if __name__ == "__main__":
    sys.exit(command(CompareConfig, compare, __doc__))
