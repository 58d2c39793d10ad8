"""The evidence on tiny models: fine-tuning runs, which are in runs.csv, one per line, and the tables of the page.

python -m data.study.compare                         print the tables, at once
python -m data.study.compare --runs runs/mine.csv    make their runs anew, in some hours on two cores; if stopped, go on

The base models that the runs need are made by data.study.pretrain.
"""

import sys
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from tqdm import tqdm

import train
from data import prompts
from data.base import file_path, find_device, load_base, screens_and_features
from data.command import command, make_directory, option
from data.evaluate import evaluate
from data.methods import METHODS, gate_scores
from data.pictures import rank_correlation
from data.questions import click_right_of
from data.study.tables import markdown, mean_and_range, rate_table, read_runs, table, write_runs
from imagelora import score_heads

# ---- Base models and learning rates ----------------------------------------------------------------------------------

# {seed of pretraining: file}. The models without the skill were never asked what is right of a name. Each model is
# fine-tuned with the seed that it was pretrained with.
SKILLED = {1: "data/tiny_vlm.pt"} | {seed: f"runs/bases/{seed}.pt" for seed in (2, 3, 4, 5)}
UNSKILLED = {seed: f"runs/bases/{seed}-unskilled.pt" for seed in (1, 2, 3, 4, 5, 6, 7, 8)}
FEW = (1, 2, 3)  # the models on which learning rates are chosen and heads are compared
SINGLE_HEADS = [f"{layer}.{head}" for layer in range(4) for head in range(6)]

# The learning rates that `choose_rate` chose, by the mean validation accuracy on FEW models. With the skill all of GRID
# was tried; without it, and in referring, a part of it. No table shows that part, so its runs are not made anew, but
# runs.csv holds them for the test of this rule. With replay and after word problems a method keeps its rate.
GRID = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
RATES = {"LoRA": 0.0025, "Partial LoRA": 0.0025, "Image-LoRA": 0.01}
UNSKILLED_RATES = {"LoRA": 0.005, "Partial LoRA": 0.005, "Image-LoRA": 0.08}
REFERRING_RATES = {"LoRA": 0.00125, "Partial LoRA": 0.00125, "Image-LoRA": 0.00125}
FEW_HEADS_RATE = 0.02  # of Image-LoRA in 12 heads or fewer


def chosen_rate(method: str, bases: dict, task: str) -> float:
    if method == "base model":
        return 0.0
    rates = UNSKILLED_RATES if bases == UNSKILLED else REFERRING_RATES if task == "referring" else RATES
    return rates[method.removesuffix(", with replay")]


# ---- Runs ------------------------------------------------------------------------------------------------------------

SETTINGS = tuple("base seed method projections heads num_heads r train_gamma lr task history replay".split())
MEASURES = (
    "task_acc",  # clicks in their box, or correct names in referring
    "validation_acc",  # the same on validation screens, by which learning rates are chosen
    "word_problem_acc",
    "word_problem_after_image_acc",
    "source_acc",  # the old task
    "reworded_acc",  # of the base model, asked to click right of the name
    "influence",  # of the head, by the probe of rank 1; this and the next two only where a single head is adapted
    "influence_exact",
    "gate_score",
)
REWORDED_SCREENS = 400  # test screens of reworded_acc
# What train_gamma holds in rows of an earlier version of train.py. It trained gamma, at a tenth of the rate of A and B,
# and chose heads with tau = 0.
EARLIER = "at a tenth of the rate"


@dataclass(frozen=True)
class CompareConfig:
    runs: str = option("data/study/runs.csv", "file of runs; in any file but this one, missing runs are made")
    workers: int = option(2, "processes that make runs, of one thread each", least=1)
    device: str = option("cpu", "where to compute: cpu, cuda, mps, or auto")


class Runs:
    """The rows of a file of runs. Missing runs are made, and each is written at once; runs.csv itself never grows."""

    def __init__(self, cfg: CompareConfig):
        self.cfg = cfg
        self.path = file_path(cfg.runs)
        rows = [row | {"heads": str(row["heads"])} for row in read_runs(self.path, SETTINGS)]  # 1.3 is no number here
        self.rows = {key(row): row for row in rows}
        self.is_shipped = cfg.runs == CompareConfig.runs

    def of(self, method: str, bases: dict, numbers=None, **changes) -> list[dict]:
        """The rows of a method on the base models of these numbers, or on all of them. changes: of train.Config.

        A row of the earlier version is preferred, unless the changes say whether gamma is trained."""
        settings = {"device": self.cfg.device} | METHODS[method] | changes
        if "lr" not in changes:
            settings["lr"] = chosen_rate(method, bases, changes.get("task", "grounding"))
        wanted = [train.Config(**settings, base=bases[seed], seed=seed) for seed in numbers or bases]
        if not self.is_shipped:
            self.make([cfg for cfg in wanted if key(vars(cfg)) not in self.rows])
        rows = []
        for cfg in wanted:
            row = self.rows.get(key(vars(cfg)))
            if "train_gamma" not in changes:
                row = self.rows.get(key(vars(cfg) | {"train_gamma": EARLIER}), row)
            if row:
                rows.append(row)
        return rows

    def make(self, missing: list[train.Config]) -> None:
        """Run these, and write each row at once. ValueError, before anything runs, if a base model is not there."""
        for cfg in missing:
            if not file_path(cfg.base).exists():
                raise ValueError(f"there is no {cfg.base}; first make it by data.study.pretrain, as its page says")
        if not missing:
            return
        make_directory(self.path.parent)
        with get_context("spawn").Pool(self.cfg.workers, torch.set_num_threads, (1,)) as pool:
            for row in tqdm(pool.imap_unordered(run, missing), "runs", len(missing)):
                self.rows[key(row)] = {name: row.get(name, "") for name in SETTINGS + MEASURES}
                write_runs(self.path, [*self.rows.values()])


def key(row: dict) -> tuple:
    """What tells this run from all others."""
    return tuple(row[name] for name in SETTINGS)


def run(cfg: train.Config) -> dict:
    """What `train.run` returns, and the measures that only the study needs."""
    tuned = train.finetune(cfg)
    validation_screens = screens_and_features(tuned.model, "switches", "validation", cfg.test_screens)
    validation, _ = evaluate(tuned.model, *validation_screens, cfg.task, cfg.history)
    row = tuned.result | {"validation_acc": validation["task_acc"]}
    if cfg.method == "none":
        test_screens = screens_and_features(tuned.model, "switches", "test", REWORDED_SCREENS)
        reworded, _ = evaluate(tuned.model, *test_screens, cfg.task, cfg.history, click_right_of)
        row["reworded_acc"] = reworded["task_acc"]
    if cfg.heads in SINGLE_HEADS:
        row |= head_scores(cfg)
    return row


def head_scores(cfg: train.Config) -> dict:
    """The three scores of a single head, before training."""
    model = load_base(cfg.base, find_device(cfg.device))
    data = train.training_data(cfg, model)
    batches = [prompts.training_batch(cfg, data, i, probe=True) for i in range(prompts.PROBE_BATCHES)]
    layer, head = map(int, cfg.heads.split("."))
    return {
        "influence": score_heads(model, batches, seed=cfg.seed)[layer, head].item(),
        "influence_exact": score_heads(model, batches, probe="exact")[layer, head].item(),
        "gate_score": gate_scores(model, batches)[layer, head].item(),
    }


# ---- Tables, in the order of the page --------------------------------------------------------------------------------


CLICKS = {"switches clicked, %": mean_and_range("task_acc")}
WITHOUT_IMAGE = {"word problems without an image, %": mean_and_range("word_problem_acc")}
AFTER_IMAGE = {"word problems after an image, %": mean_and_range("word_problem_after_image_acc")}
OLD_TASK = {"old task, %": mean_and_range("source_acc")}
RATE = {"learning rate": mean_and_range("lr", "{:g}")}
CHOICES = {  # of heads: {name: (the option of train.py, the column of the score that it goes by)}
    "the probe": ("top", "influence"),
    "the exact probe": (None, "influence_exact"),
    "the gate of the authors' release": ("gate", "gate_score"),
    "chance, as many in each layer as the probe's": ("random", None),
    "the probe, the least influential ones": ("bottom", None),
}


def rates(runs: Runs) -> str:
    """Means of FEW models."""
    clicks = "clicks on validation screens, %"
    word_problems = "word problems after an image, %"
    lines = []
    for method, name, measure in (
        ("LoRA", clicks, "validation_acc"),
        ("LoRA", word_problems, "word_problem_after_image_acc"),
        ("Partial LoRA", clicks, "validation_acc"),
        ("Image-LoRA", clicks, "validation_acc"),
        ("Image-LoRA", word_problems, "word_problem_after_image_acc"),
    ):
        rows_of = {lr: runs.of(method, SKILLED, FEW, lr=lr) for lr in GRID}
        means = {lr: np.mean([row[measure] for row in rows]) for lr, rows in rows_of.items()}
        lines.append((f"{method}: {name}", means, RATES[method]))
    return rate_table("tiny models 1 to 3, learning rate", lines)


def after_an_image(runs: Runs) -> str:
    rows = []
    for kind, bases, replayed in (("with", SKILLED, RATES), ("without", UNSKILLED, ("LoRA", "Image-LoRA"))):
        for method in ("base model", *RATES, *(f"{name}, with replay" for name in replayed)):
            rows.append((f"{kind} the skill: {method}", runs.of(method, bases)))
    return table("tiny models", WITHOUT_IMAGE | AFTER_IMAGE | OLD_TASK, rows)


def each_model(runs: Runs) -> str:
    """How many points of clicks the other methods are behind LoRA."""
    lines = []
    for kind, bases in (("with", SKILLED), ("without", UNSKILLED)):
        methods = ("base model", *RATES, "LoRA, with replay", "Image-LoRA, with replay")
        rows_of = {method: runs.of(method, bases) for method in methods}
        for i, seed in enumerate(bases):
            clicks = {method: 100 * rows[i]["task_acc"] for method, rows in rows_of.items()}
            gap_with_replay = clicks["LoRA, with replay"] - clicks["Image-LoRA, with replay"]
            cells = {
                "base model, asked to click right of the name, %": 100 * rows_of["base model"][i]["reworded_acc"],
                "LoRA clicks, %": clicks["LoRA"],
                "Partial LoRA is behind by": clicks["LoRA"] - clicks["Partial LoRA"],
                "Image-LoRA is behind by": clicks["LoRA"] - clicks["Image-LoRA"],
                "Image-LoRA is behind LoRA, both with replay": gap_with_replay,
            }
            lines.append((f"{seed}, {kind} the skill", *(f"{number:.1f}" for number in cells.values())))
    return markdown(("tiny model", *cells), *lines)


def factor(runs: Runs) -> str:
    """Partial LoRA on v beside Image-LoRA at twice its rate; gamma, which is 1 elsewhere; fewer heads, a lower rank."""

    def add(method: str, lr: float, name="", **changes) -> None:
        rows.append((name or method, runs.of(method, SKILLED, FEW, lr=lr, **{"train_gamma": False} | changes)))

    rows = []
    for lr in GRID[2:7]:
        add("Partial LoRA on v", lr)
        add("Image-LoRA", 2 * lr)
    for lr in (0.01, 0.04, 0.08, 0.16):
        add("Image-LoRA", lr, "Image-LoRA, γ trained", train_gamma=True)
    add("Partial LoRA on v, with replay", 0.005)
    add("Image-LoRA, with replay", 0.01)
    add("Image-LoRA in 12 heads", FEW_HEADS_RATE)
    add("Image-LoRA in 12 heads", FEW_HEADS_RATE, "Image-LoRA in 4 heads", num_heads=4)
    add("Partial LoRA on v", FEW_HEADS_RATE, "Partial LoRA on v, rank 4", r=4)
    return table("tiny models 1 to 3", RATE | CLICKS | AFTER_IMAGE | OLD_TASK, rows)


def heads(runs: Runs) -> str:
    """Four heads of each choice; and whether a score tells before training what each head will click alone."""
    alone = []  # the runs in a single head, for each model that has them all
    for seed in FEW:
        rows = []
        for head in SINGLE_HEADS:
            rows += runs.of("Image-LoRA", SKILLED, [seed], heads=head, lr=FEW_HEADS_RATE)
        if len(rows) == len(SINGLE_HEADS):
            alone.append(rows)
    lines = []
    for name, (choice, score) in CHOICES.items():
        four = []
        if choice:
            options = {"heads": choice, "num_heads": 4, "train_gamma": False}
            four = runs.of("Image-LoRA", SKILLED, FEW, lr=FEW_HEADS_RATE, **options)
        correlations = []
        if score:
            for rows in alone:
                scores, clicks = np.array([(row[score], row["task_acc"]) for row in rows]).T
                correlations.append({"correlation": rank_correlation(scores, clicks)})
        lines.append((name, mean_and_range("task_acc")(four), mean_and_range("correlation", "{:.2f}")(correlations)))
    titles = "clicks with these 4 of 24 heads, %", "rank correlation with what a head clicks alone"
    return markdown(("heads chosen by", *titles), *lines)


def other_tasks(runs: Runs) -> str:
    rows = []
    for method in REFERRING_RATES:
        rows.append((f"referring: {method}", runs.of(method, SKILLED, FEW, task="referring")))
    rows.append(("referring: Image-LoRA", runs.of("Image-LoRA", SKILLED, FEW, task="referring", lr=0.01)))
    for method in ("LoRA", "Image-LoRA"):
        rows.append((f"after nine word problems: {method}", runs.of(method, SKILLED, FEW, history=9)))
    correct = {"correct answers, %": mean_and_range("task_acc")}
    return table("tiny models 1 to 3", RATE | correct | AFTER_IMAGE | OLD_TASK, rows)


TABLES = (rates, after_an_image, each_model, factor, heads, other_tasks)


def compare(cfg: CompareConfig) -> None:
    runs = Runs(cfg)
    for table_of in TABLES:
        print(table_of(runs))


if __name__ == "__main__":
    sys.exit(command(CompareConfig, compare, __doc__))
