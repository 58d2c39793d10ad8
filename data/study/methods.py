"""For runs.py, smollm.py and compare.py: what a row of runs.csv and smollm.csv means, what is trained and asked.

A method's name says which fields of train.Config it sets: "LoRA on v with hints" is LoRA, changed by two ENDINGS.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import train
from data.prompts import random_click
from data.questions import grounding_sample, place
from data.screens import Screen


class Row(NamedTuple):
    """What tells a row from all others. The rows of a run differ in gamma and text only."""

    setting: str  # one of SETTINGS
    model: int
    method: str  # one of METHODS, with any of ENDINGS
    lr: float
    seed: int
    gamma: float  # what the update is multiplied by after training
    text: int  # how many word problems stand before each screen when the model is asked


# ---- Settings: base models and tasks ---------------------------------------------------------------------------------


def below_samples(screen: Screen, rng) -> list[dict]:
    """Asks in the new task's words, *click wifi*, for the switch on the line below; not for the last line's name."""
    targets = screen.targets()  # from the first line to the last
    samples = []
    for target, below in zip(targets, targets[1:]):
        sample = grounding_sample(screen, target, rng)
        samples.append(sample | {"bbox": below.click, "answer": place(below.click)})
    return samples


def random_below(screen: Screen, rng) -> dict:
    samples = below_samples(screen, rng)
    return samples[rng.integers(len(samples))]


class Setting(NamedTuple):
    bases: dict[int, str]  # {model: its file}
    sample_of: Callable = random_click  # what the new task asks in training, see data.prompts.training_batch
    kind: str | Callable = "click"  # and in tests, see data.questions.all_samples
    steps: int = 500


SKILLED = {1: "data/study/tiny_vlm_1.pt", 2: "data/tiny_vlm.pt", 3: "data/study/tiny_vlm_3.pt"}
SETTINGS = {
    "skilled": Setting(SKILLED),
    "unskilled": Setting({model: f"runs/bases/{model}-unskilled.pt" for model in SKILLED}),
    "copying": Setting({model: f"runs/bases/{model}-copying.pt" for model in SKILLED}),
    "below": Setting(SKILLED, random_below, below_samples),
    "SmolLM2": Setting({1: "data/study/smollm_1.pt", 2: "data/study/smollm_2.pt"}, steps=300),
}

# ---- Methods ---------------------------------------------------------------------------------------------------------

REWORDED = "base model, asked to click right of the name"
UNTRAINED = ("base model", REWORDED)
METHODS = {  # {name: fields of train.Config}
    "LoRA": {"method": "lora"},
    "Partial LoRA": {"method": "partial_lora"},  # arXiv 2401.16420, there on all linear layers
    "Image-LoRA": {"method": "image_lora", "heads": "all"},
}
CORRECT = " with correct answers"  # instead of own ones: see data.study.runs.fine_tune
ENDINGS = {  # {ending of a name, as a regular expression: the fields that it changes}
    " on v": {"projections": "v"},
    " on q and k": {"projections": "qk"},
    " on the MLP": {"projections": "mlp"},
    " on all linear layers": {"projections": "all"},
    r", rank (\d+)": {"r": int},
    r" in (\d+) heads by the probe": {"heads": "top", "num_heads": int},
    r" in (\d+) random heads": {"heads": "random", "num_heads": int},
    r", without 1/√\|S\|": {"no_normalize": True},
    " trained after 9": {"text": 9},  # word problems before each screen
    " trained after 0 to 9": {"text": 9, "vary_text": True},
    " with own answers": {"replay": 2},
    CORRECT: {"replay": 2},
    " with hints": {"hint": "question"},
    ", at (?:half|four times) the rate": {},  # of the method without this ending
}


def split_ending(method: str) -> tuple[str, dict]:
    """A name without its last ending, and the fields that this changes. ValueError if it has none."""
    for ending, changes in ENDINGS.items():
        found = re.fullmatch(f"(.+){ending}", method)
        if found:
            numbers = map(int, found.groups()[1:])
            return found[1], {name: next(numbers) if value is int else value for name, value in changes.items()}
    raise ValueError(f"{method!r} is no method of data/study/methods.py")


def fields(method: str) -> dict:
    """The fields of train.Config that a name stands for."""
    if method in METHODS:
        return METHODS[method]
    shorter, changes = split_ending(method)
    return fields(shorter) | changes


def config(row: Row, device="cpu") -> train.Config:
    """The run of a row."""
    setting = SETTINGS[row.setting]
    changes = {} if row.method in UNTRAINED else fields(row.method)
    shared = {"base": setting.bases[row.model], "steps": setting.steps, "lr": row.lr, "seed": row.seed}
    return train.Config(**shared | changes, device=device)


def rows_of(runs) -> list[Row]:
    """The rows of a table, pandas.DataFrame."""
    return [Row(*row) for row in runs[[*Row._fields]].itertuples(index=False)]
