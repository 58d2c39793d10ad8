"""Makes the runs of tiny models that the tables need (data/study/plan.py), a line of runs.csv for each row.

python -m data.study.runs --out runs/mine.csv     make all of them, in some hours; if stopped, go on

The base models are shipped, except for those that can repeat a place (data.study.copying).
"""

import csv
import io
import sys
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import train
from data import prompts
from data.base import file_path, load_base, screens_and_features
from data.command import command, make_directory, option, write_file
from data.evaluate import evaluate, generate_answers, measure, measure_hints, measure_other_questions
from data.gamma import turned_down
from data.prompts import random_click
from data.questions import OTHER_KINDS, all_samples, click_right_of, random_samples
from data.replay import make_replay_data
from data.study.attention import image_share
from data.study.plan import NINE, REWORDED, SETTINGS, Row, all_rows, fields_of

AFTER_NINE = "Image-LoRA" + NINE
AS_TRAINED = ("same_words_acc", "word_problem_after_image_acc", "word_problem_acc")  # measured at gamma 1 alone
ANSWERS = ("task_acc", "validation_acc", "other_questions_acc", *(f"{kind}_acc" for kind in OTHER_KINDS), *AS_TRAINED)
MEASURES = (  # see data/evaluate.py; validation_acc is the new task on validation screens
    *ANSWERS,
    *("right_hint_acc", "wrong_hint_acc", "followed_acc"),
    "replay_answers_acc",  # of the answers that replay trains on
    *(f"image_share_{layer}" for layer in range(4)),  # of the base model's attention, see data/study/attention.py
    # With gamma as attention predicts it: one for all layers, and one for each.
    *("one_gamma_acc", "one_gamma_others_acc", "layer_gammas_acc", "layer_gammas_others_acc"),
)
COLUMNS = (*Row._fields, *MEASURES)
SHARE_QUESTIONS = 100  # for which the image's share of attention is measured
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


@dataclass
class Config(train.Config):
    """A run of the study. Nothing has to be refused."""

    replay_answers: str = "own"  # the base model's own, or correct ones
    task: str = "click"  # or what_is_at: the model is given a place, and names what is there

    def __post_init__(self):
        pass


def config(row: Row, device="cpu") -> Config:
    """What to train for this row."""
    bases, shared = SETTINGS[row.setting]
    own = {"base": bases[row.model], "lr": row.lr, "seed": row.seed, "device": device}
    return Config(**fields_of(row.method) | shared | own)


@cache
def screens_of(base: str, domain: str, split: str, count: int, device: str) -> tuple[list, Tensor]:
    """(Screens, features [N, P, D]), which the runs of a process share."""
    return screens_and_features(load_base(base, device), domain, split, count)


def make_rows(rows: list[Row], device: str) -> list[dict]:
    """Lines of the file: trains a model once, as train.finetune does, and asks it as each of these rows says."""
    cfg = config(rows[0], device)
    model = load_base(cfg.base, device)
    train_data = screens_of(cfg.base, "new", "train", prompts.TRAIN_SCREENS, device)
    replay_data = None
    if cfg.replay:
        answer = correct_answers if cfg.replay_answers == "correct" else generate_answers
        replay_data = make_replay_data(model, train_data, cfg.seed, answer)
    adapter = fine_tune(cfg, model, train_data, replay_data)
    lines = []
    for row in rows:
        with turned_down(adapter, row.gamma):
            measures = ask(model, adapter, row, cfg)
        if replay_data:
            measures["replay_answers_acc"] = replay_data.share_correct
        lines.append(row._asdict() | {name: measures.get(name, "") for name in MEASURES})
    return lines


def correct_answers(model, samples: list[dict], features: Tensor) -> list[str]:
    return [sample["answer"] for sample in samples]


def random_name(screen, rng) -> dict:
    """A question of what is at a place."""
    (sample,) = random_samples(screen, 1, rng, refer=1.0, distinct=True)
    return sample


def fine_tune(cfg: Config, model, train_data: tuple, replay_data) -> nn.Module:
    """The adapter, trained as train.py trains it; a module without parameters for the base model."""
    if cfg.method == "none":
        model.requires_grad_(False)
        return nn.Module()
    sample_of = random_click if cfg.task == "click" else random_name
    batch_of = partial(prompts.training_batch, cfg, train_data, sample_of=sample_of)
    heads = train.choose_heads(cfg, model, batch_of)
    adapter = train.attach_adapter(cfg, model, heads)
    train.train(cfg, model, adapter, partial(batch_of, replay_data=replay_data))
    return adapter


def ask(model, adapter: nn.Module, row: Row, cfg: Config) -> dict:
    """The measures of a row."""
    if row.method == REWORDED:
        test = screens_of(cfg.base, "new", "test", REWORDED_SCREENS, cfg.device)
        return {"task_acc": evaluate(model, *test, reword=click_right_of)[0]}
    new_test = screens_of(cfg.base, "new", "test", cfg.test_screens, cfg.device)
    old_test = screens_of(cfg.base, "old", "test", cfg.test_screens // 2 + 1, cfg.device)
    if row.gamma == 1 and row.text == cfg.text:  # as in training
        measures, _ = measure(model, new_test, old_test, cfg.task, row.text)
        if cfg.hint != "none":
            measures |= measure_hints(model, new_test)
    else:
        measures = ask_briefly(model, new_test, old_test, cfg, row.text)
    if row.text == cfg.text or row.method == AFTER_NINE:
        validation = screens_of(cfg.base, "new", "validation", cfg.test_screens, cfg.device)
        measures["validation_acc"], _ = evaluate(model, *validation, cfg.task, row.text)
    if row.method == "base model":
        shares = shares_of_layers(model, new_test, row.text)
        measures |= {f"image_share_{layer}": share for layer, share in enumerate(shares)}
    if row.gamma == 1 and row.text != cfg.text and row.method in ("Image-LoRA", AFTER_NINE):
        frozen = load_base(cfg.base, cfg.device)
        shares = [shares_of_layers(frozen, new_test, text) for text in (cfg.text, row.text)]
        of_layers = [trained / asked for trained, asked in zip(*shares)]
        for name, gammas in (("one_gamma", sum(shares[0]) / sum(shares[1])), ("layer_gammas", of_layers)):
            with turned_down(adapter, gammas):
                brief = ask_briefly(model, new_test, old_test, cfg, row.text)
            measures[f"{name}_acc"] = brief["task_acc"]
            measures[f"{name}_others_acc"] = brief["other_questions_acc"]
    return measures


def ask_briefly(model, new_test: tuple, old_test: tuple, cfg: Config, num_problems: int) -> dict:
    """The new task and the other questions."""
    measures = measure_other_questions(model, old_test, num_problems)
    measures["task_acc"], _ = evaluate(model, *new_test, cfg.task, num_problems)
    return measures


def shares_of_layers(model, new_test: tuple, num_problems: int) -> list[float]:
    """The image's share of attention in each layer, for questions about new screens."""
    screens, features = new_test
    numbers, samples = zip(*all_samples(screens)[:SHARE_QUESTIONS])
    return image_share(model, samples, features[list(numbers)], num_problems)


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
