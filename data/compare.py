"""The comparison: fine-tuning runs as rows of compare.json, and the tables that they make.

    python train.py --compare --out data        makes data/compare.json and the tables of data/README.md

A job is a part, a name and the fields of one run's settings in which it differs from the defaults. This file knows no
model: the caller hands it `run`, from settings to what was measured.
"""

import json
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data import check_options, option, progress, replacing

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
DOMAINS = ("settings", "row", "dark", "blueprint")
RATES = tuple(0.01 * 2.0**i for i in range(-5, 6))  # the grid; tuning starts at its middle
STEPS, TUNING_STEPS, TEST_SCREENS = 400, 200, 100
RUNGS = "projections · tokens · heads"
CHOICES = ("top", "matched", "lowest", "random", "least")


@dataclass(frozen=True)
class CompareConfig:
    """The comparison's settings; each field is an option of the command line too."""

    quick: bool = option(False, "the ladder on settings alone, one seed, one learning rate")
    seeds: int = option(5, "runs of each kind", least=1)
    workers: int = option(2, "processes, of one thread each", least=1)
    out: str = option("runs/compare", "directory of compare.json; finished rows found there are kept")

    def __post_init__(self):
        check_options(self)


# ---- The runs --------------------------------------------------------------------------------------------------------


def jobs_of(cfg: CompareConfig, num_layers: int, num_heads: int) -> list[dict]:
    """Every run but those that choose learning rates; where lr is missing it is to be chosen."""
    jobs = []

    def add(part: str, name: str, seeds: int = cfg.seeds, **settings) -> None:
        common = {"part": part, "name": name, "steps": STEPS, "test_screens": TEST_SCREENS}
        jobs.extend(common | {"seed": seed} | settings for seed in range(seeds))

    two = min(cfg.seeds, 2)
    for domain in DOMAINS[:1] if cfg.quick else DOMAINS:
        for name, settings in LADDER.items():
            add("ladder", name, 1 if cfg.quick or name == FROZEN else cfg.seeds, domain=domain, **settings)
    if cfg.quick:
        return [{"lr": 0.01} | job for job in jobs]
    for budget in (1, 4, 10):
        for choice in CHOICES:
            add("probe", choice, num_heads=budget, heads=choice)
    for tau in (0.0, 0.5, 1.0, 4.0):
        for domain in ("settings", "row"):
            add("tau", f"τ = {tau:g}", domain=domain, tau=tau)
    for replay, rates in ((0, (0.001, 0.0025, 0.005, 0.01, 0.02)), (1, (0.0025, 0.01))):
        for lr in rates:
            add("rates", f"{replay} replayed", two, method="lora", lr=lr, replay=replay)
    for domain in ("dark", "settings"):
        for name in (FROZEN, LORA, LORA_VISUAL, IMAGE_LORA):
            seeds = 1 if name == FROZEN else cfg.seeds
            add("referring", name, seeds, task="referring", domain=domain, **LADDER[name])
    brief = {"lr": 0.01, "split": "validation", "test_screens": 2}
    for steps in (1, 3, 6, 50):
        for size in (1, 2, 3, num_heads):
            for normalize in (True, False):
                heads = f"0:{','.join(map(str, range(size)))}"
                options = {"steps": steps, "heads": heads, "normalize": normalize} | brief
                add("normalization", f"{size} heads", two, **options)
    for layer in range(num_layers):
        for head in range(num_heads):
            add("single", f"layer {layer}", 1, heads=f"{layer}:{head}")
    for name in (LORA, LORA_VALUE, IMAGE_LORA):
        add("regimes", name, history=9, **LADDER[name])
    for name in (LORA, LORA_VISUAL, IMAGE_LORA):
        add("prior", name, domain="dark", prior=True, **LADDER[name])
    for lowest in range(num_layers):
        heads = " ".join(f"{layer}:{','.join(map(str, range(num_heads)))}" for layer in range(lowest, num_layers))
        add("lowest", f"layers {lowest} to {num_layers - 1}", 1, heads=heads)
    return jobs


def tuned_as(job: dict) -> tuple[str, int, str]:
    """The kind of run whose learning rate a job takes: its name on the ladder, number of heads and choice of them."""
    if job["part"] in ("probe", "single"):
        return IMAGE_LORA, job.get("num_heads", 1), job["heads"] if job["part"] == "probe" else "top"
    name = job["name"] if job["name"] in LADDER else ALL_HEADS if job["part"] == "lowest" else IMAGE_LORA
    return name, 10, LADDER[name].get("heads", "top")


def tuning_jobs(kind: tuple[str, int, str], rates: set[int]) -> list[dict]:
    """A kind of run at these places of the grid, half as long, judged on validation screens.

    On the ladder these are of every domain; other choices of heads are compared on settings alone: two seeds."""
    name, num_heads, choice = kind
    on_ladder = name != IMAGE_LORA or (num_heads, choice) == (10, "top")
    common = {"part": "tuning", "name": f"{name}, K = {num_heads}, {choice}", "split": "validation"}
    common |= {"steps": TUNING_STEPS, "test_screens": TEST_SCREENS}
    common |= LADDER[name] | {"num_heads": num_heads, "heads": choice}
    return [
        common | {"domain": domain, "lr": RATES[i], "seed": 100 + seed}
        for i in sorted(rates)
        for seed, domain in enumerate(DOMAINS if on_ladder else ("settings", "settings"))
    ]


def best_rate(kind: tuple[str, int, str], finish) -> float:
    """The learning rate of a kind of run: three are tried, and more until the best is not the last of them."""
    middle = best = len(RATES) // 2
    grid, tried = set(range(len(RATES))), set()
    while not {best - 1, best + 1} & grid <= tried:
        tried |= {best - 1, best, best + 1} & grid
        rows = grouped(finish(tuning_jobs(kind, tried)), "lr")
        scores = {i: mean(rows[RATES[i]], "action_acc") for i in sorted(tried, key=lambda i: abs(i - middle))}
        best = max(scores, key=scores.get)
    return RATES[best]


def compare(cfg: CompareConfig, make_config, run, num_layers: int, num_heads: int) -> None:
    """Run (or go on with) the comparison, print its tables. A stop loses only the runs under way.

    make_config(**fields) gives the settings of a run, run(settings) its row.
    """
    path = Path(cfg.out) / "compare.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path) if path.exists() else []
    jobs = jobs_of(cfg, num_layers, num_heads)
    kinds = dict.fromkeys(tuned_as(job) for job in jobs if "lr" not in job)
    expected = len(jobs) + sum(len(tuning_jobs(kind, {0, 1, 2})) for kind in kinds)
    with get_context("spawn").Pool(cfg.workers) as pool, progress(len(rows), expected, "compare") as bar:
        finish = partial(finished, rows, path, pool, bar, make_config, run)
        rates = {kind: best_rate(kind, finish) for kind in kinds}
        done = finish([job if "lr" in job else job | {"lr": rates[tuned_as(job)]} for job in jobs])
    print("\n" + "\n\n".join(tables(done).values()))
    print(f"\nsaved {path}")


def finished(rows: list[dict], path: Path, pool, bar, make_config, run, jobs: list[dict]) -> list[dict]:
    """The rows of these jobs, run where `rows` does not hold them yet; every new row is written at once."""
    settings = [make_config(**{k: v for k, v in job.items() if k not in ("part", "name")}) for job in jobs]
    names = ("part", "name", *(f.name for f in fields(make_config) if f.name != "device"))  # a row has the one used
    keys = [tuple((job | asdict(made))[name] for name in names) for job, made in zip(jobs, settings)]
    known = {tuple((row | {"heads": row["heads_from"]})[name] for name in names): row for row in rows}
    missing = [i for i, key in enumerate(keys) if key not in known]
    bar.total = max(bar.total, bar.n + len(missing))
    for i, measured in zip(missing, pool.imap(run, [settings[i] for i in missing])):
        row = {"part": jobs[i]["part"], "name": jobs[i]["name"]} | measured
        known[keys[i]] = json.loads(json.dumps(row))
        rows.append(known[keys[i]])
        with replacing(path) as temporary:  # a row a line
            temporary.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        bar.set_postfix_str(f"{row['part']}, {row['domain']}, {row['name']}", refresh=False)
        bar.update()
    return [known[key] for key in keys]


def read_rows(path: Path) -> list[dict]:
    """The finished rows of a comparison. Raises ValueError where the file is none."""
    try:
        rows = json.loads(path.read_text())
        if type(rows) is list and all(row["part"] and row["name"] for row in rows):
            return rows
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is not a comparison of this project; move it away to start anew")


# ---- What the rows say -----------------------------------------------------------------------------------------------


def mean(rows: list[dict], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def percent(rows: list[dict], name: str = "action_acc") -> str:
    """Mean and standard deviation over seeds, in %; empty where it was not measured."""
    values = 100 * np.array([row[name] for row in rows if name in row])
    spread = f" ±{values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}" if len(values) else ""


def number(rows: list[dict], name: str, unit: float = 1, digits: int = 0) -> str:
    return f"{mean(rows, name) / unit:,.{digits}f}" if all(name in row for row in rows) else ""


def grouped(rows: list[dict], name: str) -> dict:
    """Rows by a field, in order of appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def table(title: str, lines: dict[str, dict[str, str]]) -> str:
    """A Markdown table of {line: {column: cell}}, its title above the first column."""
    columns = list(dict.fromkeys(column for cells in lines.values() for column in cells))
    body = [[line, *(cells.get(column, "") for column in columns)] for line, cells in lines.items()]
    rows = [[f"**{title}**", *columns], ["---"] * (len(columns) + 1), *body]
    return "\n".join(f"|{'|'.join(row)}|" for row in rows)


def pivot(rows: list[dict], title: str, line: str, column: str, cell=percent) -> str:
    """Cells of the rows that agree in both texts; `line` and `column` are texts with {fields} of a row."""
    lines = {}
    for row in rows:
        lines.setdefault(line.format(**row), {}).setdefault(column.format(**row), []).append(row)
    return table(title, {name: {key: cell(group) for key, group in cells.items()} for name, cells in lines.items()})


def summary(rows: list[dict], title: str, columns: dict, by: str = "name") -> str:
    """A line for each value of a field, its cells made by {column: function of the line's rows}."""
    lines = grouped(rows, by).items()
    return table(title, {name: {column: cell(group) for column, cell in columns.items()} for name, group in lines})


FLOPS = "adapter_flops_per_screen"
BESIDE = {  # what else changes
    "parameters": partial(number, name="trainable_parameters"),
    "adapter kFLOP": partial(number, name=FLOPS, unit=1e3),
    "source %": partial(percent, name="source_acc"),
    "word problems %": partial(percent, name="word_problem_acc"),
    "after an image %": partial(percent, name="word_problem_after_image_acc"),
    "text logits": lambda rows: f"{max(row['text_logits_max_abs_diff'] for row in rows):.2g}",
    "lr": lambda rows: f"{rows[0]['lr']:g}",
}
CLICKS = {"click %": percent, "words": partial(percent, name="text_acc"), "icons": partial(percent, name="icon_acc")}
CONTROLS = {
    "click %": percent,
    "best constant": partial(percent, name="constant_acc"),
    "+ best offset": partial(percent, name="offset_acc"),
    "switches erased": partial(percent, name="erased_acc"),
    "exchanged": partial(percent, name="exchanged_acc"),
    "no point, of": lambda rows: f"{number(rows, 'wrong_format_num')} of {rows[0]['num_total']:,}",
}
STEP = {
    "adapter kFLOP a screen": partial(number, name=FLOPS, unit=1e3),
    "counted": partial(number, name="counted_flops_per_screen", unit=1e3),
    "of the whole step": lambda rows: f"{mean(rows, FLOPS) / mean(rows, 'step_flops_per_screen'):.2%}",
    "kept for the backward pass, KiB a screen": partial(number, name="saved_bytes_per_screen", unit=1024),
}
LOWEST = {
    "click %": percent,
    "whole step, MFLOP a screen": partial(number, name="step_flops_per_screen", unit=1e6, digits=1),
    "ms a step": partial(number, name="step_ms", digits=1),
}
KFLOP, WORD_PROBLEMS, NAMES = BESIDE["adapter kFLOP"], BESIDE["word problems %"], partial(percent, name="name_acc")
UPDATE = lambda rows: f"{np.mean([row['update_norms']['0'] for row in rows]):.2f}"  # noqa: E731
PIVOTS = {  # table -> part, title, what a line and a column have in common, cells
    "probe": ("probe", "settings, click % by choice of heads", "{name}", "K = {num_heads}", percent),
    "tau": ("tau", "click %, K = 10", "{name}", "{domain}", percent),
    "tau costs": ("tau", "adapter kFLOP a screen, K = 10", "{name}", "{domain}", KFLOP),
    "single": ("single", "settings, click % of one head", "{name}", "head {heads_from[2]}", percent),
    "click": ("rates", "LoRA, settings, click %", "{name}", "lr {lr:g}", percent),
    "word problems": ("rates", "LoRA, settings, word problems %", "{name}", "lr {lr:g}", WORD_PROBLEMS),
    "referring": ("referring", "names right, %", "{name}", "{domain}", NAMES),
    "regimes": ("regimes", "settings, click %", "{name}", "after {history} word problems", percent),
    "regime costs": ("regimes", "settings, adapter kFLOP a screen", "{name}", "after {history} word problems", KFLOP),
    "prior": ("prior", "dark, click %", "{name}", "language prior: {prior}", percent),
    "normalization": ("normalization", "layer 0's update", "{steps} steps, normalize: {normalize}", "{name}", UPDATE),
}


def overview(ladder: list[dict]) -> str:
    """The ladder in one table: clicks on every kind of screen; what else changed is of the runs on settings."""
    lines = {}
    for name, group in grouped(ladder, "name").items():
        own = grouped(group, "domain")
        lines[name] = {f"{domain} %": percent(of_domain) for domain, of_domain in own.items()}
        for column in ("parameters", "adapter kFLOP", "source %", "word problems %", "text logits"):
            lines[name][column] = BESIDE[column](own["settings"])
    return table(RUNGS, lines)


def correlations(part: dict[str, list[dict]]) -> str:
    """How well a score of heads foretells what they gain, alone and as sets of 4 and of 10: Spearman's rho."""
    scores = next(row["scores"] for row in part["ladder"] if "scores" in row)
    scores["layer order"] = [[-layer for _ in heads] for layer, heads in enumerate(scores["exact"])]
    groups = {"each head alone": part["single"]}
    groups |= {f"sets of {k}": [row for row in part["probe"] if row["num_heads"] == k] for k in (4, 10)}
    lines = {probe: {} for probe in scores}
    for probe, score in scores.items():
        for column, rows in groups.items():
            summed = [sum(score[int(layer)][h] for layer, heads in row["heads"].items() for h in heads) for row in rows]
            pairs = summed, [row["action_acc"] for row in rows]
            ranks = [np.argsort(np.argsort(np.array(values, dtype=float), kind="stable")) for values in pairs]
            lines[probe][column] = f"{np.corrcoef(*ranks)[0, 1]:.2f}"
    return table("rank correlation of score and click accuracy, settings", lines)


def tables(rows: list[dict]) -> dict[str, str]:
    """Every table that these rows allow, as Markdown, by name."""
    part = grouped(rows, "part")
    domains = grouped(part["ladder"], "domain")
    found = {"ladder": overview(part["ladder"])}
    for domain, own in domains.items():
        found[domain] = summary(own, f"{domain}: {RUNGS}", CLICKS | BESIDE)
    shown = [row for row in part["ladder"] if row["name"] in (FROZEN, LORA, LORA_VISUAL, IMAGE_LORA)]
    lines = [row | {"line": f"{row['domain']}: {row['name']}"} for row in shown]
    lines = [row for row in lines if "erased_acc" in row or row["name"] == FROZEN]
    found["controls"] = summary(lines, "controls", CONTROLS, by="line")
    found["step"] = summary(domains["settings"][1:], "the whole training step, settings", STEP)
    if "lowest" in part:
        found["lowest"] = summary(part["lowest"], "all heads of, settings", LOWEST)
        found["correlation"] = correlations(part)
        regular = [row for row in domains["settings"] if row["name"] in (LORA, LORA_VALUE, IMAGE_LORA)]
        part["regimes"] = regular + part["regimes"]
        part["prior"] = [row for row in shown if row["domain"] == "dark" and row["name"] != FROZEN] + part["prior"]
    for name, (of, *how) in PIVOTS.items():
        if of in part:
            found[name] = pivot(part[of], *how)
    return found
