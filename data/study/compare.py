"""The comparison: tables whose cells are fine-tuning runs, each on three bases.

    python -m data.study.compare --quick             the first table alone: the shipped base, no search for rates
    python -m data.study.compare                     all tables; bases of seeds 2 and 3, and twins, are made first
    python -m data.study.compare --out data/study    the same of the runs in data/study/compare.json, at once

A cell is a method and what is changed of it: fields of `train.Config`, and `bases`. One replicate is one base and one
seed: base i is fine-tuned with seed i. Learning rates are chosen on validation screens, the tables are of test screens.
A run is known by its Config, which names the device, and by a fingerprint of its base; what is in compare.json is not
run again.
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
from data.prompts import ROOT, available, seen
from data.study import BASES, TWINS
from data.study.pretrain import PretrainConfig, pretrain
from imagelora import safe_write

LORA, VISUAL = "LoRA (q, k, v, o), all tokens", "LoRA (q, k, v, o), visual tokens"
SMALL = f"{VISUAL}, rank 2"
ALL, HALF = "Image-LoRA, all heads", "Image-LoRA, half of the heads"
FROZEN = "frozen"
METHODS = {  # lr: where the search for a rate starts
    FROZEN: {"method": "none", "lr": 0.0},
    LORA: {"method": "lora", "lr": 0.005},
    VISUAL: {"method": "lora", "tokens": "visual", "lr": 0.005},
    SMALL: {"method": "lora", "tokens": "visual", "r": 2, "lr": 0.02},
    ALL: {"heads": "all", "lr": 0.02},
    HALF: {"lr": 0.02},
}
SEARCHED = ("bases", "domain", "task")  # a change of these has a search of its own for the learning rate
EACH = {method: (method, {}) for method in METHODS}  # a line a method, nothing changed
FEW = {method: EACH[method] for method in (LORA, ALL, HALF)}
CHOICES = {choice: (HALF, {"heads": choice}) for choice in ("top", "gate", "matched", "random")}
CLICKS, AFTER = "correct clicks %", "text after an image %"
KEPT = {"text alone %": {}, AFTER: {}}
FIRST = {CLICKS: {}, "without the skill %": {"bases": TWINS}} | KEPT | {"parameters": {}, "kFLOP": {}, "rate": {}}
TABLES = {  # title -> (its lines, its columns); where both change a field, the column does
    "switch screens": (EACH, FIRST),
    "one of eight sequences replays": (FEW, {name: {"replay": 1} for name in (CLICKS, *KEPT)}),
    "choice of heads": (CHOICES, {"4 of 24 %": {"num_heads": 4}}),
}


@dataclass(frozen=True)
class CompareConfig(Settings):
    quick: bool = option(False, "the first table alone, on the shipped base, no search for rates")
    workers: int = option(2, "processes, of one thread each", least=1)
    device: str = option("cpu", "where to compute", DEVICES)
    out: str = option("runs/compare", "directory of compare.json; the runs found there are kept")


Cell = tuple[str, tuple]  # a method's name, what is changed of it as sorted pairs


def cells() -> dict[tuple[str, str, str], Cell]:
    """(table, line, column) -> cell."""
    found = {}
    for table, (lines, columns) in TABLES.items():
        for (line, (method, changes)), (column, more) in product(lines.items(), columns.items()):
            found[table, line, column] = method, tuple(sorted((changes | more).items()))
    return found


def configs(cell: Cell, lr: float, device: str) -> list[train.Config]:
    """The runs of a cell at this rate, one on each base."""
    method, changes = cell
    settings = METHODS[method] | dict(changes)
    settings |= {"lr": lr, "device": device}
    bases = settings.pop("bases", BASES)
    return [train.Config(**settings, base=base, seed=seed) for seed, base in enumerate(bases, 1)]


# ---- Learning rates --------------------------------------------------------------------------------------------------


def search_of(cell: Cell) -> Cell:
    """The cell that a learning rate is chosen for; cells that differ in other changes take the same."""
    method, changes = cell
    return method, tuple((name, value) for name, value in changes if name in SEARCHED)


def choose_rates(searches: dict[Cell, float], finish: Callable) -> tuple[dict[Cell, float], dict[tuple, list]]:
    """(The rate of each search that is best in the mean over its bases, of equals the lower; the rows of all tried).

    searches: where each starts. It goes on by factors of two until both neighbours of the best were tried.
    finish([(cell, rate), ...]) gives the rows of each."""
    tried, best = {}, {}
    untried = []
    for search, start in searches.items():
        untried += [(search, start), (search, start / 2), (search, 2 * start)]
    while untried:
        tried |= zip(untried, finish(untried))
        for search in searches:
            scores = {lr: mean(rows, "validation_acc") for (of, lr), rows in tried.items() if of == search}
            best[search] = max(sorted(scores), key=scores.get)
        near = []
        for search, lr in best.items():
            near += [(search, lr / 2), (search, 2 * lr)]
        untried = [at for at in near if at not in tried and 0.001 < at[1] < 1]
    return best, tried


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
    """`train.run`, what the tuned model gets right on validation screens, and the fingerprint of its base."""
    done = train.finetune(cfg, say=lambda line: None)
    validation = seen(cfg.base, cfg.domain, "validation", cfg.test_screens, done.model.device)
    metrics, _ = evaluate(done.model, *validation, cfg.task, cfg.history)
    accuracy = metrics["action_acc" if cfg.task == "grounding" else "name_acc"]
    return done.result | {"validation_acc": accuracy, "base_fingerprint": fingerprint(cfg.base)}


def fingerprint(base: str) -> str:
    """Twelve digits that another file has not; "" where there is no such file."""
    for path in (Path(base), ROOT / base):
        if path.exists():
            return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return ""


class Rows:
    """The rows of compare.json, by their Config and the fingerprint of their base."""

    def __init__(self, path: Path):
        self.path, self.known, self.last = path, {}, {}  # last: base -> the fingerprint of its last row
        names = [f.name for f in fields(train.Config)]
        try:
            for row in json.loads(path.read_text()) if path.exists() else []:
                cfg = train.Config(**{name: row[name] for name in names})
                self.known[cfg, row["base_fingerprint"]] = row
                self.last[cfg.base] = row["base_fingerprint"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a comparison of this project; move it away to start anew") from None

    def keys(self, configs: list) -> list[tuple]:
        """Where a base is not on this machine, the rows of the last one of its name count."""
        bases = {cfg.base for cfg in configs}
        prints = {base: fingerprint(base) or self.last.get(base) for base in bases}
        return [(cfg, prints[cfg.base]) for cfg in configs]

    def finish(self, cells: list, pool, name: str) -> list:
        """Of each cell the rows of its `configs`. What is missing is run, on bases that may first have to be made, and
        written at once."""
        wanted = [cfg for cell in cells for cfg in cell]
        missing = dict.fromkeys(cfg for cfg, base in self.keys(wanted) if (cfg, base) not in self.known)
        if not all(fingerprint(base) for base in {cfg.base for cfg in missing}):
            make_bases(pool)
        for cfg, row in zip(missing, progress(pool.imap(run, missing), name, len(missing), quiet=not missing)):
            self.known[cfg, row["base_fingerprint"]] = row
            lines = ",\n".join(map(json.dumps, self.known.values()))
            safe_write(f"[\n{lines}\n]\n".encode(), self.path)
        rows = {cfg: self.known[cfg, base] for cfg, base in self.keys(wanted)}
        return [[rows[cfg] for cfg in cell] for cell in cells]


def compare(cfg: CompareConfig) -> None:
    """Run (or go on with) the comparison, print its tables."""
    device = available(cfg.device)
    path = Path(cfg.out) / "compare.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    done, wanted, tried = Rows(path), cells(), {}
    if cfg.quick:
        wanted = {place: cell for place, cell in wanted.items() if place[0] == "switch screens" and not cell[1]}
    with get_context("spawn").Pool(cfg.workers, torch.set_num_threads, (1,)) as pool:

        def finish(at: list[tuple[Cell, float]], name="rates") -> list:
            bases = 1 if cfg.quick else len(BASES)
            return done.finish([configs(*cell_and_rate, device)[:bases] for cell_and_rate in at], pool, name)

        rates = {search_of(cell): METHODS[cell[0]]["lr"] for cell in wanted.values()}
        if not cfg.quick:
            plain = {search: start for search, start in rates.items() if not search[1] and start}
            best, tried = choose_rates(plain, finish)
            rates |= best
            changed = {search: rates[search[0], ()] for search in rates if search[1] and rates[search]}
            rates |= choose_rates(changed, finish)[0]
        rows = finish([(cell, rates[search_of(cell)]) for cell in wanted.values()], "runs")
    found = dict(zip(wanted, rows))
    for (method, _), lr in sorted(tried, key=lambda at: ([*METHODS].index(at[0][0]), at[1])):
        for column in (CLICKS, *KEPT):
            found["all rates tried", f"{method}, {lr:g}", column] = tried[(method, ()), lr]
    print("\n" + "\n\n".join(tables(found)) + f"\n\nruns     {path}")


# ---- Tables: each is a function of the rows --------------------------------------------------------------------------


def mean(rows: list[dict], field: str) -> float:
    return np.mean([row[field] for row in rows])


def percent(rows: list[dict], field="") -> str:
    """An accuracy in %, by default the task's: its mean over bases ± standard deviation, or each base's in brackets
    where they are over 3 points apart."""
    field = field or ("name_acc" if "name_acc" in rows[0] else "action_acc")
    values = [100 * row[field] for row in rows]
    text = f"{np.mean(values):.1f}".removesuffix(".0")
    if max(values) == min(values):
        return text
    if max(values) - min(values) > 3:
        return f"{text} ({', '.join(f'{value:.1f}' for value in values)})"
    return f"{text} ±{np.std(values, ddof=1):.1f}"


MEASURES = {  # of columns that are no accuracy of the task
    "text alone %": lambda rows: percent(rows, "word_problem_acc"),
    AFTER: lambda rows: percent(rows, "word_problem_after_image_acc"),
    "parameters": lambda rows: f"{mean(rows, 'trainable_parameters'):,.0f}",
    "kFLOP": lambda rows: f"{mean(rows, 'adapter_flops_per_screen') / 1e3:,.0f}",
    "rate": lambda rows: f"{rows[0]['lr']:g}",
}


def tables(rows: dict[tuple, list[dict]]) -> list[str]:
    """Markdown; rows: (table, line, column) -> one for each base."""
    found, columns = {}, {}
    for (table, line, column), of_bases in rows.items():
        measure = MEASURES.get(column, percent)
        found.setdefault(table, {}).setdefault(line, []).append(measure(of_bases))
        columns.setdefault(table, {})[column] = None
    markdown = []
    for table, lines in found.items():
        header = [f"**{table}**", *columns[table]]
        body = [header, ["---"] * len(header)]
        for line, texts in lines.items():
            body.append([line, *texts])
        markdown.append("\n".join(f"|{'|'.join(texts)}|" for texts in body))
    return markdown


if __name__ == "__main__":
    sys.exit(command(CompareConfig, compare, __doc__))
