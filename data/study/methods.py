"""The plan of the study: what is trained, how it is asked then, and which rows of runs.csv and smollm.csv this makes.

A method's name says which fields of train.Config it sets: "LoRA on v with hints" is LoRA, changed by two ENDINGS.
"""

import re
from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple

import train
from data.prompts import random_click
from data.questions import grounding_sample, place, random_samples
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


def random_referring(screen: Screen, rng) -> dict:
    """Asks what is at a random switch."""
    (sample,) = random_samples(screen, 1, rng, refer=1.0, distinct=True)
    return sample


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
    "referring": Setting(SKILLED, random_referring, "what_is_at"),
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
THREE = [*METHODS]
CORRECT = " with correct answers"  # instead of own ones: see data.study.runs.fine_tune
FOUR_TIMES = ", at four times the rate"  # of the method without this ending
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
    " for 40 steps": {"steps": 40},
    FOUR_TIMES: {},
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


# ---- Rows ------------------------------------------------------------------------------------------------------------

GAMMAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
TEXTS = (0, 3, 9)
TRIED = {  # {setting: {method: the learning rates that were tried with seed 1}}
    "skilled": {
        "LoRA": (0.00125, 0.0025, 0.005),
        "LoRA on v": (0.0025, 0.005, 0.01, 0.02),
        "LoRA on the MLP": (0.00125, 0.0025, 0.005),
        "LoRA on all linear layers": (0.000625, 0.00125, 0.0025),
        "LoRA, rank 2": (0.0025, 0.005, 0.01),
        "LoRA on the MLP, rank 2": (0.0025, 0.005, 0.01),
        "Partial LoRA": (0.000625, 0.00125, 0.0025, 0.005, 0.01),
        "Partial LoRA on v": (0.0025, 0.005, 0.01),
        "Partial LoRA on the MLP": (0.00125, 0.0025, 0.005),
        "Partial LoRA on all linear layers": (0.000625, 0.00125, 0.0025),
        "Partial LoRA, rank 2": (0.0025, 0.005, 0.01),
        "Partial LoRA on the MLP, rank 2": (0.0025, 0.005, 0.01),
        "Image-LoRA": (0.005, 0.01, 0.02),
    },
    "unskilled": {
        "LoRA": (0.0025, 0.005, 0.01),
        "LoRA, rank 2": (0.005, 0.01, 0.02),
        "Partial LoRA": (0.0025, 0.005, 0.01),
        "Partial LoRA, rank 2": (0.01, 0.02, 0.04),
        "Image-LoRA": (0.04, 0.08, 0.16),
    },
    "SmolLM2": {
        "LoRA": (0.001, 0.002, 0.004),
        "LoRA on the MLP, rank 5": (0.001, 0.002, 0.004),  # about as large as LoRA of rank 8
        "Partial LoRA": (0.002, 0.004, 0.008),
        "Partial LoRA on the MLP, rank 5": (0.002, 0.004, 0.008),
        "Image-LoRA": (0.004, 0.008, 0.016),
    },
}
LADDER = ["LoRA", "Partial LoRA", "Partial LoRA on v", "Image-LoRA", "Image-LoRA in 12 heads by the probe"]
COSTS = [method for method in TRIED["skilled"] if not method.endswith(" on v")]
OWN = [f"{method} with own answers" for method in THREE]
CORRECTED = [method + CORRECT for method in THREE]
AFTER_9 = [f"{method} trained after 9" for method in THREE]
VARIED = [f"{method} trained after 0 to 9 with own answers" for method in THREE]
HINTED = ["LoRA", "LoRA on the MLP", "LoRA on q and k", "LoRA on v", "Partial LoRA", "Image-LoRA"]
HINTS = [f"{method} with hints" for method in HINTED]
FASTER_HINTS = [f"{method} with hints{FOUR_TIMES}" for method in THREE]
BY_PROBE = [f"Image-LoRA in {number} heads by the probe" for number in (4, 12)]
RANDOM = [f"Image-LoRA in {number} random heads" for number in (4, 12)]
NEW_SKILL = [*TRIED["unskilled"]]
ON_SMOLLM2 = [*TRIED["SmolLM2"], "LoRA, rank 2", "Partial LoRA, rank 2", *OWN]


class Group(NamedTuple):
    """Runs that differ in the model, the method and the seed, and how each is asked."""

    setting: str
    methods: Iterable[str]
    seeds: Iterable[int] = (1, 2, 3)
    gammas: Iterable[float] = (1.0,)
    texts: Iterable[int] = (0,)


GROUPS = [
    # What does it cost elsewhere, and what brings it back?
    Group("skilled", COSTS + LADDER + OWN + CORRECTED, gammas=GAMMAS),
    Group("skilled", ["Image-LoRA in 12 heads by the probe, without 1/√|S|"], gammas=GAMMAS),
    Group("skilled", ["LoRA on v"], seeds=[1], gammas=GAMMAS),
    Group("SmolLM2", ON_SMOLLM2, [1], GAMMAS[:-1]),
    # A new skill?
    *(Group(setting, NEW_SKILL) for setting in ("unskilled", "below")),
    *(Group(setting, [REWORDED], seeds=[1]) for setting in ("skilled", "unskilled")),
    Group("referring", LADDER[:4], seeds=[1]),
    # Does text mislead it?
    Group("skilled", HINTS),
    Group("skilled", ["Partial LoRA on v with hints", "LoRA, rank 2 with hints"], seeds=[1, 2]),
    Group("skilled", FASTER_HINTS, seeds=[1]),
    Group("copying", ["LoRA with hints", "LoRA on v with hints", "Image-LoRA with hints"], seeds=[1]),
    # Does the text before the image have to be as in training?
    Group("skilled", THREE + AFTER_9 + VARIED, texts=TEXTS),
    Group("skilled", ["Image-LoRA trained after 0 to 9"], seeds=[1], texts=TEXTS),
    Group("skilled", ["base model", "Image-LoRA", "Image-LoRA trained after 9"], seeds=[1], texts=(0, 1, 3, 9)),
    # Does the choice of heads matter?
    Group("skilled", BY_PROBE),
    Group("skilled", RANDOM, seeds=range(1, 6)),
    # What SmolLM2 can do before fine-tuning, and what it does with hints
    Group("SmolLM2", ["base model"], seeds=[1]),
]
SINGLE_ROWS = [
    Row("SmolLM2", 1, "LoRA with hints for 40 steps", 0.001, 1, 1.0, 0),
    Row("SmolLM2", 1, "Image-LoRA with hints for 40 steps", 0.016, 1, 1.0, 0),
]


def planned_rows(rates: dict[tuple[str, str], float]) -> list[Row]:
    """Each row once: those by which learning rates are chosen, and those of GROUPS at the chosen rates.

    rates: {(setting, method): the chosen one}. A tuned method that is not there waits for its rate."""
    rows = [*SINGLE_ROWS]
    for setting, tried in TRIED.items():
        for (method, lrs), model in product(tried.items(), SETTINGS[setting].bases):
            rows += [Row(setting, model, method, lr, 1, 1.0, 0) for lr in lrs]
    for setting, methods, *asked in GROUPS:
        for method in methods:
            if method in TRIED.get(setting, ()) and (setting, method) not in rates:
                continue
            lr = chosen_rate(rates, setting, method)
            rows += [
                Row(setting, model, method, lr, *rest) for model, *rest in product(SETTINGS[setting].bases, *asked)
            ]
    return list(dict.fromkeys(rows))


def rows_of(runs) -> list[Row]:
    """The rows of a table, pandas.DataFrame."""
    return [Row(*row) for row in runs[[*Row._fields]].itertuples(index=False)]


def chosen_rate(rates: dict[tuple[str, str], float], setting: str, method: str) -> float:
    """A method that was not tuned has the rate of the one that its name begins with, or that of the demo's setting."""
    if method in UNTRAINED:
        return 0.0
    for place_of_choice in (setting, "skilled"):
        if (place_of_choice, method) in rates:
            return rates[place_of_choice, method]
    shorter, _ = split_ending(method)
    return chosen_rate(rates, setting, shorter) * (4 if method.endswith(FOUR_TIMES) else 1)
