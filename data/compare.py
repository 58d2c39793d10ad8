"""The comparison: tables whose cells are fine-tuning runs, each on three bases.

    python -m data.compare --quick             the first table alone: the shipped base, one rate, no search
    python -m data.compare                     all tables on three bases; these and their twins are made first
    python -m data.compare --out data          the same of the runs in data/compare.json, at once

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
from data.evaluate import evaluate, examined
from data.pretrain import PretrainConfig, pretrain
from imagelora import safe_write

BASES = ("data/tiny_vlm.pt", "runs/bases/2.pt", "runs/bases/3.pt")  # pretrained with seeds 1, 2, 3
TWINS = {  # theirs, in pretraining asked what is right of a name, but not where that is; or neither
    kind: tuple(f"runs/bases/{seed}-{kind}.pt" for seed in (1, 2, 3)) for kind in ("names", "none")
}

LORA, VISUAL = "LoRA q k v o, all tokens", "LoRA q k v o, visual tokens"
SMALL = f"{VISUAL}, r = 2"
ALL, HALF = "Image-LoRA, all heads", "Image-LoRA, half of the heads"
METHODS = {  # the ladder: one restriction a line from LoRA to Image-LoRA; and LoRA of the latter's size
    "frozen": {"method": "none", "lr": 0.0},
    LORA: {"method": "lora", "draws": 3},
    VISUAL: {"method": "lora", "tokens": "visual"},
    "LoRA v, visual tokens": {"method": "lora", "tokens": "visual", "projections": "v"},
    ALL: {"heads": "all", "draws": 3},
    HALF: {"draws": 3},
    SMALL: {"method": "lora", "tokens": "visual", "r": 2, "draws": 3},
}
CHOICES = {name: {"heads": name, "draws": 3} for name in ("top", "gate", "matched", "random")}
OPTIONS = {
    "r = 4": {"r": 4},
    "r = 8, τ = 0, γ's rate 0.1 of A's": {},
    "r = 16": {"r": 16},
    "τ = 0.5": {"tau": 0.5},
    "γ's rate that of A": {"gamma_lr": 1.0},
    "γ's rate 0: it stays 1": {"gamma_lr": 0.0},
}
MAIN = {name: METHODS[name] for name in ("frozen", LORA, SMALL, ALL, HALF)}
MORE = {name: METHODS[name] for name in ("frozen", LORA, VISUAL, SMALL, ALL, HALF)}
FEW = {name: METHODS[name] for name in ("frozen", LORA, HALF)}
ELSEWHERE = {"settings %": {"domain": "settings", "draws": 1}, "dark %": {"domain": "dark", "draws": 1}}
ASKED = {  # in pretraining, about the neighbour of a name
    "what and where it is %": {},
    "what it is %": {"bases": TWINS["names"], "draws": 1},
    "neither %": {"bases": TWINS["none"], "draws": 1},
}
PROMPTS = {
    "settings, names right %": {"domain": "settings", "task": "referring", "draws": 1},
    "row after 9 word problems, clicks %": {"history": 9, "draws": 1},
}
BUDGETS = {"4 of 24 heads %": {"num_heads": 4}, "8 of 24 heads %": {"num_heads": 8}}
TABLES = {  # title -> (its lines, its columns); where both set a field, the column does
    "row": (METHODS, {"": {}}),  # its columns are MEASURES
    "correct clicks": (MAIN, ELSEWHERE),
    "row; of a name's neighbour the base was asked": (MORE, ASKED),
    "other prompts": (FEW, PROMPTS),
    "heads, row clicks": (CHOICES, BUDGETS),
    "half of the heads": (OPTIONS, {"row clicks %": {}}),
}


@dataclass(frozen=True)
class CompareConfig(Settings):
    quick: bool = option(False, "the first table alone, on the shipped base, at rate 0.01")
    workers: int = option(2, "processes, of one thread each", least=1)
    out: str = option("runs/compare", "directory of compare.json; the runs found there are kept")


def cells() -> dict[tuple[str, str, str], dict]:
    """(table, line, column) -> settings."""
    found = {}
    for table, (lines, columns) in TABLES.items():
        for line, column in product(lines, columns):
            found[table, line, column] = lines[line] | columns[column]
    return found


def configs(settings: dict, lr: float) -> list[list[train.Config]]:
    """The runs of a cell, at this rate if its settings name none: for each base its draws."""
    own = {"lr": lr} | settings
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
    """One for each seed; then for each its twins, which differ in what they were asked last."""
    Path(BASES[1]).parent.mkdir(parents=True, exist_ok=True)
    whole = [PretrainConfig(seed=seed, out=f"runs/bases/{seed}.pt") for seed in (1, 2, 3)]
    twins = []  # the shipped base is made, too, for what it was before its last stage
    for kind, paths in TWINS.items():
        for base, path in zip(whole, paths):
            grounded = str(Path(base.out).with_suffix(".grounded.pt"))
            twins.append(replace(base, relations=kind, start=grounded, out=path))
    for made in (whole, twins):
        for _ in progress(pool.imap(make_base, made), "bases", len(made)):
            pass


def run(cfg: train.Config) -> dict:
    """`train.run`, and what the tuned model gets right on validation screens."""
    done = train.finetune(cfg, say=lambda line: None)
    metrics, _ = evaluate(done.model, *examined(cfg, done.model, "validation"), cfg.task, cfg.history)
    right = metrics["action_acc"] if cfg.task == "grounding" else metrics["name_acc"]
    return done.result | {"validation_acc": right}


class Rows:
    """The rows of compare.json, by their settings."""

    def __init__(self, path: Path):
        self.path, names = path, [f.name for f in fields(train.Config) if f.name != "device"]
        try:
            rows = json.loads(path.read_text()) if path.exists() else []
            told = [{name: row[name] for name in names} | {"heads": row["heads_from"]} for row in rows]
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
        wanted = {place: of | {"bases": BASES[:1], "draws": 1} for place, of in wanted.items() if place[0] == "row"}
    with get_context("spawn").Pool(cfg.workers, torch.set_num_threads, (1,)) as pool:
        if not cfg.quick:
            searches = dict.fromkeys(search_of(of) for of in wanted.values() if "lr" not in of)
            rates = choose_rates([*searches], lambda cells: done.finish(cells, pool, "rates"))
        runs = [configs(of, rates.get(search_of(of), 0.01)) for of in wanted.values()]
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
    text = f"{np.mean(values):.1f}"
    if max(values) - min(values) > 3:
        return f"{text} ({', '.join(f'{value:.1f}' for value in values)})"
    return text if len(values) == 1 else f"{text} ±{np.std(values, ddof=1):.1f}"


MEASURES = {  # columns of the first table: what is kept, and what it costs
    "clicks %": percent,
    "text alone %": lambda rows: percent(rows, "word_problem_acc"),
    "text after an image %": lambda rows: percent(rows, "word_problem_after_image_acc"),
    "source %": lambda rows: percent(rows, "source_acc"),
    "parameters": lambda rows: f"{mean(rows, 'trainable_parameters'):,.0f}",
    "adapter kFLOP a screen": lambda rows: f"{mean(rows, 'adapter_flops_per_screen') / 1e3:,.0f}",
    "rate": lambda rows: f"{mean(rows, 'lr'):g}",
}


def tables(rows: dict[tuple, list]) -> list[str]:
    """Markdown; rows: (table, line, column) -> for each base its draws."""
    found = {}
    for (table, line, column), of_bases in rows.items():
        measures = MEASURES if table == "row" else {column: percent}
        texts = found.setdefault(table, {}).setdefault(line, {})
        texts |= {name: measure(of_bases) for name, measure in measures.items()}
    markdown = []
    for table, lines in found.items():
        columns = next(iter(lines.values()))
        body = [[f"**{table}**", *columns], ["---"] * (len(columns) + 1)]
        body += [[line, *texts.values()] for line, texts in lines.items()]
        markdown.append("\n".join(f"|{'|'.join(texts)}|" for texts in body))
    return markdown


if __name__ == "__main__":
    sys.exit(command(CompareConfig, compare, __doc__))
