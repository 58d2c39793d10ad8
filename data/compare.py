"""The comparison: fine-tuning runs as rows of compare.json, and the tables and figures that they make.

    python train.py --compare --out data        makes data/compare.json, data/figures/ and the tables of data/README.md

A job is a part of the comparison, a name, and the fields of `train.Config` in which the run differs from the defaults.
A row of compare.json is a job and what was measured. To add a table, add its jobs to `jobs_of` and a line to `tables`,
where `grid` says what its lines and columns are. This file knows no model: the caller hands it `run`.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data import Settings, figures, option, progress
from data.costs import CostsConfig, restrictions
from data.pretrain import PretrainConfig, pretrain
from data.prompts import BASE, base_path
from data.screens import PAIRED
from imagelora import safe_write

FROZEN, LORA, LORA_VISUAL = "frozen", "LoRA q k v o, all tokens", "LoRA q k v o, visual tokens"
VALUES, ALL_HEADS, IMAGE_LORA = "LoRA v, visual tokens", "Image-LoRA, all heads", "Image-LoRA, half of the heads"
LADDER = {  # one restriction a line, from LoRA to Image-LoRA
    FROZEN: {"method": "none", "lr": 0.0},
    LORA: {"method": "lora"},
    LORA_VISUAL: {"method": "lora", "tokens": "visual"},
    VALUES: {"method": "lora", "tokens": "visual", "projections": "v"},
    ALL_HEADS: {"heads": "all"},
    IMAGE_LORA: {},
}
SMALL, SMALL_VISUAL = "LoRA r = 2, all tokens", "LoRA r = 2, visual tokens"
BESIDE = {
    "LoRA v, all tokens": {"method": "lora", "projections": "v"},
    SMALL: {"method": "lora", "r": 2, "lora_alpha": 4.0},
    SMALL_VISUAL: {"method": "lora", "r": 2, "lora_alpha": 4.0, "tokens": "visual"},
}
METHODS = LADDER | BESIDE
DOMAINS = ("row", "settings", "dark", "blueprint")
STEPS, FEWER_STEPS, TUNING_STEPS, TEST_SCREENS = 600, 400, 200, 100
SHIPPED = "shipped base"
OTHERS = ((2, 0), (2, 3), (1, 12))  # (seed, screens a step that are asked about relations) of the second stage
BASES = {f"seed {seed}, {relations} relations": (seed, relations) for seed, relations in OTHERS}
NO_SKILL, _, RELATED = BASES
MAIN = (LORA, VALUES, IMAGE_LORA)


@dataclass(frozen=True)
class CompareConfig(Settings):
    """The comparison's settings; each field is an option of the command line too."""

    quick: bool = option(False, "the ladder on row alone, one seed, one learning rate, the shipped base")
    workers: int = option(2, "processes, of one thread each", least=1)
    bases: str = option("runs/bases", "directory of the base models that it makes; those found there are kept")
    out: str = option("runs/compare", "directory of compare.json; finished rows found there are kept")


def jobs_of(cfg: CompareConfig) -> list[dict]:
    """Every run but those that choose learning rates. A run whose rate is not named has that of its method."""
    jobs = []

    def add(part, name, seeds, rung=None, **settings):
        rung = rung or name
        steps = FEWER_STEPS if part in ("probe", "sets", "tau", "gamma", "depth", "referring") else STEPS
        common = {"part": part, "name": name, "rate_of": rung, "steps": steps, "test_screens": TEST_SCREENS}
        common["controls"] = part in ("ladder", "rates", "blind")
        jobs.extend(common | METHODS[rung] | settings | {"seed": seed} for seed in range(seeds))

    if cfg.quick:
        for name in METHODS:
            add("ladder", name, 1, **{"lr": 0.01} | METHODS[name])
        return jobs
    for domain, name in product(DOMAINS[:2], METHODS):
        seeds = 1 if name == FROZEN else 3 if domain == "row" else 2 if name in LADDER else 1
        add("ladder", name, seeds, domain=domain)
    for domain, name in product(("dark", "blueprint"), (FROZEN, *MAIN)):
        add("ladder", name, 1, domain=domain)
    for name in (SMALL, SMALL_VISUAL):
        add("longer", name, 1, steps=4 * STEPS)
    for base, name in product(BASES, MAIN):
        add("skill", name, 2, base=base_file(cfg, base))
        if base == RELATED:
            add("headline", name, 1, base=base_file(cfg, base), domain="settings")
    for base, projections in product((BASE, base_file(cfg, NO_SKILL)), ("qkv", "qk", "vo", "o")):
        add("elsewhere", projections, 1, LORA_VISUAL, projections=projections, base=base)
    for size, name in product((4, 8, 12), ("top", "matched", "random", "gate", "exact", "lowest", "least")):
        if size == 12 and name in ("exact", "lowest", "least"):
            continue
        chosen = {"heads": "top", "probe": name} if name in ("gate", "exact") else {"heads": name}
        add("probe", name, 2, IMAGE_LORA, num_heads=size, **chosen)
        if size == 8 and name in ("top", "matched", "random", "gate"):
            add("probe", name, 1, IMAGE_LORA, num_heads=size, domain="settings", **chosen)
            add("probe", name, 1, IMAGE_LORA, num_heads=size, base=base_file(cfg, RELATED), **chosen)
    for tau in (0.0, 0.5, 1.0, 4.0):
        add("tau", f"τ = {tau:g}", 2, IMAGE_LORA, tau=tau)
    add("sets", "random", 10, IMAGE_LORA, heads="random", num_heads=8)
    for gamma_lr, normalize in ((1.0, True), (0.1, True), (0.0, True), (1.0, False), (0.0, False)):
        add("gamma", f"γ's rate {gamma_lr:g} of A's", 1, IMAGE_LORA, gamma_lr=gamma_lr, normalize=normalize)
    for replay, lr in ((0, 0.0025), (0, 0.005), (0, 0.01), (0, 0.02), (1, 0.005), (1, 0.01)):
        add("rates", f"{replay} replayed", 1, LORA, lr=lr, replay=replay)
    for name in (LORA_VISUAL, IMAGE_LORA):
        add("blind", name, 1, switches="erased")
    for domain, name in product(("dark", "settings"), (FROZEN, LORA, LORA_VISUAL, IMAGE_LORA)):
        add("referring", name, 1, task="referring", domain=domain)
    for steps, size, normalize in product((1, 50), (1, 2, 3, 6), (True, False)):
        heads = f"0:{','.join(map(str, range(size)))}"
        brief = {"lr": 0.01, "split": "validation", "test_screens": 2}
        add("normalization", f"{size} heads", 1, IMAGE_LORA, steps=steps, heads=heads, normalize=normalize, **brief)
    for name in (LORA, "LoRA v, all tokens", IMAGE_LORA):
        add("history", name, 1, history=9)
    for name in (LORA, LORA_VISUAL, IMAGE_LORA):
        add("prior", name, 1, domain="dark", prior=True)
    for lowest in range(4):
        heads = " ".join(f"{layer}:0,1,2,3,4,5" for layer in range(lowest, 4))
        add("depth", f"layers {lowest} to 3", 1, ALL_HEADS, heads=heads)
    return jobs


# ---- Bases, learning rates, and the runs -----------------------------------------------------------------------------


def base_file(cfg: CompareConfig, name: str) -> str:
    return f"{cfg.bases}/{name.replace(', ', '-').replace(' ', '')}.pt"


def make_base(cfg: PretrainConfig) -> None:
    if not Path(cfg.out).with_suffix(".json").exists():
        pretrain(cfg)


def make_bases(cfg: CompareConfig, pool) -> dict[str, str]:
    """Bases that differ from each other in their second stage alone: name -> file."""
    files = {name: base_file(cfg, name) for name in BASES}
    first = Path(cfg.bases) / "first.pt"
    first.parent.mkdir(parents=True, exist_ok=True)
    if not first.exists():
        pretrain(PretrainConfig(second_steps=0, out=str(first)))
    second = [
        PretrainConfig(steps=0, start=str(first), relations=relations, seed=seed, out=files[name])
        for name, (seed, relations) in BASES.items()
    ]
    pool.map(make_base, second, 1)
    return files


def base_rows(files: dict[str, str]) -> list[dict]:
    """A row for each base: its record."""
    records = {name: json.loads(base_path(file).with_suffix(".json").read_text()) for name, file in files.items()}
    return [{"part": "bases", "name": name, "base": files[name]} | record for name, record in records.items()]


def tuning_jobs(method: str, rates: list[float]) -> list[dict]:
    """A method at these learning rates, half as long, on validation screens and seeds that no table uses."""
    common = METHODS[method] | {"part": "tuning", "name": method, "split": "validation"}
    common |= {"steps": TUNING_STEPS, "test_screens": TEST_SCREENS, "controls": False}
    return [common | {"domain": domain, "lr": lr, "seed": 100} for lr in rates for domain in PAIRED]


def best_rate(method: str, finish) -> float:
    """The learning rate of a method: three are tried, and more until the best is not the last of them."""
    best, scores = 0.02, {}
    while new := [lr for lr in (best, best / 2, 2 * best) if lr not in scores and 0.001 < lr < 1]:
        rows = finish(tuning_jobs(method, new))
        scores |= {lr: np.mean([row["action_acc"] for row in rows if row["lr"] == lr]) for lr in new}
        best = max(scores, key=scores.get)  # of equals the one nearest to 0.02
    return best


def compare(cfg: CompareConfig, make_config, run) -> None:
    """Run (or go on with) the comparison, print its tables. A stop loses only the runs under way.

    make_config(**fields) gives the settings of a run, run(settings) its row."""
    path = Path(cfg.out) / "compare.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(make_config) if f.name != "device"]

    def key(row: dict) -> tuple:
        return row["part"], row["name"], *(row[name] for name in names)

    try:
        rows = json.loads(path.read_text()) if path.exists() else []
        made = [row for row in rows if row["part"] == "bases"]
        known = {key(row | {"heads": row["heads_from"]}): row for row in rows if row["part"] != "bases"}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a comparison of this project; move it away to start anew") from None

    def finish(jobs: list[dict]) -> list[dict]:
        """The rows of these jobs, run where they are missing; every new row is written at once, a row a line."""
        settings = [
            make_config(**{name: job[name] for name in job.keys() - {"part", "name", "rate_of"}}) for job in jobs
        ]
        keys = [key(job | asdict(each)) for job, each in zip(jobs, settings)]
        missing = [i for i, at in enumerate(keys) if at not in known]
        bar.total = max(bar.total, bar.n + len(missing))
        for i, measured in zip(missing, pool.imap(run, [settings[i] for i in missing])):
            row = {"part": jobs[i]["part"], "name": jobs[i]["name"]} | measured
            known[keys[i]] = json.loads(json.dumps(row))
            text = "[\n" + ",\n".join(map(json.dumps, [*made, *known.values()])) + "\n]\n"
            safe_write(text.encode(), path)
            bar.set_postfix_str(f"{row['part']}, {row['domain']}, {row['name']}", refresh=False)
            bar.update()
        return [known[at] for at in keys]

    jobs = jobs_of(cfg)
    with get_context("spawn").Pool(cfg.workers) as pool:
        if not made:
            made = base_rows({SHIPPED: BASE} | ({} if cfg.quick else make_bases(cfg, pool)))
        with progress(len(known), len(jobs) + (0 if cfg.quick else 2 * 3 * len(METHODS)), "compare") as bar:
            tuned = {} if cfg.quick else {method: best_rate(method, finish) for method in METHODS if method != FROZEN}
            done = finish([{"lr": tuned.get(job["rate_of"])} | job for job in jobs])
    print("\n" + "\n\n".join(tables(made + done).values()))
    if not cfg.quick:
        (path.parent / "figures").mkdir(exist_ok=True)
        for name, picture in pictures(made + done).items():
            figures.save(picture, path.parent / "figures" / f"{name}.png")
    print(f"\nsaved {path}")


# ---- Tables and figures: each is a function of the rows --------------------------------------------------------------


def where(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def percent(rows: list[dict], field: str = "action_acc") -> str:
    """The mean of an accuracy over seeds in %, and its standard deviation."""
    values = [100 * row[field] for row in rows if field in row]
    spread = f" ±{np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}" if values else ""


def mean(rows: list[dict], field: str, unit: float = 1, form: str = ",.0f") -> str:
    values = [row[field] / unit for row in rows if field in row]
    return format(np.mean(values), form) if values else ""


def markdown(head: list[str], body: list[list[str]]) -> str:
    ruler = ["---"] * len(head)
    return "\n".join(f"|{'|'.join(cells)}|" for cells in ([f"**{head[0]}**", *head[1:]], ruler, *body))


def grid(title: str, rows: list[dict], column: str, line: str = "{name}", cell=percent) -> str:
    """A Markdown table. line and column are texts with {fields} of a row; cell(rows) is what stands where they meet."""
    places = defaultdict(list)
    for row in rows:
        places[line.format(**row), column.format(**row)].append(row)
    lines, columns = (dict.fromkeys(place[i] for place in places) for i in (0, 1))
    return markdown([title, *columns], [[name, *(cell(places[name, at]) for at in columns)] for name in lines])


def measures(title: str, rows: list[dict], cells: dict) -> str:
    """A Markdown table of a line for each name; cells: column -> what stands there, a function of the name's rows."""
    groups = {name: where(rows, name=name) for name in dict.fromkeys(row["name"] for row in rows)}
    return markdown([title, *cells], [[name, *(cell(of) for cell in cells.values())] for name, of in groups.items()])


def acc(field: str):
    return partial(percent, field=f"{field}_acc")


MEASURED = {  # column -> what stands there
    "click %": percent,
    "words %": acc("text"),
    "icons %": acc("icon"),
    "parameters": partial(mean, field="trainable_parameters"),
    "adapter kFLOP a screen": partial(mean, field="adapter_flops_per_screen", unit=1e3),
    "source %": acc("source"),
    "word problems %": acc("word_problem"),
    "after an image %": acc("word_problem_after_image"),
    "text logits": lambda rows: f"{max(row['text_logits_max_abs_diff'] for row in rows):.2g}",
    "rate": partial(mean, field="lr", form="g"),
}
CONTROLS = {
    "click %": percent,
    "best constant": acc("constant"),
    "base + offset a kind": acc("offset"),
    "base + offset a name": acc("name_offset"),
    "base's height, best column": acc("column"),
    "image erased": acc("blank"),
    "switches erased": acc("erased"),
    "exchanged with names": acc("exchanged"),
}
STEP = {
    "adapter kFLOP a screen": partial(mean, field="adapter_flops_per_screen", unit=1e3),
    "counted": partial(mean, field="counted_flops_per_screen", unit=1e3),
    "the decoder's step, MFLOP": partial(mean, field="step_flops_per_screen", unit=1e6, form=".1f"),
    "the vision tower, MFLOP": partial(mean, field="vision_flops_per_screen", unit=1e6, form=".1f"),
    "kept for the backward pass, KiB": partial(mean, field="saved_bytes_per_screen", unit=1024),
    "ms a step": partial(mean, field="step_ms", form=".0f"),
}


def on_bases(rows: list[dict]) -> list[dict]:
    """Runs on row with every base; the shipped one's are the ladder's."""
    shown = where(rows, part="ladder", domain="row") + where(rows, part="skill")
    return [row for row in shown if row["name"] in MAIN]


def headline(rows: list[dict]) -> str:
    shown = on_bases(rows) + where(rows, part="headline") + where(rows, part="ladder", domain="settings")
    shown = [row for row in shown if row["name"] in MAIN and row["of_base"] in (SHIPPED, RELATED)]
    return grid("clicks right", shown, "{domain}, {of_base} %")


def controls(rows: list[dict]) -> str:
    shown = [row for row in where(rows, part="ladder") if row["domain"] in PAIRED] + where(rows, part="blind")
    told = "{domain}: {name}, switches {switches}"
    return measures("control, %", [row | {"name": told.format(**row)} for row in shown], CONTROLS)


def beside_the_ladder(rows: list[dict], part: str) -> list[dict]:
    """The rows of a part, after those of the ladder's runs that differ from them in one thing."""
    names = {(row["name"], row["domain"]) for row in where(rows, part=part)}
    return [row for row in where(rows, part="ladder") if (row["name"], row["domain"]) in names] + where(rows, part=part)


def overlap(rows: list[dict]) -> str:
    """How many of its heads a choice shares with the probe's of the same seed."""
    shown = []
    for row in where(rows, part="probe", domain="row", base=BASE):
        same = {name: row[name] for name in ("part", "domain", "base", "num_heads", "seed")}
        top = where(rows, name="top", **same)[0]["heads"]
        shared = sum(len(set(row["heads"].get(layer, [])) & set(chosen)) for layer, chosen in top.items())
        shown.append(row | {"shared": shared})
    return grid(
        "heads shared with the probe's", shown, "of {num_heads}", cell=partial(mean, field="shared", form=".1f")
    )


def correlation(rows: list[dict]) -> str:
    """Spearman's rank correlation of the summed score of random heads with their clicks."""
    sets, body = where(rows, part="sets"), []
    if not sets:
        return ""
    for row in where(rows, part="probe", domain="row", base=BASE, num_heads=8, seed=0):
        if row["name"] in ("top", "exact", "gate"):
            scores = row["scores"]
            summed = [sum(scores[int(layer)][h] for layer, heads in of["heads"].items() for h in heads) for of in sets]
            ranks = [np.argsort(np.argsort(values)) for values in (summed, [of["action_acc"] for of in sets])]
            body.append([row["probe"], f"{np.corrcoef(*ranks)[0, 1]:.2f}"])
    return markdown([f"score of {len(sets)} random sets of 8 heads", "rank correlation with clicks on row"], body)


def tables(rows: list[dict]) -> dict[str, str]:
    """Every table that these rows allow, as Markdown."""
    bases = {row["base"]: row for row in where(rows, part="bases")}
    for row in rows:
        of = bases[row["base"]]
        row |= {"of_base": of["name"], "relation": 100 * of["source"]["relation_acc"]} | row.get("changes", {})
    part = defaultdict(list)
    for row in rows:
        part[row["part"]].append(row)
    found = {
        "ladder": grid("clicks right", part["ladder"], "{domain} %"),
        "controls": controls(rows),
        "step": measures("a training step, row", where(part["ladder"], domain="row"), STEP),
    }
    for domain in dict.fromkeys(row["domain"] for row in part["ladder"]):
        found[domain] = measures(domain, where(part["ladder"], domain=domain), MEASURED)
    small = [row for row in beside_the_ladder(rows, "longer") if row["domain"] in PAIRED]
    elsewhere = "LoRA at visual tokens on"
    sqrt = "1/√S: {normalize}"
    update = partial(mean, field="update0", form=".2f")
    found |= {
        "headline": headline(rows),
        "skill": grid("what is right of a name", on_bases(rows), "{name} %", "{of_base}: {relation:.1f} % right"),
        "longer": grid("clicks right", small, "{domain}, {steps} steps %"),
        "elsewhere": grid(elsewhere, part["elsewhere"], "row, {of_base} %"),
        "probe": grid("heads", part["probe"], "{domain}, K = {num_heads}, {of_base} %"),
        "overlap": overlap(rows),
        "correlation": correlation(rows),
        "tau": grid("clicks right, K = 12", part["tau"], "{domain} %"),
        "gamma": grid("row, clicks right %", part["gamma"], "heads: {heads_from}, " + sqrt),
        "rates": grid("LoRA, row, clicks right %", part["rates"], "rate {lr:g}"),
        "forgetting": grid("LoRA, row, word problems %", part["rates"], "rate {lr:g}", cell=acc("word_problem")),
        "referring": grid("names right", part["referring"], "{domain} %", cell=acc("name")),
        "normalization": grid("layer 0's update", part["normalization"], "{name}", "{steps} steps, " + sqrt, update),
        "history": grid("row, clicks right %", beside_the_ladder(rows, "history"), "after {history} word problems"),
        "prior": grid("dark, clicks right %", beside_the_ladder(rows, "prior"), "names tell places: {prior}"),
        "depth": measures("all heads of, row", part["depth"], {"click %": percent} | STEP),
    }
    return {name: table for name, table in found.items() if table.count("\n") > 1}  # those that have a line


def pictures(rows: list[dict]) -> dict:
    """The figures of README that are made of rows."""
    points, lines = [], defaultdict(list)
    for name in list(METHODS)[1:]:
        of = where(rows, part="ladder", domain="row", name=name)
        clicks = [row["action_acc"] for row in of]
        x = np.mean([row["adapter_flops_per_screen"] for row in of]) / 1e3
        kept = not any(row["text_logits_max_abs_diff"] for row in of)
        points.append({"name": name, "x": x, "y": np.mean(clicks), "spread": np.std(clicks, ddof=1), "kept": kept})
    shown = sorted(on_bases(rows), key=lambda row: row["relation"])
    for name, base in dict.fromkeys((row["name"], row["base"]) for row in shown):
        of = where(shown, name=name, base=base)
        clicks = [row["action_acc"] for row in of]
        lines[name].append((of[0]["relation"] / 100, np.mean(clicks), np.std(clicks, ddof=1)))
    flops = restrictions(CostsConfig())
    shares = [(name, of / max(flops.values())) for name, of in flops.items()]
    return {
        "trade_off": figures.trade_off(points),
        "skill": figures.skill(lines),
        "factors": figures.factors(shares),
    }
