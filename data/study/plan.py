"""What the study compares: the methods, the runs that runs.py makes, and the tables that compare.py prints.

This file needs no pandas, because runs.py makes the runs without it. (SmolLM2's are made one by one, by smollm.py.)
"""

from itertools import product
from typing import NamedTuple


class Row(NamedTuple):
    """What tells a row of runs.csv from all others: how a model was trained, and how it was asked then."""

    setting: str  # one of SETTINGS
    model: int
    method: str  # one of METHODS
    lr: float
    seed: int
    gamma: float  # what the update is multiplied by after training
    text: int  # how many word problems stand before each screen when the model is asked


# ---- Models, methods and learning rates ------------------------------------------------------------------------------

MODELS = (1, 2, 3)
SKILLED = {1: "data/study/tiny_vlm_1.pt", 2: "data/tiny_vlm.pt", 3: "data/study/tiny_vlm_3.pt"}
UNSKILLED = {model: f"runs/bases/{model}-unskilled.pt" for model in MODELS}  # never asked what is right of a name
COPYING = {model: f"runs/bases/{model}-copying.pt" for model in MODELS}  # can repeat a place, see copying.py
PACKED = {"packed": True}  # five questions about a screen in a sequence
SETTINGS = {  # {setting: (base models, the fields of train.Config that its runs share)}
    "skilled": (SKILLED, {}),
    "copying": (COPYING, {}),
    "packed": (SKILLED, PACKED),
    "unskilled, packed": (UNSKILLED, PACKED),
    "referring": (SKILLED, {"task": "referring"}),
}

# {method: fields of train.Config}. With replay, in fewer heads, after text and on other tasks, a method keeps its rate.
LORA = {"method": "lora", "lr": 0.0025}
PARTIAL_LORA = {"method": "partial_lora", "lr": 0.00125}  # arXiv 2401.16420, there on all linear layers
IMAGE_LORA = {"heads": "all", "lr": 0.01}
THREE = {"LoRA": LORA, "Partial LoRA": PARTIAL_LORA, "Image-LoRA": IMAGE_LORA}
ON_V = {
    "LoRA on v": LORA | {"projections": "v", "lr": 0.01},
    "Partial LoRA on v": PARTIAL_LORA | {"projections": "v", "lr": 0.005},
}
RANK_2 = {  # on tiny models, LoRA and Partial LoRA are then as large as Image-LoRA in all heads
    "LoRA, rank 2": LORA | {"r": 2, "lr": 0.005},
    "Partial LoRA, rank 2": PARTIAL_LORA | {"r": 2, "lr": 0.005},
}
FEW_HEADS = {
    "Image-LoRA in 12 heads by the probe": IMAGE_LORA | {"heads": "top", "num_heads": 12},
    "Image-LoRA in 12 random heads": IMAGE_LORA | {"heads": "random", "num_heads": 12},
    "Image-LoRA in 4 heads by the probe": IMAGE_LORA | {"heads": "top", "num_heads": 4},
    "Image-LoRA in 4 random heads": IMAGE_LORA | {"heads": "random", "num_heads": 4},
}


def with_ending(methods: dict, ending: str, **changes) -> dict[str, dict]:
    """These methods with an ending of their names, and these changes of their fields."""
    return {name + ending: fields | changes for name, fields in methods.items()}


UPPER_HALF = ",".join(f"{layer}.{head}" for layer in (2, 3) for head in range(6))
OWN = {"replay": 2}  # the base model's own answers about new screens
CORRECT = OWN | {"replay_answers": "correct"}
OWN_ANSWERS = with_ending(THREE, " with own answers", **OWN)
REPLAYS = (  # to the same questions or fewer, whose answers are correct or the base's own
    with_ending(THREE, " with correct answers", **CORRECT)
    | with_ending(THREE, " with correct answers but to 'switch'", **CORRECT, replay_no_switch=True)
    | with_ending(THREE, " with own answers but to 'switch'", **OWN, replay_no_switch=True)
)
OLD_REPLAY = {
    "Image-LoRA with correct answers about old screens": IMAGE_LORA | CORRECT | {"replay_screens": "old"},
}
IN_PART = {"Image-LoRA in the upper half of the layers": IMAGE_LORA | {"heads": UPPER_HALF}}
OTHER_WAYS = {
    "Image-LoRA for 150 steps": IMAGE_LORA | {"steps": 150},
    "Image-LoRA with trained γ": IMAGE_LORA | {"train_gamma": True},
}
AFTER_9 = {"Image-LoRA trained after 9": IMAGE_LORA | {"text": 9}}  # word problems before each screen
AFTER_0_TO_9 = {"Image-LoRA trained after 0 to 9": IMAGE_LORA | {"text": 9, "vary_text": True}}
VARIED_OWN = with_ending(THREE, " trained after 0 to 9 with own answers", text=9, vary_text=True, **OWN)
TEXTS = AFTER_9 | AFTER_0_TO_9 | VARIED_OWN
ON_QK = {"LoRA on q and k": LORA | {"projections": "qk"}}
HINTED = THREE | ON_QK | ON_V | {"LoRA, rank 2": RANK_2["LoRA, rank 2"]}
HINTS = with_ending(HINTED, " with hints", hint="question")
HINTS |= with_ending({"LoRA": LORA}, " with hints, at half the rate", hint="question", lr=0.00125)
HINTS |= with_ending({"Partial LoRA": PARTIAL_LORA}, " with hints, at four times the rate", hint="question", lr=0.005)
HINTS |= with_ending({"Image-LoRA": IMAGE_LORA}, " with hints, at four times the rate", hint="question", lr=0.04)
BEFORE = {"LoRA": LORA, "Image-LoRA": IMAGE_LORA}
HINTS_BEFORE = with_ending(BEFORE, " with hints before the image", hint="before_image")
COPYING_HINTS = [f"{name} with hints" for name in ("LoRA", "LoRA on v", "Image-LoRA")]
REWORDED = "base model, asked to click right of the name"
BASE = {"base model": {"method": "none", "lr": 0.0}, REWORDED: {"method": "none", "lr": 0.0}}
METHODS = THREE | ON_V | RANK_2 | FEW_HEADS | OWN_ANSWERS | REPLAYS | OLD_REPLAY | IN_PART | OTHER_WAYS
METHODS |= TEXTS | HINTS | HINTS_BEFORE | BASE

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
SMOLLM2_HINTS = {"LoRA with hints": 0.001, "Image-LoRA with hints": 0.016}
SMOLLM2_RATES = SMOLLM2 | SMOLLM2_HINTS
SMOLLM2_BASES = {"smollm_1": 1, "smollm_2": 2}  # {file: its number, the model of these runs}
RATES = {method: fields["lr"] for method, fields in METHODS.items()}
CHOSEN = {  # {setting: {method: the learning rate that validation screens chose}}
    "unskilled, packed": {
        REWORDED: 0.0,
        "LoRA": 0.005,
        "Partial LoRA": 0.005,
        "Partial LoRA on v": 0.04,
        "Image-LoRA": 0.08,
    },
    **dict.fromkeys(("skilled", "copying", "packed", "referring"), RATES),
    "SmolLM2": SMOLLM2_RATES,
}
TRIED = {  # {setting: {method: learning rates, once on each model; of SmolLM2 on model 1}}
    "skilled": {
        "LoRA": (0.00125, 0.0025, 0.005),
        "Partial LoRA": (0.000625, 0.00125, 0.0025, 0.005, 0.01),
        "Image-LoRA": (0.005, 0.01, 0.02),
        "LoRA on v": (0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA on v": (0.0025, 0.005, 0.01),
        "LoRA, rank 2": (0.0025, 0.005, 0.01),
        "Partial LoRA, rank 2": (0.0025, 0.005, 0.01),
    },
    "unskilled, packed": {
        "LoRA": (0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA": (0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA on v": (0.01, 0.02, 0.04, 0.08),
        "Image-LoRA": (0.02, 0.04, 0.08, 0.16),
    },
    "SmolLM2": {
        "LoRA": (0.001, 0.002, 0.004),
        "Partial LoRA": (0.002, 0.004, 0.008),
        "Image-LoRA": (0.004, 0.008, 0.016),
    },
}

# ---- The rows of runs.csv --------------------------------------------------------------------------------------------

GAMMAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
TEXT = (0, 1, 3, 9)  # word problems before an image
MORE_TEXT = "Image-LoRA trained after 9"  # word problems, and asked after as many or fewer
FEWER_PROBLEMS = (0, 1, 3)
RIVALS = ["LoRA", "Partial LoRA", "Partial LoRA on v", "Image-LoRA"]
AS_LARGE = [*RANK_2, "LoRA on v", "Partial LoRA on v", "Image-LoRA"]
VARIED = AFTER_0_TO_9 | VARIED_OWN
FEW_TEXTS = (0, 3, 9)


class Group(NamedTuple):
    """Runs that differ in the model, the method and the seed, and how each is asked."""

    setting: str
    methods: dict | list[str]
    seeds: tuple[int, ...] = (1,)
    gammas: tuple[float, ...] = (1.0,)
    texts: tuple[int, ...] = (0,)

    def rows(self) -> list[Row]:
        rows = []
        for method, model, seed in product(self.methods, MODELS, self.seeds):
            lr = CHOSEN[self.setting][method]
            # A run of a model without the skill has the seed that the model was pretrained with.
            seed = model if self.setting.startswith("unskilled") else seed
            for gamma, text in product(self.gammas, self.texts):
                rows.append(Row(self.setting, model, method, lr, seed, gamma, text))
        return rows


GROUPS = [
    Group("skilled", ["base model"], texts=TEXT),
    Group("skilled", [REWORDED]),
    Group("skilled", THREE | OWN_ANSWERS, gammas=GAMMAS),
    Group("skilled", REPLAYS | OLD_REPLAY),
    Group("skilled", HINTS),
    Group("skilled", [f"{name} with hints" for name in HINTED], seeds=(1, 2)),
    Group("skilled", HINTS_BEFORE),
    Group("copying", COPYING_HINTS),
    Group("skilled", IN_PART, gammas=GAMMAS),
    Group("skilled", OTHER_WAYS),
    Group("packed", THREE),
    Group("skilled", AS_LARGE, gammas=GAMMAS),
    Group("skilled", ["Image-LoRA", MORE_TEXT], texts=TEXT),
    Group("skilled", VARIED, texts=FEW_TEXTS),
    Group("skilled", FEW_HEADS),
    Group("referring", RIVALS),
    Group("unskilled, packed", [REWORDED, *RIVALS]),
]


def all_rows() -> list[Row]:
    """Each row once: those of the groups, and of the learning rates that were tried on tiny models."""
    rows = [row for group in GROUPS for row in group.rows()]
    for setting in SETTINGS:
        for method, rates in TRIED.get(setting, {}).items():
            for row in Group(setting, [method]).rows():
                rows += [row._replace(lr=lr) for lr in rates]
    return list(dict.fromkeys(rows))
