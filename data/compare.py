"""The comparison: fine-tuning runs as rows of compare.json, and the tables that they make.

    python train.py --compare --out data        makes data/compare.json and the tables of data/README.md

A job is a part, a name and the fields of one run's settings in which it differs from the defaults. This file knows no
model: the caller hands it `run`, from settings to what was measured.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from itertools import product
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path

import numpy as np

from data import Settings, option, progress
from data.screens import PAIRED
from imagelora import safe_write

LADDER = {  # projections · tokens · heads of what is trained -> settings
    "none · frozen": {"method": "none", "lr": 0.0},
    "qkvo · all · all": {"method": "lora"},
    "qkvo · visual · all": {"method": "lora_visual"},
    "v · visual · all": {"heads": "all"},
    "v · visual · selected": {},
    "v · all · all": {"method": "lora_value"},
    "qkvo r=1 · all · all": {"method": "lora", "r": 1, "lora_alpha": 2.0},
    "qkvo r=1 · visual · all": {"method": "lora_visual", "r": 1, "lora_alpha": 2.0},
}
FROZEN, LORA, LORA_VISUAL, ALL_HEADS, IMAGE_LORA, LORA_VALUE, *_ = LADDER
MAIN = (LORA, LORA_VISUAL, IMAGE_LORA)
DOMAINS = ("settings", "row", "dark", "blueprint")
STEPS, TUNING_STEPS, TEST_SCREENS = 400, 200, 100
RUNGS = "projections · tokens · heads"


@dataclass(frozen=True)
class CompareConfig(Settings):
    """The comparison's settings; each field is an option of the command line too."""

    quick: bool = option(False, "the ladder on settings alone, one seed, one learning rate")
    seeds: int = option(5, "runs of each kind", least=1)
    workers: int = option(2, "processes, of one thread each", least=1)
    out: str = option("runs/compare", "directory of compare.json; finished rows found there are kept")


def jobs_of(cfg: CompareConfig, num_layers: int, num_heads: int) -> list[dict]:
    """Every run but those that choose learning rates; kind: the rung, number and choice of heads whose rate it has."""
    jobs = []

    def add(part, name, seeds=cfg.seeds, kind=None, **settings):
        job = {"part": part, "name": name, "steps": STEPS, "test_screens": TEST_SCREENS}
        job |= LADDER.get(name, {}) | settings
        rung = name if name in LADDER else IMAGE_LORA
        job["kind"] = kind or (rung, job.get("num_heads", 10), job.get("heads", "top"))
        jobs.extend(job | {"seed": seed} for seed in range(1 if cfg.quick or name == FROZEN else seeds))

    for domain, name in product(DOMAINS[:1] if cfg.quick else DOMAINS, LADDER):
        add("ladder", name, domain=domain)
    if cfg.quick:
        return [{"lr": 0.01} | job for job in jobs]
    for budget, choice in product((1, 4, 10), ("top", "matched", "lowest", "random", "least")):
        add("probe", choice, num_heads=budget, heads=choice)
    for tau, domain in product((0.0, 0.5, 1.0, 4.0), ("settings", "row")):
        add("tau", f"τ = {tau:g}", domain=domain, tau=tau)
    two = min(cfg.seeds, 2)
    for replay, rates in ((0, (0.001, 0.0025, 0.005, 0.01, 0.02)), (1, (0.0025, 0.01))):
        for lr in rates:
            add("rates", f"{replay} replayed", two, method="lora", lr=lr, replay=replay)
    for domain, name in product(("dark", "settings"), (FROZEN, *MAIN)):
        add("referring", name, task="referring", domain=domain)
    brief = {"lr": 0.01, "split": "validation", "test_screens": 2}
    for steps, size, normalize in product((1, 3, 6, 50), (1, 2, 3, num_heads), (True, False)):
        heads = f"0:{','.join(map(str, range(size)))}"
        add("normalization", f"{size} heads", two, steps=steps, heads=heads, normalize=normalize, **brief)
    for layer, head in product(range(num_layers), range(num_heads)):
        add("single", f"layer {layer}", 1, kind=(IMAGE_LORA, 1, "top"), heads=f"{layer}:{head}")
    for name in (LORA, LORA_VALUE, IMAGE_LORA):
        add("regimes", name, history=9)
    for name in MAIN:
        add("prior", name, domain="dark", prior=True)
    for lowest in range(num_layers):
        heads = " ".join(f"{layer}:{','.join(map(str, range(num_heads)))}" for layer in range(lowest, num_layers))
        add("lowest", f"layers {lowest} to {num_layers - 1}", 1, kind=(ALL_HEADS, 10, "all"), heads=heads)
    return jobs


def tuning_jobs(kind: tuple[str, int, str], rates: list[float]) -> list[dict]:
    """A kind of run at these learning rates, half as long; choices of heads not on the ladder on settings alone."""
    name, num_heads, choice = kind
    on_ladder = name != IMAGE_LORA or (num_heads, choice) == (10, "top")
    common = LADDER[name] | {"part": "tuning", "name": f"{name}, K = {num_heads}, {choice}", "split": "validation"}
    common |= {"steps": TUNING_STEPS, "test_screens": TEST_SCREENS, "num_heads": num_heads, "heads": choice}
    return [
        common | {"domain": domain, "lr": lr, "seed": 100 + seed}
        for lr in rates
        for seed, domain in enumerate(DOMAINS if on_ladder else ("settings", "settings"))
    ]


def best_rate(kind: tuple[str, int, str], finish) -> float:
    """The learning rate of a kind of run: three are tried, and more until the best is not the last of them."""
    best, scores = 0.01, {}
    while new := [lr for lr in (best, best / 2, 2 * best) if lr not in scores and 0.01 / 32 <= lr <= 0.01 * 32]:
        rows = finish(tuning_jobs(kind, new))
        scores |= {lr: np.mean([row["action_acc"] for row in rows if row["lr"] == lr]) for lr in new}
        best = max(scores, key=scores.get)  # of equals the one nearest to 0.01
    return best


def compare(cfg: CompareConfig, make_config, run, shape: tuple) -> None:
    """Run (or go on with) the comparison, print its tables. A stop loses only the runs under way.

    make_config(**fields) gives the settings of a run, run(settings) its row, whose device is the one used.
    shape: layers, hidden size, query heads, value heads, head size."""
    path = Path(cfg.out) / "compare.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    key = itemgetter("part", "name", *(f.name for f in fields(make_config) if f.name != "device"))
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
        known = {key(row | {"heads": row["heads_from"]}): row for row in rows}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a comparison of this project; move it away to start anew") from None

    def finish(jobs: list[dict]) -> list[dict]:
        """The rows of these jobs, run where they are missing; every new row is written at once, a row a line."""
        made = [make_config(**{name: job[name] for name in job.keys() - {"part", "name", "kind"}}) for job in jobs]
        keys = [key(job | asdict(each)) for job, each in zip(jobs, made)]
        missing = [i for i, at in enumerate(keys) if at not in known]
        bar.total = max(bar.total, bar.n + len(missing))
        for i, measured in zip(missing, pool.imap(run, [made[i] for i in missing])):
            row = {"part": jobs[i]["part"], "name": jobs[i]["name"]} | measured
            known[keys[i]] = json.loads(json.dumps(row))
            text = "[\n" + ",\n".join(map(json.dumps, known.values())) + "\n]\n"
            safe_write(text.encode(), path)
            bar.set_postfix_str(f"{row['part']}, {row['domain']}, {row['name']}", refresh=False)
            bar.update()
        return [known[at] for at in keys]

    num_layers, _, _, num_heads, _ = shape
    jobs = jobs_of(cfg, num_layers, num_heads)
    kinds = dict.fromkeys(job["kind"] for job in jobs if "lr" not in job)
    expected = len(jobs) + sum(len(tuning_jobs(kind, [0.005, 0.01, 0.02])) for kind in kinds)
    with get_context("spawn").Pool(cfg.workers) as pool, progress(len(known), expected, "compare") as bar:
        rates = {kind: best_rate(kind, finish) for kind in kinds}
        done = finish([job if "lr" in job else job | {"lr": rates[job["kind"]]} for job in jobs])
    print("\n" + "\n\n".join(tables(done).values()))
    print(f"\nsaved {path}")


def cell(rows: list[dict], name: str, unit=1, form="{:,.0f}", of=np.mean) -> str:
    """The mean of a field in a unit, a number or another field; an accuracy's in %, with its deviation over seeds."""
    values = np.array([row[name] for row in rows if name in row])
    if not len(values):  # it was not measured
        return ""
    if not name.endswith("_acc"):
        return form.format(of(values) / np.mean([row.get(unit, unit) for row in rows]), **rows[0])
    spread = f" ±{100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread}"


ACCURACIES = {"words": "text", "icons": "icon", "best constant": "constant", "exchanged": "exchanged"}
ACCURACIES |= {"source %": "source", "word problems %": "word_problem", "after an image %": "word_problem_after_image"}
ACCURACIES |= {"names %": "name", "+ best offset": "offset", "switches erased": "erased"}
MEASURES = {  # a column, or what all columns of a table are -> arguments of its cells; any other is of clicks
    "parameters": ("trainable_parameters",),
    "adapter kFLOP": ("adapter_flops_per_screen", 1e3),
    "adapter kFLOP a screen": ("adapter_flops_per_screen", 1e3),
    "counted": ("counted_flops_per_screen", 1e3),
    "of the whole step": ("adapter_flops_per_screen", "step_flops_per_screen", "{:.2%}"),
    "kept for the backward pass, KiB a screen": ("saved_bytes_per_screen", 1024),
    "whole step, MFLOP a screen": ("step_flops_per_screen", 1e6, "{:.1f}"),
    "ms a step": ("step_ms", 1, "{:.1f}"),
    "text logits": ("text_logits_max_abs_diff", 1, "{:.2g}", np.max),
    "lr": ("lr", 1, "{:g}"),
    "no point, of": ("wrong_format_num", 1, "{:,.0f} of {num_total:,}"),
    "rho": ("rho", 1, "{:.2f}"),
    "update": ("0", 1, "{:.2f}"),  # of layer 0
} | {column: (f"{name}_acc",) for column, name in ACCURACIES.items()}
CONTROLS = "click %|best constant|+ best offset|switches erased|exchanged|no point, of"
STEP = "adapter kFLOP a screen|counted|of the whole step|kept for the backward pass, KiB a screen"
BESIDE = "parameters|adapter kFLOP|source %|word problems %"  # what else changes
IN_DOMAIN = f"click %|words|icons|{BESIDE}|after an image %|text logits|lr"
TOLD = "after {history} word problems"
TABLES = {  # table -> part, title, columns, and what they all are and what is in a line, where not said by their names
    "ladder": ("overview", RUNGS, f"{{domain}} %|{BESIDE}|text logits"),
    **{domain: (domain, f"{domain}: {RUNGS}", IN_DOMAIN) for domain in DOMAINS},
    "controls": ("controls", "controls", CONTROLS, "", "{domain}: {name}"),
    "step": ("step", "the whole training step, settings", STEP),
    "lowest": ("lowest", "all heads of, settings", "click %|whole step, MFLOP a screen|ms a step"),
    "correlation": ("correlation", "rank correlation of score and click accuracy, settings", "{of}", "rho"),
    "probe": ("probe", "settings, click % by choice of heads", "K = {num_heads}"),
    "tau": ("tau", "click %, K = 10", "{domain}"),
    "tau costs": ("tau", "adapter kFLOP a screen, K = 10", "{domain}", "adapter kFLOP"),
    "single": ("single", "settings, click % of one head", "head {heads_from[2]}"),
    "click": ("rates", "LoRA, settings, click %", "lr {lr:g}"),
    "word problems": ("rates", "LoRA, settings, word problems %", "lr {lr:g}", "word problems %"),
    "referring": ("referring", "names right, %", "{domain}", "names %"),
    "regimes": ("regimes", "settings, click %", TOLD),
    "regime costs": ("regimes", "settings, adapter kFLOP a screen", TOLD, "adapter kFLOP"),
    "prior": ("prior", "dark, click %", "language prior: {prior}"),
    "normalization": ("normalization", "layer 0's update", "{name}", "update", "{steps} steps, normalize: {normalize}"),
}


def table(rows: list[dict], title: str, columns: str, measure: str = "", line: str = "{name}") -> str:
    """A Markdown table: lines and columns are texts with {fields} of a row, cells of the rows that agree in both."""
    cells = {}
    for column in columns.split("|"):
        groups = defaultdict(list)
        for row in rows:
            groups[line.format(**row), column.format(**row)].append(row)
        how = MEASURES.get(measure or column, ("action_acc",))
        cells |= {place: cell(group, *how) for place, group in groups.items()}
    names, heads = (dict.fromkeys(texts) for texts in zip(*cells))
    body = [[name, *(cells.get((name, head), "") for head in heads)] for name in names]
    return "\n".join(f"|{'|'.join(each)}|" for each in ([f"**{title}**", *heads], ["---"] * (len(heads) + 1), *body))


def correlations(part: dict[str, list[dict]]) -> list[dict]:
    """How well a score of heads foretells what they gain, alone and as sets of 4 and of 10: Spearman's rho."""
    scores = next(row["scores"] for row in part["ladder"] if "scores" in row)
    scores["layer order"] = [[-layer for _ in heads] for layer, heads in enumerate(scores["exact"])]
    groups = {"each head alone": part["single"]}
    groups |= {f"sets of {k}": [row for row in part["probe"] if row["num_heads"] == k] for k in (4, 10)}
    found = []
    for (name, score), (of, rows) in product(scores.items(), groups.items()):
        summed = [sum(score[int(layer)][h] for layer, heads in row["heads"].items() for h in heads) for row in rows]
        clicks = [row["action_acc"] for row in rows]
        differences = [np.subtract.outer(values, values) for values in (summed, clicks)]
        ranks = [np.sign(of_pairs).sum(1) for of_pairs in differences]  # equals share theirs
        found.append({"name": name, "of": of, "rho": np.corrcoef(*ranks)[0, 1]})
    return found


def tables(rows: list[dict]) -> dict[str, str]:
    """Every table that these rows allow, as Markdown, by name."""
    part = defaultdict(list)
    for row in rows:
        part[row["part"]].append(row | row.get("update_norms", {}))
    for row in part["ladder"]:
        part[row["domain"]].append(row)
        brief = {field: row[field] for field in ("name", "domain", "action_acc")}
        part["overview"].append(row if row["domain"] == "settings" else brief)
        if row["name"] == FROZEN or row["name"] in MAIN and row["domain"] in PAIRED:
            part["controls"].append(row)
    part["step"] = [row for row in part["settings"] if row["name"] != FROZEN]
    if "single" in part:
        part["correlation"] = correlations(part)
    for name, domain in (("regimes", "settings"), ("prior", "dark")):
        if name in part:  # beside the same methods' runs on the ladder
            methods = {row["name"] for row in part[name]}
            part[name] = [row for row in part[domain] if row["name"] in methods] + part[name]
    return {name: table(part[of], *how) for name, (of, *how) in TABLES.items() if of in part}
