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
from data.study.tables import markdown, mean_and_range, rate_table, read_runs, side_by_side, write_runs
from imagelora import score_heads

# ---- Base models and learning rates ----------------------------------------------------------------------------------

# {seed of pretraining: file}. The models without the skill were never asked what is right of a name. Each model is
# fine-tuned with the seed that it was pretrained with.
SKILLED = {1: "data/tiny_vlm.pt"} | {seed: f"runs/bases/{seed}.pt" for seed in (2, 3, 4, 5)}
UNSKILLED = {seed: f"runs/bases/{seed}-unskilled.pt" for seed in (1, 2, 3, 4, 5)}
FIRST_MODELS = (1, 2, 3)  # on which learning rates are chosen and single heads are tried
SINGLE_HEADS = [f"{layer}.{head}" for layer in range(4) for head in range(6)]

# The learning rates that were tried, and those that `choose_rate` chose by the mean validation accuracy. With replay,
# in fewer heads and on other tasks a method keeps its rate; so does another rank, unless rates were tried for it.
GRID = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
TRIED = {method: GRID for method in ("LoRA", "Partial LoRA", "Partial LoRA on v", "Image-LoRA")}
TRIED |= {"Image-LoRA, γ trained": (0.01, 0.04, 0.08, 0.16)}
RATES = {"LoRA": 0.0025, "Partial LoRA": 0.0025, "Partial LoRA on v": 0.01, "Image-LoRA": 0.02}
UNSKILLED_TRIED = {
    "LoRA": (0.0025, 0.005, 0.01, 0.02),
    "Partial LoRA": (0.0025, 0.005, 0.01, 0.02),
    "Partial LoRA on v": (0.01, 0.02, 0.04, 0.08),
    "Partial LoRA on v, rank 32": (0.005, 0.01, 0.02, 0.04),  # as large as Partial LoRA
    "Image-LoRA": (0.02, 0.04, 0.08, 0.16),
}
UNSKILLED_RATES = {
    "LoRA": 0.01,
    "Partial LoRA": 0.01,
    "Partial LoRA on v": 0.02,
    "Partial LoRA on v, rank 32": 0.01,
    "Image-LoRA": 0.04,
}


def chosen_rate(method: str, bases: dict) -> float:
    """The rate of a method, or of that which it is a variant of: of 'LoRA' for 'LoRA, with replay'."""
    if method == "base model":
        return 0.0
    rates = UNSKILLED_RATES if bases == UNSKILLED else RATES
    return rates[method if method in rates else method.split(", ")[0]]


# ---- Runs ------------------------------------------------------------------------------------------------------------

SETTINGS = tuple("base seed method projections heads num_heads r train_gamma lr task history replay".split())
MEASURES = (
    "task_acc",  # clicks in their box, or correct names in referring
    "validation_acc",  # the same on validation screens, by which learning rates are chosen
    "word_problem_acc",
    "word_problem_after_image_acc",
    "other_questions_acc",  # the mean of the next three
    "what_is_at_acc",
    "what_is_right_of_acc",
    "click_right_of_acc",
    "same_words_acc",
    "reworded_acc",  # of the base model, asked to click right of the name
    "influence",  # of the head, by the probe of rank 1; this and the next two only where a single head is adapted
    "influence_exact",
    "gate_score",
)
REWORDED_SCREENS = 400  # test screens of reworded_acc


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
        """The rows of a method on the base models of these numbers, or on all of them. changes: of train.Config."""
        settings = {"device": self.cfg.device} | METHODS[method] | changes
        if "lr" not in changes:
            settings["lr"] = chosen_rate(method, bases)
        wanted = [train.Config(**settings, base=bases[seed], seed=seed) for seed in numbers or bases]
        if not self.is_shipped:
            self.make([cfg for cfg in wanted if key(vars(cfg)) not in self.rows])
        return [self.rows[key(vars(cfg))] for cfg in wanted if key(vars(cfg)) in self.rows]

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
CHOICES = {  # {name: (method, or None if only its score was measured; changes; the column of its score)}
    "all 24 heads": ("Image-LoRA", {}, None),
    "12 heads by the probe": ("Image-LoRA", {"heads": "top"}, None),
    "4 heads by the probe": ("Image-LoRA", {"num_heads": 4, "heads": "top"}, "influence"),
    "by the exact probe": (None, {}, "influence_exact"),
    "4 heads by the gate of the authors' release": ("Image-LoRA", {"num_heads": 4, "heads": "gate"}, "gate_score"),
    "4 random heads, as many in each layer": ("Image-LoRA", {"num_heads": 4, "heads": "random"}, None),
    "4 least influential heads, as many in each layer": ("Image-LoRA", {"num_heads": 4, "heads": "bottom"}, None),
    "for comparison: Partial LoRA on v, rank 4, in all heads": ("Partial LoRA on v", {"r": 4}, None),
}


def rates(runs: Runs) -> str:
    """Means of the first three models."""
    lines = []
    for title, bases, chosen, tried, measure in (
        ("clicks with the skill", SKILLED, RATES, TRIED, "validation_acc"),
        ("word problems with the skill", SKILLED, RATES, TRIED, "word_problem_after_image_acc"),
        ("clicks without the skill", UNSKILLED, UNSKILLED_RATES, UNSKILLED_TRIED, "validation_acc"),
    ):
        for method, learning_rates in tried.items():
            means = {}
            for lr in learning_rates:
                means[lr] = np.mean([row[measure] for row in runs.of(method, bases, FIRST_MODELS, lr=lr)])
            lines.append((f"{title}, %: {method}", means, chosen.get(method)))
    return rate_table("tiny models 1 to 3, learning rate", lines)


def after_an_image(runs: Runs) -> str:
    methods = "base model", *RATES, *(f"{method}, with replay" for method in RATES)
    groups = {
        "with the skill": lambda method: runs.of(method, SKILLED),
        "without the skill": lambda method: runs.of(method, UNSKILLED),
    }
    return side_by_side("tiny models", methods, groups, WITHOUT_IMAGE | AFTER_IMAGE | OLD_TASK)


def each_model(runs: Runs) -> str:
    """What each model clicks, after fine-tuning by each method."""
    methods = *UNSKILLED_RATES, "LoRA, with replay", "Image-LoRA, with replay"
    lines = []
    for kind, bases in (("with", SKILLED), ("without", UNSKILLED)):
        for seed in bases:
            clicks = [mean_and_range("task_acc")(runs.of(method, bases, [seed])) for method in methods]
            reworded = mean_and_range("reworded_acc")(runs.of("base model", bases, [seed]))
            lines.append((f"{seed}, {kind} the skill", reworded, *clicks))
    reworded_title = "base model, asked to click right of the name"
    return markdown(("clicks on test screens in %, tiny model", reworded_title, *methods), *lines)


def heads(runs: Runs) -> str:
    """Few heads of each choice; and whether a score tells before training what each head will click alone."""
    alone = []  # the runs in a single head, a list for each model
    for seed in FIRST_MODELS:
        rows = []
        for head in SINGLE_HEADS:
            rows += runs.of("Image-LoRA", SKILLED, [seed], heads=head)
        alone.append(rows)
    columns = CLICKS | AFTER_IMAGE | OLD_TASK
    lines = []
    for name, (method, changes, score) in CHOICES.items():
        rows = runs.of(method, SKILLED, **changes) if method else []
        correlations = []
        if score:
            for rows_of_model in alone:
                scores, clicks = np.array([(row[score], row["task_acc"]) for row in rows_of_model]).T
                correlations.append({"correlation": rank_correlation(scores, clicks)})
        correlation = mean_and_range("correlation", "{:.2f}")(correlations)
        lines.append((name, *(cell(rows) for cell in columns.values()), correlation))
    return markdown(("Image-LoRA in", *columns, "rank correlation with what a head clicks alone"), *lines)


def other_tasks(runs: Runs) -> str:
    groups = {
        "referring": lambda method: runs.of(method, SKILLED, task="referring"),
        "long text": lambda method: runs.of(method, SKILLED, history=9),
    }
    correct = {"correct answers, %": mean_and_range("task_acc")}
    return side_by_side("tiny models with the skill", RATES, groups, correct | AFTER_IMAGE | OLD_TASK)


TABLES = (rates, after_an_image, each_model, heads, other_tasks)


def compare(cfg: CompareConfig) -> None:
    runs = Runs(cfg)
    for table_of in TABLES:
        print(table_of(runs))


if __name__ == "__main__":
    sys.exit(command(CompareConfig, compare, __doc__))
