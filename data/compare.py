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
SMALL, SMALL_VISUAL = "LoRA q k v o, r = 2, all tokens", "LoRA q k v o, r = 2, visual tokens"
BESIDE = {
    "LoRA v, all tokens": {"method": "lora", "projections": "v"},
    SMALL: {"method": "lora", "r": 2, "lora_alpha": 4.0},
    SMALL_VISUAL: {"method": "lora", "r": 2, "lora_alpha": 4.0, "tokens": "visual"},
}
SHOWN = LADDER | BESIDE
SETS = {
    f"LoRA {' '.join(names)}, visual tokens": {"method": "lora", "tokens": "visual", "projections": names}
    for names in ("qkvo", "qkv", "vo", "v", "qk", "o")
}
RANKS = {f"{IMAGE_LORA}, r = {r}": {"r": r, "lora_alpha": 2.0 * r} for r in (2, 4, 8, 16, 32)}
METHODS = SHOWN | SETS | RANKS
DOMAINS = ("row", "settings", "dark", "blueprint")
STEPS, FEWER_STEPS, TUNING_STEPS, TEST_SCREENS = 500, 300, 200, 100
BASES = {  # how they are made; the first is the shipped one
    "base 1": {"seed": 1},
    "base 2": {"seed": 2, "muon_lr": 0.02},
    "base 3": {"seed": 3, "steps": 4800},
}
SHIPPED, *OTHERS = BASES
DOSED = {  # other second stages of these bases
    f"{SHIPPED}, no relations": (SHIPPED, {"relations": 0}),
    f"{OTHERS[0]}, no relations": (OTHERS[0], {"relations": 0}),
    f"{SHIPPED}, 1 relation screen, 700 steps": (SHIPPED, {"relations": 1, "second_steps": 700}),
    f"{SHIPPED}, 1 relation screen": (SHIPPED, {"relations": 1}),
}
NO_SKILL = f"{SHIPPED}, no relations"
MAIN = (LORA, VALUES, IMAGE_LORA)
ON_BASES = (LORA, VALUES, ALL_HEADS, IMAGE_LORA)  # what was run on every base, whole or with another second stage
HEADLINE = (LORA, LORA_VISUAL, VALUES, ALL_HEADS, IMAGE_LORA, SMALL_VISUAL)
TO_LOOK = {SHIPPED: SHOWN, NO_SKILL: MAIN, OTHERS[1]: HEADLINE}  # bases to try SETS on, but for these
CHOICES = {name: {"heads": name} for name in ("top", "matched", "random", "lowest", "least")}
CHOICES |= {name: {"heads": "top", "probe": name} for name in ("gate", "exact")}
DRAWN = ("matched", "random")  # each seed draws other heads; of the other choices it changes little
FEW = ("top", *DRAWN, "gate")


@dataclass(frozen=True)
class CompareConfig(Settings):
    """The comparison's settings; each field is an option of the command line too."""

    quick: bool = option(False, "the ladder on row alone, one seed, one learning rate, the shipped base")
    workers: int = option(2, "processes, of one thread each", least=1)
    bases: str = option("runs/bases", "directory of the base models that it makes; those found there are kept")
    out: str = option("runs/compare", "directory of compare.json; finished rows found there are kept")


def job(cfg: CompareConfig, part: str, name: str, rung: str = "", base: str = SHIPPED, **settings) -> dict:
    """A run. It is a variant of `rung` in METHODS (default: name), and takes that method's learning rate on its base,
    found on row screens; on dark and blueprint ones, on these."""
    rung, file = rung or name, base_file(cfg, base)
    domain = settings.get("domain", "row")
    fewer = part in ("probe", "tau", "gamma", "depth", "referring")
    common = {
        "part": part,
        "name": name,
        "rate_of": (rung, file, domain if domain in DOMAINS[2:] else "row"),
        "base": file,
        "steps": FEWER_STEPS if fewer else STEPS,
        "test_screens": TEST_SCREENS,
        "controls": part in ("ladder", "rates", "ranks", "blind"),
    }
    return common | METHODS[rung] | settings


def jobs_of(cfg: CompareConfig) -> list[dict]:
    """Every run but those that choose learning rates."""
    jobs = []

    def add(part, name, seeds, *of, **settings):
        jobs.extend(job(cfg, part, name, *of, **settings, seed=seed) for seed in range(seeds))

    if cfg.quick:
        for name in SHOWN:
            add("ladder", name, 1, **{"lr": 0.02} | METHODS[name])
        return jobs
    for name in SHOWN:
        add("ladder", name, 1 if name == FROZEN else 3 if name in (LORA, IMAGE_LORA, SMALL_VISUAL) else 2)
    for name in (FROZEN, *HEADLINE):
        add("ladder", name, 2 if name in (LORA, IMAGE_LORA) else 1, domain="settings")
    for domain, name in product(DOMAINS[2:], (FROZEN, *MAIN)):
        add("ladder", name, 1, domain=domain)
    add("longer", SMALL_VISUAL, 1, steps=4 * STEPS)
    for base in OTHERS:
        for name in (FROZEN, *HEADLINE):
            add("bases", name, 2 if name in (LORA, IMAGE_LORA) else 1, base=base)
            if name in (FROZEN, *MAIN):
                add("bases", name, 1, base=base, domain="settings")
    for base, name in product(DOSED, (FROZEN, *ON_BASES)):
        add("bases", name, 2 if name == IMAGE_LORA else 1, base=base)
    for base, others in TO_LOOK.items():
        for name in SETS:
            if name not in others:
                add("elsewhere", name, 1, base=base)
    add_heads(add)
    for name, rates in ((LORA, (0.0025, 0.005, 0.01)), (IMAGE_LORA, (0.01, 0.02, 0.04, 0.08))):
        for lr in rates:
            add("rates", name, 3, lr=lr)
    for lr in (0.0025, 0.01):
        add("rates", f"{LORA}, replay", 1, LORA, lr=lr, replay=1)
    for name in RANKS:
        add("ranks", name, 2)
    for name in (LORA_VISUAL, IMAGE_LORA):
        add("blind", name, 1, switches="erased")
    for domain, name in product(("dark", "settings"), (FROZEN, LORA, LORA_VISUAL, IMAGE_LORA)):
        add("referring", name, 1, task="referring", domain=domain)
    for steps, size, normalize in product((1, 50), (1, 2, 3, 6), (True, False)):
        heads = f"0:{','.join(map(str, range(size)))}"
        brief = {"lr": 0.01, "split": "validation", "test_screens": 2}
        add("normalization", f"{size} heads", 1, IMAGE_LORA, steps=steps, heads=heads, normalize=normalize, **brief)
    for name in (LORA, IMAGE_LORA):
        add("history", name, 1, history=9)
    for name in (LORA, LORA_VISUAL, IMAGE_LORA):
        add("prior", name, 1, domain="dark", prior=True)
    for lowest in range(4):
        heads = " ".join(f"{layer}:0,1,2,3,4,5" for layer in range(lowest, 4))
        add("depth", f"layers {lowest} to 3", 1, ALL_HEADS, heads=heads)
    return jobs


def add_heads(add) -> None:
    """Which heads, how they are spread over the layers, and how they are scaled."""
    for size, (name, chosen) in product((4, 8, 12), CHOICES.items()):
        common = {"rung": IMAGE_LORA, "num_heads": size} | chosen
        if name in FEW or size == 8:
            add("probe", name, 10 if name in DRAWN else 5 if name in FEW else 1, **common)
        if name in FEW and size == 8:
            add("probe", name, 5, domain="settings", **common)
        if name in FEW and size < 12:
            for base in OTHERS:
                add("probe", name, 5, base=base, **common)
    for base, tau in product(BASES, (0.0, 0.5, 1.0, 4.0)):
        add("tau", f"τ = {tau:g}", 2 if base == SHIPPED else 1, IMAGE_LORA, base=base, tau=tau)
    for base, (gamma_lr, normalize) in product(BASES, product((1.0, 0.1, 0.0), (True, False))):
        if normalize or base == SHIPPED:
            of_gamma = {"gamma_lr": gamma_lr, "normalize": normalize}
            add("gamma", f"γ's rate {gamma_lr:g} of A's", 2, IMAGE_LORA, base=base, **of_gamma)


# ---- Bases, learning rates, and the runs -----------------------------------------------------------------------------


def base_file(cfg: CompareConfig, name: str) -> str:
    return BASE if name == SHIPPED else f"{cfg.bases}/{name.replace(', ', '-').replace(' ', '')}.pt"


def make_base(cfg: PretrainConfig) -> None:
    if not Path(cfg.out).with_suffix(".json").exists():
        pretrain(cfg)


def make_bases(cfg: CompareConfig, pool) -> None:
    """Whole bases of other seeds, then those that differ from them in their second stage alone."""
    Path(cfg.bases).mkdir(parents=True, exist_ok=True)
    again = Path(cfg.bases) / "first.pt"  # the shipped base's first stage is not in the repository
    whole = [PretrainConfig(**BASES[SHIPPED], second_steps=0, out=str(again))]
    whole += [PretrainConfig(**BASES[name], out=base_file(cfg, name)) for name in OTHERS]
    pool.map(make_base, whole, 1)
    dosed = []
    for name, (base, changes) in DOSED.items():
        start = again if base == SHIPPED else Path(base_file(cfg, base)).with_suffix(".first.pt")
        second = BASES[base] | {"steps": 0, "start": str(start)} | changes
        dosed.append(PretrainConfig(**second, out=base_file(cfg, name)))
    pool.map(make_base, dosed, 1)


def base_rows(cfg: CompareConfig) -> list[dict]:
    """A row for each base: its record."""
    rows = []
    for name in [SHIPPED] if cfg.quick else [*BASES, *DOSED]:
        file = base_file(cfg, name)
        record = json.loads(base_path(file).with_suffix(".json").read_text())
        rows.append({"part": "pretraining", "name": name, "base": file} | record)
    return rows


def tuning_jobs(method: str, base: str, domain: str, rates: list[float]) -> list[dict]:
    """A method at these learning rates, a third as long, on validation screens and a seed that no table uses."""
    common = METHODS[method] | {"part": "tuning", "name": method, "base": base, "domain": domain, "split": "validation"}
    common |= {"steps": TUNING_STEPS, "test_screens": TEST_SCREENS, "controls": False, "seed": 100}
    return [common | {"lr": lr} for lr in rates]


def best_rates(wanted: list[tuple], finish) -> dict[tuple, float]:
    """(method, base, domain) -> learning rate: three are tried, and more until the best is not the last of them."""
    best, scores = dict.fromkeys(wanted, 0.02), {of: {} for of in wanted}

    def untried(of):
        near = best[of], best[of] / 2, 2 * best[of]
        return [lr for lr in near if lr not in scores[of] and 0.001 < lr < 1]

    while jobs := [job for of in wanted for job in tuning_jobs(*of, untried(of))]:
        for row in finish(jobs):
            scores[row["name"], row["base"], row["domain"]][row["lr"]] = row["action_acc"]
        best = {of: max(tried, key=tried.get) for of, tried in scores.items()}  # of equals the one nearest to 0.02
    return best


class Rows:
    """The rows of compare.json. What has the settings of a known run is not run again."""

    def __init__(self, path: Path, make_config, run):
        self.path, self.make_config, self.run = path, make_config, run
        self.names = [f.name for f in fields(make_config) if f.name != "device"]
        try:
            rows = json.loads(path.read_text()) if path.exists() else []
            self.bases = [row for row in rows if row["part"] == "pretraining"]
            runs = rows[len(self.bases) :]
            self.known = {self.key(row | {"heads": row["heads_from"]}): row for row in runs}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a comparison of this project; move it away to start anew") from None
        self.measured = {settings: row for (_, _, settings), row in self.known.items()}

    def key(self, row: dict) -> tuple:
        """(part, name, settings of the run)."""
        return row["part"], row["name"], tuple(row[name] for name in self.names)

    def write(self) -> None:
        rows = map(json.dumps, [*self.bases, *self.known.values()])
        safe_write(("[\n" + ",\n".join(rows) + "\n]\n").encode(), self.path)

    def finish(self, jobs: list[dict], pool, bar) -> list[dict]:
        """The rows of these jobs. What is missing is run, and written at once."""
        keys, missing = [], {}
        for job in jobs:
            cfg = self.make_config(**{name: value for name, value in job.items() if name in self.names})
            keys.append(self.key(job | asdict(cfg)))
            if keys[-1][2] not in self.measured:
                missing[keys[-1][2]] = cfg
        bar.total = max(bar.total, bar.n + len(missing))
        for settings, row in zip(missing, pool.imap(self.run, missing.values())):
            self.measured[settings] = json.loads(json.dumps(row))
            self.name(keys)
            bar.set_postfix_str(f"{row['domain']}, {row['method']}, {Path(row['base']).stem}", refresh=False)
            bar.update()
        self.name(keys)
        return [self.known[key] for key in keys]

    def name(self, keys: list[tuple]) -> None:
        """Keeps the runs that are done as rows of their parts."""
        for part, name, settings in keys:
            if settings in self.measured:
                self.known[part, name, settings] = self.measured[settings] | {"part": part, "name": name}
        self.write()


def compare(cfg: CompareConfig, make_config, run) -> None:
    """Run (or go on with) the comparison, print its tables. A stop loses only the runs under way.

    make_config(**fields) gives the settings of a run, run(settings) its row."""
    path = Path(cfg.out) / "compare.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, jobs = Rows(path, make_config, run), jobs_of(cfg)
    with get_context("spawn").Pool(cfg.workers) as pool:
        if not rows.bases:
            if not cfg.quick:
                make_bases(cfg, pool)
            rows.bases = base_rows(cfg)
        wanted = list(dict.fromkeys(job["rate_of"] for job in jobs if "lr" not in job))
        with progress(len(rows.measured), len(jobs) + 4 * len(wanted), "compare") as bar:
            tuned = best_rates(wanted, partial(rows.finish, pool=pool, bar=bar))
            rows.finish([{"lr": tuned.get(job["rate_of"])} | job for job in jobs], pool, bar)
    done = [*rows.bases, *rows.known.values()]
    print("\n" + "\n\n".join(tables(done).values()))
    if not cfg.quick:
        (path.parent / "figures").mkdir(exist_ok=True)
        for name, picture in pictures(done).items():
            figures.save(picture, path.parent / "figures" / f"{name}.png")
    print(f"\nsaved {path}")


# ---- Tables and figures: each is a function of the rows --------------------------------------------------------------


def where(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def spread(rows: list[dict], field: str = "action_acc") -> tuple[float, float]:
    """The mean of an accuracy over seeds in %, and its standard deviation; 0 of one."""
    values = [100 * row[field] for row in rows]
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0


def percent(rows: list[dict], field: str = "action_acc") -> str:
    """`spread` as text; the rows that lack the field are left out."""
    known = [row for row in rows if field in row]
    form = "{:.1f} ±{:.1f}" if len(known) > 1 else "{:.1f}"
    return form.format(*spread(known, field)) if known else ""


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


def rule(field: str):
    """Of the base alone, so the same for every seed."""
    return partial(mean, field=f"{field}_acc", unit=0.01, form=".1f")


MEASURED = {  # column -> what stands there
    "click %": percent,
    "words %": acc("text"),
    "icons %": acc("icon"),
    "parameters": partial(mean, field="trainable_parameters"),
    "adapter kFLOP per screen": partial(mean, field="adapter_flops_per_screen", unit=1e3),
    "source %": acc("source"),
    "word problems %": acc("word_problem"),
    "after an image %": acc("word_problem_after_image"),
    "text logits": lambda rows: f"{max(row['text_logits_max_abs_diff'] for row in rows):.2g}",
    "rate": partial(mean, field="lr", form="g"),
}
PRESERVED = {
    "word problems": MEASURED["word problems %"],
    "word problems after an image": MEASURED["after an image %"],
    "source clicks": MEASURED["source %"],
    "row clicks": percent,
}
CONTROLS = {
    "click %": percent,
    "best constant": rule("constant"),
    "base + offset per kind": rule("offset"),
    "base + offset per name": rule("name_offset"),
    "base's height, best column": rule("column"),
    "image erased": acc("blank"),
    "switches erased": acc("erased"),
    "exchanged with names": acc("exchanged"),
}
STEP = {
    "adapter kFLOP per screen": partial(mean, field="adapter_flops_per_screen", unit=1e3),
    "counted": partial(mean, field="counted_flops_per_screen", unit=1e3),
    "the decoder's step, MFLOP": partial(mean, field="step_flops_per_screen", unit=1e6, form=".1f"),
    "the vision tower, MFLOP": partial(mean, field="vision_flops_per_screen", unit=1e6, form=".1f"),
    "kept for the backward pass, KiB": partial(mean, field="saved_bytes_per_screen", unit=1024),
    "ms per step": partial(mean, field="step_ms", form=".0f"),
}


def on_bases(rows: list[dict], bases: list[str], domain: str = "row") -> list[dict]:
    """Runs with these bases; the shipped one's are the ladder's."""
    shown = where(rows, part="ladder", domain=domain) + where(rows, part="bases", domain=domain)
    return [row for row in shown if row["name"] in (FROZEN, *HEADLINE) and row["of_base"] in bases]


def over_bases(rows: list[dict]) -> str:
    """The mean of an accuracy in %, and its standard deviation over seeds; where there are several bases, over them."""
    bases = dict.fromkeys(row["of_base"] for row in rows)
    means = [{"action_acc": np.mean([row["action_acc"] for row in where(rows, of_base=base)])} for base in bases]
    return percent(means if len(means) > 1 else rows)


def headline(rows: list[dict]) -> str:
    """Each base, and their mean for what was run on all of them."""
    shown = []
    for domain in DOMAINS[:2]:
        of = on_bases(rows, BASES, domain)
        shown += [row | {"column": row["of_base"]} for row in of]
        tried = {name: {row["of_base"] for row in where(of, name=name)} for name in (FROZEN, *HEADLINE)}
        shown += [row | {"column": f"{len(BASES)} bases"} for row in of if len(tried[row["name"]]) == len(BASES)]
    return grid("correct clicks", shown, "{domain}, {column} %", cell=over_bases)


def skill(rows: list[dict]) -> str:
    shown = [row for name in ON_BASES for row in where(on_bases(rows, [*BASES, *DOSED]), name=name)]
    shown.sort(key=lambda row: row["relation"])
    return grid("row, correct clicks", shown, "{name} %", "{of_base}: skill {relation:.1f} %")


def early_rows(rows: list[dict], **wanted) -> list[dict]:
    """The runs that chose the learning rates on row: on validation screens, after fewer steps."""
    return [row for row in where(rows, part="tuning", domain="row", **wanted) if row["name"] in HEADLINE]


def best_click(rows: list[dict]) -> float:
    return 100 * max(row["action_acc"] for row in rows)


def early(rows: list[dict]) -> str:
    title = f"row, {TUNING_STEPS} steps, validation screens"
    return grid(title, early_rows(rows), "{of_base} %", cell=lambda of: f"{best_click(of):.1f}" if of else "")


def looks(rows: list[dict]) -> str:
    """The largest share of its attention that a head gives to the switch."""
    shown = sorted(on_bases(rows, [*BASES, *DOSED]), key=lambda row: row["relation"])

    def most(of: list[dict]) -> str:
        return percent([{"action_acc": np.max(row["target_attention"])} for row in of])

    return grid("row, a head's attention on the switch", shown, "{name} %", "{of_base}: skill {relation:.1f} %", most)


def elsewhere(rows: list[dict]) -> str:
    """Clicks and the learning rate that was found, of LoRA at visual tokens on every set of projections."""
    parts = ("elsewhere", "ladder", "bases")
    shown = [row for row in where(rows, domain="row") if row["part"] in parts and row["of_base"] in TO_LOOK]
    shown = [row for name in SETS for row in where(shown, name=name)]
    return grid("row", shown, "{of_base} %", cell=lambda of: f"{percent(of)} (rate {of[0]['lr']:g})" if of else "")


def controls(rows: list[dict]) -> str:
    shown = [row for row in where(rows, part="ladder") if row["domain"] in PAIRED] + where(rows, part="blind")
    told = "{domain}: {name}, switches {switches}"
    return measures("control, %", [row | {"name": told.format(**row)} for row in shown], CONTROLS)


def preserved(rows: list[dict]) -> str:
    """What is left of other skills, also at lower rates, and with replay."""
    shown = []
    for name in (FROZEN, LORA, ALL_HEADS, IMAGE_LORA, SMALL_VISUAL):
        own = where(rows, part="ladder", domain="row", name=name)
        shown += own
        for share, parts in {"half": 2, "a quarter": 4}.items():
            lower = where(rows, part="rates", name=name, lr=own[0]["lr"] / parts)
            shown += [row | {"name": f"{name}, {share} of its rate"} for row in lower]
    return measures("trained on row, %", shown + where(rows, part="rates", lr=0.01, replay=1), PRESERVED)


def beside_the_ladder(rows: list[dict], part: str) -> list[dict]:
    """The rows of a part, after those of the ladder's runs that differ from them in one thing."""
    names = {(row["name"], row["domain"]) for row in where(rows, part=part)}
    return [row for row in where(rows, part="ladder") if (row["name"], row["domain"]) in names] + where(rows, part=part)


def column_of(row: dict) -> tuple:
    return row["of_base"], row["domain"], row["num_heads"]


def overlap(rows: list[dict]) -> str:
    """How many of its heads a choice shares with the probe's of seed 0."""
    shown = []
    for row in where(rows, part="probe", domain="row", base=BASE):
        same = {name: row[name] for name in ("part", "domain", "base", "num_heads")}
        top = where(rows, name="top", seed=0, **same)[0]["heads"]
        shared = sum(len(set(row["heads"].get(layer, [])) & set(chosen)) for layer, chosen in top.items())
        shown.append(row | {"shared": shared})
    return grid(
        "heads shared with the probe's", shown, "of {num_heads}", cell=partial(mean, field="shared", form=".1f")
    )


def tables(rows: list[dict]) -> dict[str, str]:
    """Every table that these rows allow, as Markdown."""
    bases = {row["base"]: row for row in where(rows, part="pretraining")}
    for row in rows:
        of = bases[row["base"]]
        row |= {"of_base": of["name"], "relation": 100 * of["source"]["relation_acc"]} | row.get("changes", {})
    part = defaultdict(list)
    for row in rows:
        part[row["part"]].append(row)
    found = {
        "ladder": grid("correct clicks", part["ladder"], "{domain} %"),
        "controls": controls(rows),
        "step": measures("a training step, row", where(part["ladder"], domain="row"), STEP),
    }
    for domain in dict.fromkeys(row["domain"] for row in part["ladder"]):
        found[domain] = measures(domain, where(part["ladder"], domain=domain), MEASURED)
    few = [row for row in where(part["probe"], domain="row") if row["name"] in FEW and row["num_heads"] < 12]
    small = [row for row in beside_the_ladder(rows, "longer") if row["domain"] in PAIRED]
    by_rate = sorted(part["rates"], key=lambda row: (row["name"], row["lr"]))
    by_rate = [row | {"name": "{name}, rate {lr:g}".format(**row)} for row in by_rate]
    sqrt = "1/√S: {normalize}"
    update = partial(mean, field="update0", form=".2f")
    found |= {
        "headline": headline(rows),
        "skill": skill(rows),
        "early": early(rows),
        "looks": looks(rows),
        "longer": grid("correct clicks", small, "{domain}, {steps} steps %"),
        "elsewhere": elsewhere(rows),
        "probe": grid("heads", sorted(part["probe"], key=column_of), "{domain}, K = {num_heads}, {of_base} %"),
        "choices": grid(f"heads, {len(BASES)} bases", few, "{num_heads} of 24 heads %", cell=over_bases),
        "overlap": overlap(rows),
        "tau": grid("row, K = 12", part["tau"], "{of_base} %"),
        "gamma": grid("row, correct clicks %", part["gamma"], "{of_base}, " + sqrt),
        "preserved": preserved(rows),
        "rates": measures("trained on row, %", by_rate, PRESERVED),
        "ranks": measures("row", sorted(part["ranks"], key=lambda row: row["r"]), MEASURED),
        "referring": grid("names right", part["referring"], "{domain} %", cell=acc("name")),
        "normalization": grid("layer 0's update", part["normalization"], "{name}", "{steps} steps, " + sqrt, update),
        "history": grid("row, correct clicks %", beside_the_ladder(rows, "history"), "after {history} word problems"),
        "prior": grid("dark, correct clicks %", beside_the_ladder(rows, "prior"), "names tell places: {prior}"),
        "depth": measures("all heads of, row", part["depth"], {"click %": percent} | STEP),
    }
    return {name: table for name, table in found.items() if table.count("\n") > 1}  # those that have a line


def pictures(rows: list[dict]) -> dict:
    """The figures of README that are made of rows."""
    points = []
    for name in list(SHOWN)[1:]:
        of = where(rows, part="ladder", domain="row", name=name)
        x = np.mean([row["adapter_flops_per_screen"] for row in of]) / 1e6
        y, over_seeds = spread(of)
        kept = not any(row["text_logits_max_abs_diff"] for row in of)
        points.append({"name": name, "x": x, "y": y, "spread": over_seeds, "kept": kept})
    relation = {row["of_base"]: row["relation"] for row in where(rows, part="pretraining")}
    soon, late = defaultdict(dict), defaultdict(dict)
    for first, name in product(BASES, ON_BASES):
        bases = [first, *(base for base, (start, _) in DOSED.items() if start == first)]
        soon[f"{first}, {TUNING_STEPS} steps, validation screens"][name] = [
            (relation[base], best_click(early_rows(rows, of_base=base, name=name)), 0) for base in bases
        ]
        late[f"{first}, {STEPS} steps, test screens"][name] = [
            (relation[base], *spread(where(on_bases(rows, [base]), name=name))) for base in bases
        ]
    sets = {}
    for size, base in product((4, 8), BASES):
        of = where(rows, part="probe", domain="row", num_heads=size, of_base=base)
        runs = {name: [100 * row["action_acc"] for row in where(of, name=name)] for name in FEW}
        sets.setdefault(f"{size} of 24 heads", {})[base] = runs
    flops = restrictions(CostsConfig())
    shares = [(name, of / max(flops.values())) for name, of in flops.items()]
    return {
        "trade_off": figures.trade_off(points),
        "skill": figures.skill(soon | late),
        "choices": figures.choices(sets),
        "factors": figures.factors(shares),
    }
