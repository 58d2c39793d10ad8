"""The comparison: fine-tuning runs as rows of compare.json, and the tables and figures that they make.

    python train.py --compare --out data        makes data/compare.json, data/figures/ and the tables of data/README.md

A job is a part of the comparison, a name, and the fields of `train.Config` in which the run differs from the defaults.
A row of compare.json is a job and what was measured. A table is a function of the rows. To add a table, add its jobs
to `jobs_of` and a function to TABLES. This file knows no model: the caller hands it `run`.
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
STEPS, TUNING_STEPS, TEST_SCREENS = 400, 200, 100
NO_SKILL = "seed 2, 0 relations"
BASES = {f"seed {seed}, {n} relations": (seed, n) for seed, n in product((2, 3), (0, 1, 3, 12))}
MAIN = (LORA, VALUES, IMAGE_LORA)
SHIPPED = "shipped base"
RELATED = ("seed 2, 12 relations", "seed 3, 12 relations")


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
        common = {"part": part, "name": name, "rate_of": rung, "steps": STEPS, "test_screens": TEST_SCREENS}
        jobs.extend(common | METHODS[rung] | settings | {"seed": seed} for seed in range(seeds))

    if cfg.quick:
        for name in METHODS:
            add("ladder", name, 1, **{"lr": 0.01} | METHODS[name])
        return jobs
    for domain, name in product(DOMAINS, METHODS):
        add("ladder", name, 1 if name == FROZEN else 3 if domain in PAIRED else 2, domain=domain)
    for domain, name in product(PAIRED, (SMALL, SMALL_VISUAL)):
        add("longer", name, 2, domain=domain, steps=4 * STEPS)
    for base in BASES:
        path = base_file(cfg, base)
        for name in (LORA, VALUES, IMAGE_LORA):
            add("skill", name, 2, base=path)
            if base in RELATED:
                add("headline", name, 2, base=path, domain="settings")
    for base, projections in product((BASE, base_file(cfg, NO_SKILL)), ("qkv", "qk", "vo", "o", "v")):
        add("elsewhere", projections, 2, LORA_VISUAL, projections=projections, base=base)
    for size, name in product((4, 8, 12), ("top", "matched", "random", "lowest", "least", "gate", "exact")):
        chosen = {"heads": "top", "probe": name} if name in ("gate", "exact") else {"heads": name}
        add("probe", name, 3, IMAGE_LORA, num_heads=size, **chosen)
        if size < 12 and name != "exact":
            add("probe", name, 2, IMAGE_LORA, num_heads=size, domain="settings", **chosen)
        if size == 8 and name in ("top", "matched", "gate"):
            add("probe", name, 2, IMAGE_LORA, num_heads=size, base=base_file(cfg, RELATED[0]), **chosen)
    for tau, domain in product((0.0, 0.5, 1.0, 4.0), PAIRED):
        add("tau", f"τ = {tau:g}", 2, IMAGE_LORA, tau=tau, domain=domain)
    for seed in range(16):
        add("sets", f"set {seed}", 1, IMAGE_LORA, heads="random", num_heads=8, seed=seed)
    for gamma_lr, normalize in product((1.0, 0.1, 0.0), (True, False)):
        for name in (ALL_HEADS, IMAGE_LORA):
            add("gamma", f"γ's rate {gamma_lr:g} of A's", 2, name, gamma_lr=gamma_lr, normalize=normalize)
    for replay, lr in product((0, 1), (0.001, 0.0025, 0.005, 0.01, 0.02)):
        add("rates", f"{replay} replayed", 2, LORA, lr=lr, replay=replay)
    for name in (LORA_VISUAL, IMAGE_LORA):
        add("blind", name, 1, switches="erased")
    for domain, name in product(("dark", "settings"), (FROZEN, LORA, LORA_VISUAL, IMAGE_LORA)):
        add("referring", name, 1 if name == FROZEN else 2, task="referring", domain=domain)
    for steps, size, normalize in product((1, 3, 10, 50), (1, 2, 3, 6), (True, False)):
        heads = f"0:{','.join(map(str, range(size)))}"
        brief = {"lr": 0.01, "split": "validation", "test_screens": 2}
        add("normalization", f"{size} heads", 2, IMAGE_LORA, steps=steps, heads=heads, normalize=normalize, **brief)
    for name in (LORA, "LoRA v, all tokens", IMAGE_LORA):
        add("history", name, 2, history=9)
    for name in (LORA, LORA_VISUAL, IMAGE_LORA):
        add("prior", name, 2, domain="dark", prior=True)
    for lowest in range(4):
        heads = " ".join(f"{layer}:0,1,2,3,4,5" for layer in range(lowest, 4))
        add("depth", f"layers {lowest} to 3", 2, ALL_HEADS, heads=heads)
    return jobs


# ---- Bases, learning rates, and the runs -----------------------------------------------------------------------------


def base_file(cfg: CompareConfig, name: str) -> str:
    return f"{cfg.bases}/{name.replace(', ', '-').replace(' ', '')}.pt"


def make_base(cfg: PretrainConfig) -> None:
    if not Path(cfg.out).with_suffix(".json").exists():
        pretrain(cfg)


def make_bases(cfg: CompareConfig, pool) -> dict[str, str]:
    """The bases of other seeds, and with other numbers of relation screens: name -> file."""
    Path(cfg.bases).mkdir(parents=True, exist_ok=True)
    first = {seed: f"{cfg.bases}/seed{seed}.pt" for seed, _ in BASES.values()}
    pool.map(make_base, [PretrainConfig(seed=seed, second_steps=0, out=out) for seed, out in first.items()], 1)
    files = {name: base_file(cfg, name) for name in BASES}
    second = [
        PretrainConfig(steps=0, start=first[seed], relations=relations, seed=seed, out=files[name])
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
    common |= {"steps": TUNING_STEPS, "test_screens": TEST_SCREENS}
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
    print("\n" + "\n\n".join(tables(made + done)))
    if not cfg.quick:
        (path.parent / "figures").mkdir(exist_ok=True)
        for name, picture in pictures(made + done).items():
            figures.save(picture, path.parent / "figures" / f"{name}.png")
    print(f"\nsaved {path}")


# ---- Tables: each is a function of the rows --------------------------------------------------------------------------


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
    lines, columns = (dict.fromkeys(texts) for texts in zip(*places))
    return markdown([title, *columns], [[name, *(cell(places[name, at]) for at in columns)] for name in lines])


def measures(title: str, rows: list[dict], cells: dict) -> str:
    """A Markdown table of a line for each name; cells: column -> what stands there, a function of the name's rows."""
    names = dict.fromkeys(row["name"] for row in rows)
    return markdown(
        [title, *cells], [[name, *(cell(where(rows, name=name)) for cell in cells.values())] for name in names]
    )


def accuracies(**columns: str) -> dict:
    return {f"{text.replace('_', ' ')} %": partial(percent, field=f"{field}_acc") for text, field in columns.items()}


def ladder(rows: list[dict]) -> str:
    return grid("clicks right", where(rows, part="ladder"), "{domain} %")


def measured(rows: list[dict], domain: str = "row") -> str:
    cells = accuracies(clicks="action", words="text", icons="icon")
    cells["parameters"] = partial(mean, field="trainable_parameters")
    cells["adapter kFLOP a screen"] = partial(mean, field="adapter_flops_per_screen", unit=1e3)
    cells |= accuracies(source="source", word_problems="word_problem", after_an_image="word_problem_after_image")
    cells["text logits"] = lambda of: f"{max(row['text_logits_max_abs_diff'] for row in of):.2g}"
    cells["rate"] = partial(mean, field="lr", form="g")
    return measures(domain, where(rows, part="ladder", domain=domain), cells)


def longer(rows: list[dict]) -> str:
    names, shown = (SMALL, SMALL_VISUAL, IMAGE_LORA), where(rows, part="ladder") + where(rows, part="longer")
    shown = [row for row in shown if row["name"] in names and row["domain"] in PAIRED]
    return grid("clicks right", shown, "{domain}, {steps} steps %")


def control(rows: list[dict]) -> str:
    shown = [row for row in where(rows, part="ladder") if row["domain"] in PAIRED]
    shown += [row | {"name": f"{row['name']}, trained without switches"} for row in where(rows, part="blind")]
    rules = accuracies(best_constant="constant", offset_a_kind="offset", offset_a_name="name_offset", column="column")
    rules |= accuracies(image_erased="blank", switches_erased="erased", exchanged_with_names="exchanged")
    named = [row | {"name": f"{row['domain']}: {row['name']}"} for row in shown]
    return measures("control", named, accuracies(clicks="action") | rules)


def on_bases(rows: list[dict]) -> list[dict]:
    """Runs on row with every base; the shipped one's are the ladder's."""
    shown = where(rows, part="ladder", domain="row") + where(rows, part="skill")
    return [row for row in shown if row["name"] in MAIN]


def headline(rows: list[dict]) -> str:
    shown = on_bases(rows) + where(rows, part="headline")
    shown += [row for row in where(rows, part="ladder", domain="settings") if row["name"] in MAIN]
    return grid(
        "clicks right", [row for row in shown if row["of_base"] in (SHIPPED, *RELATED)], "{domain}, {of_base} %"
    )


def skill(rows: list[dict]) -> str:
    return grid("base: what is right of a name", on_bases(rows), "{name} %", "{of_base}: {relation:.1f} %")


def elsewhere(rows: list[dict]) -> str:
    return grid("row, LoRA at visual tokens on", where(rows, part="elsewhere"), "{of_base} %")


def probe(rows: list[dict]) -> str:
    return grid("heads", where(rows, part="probe"), "{domain}, K = {num_heads}, {of_base} %")


def overlap(rows: list[dict]) -> str:
    """How many of its heads a choice shares with the probe's of the same seed."""
    shown = []
    for row in where(rows, part="probe", domain="row", base=BASE):
        same = {name: row[name] for name in ("part", "domain", "base", "num_heads", "seed")}
        top = where(rows, name="top", **same)[0]["heads"]
        shared = sum(len(set(row["heads"].get(layer, [])) & set(chosen)) for layer, chosen in top.items())
        shown.append(row | {"shared": shared})
    cell = partial(mean, field="shared", form=".1f")
    return grid("heads shared with the probe's", shown, "of {num_heads}", cell=cell)


def tau(rows: list[dict]) -> str:
    return grid("clicks right", where(rows, part="tau"), "{domain} %")


def gamma(rows: list[dict]) -> str:
    return grid("row, clicks right %", where(rows, part="gamma"), "heads: {heads_from}, 1/√S: {normalize}")


def rates(rows: list[dict]) -> str:
    return grid("LoRA, row, clicks right %", where(rows, part="rates"), "rate {lr:g}")


def forgetting(rows: list[dict]) -> str:
    cell = partial(percent, field="word_problem_acc")
    return grid("LoRA, row, word problems %", where(rows, part="rates"), "rate {lr:g}", cell=cell)


def referring(rows: list[dict]) -> str:
    return grid("names right", where(rows, part="referring"), "{domain} %", cell=partial(percent, field="name_acc"))


def normalization(rows: list[dict]) -> str:
    shown = [row | row["changes"] for row in where(rows, part="normalization")]
    cell = partial(mean, field="update0", form=".2f")
    return grid("size of layer 0's update", shown, "{name}", "{steps} steps, 1/√S: {normalize}", cell)


def history(rows: list[dict]) -> str:
    shown = beside_the_ladder(rows, "history", "row")
    return grid("row, clicks right %", shown, "after {history} word problems")


def prior(rows: list[dict]) -> str:
    return grid("dark, clicks right %", beside_the_ladder(rows, "prior", "dark"), "names tell places: {prior}")


def beside_the_ladder(rows: list[dict], part: str, domain: str) -> list[dict]:
    names = {row["name"] for row in where(rows, part=part)}
    return [row for row in where(rows, part="ladder", domain=domain) if row["name"] in names] + where(rows, part=part)


def step(rows: list[dict]) -> str:
    shown = [row for row in where(rows, part="ladder", domain="row") if row["name"] != FROZEN]
    for row in shown:
        row["whole"] = row["step_flops_per_screen"] + row["vision_flops_per_screen"]
        row["share"] = 100 * row["adapter_flops_per_screen"] / row["whole"]
    cells = {
        "adapter kFLOP a screen": partial(mean, field="adapter_flops_per_screen", unit=1e3),
        "counted": partial(mean, field="counted_flops_per_screen", unit=1e3),
        "whole step with the vision tower, MFLOP": partial(mean, field="whole", unit=1e6),
        "the adapter's share %": partial(mean, field="share", form=".2f"),
        "kept for the backward pass, KiB a screen": partial(mean, field="saved_bytes_per_screen", unit=1024),
    }
    return measures("the whole training step, row", shown, cells)


def depth(rows: list[dict]) -> str:
    cells = accuracies(clicks="action")
    cells["whole step, MFLOP a screen"] = partial(mean, field="step_flops_per_screen", unit=1e6, form=".1f")
    cells["ms a step"] = partial(mean, field="step_ms", form=".1f")
    return measures("all heads of, row", where(rows, part="depth"), cells)


def correlation(rows: list[dict]) -> str:
    """Spearman's rank correlation of the summed score of random heads with their clicks."""
    sets, body = where(rows, part="sets"), []
    for row in where(rows, part="probe", domain="row", base=BASE, num_heads=8, seed=0):
        if row["name"] in ("top", "exact", "gate"):
            scores = row["scores"]
            summed = [sum(scores[int(layer)][h] for layer, heads in of["heads"].items() for h in heads) for of in sets]
            ranks = [np.argsort(np.argsort(values)) for values in (summed, [of["action_acc"] for of in sets])]
            body.append([row["probe"], f"{np.corrcoef(*ranks)[0, 1]:.2f}"])
    return markdown([f"score, of {len(sets)} random sets of 8 heads", "rank correlation with clicks on row"], body)


TABLES = [ladder, control, headline, skill, elsewhere, longer, probe, overlap, correlation, tau, gamma, rates]
TABLES += [forgetting, referring, normalization, history, prior, step, depth]
TABLES += [partial(measured, domain=domain) for domain in DOMAINS]


def tables(rows: list[dict]) -> list[str]:
    """Every table that these rows allow, as Markdown."""
    bases = {row["base"]: row for row in where(rows, part="bases")}
    for row in rows:
        of = bases[row["base"]]
        row |= {"of_base": of["name"], "relation": 100 * of["source"]["relation_acc"]}
    return [table for function in TABLES if len((table := function(rows)).splitlines()) > 2]


def pictures(rows: list[dict]) -> dict:
    """The figures of README that are made of rows."""
    done, points, series = where(rows, part="ladder", domain="row"), [], defaultdict(list)
    for name in METHODS:
        clicks = [row["action_acc"] for row in where(done, name=name)]
        kept = not any(row["text_logits_max_abs_diff"] for row in where(done, name=name))
        x = np.mean([row.get("adapter_flops_per_screen", 0) for row in where(done, name=name)]) / 1e3
        if x:
            points.append({"name": name, "x": x, "y": np.mean(clicks), "spread": np.std(clicks, ddof=1), "kept": kept})
    for row in sorted(on_bases(rows), key=lambda row: row["relation"]):
        series[row["name"], row["relation"] / 100].append(row["action_acc"])
    lines = defaultdict(list)
    for (name, x), values in series.items():
        lines[name].append((x, np.mean(values), np.std(values, ddof=1)))
    return {"trade_off": figures.trade_off(points), "skill": figures.skill(lines)}
