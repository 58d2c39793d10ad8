"""What the study compares: the methods, their learning rates, and the rows of runs.csv.

This file needs no pandas, because runs.py makes the runs without it. (SmolLM2's are made one by one, by smollm.py.)
"""

from itertools import product
from typing import NamedTuple


class Row(NamedTuple):
    """What tells a row of runs.csv from all others: how a model was trained, and how it was asked then."""

    setting: str  # one of SETTINGS
    model: int
    method: str  # one of METHODS, with any of ENDINGS
    lr: float
    seed: int
    gamma: float  # what the update is multiplied by after training
    text: int  # how many word problems stand before each screen when the model is asked


# ---- Models, methods and learning rates ------------------------------------------------------------------------------

MODELS = (1, 2, 3)
SKILLED = {1: "data/study/tiny_vlm_1.pt", 2: "data/tiny_vlm.pt", 3: "data/study/tiny_vlm_3.pt"}
COPYING = {model: f"runs/bases/{model}-copying.pt" for model in MODELS}  # can repeat a place, see copying.py
SETTINGS = {  # {setting: (base models, the fields of runs.Config that its runs share)}
    "skilled": (SKILLED, {}),
    "copying": (COPYING, {}),
    "referring": (SKILLED, {"task": "what_is_at"}),
}
REWORDED = "base model, asked to click right of the name"
LORA, PARTIAL_LORA = {"method": "lora"}, {"method": "partial_lora"}
METHODS = {  # {name: fields of runs.Config, with the learning rate that validation screens chose}
    "base model": {"method": "none", "lr": 0.0},
    REWORDED: {"method": "none", "lr": 0.0},
    "LoRA": LORA | {"lr": 0.0025},
    "LoRA on the MLP": LORA | {"projections": "mlp", "lr": 0.0025},
    "LoRA on all linear layers": LORA | {"projections": "all", "lr": 0.00125},
    "LoRA on v": LORA | {"projections": "v", "lr": 0.01},
    "LoRA on q and k": LORA | {"projections": "qk", "lr": 0.0025},
    "LoRA, rank 2": LORA | {"r": 2, "lr": 0.005},
    "LoRA on the MLP, rank 2": LORA | {"projections": "mlp", "r": 2, "lr": 0.005},
    "Partial LoRA": PARTIAL_LORA | {"lr": 0.00125},
    "Partial LoRA on the MLP": PARTIAL_LORA | {"projections": "mlp", "lr": 0.0025},
    "Partial LoRA on all linear layers": PARTIAL_LORA | {"projections": "all", "lr": 0.00125},  # as in its paper
    "Partial LoRA on v": PARTIAL_LORA | {"projections": "v", "lr": 0.005},
    "Partial LoRA, rank 2": PARTIAL_LORA | {"r": 2, "lr": 0.005},
    "Partial LoRA on the MLP, rank 2": PARTIAL_LORA | {"projections": "mlp", "r": 2, "lr": 0.005},
    "Image-LoRA": {"method": "image_lora", "heads": "all", "lr": 0.01},
}
ENDINGS = {  # {ending of a method's name: the fields that it changes}; the learning rate stays
    " in 4 heads by the probe": {"heads": "top", "num_heads": 4},
    " in 4 random heads": {"heads": "random", "num_heads": 4},
    " in 12 heads by the probe": {"heads": "top", "num_heads": 12},
    " in 12 random heads": {"heads": "random", "num_heads": 12},
    ", without 1/√|S|": {"no_normalize": True},
    " with own answers": {"replay": 2},  # the base model's, about new screens
    " with correct answers": {"replay": 2, "replay_answers": "correct"},
    " with hints": {"hint": "question"},
    " trained after 9": {"text": 9},  # word problems before each screen
    " trained after 0 to 9": {"text": 9, "vary_text": True},
}


def fields_of(method: str) -> dict:
    """The fields of runs.Config that a name stands for: 'LoRA on v with hints' is LoRA on v, changed once."""
    if method in METHODS:
        return METHODS[method]
    for ending, changes in ENDINGS.items():
        if method.endswith(ending):
            return fields_of(method.removesuffix(ending)) | changes
    raise ValueError(f"{method!r} is no method of data/study/plan.py")


TRIED = {  # {method: the learning rates that were compared on tiny models, once on each}
    "LoRA": (0.00125, 0.0025, 0.005),
    "LoRA on the MLP": (0.00125, 0.0025, 0.005),
    "LoRA on all linear layers": (0.000625, 0.00125, 0.0025),
    "LoRA on v": (0.0025, 0.005, 0.01, 0.02),
    "LoRA, rank 2": (0.0025, 0.005, 0.01),
    "LoRA on the MLP, rank 2": (0.0025, 0.005, 0.01),
    "Partial LoRA": (0.000625, 0.00125, 0.0025, 0.005, 0.01),
    "Partial LoRA on the MLP": (0.00125, 0.0025, 0.005),
    "Partial LoRA on all linear layers": (0.000625, 0.00125, 0.0025),
    "Partial LoRA on v": (0.0025, 0.005, 0.01),
    "Partial LoRA, rank 2": (0.0025, 0.005, 0.01),
    "Partial LoRA on the MLP, rank 2": (0.0025, 0.005, 0.01),
    "Image-LoRA": (0.005, 0.01, 0.02),
}
SMOLLM2 = {  # {method: its learning rate}
    "base model": 0.0,
    "LoRA": 0.002,
    "Partial LoRA": 0.004,
    "Image-LoRA": 0.008,
    "LoRA, rank 2": 0.004,
    "Partial LoRA, rank 2": 0.008,
    "LoRA with own answers": 0.002,
    "Partial LoRA with own answers": 0.004,
    "Image-LoRA with own answers": 0.008,
}
SMOLLM2_RATES = SMOLLM2 | {"LoRA with hints": 0.001, "Image-LoRA with hints": 0.016}
SMOLLM2_TRIED = {  # on model 1
    "LoRA": (0.001, 0.002, 0.004),
    "Partial LoRA": (0.002, 0.004, 0.008),
    "Image-LoRA": (0.004, 0.008, 0.016),
}
SMOLLM2_BASES = {"smollm_1": 1, "smollm_2": 2}  # {file: its number, the model of these runs}

# ---- The rows of runs.csv --------------------------------------------------------------------------------------------

GAMMAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
SEEDS = (1, 2, 3)
TEXT = (0, 3, 9)  # word problems before an image
THREE = ("LoRA", "Partial LoRA", "Image-LoRA")
AT_EQUAL_CLICKS = [method for method in TRIED if method not in ("LoRA on v", "Partial LoRA on v")]
HINTED = ("LoRA", "LoRA on the MLP", "LoRA on q and k", "LoRA on v", "Partial LoRA", "Image-LoRA")
PROBE, RANDOM = " in {} heads by the probe", " in {} random heads"
RIVALS = ("LoRA", "Partial LoRA", "Partial LoRA on v", "Image-LoRA")


def with_ending(methods, ending: str) -> list[str]:
    return [method + ending for method in methods]


class Group(NamedTuple):
    """Runs that differ in the model, the method and the seed, and how each is asked."""

    methods: list[str]
    seeds: tuple[int, ...] = (1,)
    gammas: tuple[float, ...] = (1.0,)
    texts: tuple[int, ...] = (0,)
    setting: str = "skilled"

    def rows(self) -> list[Row]:
        keys = product(MODELS, self.methods, self.seeds, self.gammas, self.texts)
        return [
            Row(self.setting, model, method, fields_of(method)["lr"], seed, gamma, text)
            for model, method, seed, gamma, text in keys
        ]


NINE, VARIED = " trained after 9", " trained after 0 to 9 with own answers"
OWN = " with own answers"
GROUPS = [
    Group(["base model"], texts=(0, 1, 3, 9)),
    Group([REWORDED]),
    Group(AT_EQUAL_CLICKS, SEEDS, GAMMAS),  # What does it cost elsewhere?
    Group(["LoRA on v", "Partial LoRA on v"], gammas=GAMMAS),
    Group(with_ending(THREE, OWN), gammas=GAMMAS),  # What brings it back?
    Group(with_ending(THREE, " with correct answers")),
    Group(with_ending(HINTED, " with hints"), SEEDS),  # Does text mislead it?
    Group(with_ending(("LoRA, rank 2", "Partial LoRA on v"), " with hints"), (1, 2)),
    Group(with_ending(("LoRA", "LoRA on v", "Image-LoRA"), " with hints"), setting="copying"),
    Group(THREE, SEEDS, texts=TEXT),  # Does the text before the image have to be as in training?
    Group(["Image-LoRA"], texts=(1,)),
    Group(with_ending(THREE[:2], NINE), SEEDS, texts=TEXT),
    Group(["Image-LoRA" + NINE], texts=TEXT),
    Group(["Image-LoRA" + NINE], texts=(1,)),
    Group(with_ending(THREE, VARIED), texts=TEXT),
    Group(["Image-LoRA trained after 0 to 9"], texts=TEXT),
    Group(["Image-LoRA" + RANDOM.format(4), "Image-LoRA" + RANDOM.format(12)], (1, 2, 3, 4, 5)),  # Does the choice ...
    Group(["Image-LoRA" + PROBE.format(4), "Image-LoRA" + PROBE.format(12)], SEEDS),  # ... of heads matter?
    Group(RIVALS, setting="referring"),
]


def all_rows() -> list[Row]:
    """Each row once: those of the groups, and of the learning rates that were tried on tiny models."""
    rows = [row for group in GROUPS for row in group.rows()]
    for method, rates in TRIED.items():
        for row in Group([method]).rows():
            rows += [row._replace(lr=lr) for lr in rates]
    return list(dict.fromkeys(rows))
