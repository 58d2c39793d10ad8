"""Makes the rows of a file anew: trains a model for each run, and asks it as its rows say.

python -m data.study.runs --out runs/mine.csv                       all rows of tiny models, in some days of a core
python -m data.study.runs --out runs/mine.csv --method "LoRA on v"  one method's
python -m data.study.runs --plan data/study/smollm.csv --out runs/smollm.csv      SmolLM2's, about an hour for each run

Of the plan, only the columns of data.study.methods.Row are read, so a file with these alone plans new runs. Rows are
written run by run, and if it was stopped, it goes on. The models without the skill are made by data.study.pretrain.
"""

import sys
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

import train
from data import prompts
from data.base import file_path, find_device, load_base, screens_and_features
from data.command import command, make_directory, option, write_file
from data.evaluate import evaluate, generate_answers, measure, measure_briefly, measure_hints
from data.gamma import turned_down
from data.questions import click_right_of
from data.replay import make_replay_data
from data.study.methods import CORRECT, REWORDED, SETTINGS, UNTRAINED, Row, config, rows_of

REWORDED_SCREENS = 400  # test screens on which the base model is asked to click right of the name


@dataclass(frozen=True)
class RunsConfig:
    plan: str = option("data/study/runs.csv", "file that names the rows")
    out: str = option("runs/mine.csv", "file of rows; those of the plan that it lacks are made")
    method: str = option("", "only the rows of this method")
    workers: int = option(2, "processes that make runs, of one thread each", minimum=1)
    device: str = option("cpu", "where tiny models compute: cpu, cuda, mps, or auto")


def main(cfg: RunsConfig) -> None:
    """Make the rows that the file lacks, and write those of a run at once."""
    out = Path(cfg.out)
    made = rows_of(pd.read_csv(out)) if out.exists() else []
    runs = {}  # {what is trained: the rows that are missing of it}
    plan = pd.read_csv(file_path(cfg.plan))
    if not {*Row._fields} <= {*plan}:
        raise ValueError(f"{cfg.plan} plans no runs: it must have the columns {', '.join(Row._fields)}")
    for row in rows_of(plan):
        if row not in made and cfg.method in ("", row.method):
            runs.setdefault(row[:5], []).append(row)
    for rows in runs.values():
        base = SETTINGS[rows[0].setting].bases[rows[0].model]
        if not file_path(base).exists():
            raise ValueError(f"there is no {base}; first make it by data.study.pretrain, as the study's page says")
    make_directory(out.parent)
    make = partial(make_rows, find_device(cfg.device))
    with get_context("spawn").Pool(cfg.workers, torch.set_num_threads, (1,)) as pool:
        for lines in tqdm(pool.imap_unordered(make, runs.values()), "runs", len(runs)):
            before = [pd.read_csv(out, dtype=str)] if out.exists() else []
            write_file(out, pd.concat([*before, pd.DataFrame(lines)]).to_csv(index=False).encode())


@cache
def screens_of(base: str, domain: str, split: str, count: int, device: str) -> tuple[list, Tensor]:
    """(Screens, features [N, P, D]), which the runs of a process share."""
    return screens_and_features(load_base(base, device), domain, split, count)


def make_rows(device: str, rows: list[Row]) -> list[dict]:
    """Lines of the file: trains a model once, and asks it as each of these rows says."""
    if rows[0].setting == "SmolLM2":
        from data.study import smollm  # here, because tiny models need none of its packages

        return smollm.make_rows(rows)
    cfg = config(rows[0], device)
    model = load_base(cfg.base, cfg.device)
    adapter, of_run = nn.Module(), {}
    if rows[0].method not in UNTRAINED:
        adapter, of_run = fine_tune(rows[0], cfg, model)
    lines = []
    for row in rows:
        with turned_down(adapter, row.gamma):
            lines.append(row._asdict() | ask(model, row, cfg) | of_run)
    return lines


def correct_answers(model, samples: list[dict], features: Tensor) -> list[str]:
    return [sample["answer"] for sample in samples]


def fine_tune(row: Row, cfg: train.Config, model) -> tuple[nn.Module, dict]:
    """(The adapter, trained as by train.finetune; a measure of the answers in replay)."""
    data = screens_of(cfg.base, "new", "train", prompts.TRAIN_SCREENS, cfg.device)
    replay_data, of_run = None, {}
    if cfg.replay:
        answer = correct_answers if CORRECT in row.method else generate_answers
        replay_data = make_replay_data(model, data, cfg.seed, answer)
        of_run["replay_answers_acc"] = replay_data.share_correct
    batch_of = partial(prompts.training_batch, cfg, data, sample_of=SETTINGS[row.setting].sample_of)
    heads = train.choose_heads(cfg, model, batch_of)
    adapter = train.attach_adapter(cfg, model, heads)
    train.train(cfg, model, adapter, partial(batch_of, replay_data=replay_data))
    return adapter, of_run


def ask(model, row: Row, cfg: train.Config) -> dict:
    """The measures of a row, see data/evaluate.py; validation_acc is the new task on validation screens."""
    if row.method == REWORDED:
        test = screens_of(cfg.base, "new", "test", REWORDED_SCREENS, cfg.device)
        return {"task_acc": evaluate(model, *test, reword=click_right_of)[0]}
    kind = SETTINGS[row.setting].kind
    new_test = screens_of(cfg.base, "new", "test", cfg.test_screens, cfg.device)
    old_test = screens_of(cfg.base, "old", "test", cfg.test_screens // 2 + 1, cfg.device)
    validation = screens_of(cfg.base, "new", "validation", cfg.test_screens, cfg.device)
    if row.gamma == 1 and row.text == cfg.text:  # as in training
        measures, _ = measure(model, new_test, old_test, kind, row.text)
    else:
        measures = measure_briefly(model, new_test, old_test, kind, row.text)
    measures["validation_acc"], _ = evaluate(model, *validation, kind, row.text)
    if cfg.hint != "none":
        measures |= measure_hints(model, new_test)
    return measures


if __name__ == "__main__":
    sys.exit(command(RunsConfig, main, __doc__))
