"""Makes the runs of tiny models that the tables need (data/study/plan.py), a line of runs.csv for each row.

python -m data.study.runs --out runs/mine.csv     make all of them, in some hours; if stopped, go on

The base models with the skill are shipped; those without it are made by data.study.pretrain.
"""

import csv
import io
import sys
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import train
from data.attention import image_share
from data.base import file_path, screens_and_features
from data.command import command, make_directory, option, write_file
from data.evaluate import OTHER_KINDS, evaluate, measure, measure_other_questions
from data.questions import TASKS, all_samples, click_right_of
from data.rivals import turned_down
from data.study.plan import METHODS, MORE_TEXT, REWORDED, SETTINGS, Row, all_rows

MEASURES = (  # see data/evaluate.py; validation_acc is the new task on validation screens
    *("task_acc", "validation_acc", "other_questions_acc", *(f"{kind}_acc" for kind in OTHER_KINDS), "same_words_acc"),
    *("word_problem_after_image_acc", "word_problem_acc"),
    "own_answers_acc",  # of the base model's own answers, if they are trained on
    "image_share",  # of the base model's attention, see data/attention.py
)
COLUMNS = (*Row._fields, *MEASURES)
REWORDED_SCREENS = 400  # test screens on which the base model is asked to click right of the name


def read_rows(path: Path, key: tuple[str, ...]) -> list[dict[str, str]]:
    """The lines of a file of runs, as texts; none if there is no such file.

    key: the columns that tell one line from another. ValueError if the file lacks one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in key if name not in (reader.fieldnames or ())]
        if missing:
            why = f"it has no column {', '.join(missing)}"
            raise ValueError(f"{path} is no file of runs, because {why}; name another one, or move it away")
        return list(reader)


def add_rows(path: Path, new_rows: list[dict], key: tuple[str, ...]) -> None:
    """Adds lines to a file of runs, and a column for each measure that the file lacks."""
    rows = read_rows(path, key) + new_rows  # read anew, because another process may have added some
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0] | new_rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, file.getvalue().encode())


def config(row: Row, device="cpu") -> train.Config:
    """What to give to train.py for this row."""
    bases, shared = SETTINGS[row.setting]
    own = {"base": bases[row.model], "lr": row.lr, "seed": row.seed, "device": device}
    return train.Config(**METHODS[row.method] | shared | own)


def make_rows(rows: list[Row], device: str) -> list[dict]:
    """Lines of the file: trains a model once, and asks it as each of these rows says."""
    cfg = config(rows[0], device)
    tuned = train.finetune(cfg)
    lines = []
    for row in rows:
        with turned_down(tuned.adapter or nn.Module(), row.gamma):
            measures = ask(tuned.model, row, cfg) | {"own_answers_acc": tuned.result["own_answers_acc"]}
        lines.append(row._asdict() | {name: measures.get(name, "") for name in MEASURES})
    return lines


def ask(model, row: Row, cfg: train.Config) -> dict:
    """The measures of a row."""
    if row.method == REWORDED:
        test = screens_and_features(model, "new", "test", REWORDED_SCREENS)
        return {"task_acc": evaluate(model, *test, reword=click_right_of)[0]}
    test = screens_and_features(model, "new", "test", cfg.test_screens)
    old_test = screens_and_features(model, "old", "test", cfg.test_screens // 2 + 1)
    if row.text == cfg.text:  # as in training
        measures, _ = measure(model, test, old_test, cfg.task, row.text)
    else:
        measures, _ = measure_other_questions(model, old_test, row.text)
        measures = {"other_questions_acc": measures["other_questions_acc"]}
        measures["task_acc"], _ = evaluate(model, *test, TASKS[cfg.task], row.text)
    if row.text == cfg.text or row.method == MORE_TEXT:
        validation = screens_and_features(model, "new", "validation", cfg.test_screens)
        measures["validation_acc"], _ = evaluate(model, *validation, TASKS[cfg.task], row.text)
    if row.method == "base model":
        screens, features = test
        numbers, samples = zip(*all_samples(screens)[:100])
        measures["image_share"] = image_share(model, samples, features[list(numbers)], row.text)
    return measures


@dataclass(frozen=True)
class RunsConfig:
    out: str = option("runs/mine.csv", "file of runs; those that it lacks are made")
    workers: int = option(2, "processes that make runs, of one thread each", minimum=1)
    device: str = option("cpu", "where to compute: cpu, cuda, mps, or auto")


def main(cfg: RunsConfig) -> None:
    """Make the rows that the file lacks, and write those of a run at once. ValueError, before any, if a base is not
    there."""
    path = Path(cfg.out)
    keys_in_file = {tuple(line[name] for name in Row._fields) for line in read_rows(path, Row._fields)}
    runs = {}  # {what is trained: the rows that are missing of it}
    for row in all_rows():
        if tuple(map(str, row)) not in keys_in_file:
            runs.setdefault(row[:5], []).append(row)
    for rows in runs.values():
        base = config(rows[0]).base
        if not file_path(base).exists():
            raise ValueError(f"there is no {base}; first make it by data.study.pretrain, as its page says")
    if not runs:
        print(f"{path} holds all runs")
        return
    make_directory(path.parent)
    with get_context("spawn").Pool(cfg.workers, torch.set_num_threads, (1,)) as pool:
        made = pool.imap_unordered(partial(make_rows, device=cfg.device), runs.values())
        for lines in tqdm(made, "runs", len(runs)):
            add_rows(path, lines, Row._fields)


if __name__ == "__main__":
    sys.exit(command(RunsConfig, main, __doc__))
