"""The runs of tiny models, a line of runs.csv each, and how they are made.

python -m data.study.runs --out runs/mine.csv     make all of them, in some hours; if stopped, go on

A run is a method on a base model in a setting, at a learning rate, with a seed. The base models with the skill are
shipped; those without it are made by data.study.pretrain.
"""

import csv
import io
import sys
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import train
from data.base import file_path, screens_and_features
from data.command import command, make_directory, option, write_file
from data.evaluate import OTHER_KINDS, evaluate
from data.questions import TASKS, click_right_of


class Run(NamedTuple):
    """What tells a run from all others."""

    setting: str  # one of SETTINGS
    model: int
    method: str  # one of METHODS, BASE_MODEL or SINGLE_HEADS
    lr: float
    seed: int


MEASURES = (  # see data/evaluate.py; validation_acc is the new task on validation screens
    *("task_acc", "validation_acc", "other_questions_acc", *(f"{kind}_acc" for kind in OTHER_KINDS), "same_words_acc"),
    *("word_problem_after_image_acc", "word_problem_acc"),
    "reworded_acc",  # of the base model alone: the new task, if it is asked to click right of the name
    "influence",  # of the head, where only one is adapted
)
HISTORIES = (0, 1, 3, 9)  # word problems before a screen
AFTER = tuple(  # what a run is asked after each of these, for one table: see `asked_after`
    f"{name}_after_{count}" for name in ("task_acc", "other_questions_acc") for count in HISTORIES
)
COLUMNS = (*Run._fields, *MEASURES, *AFTER)
REWORDED_SCREENS = 400  # test screens of reworded_acc


# ---- What is compared ------------------------------------------------------------------------------------------------

# Base models 1 to 3 of each kind. Those without the skill were never asked what is right of a name.
SKILLED = {1: "data/tiny_vlm.pt", 2: "data/study/base_2.pt", 3: "data/study/base_3.pt"}
UNSKILLED = {1: "runs/bases/1-unskilled.pt", 2: "runs/bases/2-unskilled.pt", 3: "runs/bases/3-unskilled.pt"}
SETTINGS = {  # {setting: (base models, the fields of train.Config that its runs share)}
    "skilled": (SKILLED, {}),
    "unskilled": (UNSKILLED, {}),
    "referring": (SKILLED, {"task": "referring"}),
}


def heads_of(*layers: int) -> str:
    """All six heads of these layers."""
    return ",".join(f"{layer}.{head}" for layer in layers for head in range(6))


# {method: fields of train.Config}. Each learning rate is the one that compare.choose_rate chooses among those of RATES.
# With replay, in fewer heads, of another rank on v, after text and on other tasks, a method keeps its rate.
BASE_MODEL = {"base model": {"method": "none", "lr": 0.0}}
LORA = {"method": "lora", "lr": 0.0025}
LORA_ON_V = {"method": "lora", "projections": "v", "lr": 0.005}
PARTIAL_LORA = {"method": "partial_lora", "lr": 0.005}  # arXiv 2401.16420, there on all linear layers
PARTIAL_LORA_ON_V = {"method": "partial_lora", "projections": "v", "lr": 0.005}
IMAGE_LORA = {"heads": "all", "lr": 0.01}
THREE = {"LoRA": LORA, "Partial LoRA": PARTIAL_LORA, "Image-LoRA": IMAGE_LORA}
UNEVEN = {"heads": f"0.0,{heads_of(1)},2.0,3.0", "lr": 0.01}  # six heads in layer 1, one in each of the others

REPLAY = {  # what one of a step's eight sequences holds
    "with replay": {},  # old questions of every kind, with true answers
    "with own answers": {"replay_with": "own"},  # the base model's, about the new screens
}
REPLAY_ONCE = {
    "with replay without what is at": {"replay_without": "what_is_at"},
    "with replay without right of": {"replay_without": "what_is_right_of,click_right_of"},
    "with replay of what is right of alone": {"replay_without": "click,what_is_at,click_right_of"},
    "with own answers about old screens": {"replay_with": "own_old"},
}
HISTORY = {  # how many word problems stand before the screens in training
    "trained after 9": {"history": 9},
    "trained after 0 to 9": {"history": 9, "vary_history": True},
}


def each_of_three(variants: dict[str, dict], **shared) -> dict[str, dict]:
    """These variants of LoRA, Partial LoRA and Image-LoRA, as {method: fields}."""
    return {
        f"{name} {variant}": fields | shared | changes
        for name, fields in THREE.items()
        for variant, changes in variants.items()
    }


METHODS = {  # with two seeds
    "LoRA": LORA,
    "LoRA on v": LORA_ON_V,
    "LoRA, rank 2": LORA | {"r": 2, "lr": 0.005},
    "Partial LoRA": PARTIAL_LORA,
    "Partial LoRA, rank 2": PARTIAL_LORA | {"r": 2, "lr": 0.01},  # as large as Image-LoRA in all heads
    "Partial LoRA on v": PARTIAL_LORA_ON_V,
    "Partial LoRA on v, rank 4": PARTIAL_LORA_ON_V | {"r": 4},
    "Image-LoRA": IMAGE_LORA,
    "Image-LoRA in 12 heads by the probe": IMAGE_LORA | {"heads": "top", "num_heads": 12},
    "Image-LoRA in 12 random heads": IMAGE_LORA | {"heads": "random", "num_heads": 12},
    "Image-LoRA in 12 heads anywhere": IMAGE_LORA | {"heads": "anywhere", "num_heads": 12},
    "Image-LoRA in 4 heads by the probe": IMAGE_LORA | {"heads": "top", "num_heads": 4},
    "Image-LoRA in 4 random heads": IMAGE_LORA | {"heads": "random", "num_heads": 4},
    "Image-LoRA in 4 heads anywhere": IMAGE_LORA | {"heads": "anywhere", "num_heads": 4},
    **{f"Image-LoRA in layer {layer}": IMAGE_LORA | {"heads": heads_of(layer)} for layer in range(4)},
    "Image-LoRA in layers 2 and 3": IMAGE_LORA | {"heads": heads_of(2, 3)},
    "Image-LoRA in uneven heads": UNEVEN,
    "Image-LoRA in uneven heads without the factor": UNEVEN | {"no_normalize": True},
    "Image-LoRA in uneven heads without the factor at half the rate": UNEVEN | {"no_normalize": True, "lr": 0.005},
    "Image-LoRA with γ trained": IMAGE_LORA | {"train_gamma": True},
    "Image-LoRA in 12 heads with γ trained": IMAGE_LORA | {"heads": "top", "num_heads": 12, "train_gamma": True},
    **each_of_three(REPLAY, replay=1),
}
ONCE = each_of_three(REPLAY_ONCE, replay=1) | each_of_three(HISTORY)  # with seed 1 alone
SINGLE_HEADS = {  # for the picture heads.png
    f"Image-LoRA in head {head}": IMAGE_LORA | {"heads": head} for head in heads_of(0, 1, 2, 3).split(",")
}
RIVALS = ("LoRA", "Partial LoRA", "Partial LoRA on v", "Image-LoRA")

PLAN = (  # (setting, methods, models, seeds): each method at its learning rate
    ("skilled", BASE_MODEL, (1, 2, 3), (1,)),
    ("skilled", METHODS, (1, 2, 3), (1, 2)),
    ("skilled", ONCE, (1, 2, 3), (1,)),
    ("skilled", SINGLE_HEADS, (1,), (1,)),
    ("referring", RIVALS, (1, 2, 3), (1,)),
    ("unskilled", BASE_MODEL, (1,), (1,)),  # with the seed that the base was pretrained with
    ("unskilled", BASE_MODEL, (2,), (2,)),
    ("unskilled", BASE_MODEL, (3,), (3,)),
)
RATES = {  # {setting: {method: the learning rates that were tried, once on each model}}
    "skilled": {
        "LoRA": (0.000625, 0.00125, 0.0025, 0.005, 0.01, 0.02),
        "LoRA on v": (0.0025, 0.005, 0.01, 0.02, 0.04),
        "Partial LoRA": (0.00125, 0.0025, 0.005, 0.01, 0.02),
        "LoRA, rank 2": (0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA, rank 2": (0.005, 0.01, 0.02, 0.04),
        "Partial LoRA on v": (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
        "Image-LoRA": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
    },
    "unskilled": {
        "LoRA": (0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA": (0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA on v": (0.01, 0.02, 0.04, 0.08),
        "Image-LoRA": (0.02, 0.04, 0.08, 0.16),
    },
}


def all_runs() -> list[Run]:
    """Every run of the tables and the pictures, each once."""
    runs = []
    for setting, methods, models, seeds in PLAN:
        for method in methods:
            lr = fields_of(method)["lr"]
            runs += [Run(setting, model, method, lr, seed) for model in models for seed in seeds]
    for setting, rates_of_methods in RATES.items():
        for method, rates in rates_of_methods.items():
            for model in (1, 2, 3):
                seed = model if setting == "unskilled" else 1
                runs += [Run(setting, model, method, lr, seed) for lr in rates]
    return list(dict.fromkeys(runs))  # because the chosen rates are among those tried


def fields_of(method: str) -> dict:
    """The fields of train.Config that make a method."""
    return (BASE_MODEL | METHODS | ONCE | SINGLE_HEADS)[method]


def config(run: Run, device="cpu") -> train.Config:
    """What to give to train.py for this run."""
    bases, shared = SETTINGS[run.setting]
    own = {"base": bases[run.model], "lr": run.lr, "seed": run.seed, "device": device}
    return train.Config(**fields_of(run.method) | shared | own)


# ---- Files of runs ---------------------------------------------------------------------------------------------------


def read_rows(path: Path, key: tuple[str, ...]) -> list[dict[str, str]]:
    """The lines of a file of runs, as texts; none if there is no such file.

    key: the columns that tell one run from another. ValueError if the file lacks one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in key if name not in (reader.fieldnames or ())]
        if missing:
            why = f"it has no column {', '.join(missing)}"
            raise ValueError(f"{path} is no file of runs, because {why}; name another one, or move it away")
        return list(reader)


def add_row(path: Path, row: dict, key: tuple[str, ...]) -> None:
    """Adds a line to a file of runs, and a column for each measure that the file lacks."""
    rows = [*read_rows(path, key), row]  # read anew, because another process may have added some
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0] | row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, file.getvalue().encode())


# ---- Make the runs ---------------------------------------------------------------------------------------------------


def make_run(run: Run, device: str) -> dict:
    """A line of the file: what `train.run` returns, and the measures that only the study needs."""
    cfg = config(run, device)
    tuned = train.finetune(cfg)
    row = tuned.result | run._asdict() | {"influence": ""}
    validation_screens = screens_and_features(tuned.model, "switches", "validation", cfg.test_screens)
    row["validation_acc"], _ = evaluate(tuned.model, *validation_screens, TASKS[cfg.task], cfg.history)
    if run.method in BASE_MODEL:
        test_screens = screens_and_features(tuned.model, "switches", "test", REWORDED_SCREENS)
        row["reworded_acc"], _ = evaluate(tuned.model, *test_screens, reword=click_right_of)
    if run.setting == "skilled" and run.method in {**BASE_MODEL, **THREE, **each_of_three(HISTORY)}:
        for count in HISTORIES:
            row |= asked_after(count, cfg, tuned.model)
    if run.method in SINGLE_HEADS:
        layer, head = map(int, cfg.heads.split("."))
        row["influence"] = tuned.result["influence"][layer][head]
    return {name: row.get(name, "") for name in COLUMNS}


def asked_after(count: int, cfg: train.Config, model) -> dict:
    """The new task and the other questions, each asked after so many word problems and its screen."""
    switch_test = screens_and_features(model, "switches", "test", cfg.test_screens)
    source_test = screens_and_features(model, "source", "test", cfg.test_screens // 2 + 1)
    task_acc, _ = evaluate(model, *switch_test, TASKS[cfg.task], count)
    others = [evaluate(model, *source_test, kind, count)[0] for kind in OTHER_KINDS]
    return {f"task_acc_after_{count}": task_acc, f"other_questions_acc_after_{count}": sum(others) / len(others)}


@dataclass(frozen=True)
class RunsConfig:
    out: str = option("runs/mine.csv", "file of runs; those that it lacks are made")
    workers: int = option(2, "processes that make runs, of one thread each", minimum=1)
    device: str = option("cpu", "where to compute: cpu, cuda, mps, or auto")


def main(cfg: RunsConfig) -> None:
    """Make the runs that the file lacks, and write each at once. ValueError, before any, if a base is not there."""
    path = Path(cfg.out)
    known = set()
    for row in read_rows(path, Run._fields):
        known.add(Run(row["setting"], int(row["model"]), row["method"], float(row["lr"]), int(row["seed"])))
    missing = [run for run in all_runs() if run not in known]
    for run in missing:
        base = config(run).base
        if not file_path(base).exists():
            raise ValueError(f"there is no {base}; first make it by data.study.pretrain, as its page says")
    if not missing:
        print(f"{path} holds all runs")
        return
    make_directory(path.parent)
    with get_context("spawn").Pool(cfg.workers, torch.set_num_threads, (1,)) as pool:
        rows = pool.imap_unordered(partial(make_run, device=cfg.device), missing)
        for row in tqdm(rows, "runs", len(missing)):
            add_row(path, row, Run._fields)


if __name__ == "__main__":
    sys.exit(command(RunsConfig, main, __doc__))
