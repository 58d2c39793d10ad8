"""What the study compares. Each table is declared here, once: compare.py prints it, and runs.py makes the runs that it
needs. (SmolLM2's are made one by one, by smollm.py.)

This file needs no pandas, because runs.py makes the runs without it.
"""

from collections.abc import Iterator
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
SKILLED = {1: "data/tiny_vlm.pt", 2: "data/study/tiny_vlm_2.pt", 3: "data/study/tiny_vlm_3.pt"}
UNSKILLED = {model: f"runs/bases/{model}-unskilled.pt" for model in MODELS}  # never asked what is right of a name
SETTINGS = {  # {setting: (base models, the fields of train.Config that its runs share)}
    "skilled": (SKILLED, {}),
    "unskilled": (UNSKILLED, {}),
    "referring": (SKILLED, {"task": "referring"}),
}

# {method: fields of train.Config}. With replay, in fewer heads, after text and on other tasks, a method keeps its rate.
LORA = {"method": "lora", "lr": 0.0025}
PARTIAL_LORA = {"method": "partial_lora", "lr": 0.005}  # arXiv 2401.16420, there on all linear layers
IMAGE_LORA = {"heads": "all", "lr": 0.01}
THREE = {"LoRA": LORA, "Partial LoRA": PARTIAL_LORA, "Image-LoRA": IMAGE_LORA}
ON_V = {"LoRA on v": LORA | {"projections": "v", "lr": 0.005}, "Partial LoRA on v": PARTIAL_LORA | {"projections": "v"}}
RANK_2 = {  # Partial LoRA is then as large as Image-LoRA in all heads
    "LoRA, rank 2": LORA | {"r": 2, "lr": 0.005},
    "Partial LoRA, rank 2": PARTIAL_LORA | {"r": 2, "lr": 0.01},
    "Partial LoRA, rank 2, at half the rate": PARTIAL_LORA | {"r": 2, "lr": 0.005},
}
FEW_HEADS = {
    "Image-LoRA in 12 heads by the probe": IMAGE_LORA | {"heads": "top", "num_heads": 12},
    "Image-LoRA in 12 random heads": IMAGE_LORA | {"heads": "random", "num_heads": 12},
    "Image-LoRA in 4 heads by the probe": IMAGE_LORA | {"heads": "top", "num_heads": 4},
    "Image-LoRA in 4 random heads": IMAGE_LORA | {"heads": "random", "num_heads": 4},
}
WITH_FACTOR = IMAGE_LORA | {"heads": "0.0,1.0,1.1,1.2,1.3,1.4,1.5,2.0,3.0"}  # six of layer 1, one of each other
WITHOUT_FACTOR = WITH_FACTOR | {"no_normalize": True}
UNEVEN = {
    "Image-LoRA in uneven heads": WITH_FACTOR,
    "Image-LoRA in uneven heads without the factor": WITHOUT_FACTOR,
    "Image-LoRA in uneven heads without the factor at half the rate": WITHOUT_FACTOR | {"lr": 0.005},
}


def each_of_three(ending: str, **changes) -> dict[str, dict]:
    """LoRA, Partial LoRA and Image-LoRA with this ending of their names, and these changes of their fields."""
    return {name + ending: fields | changes for name, fields in THREE.items()}


WITH_REPLAY = each_of_three(" with replay", replay=1)  # old questions, with true answers
TRUE_ANSWERS = each_of_three(" with true answers", replay=1, replay_with="new")  # to the questions of own answers
OWN_ANSWERS = each_of_three(" with own answers", replay=1, replay_with="own")  # the base model's, about new screens
OWN_OLD = each_of_three(" with own answers about old screens", replay=1, replay_with="own_old")
AFTER_9 = each_of_three(" trained after 9", text=9)  # word problems before each screen
LAYER_0 = {"Image-LoRA in layer 0 trained after 9": IMAGE_LORA | {"heads": "0.0,0.1,0.2,0.3,0.4,0.5", "text": 9}}
AFTER_0_TO_9 = each_of_three(" trained after 0 to 9", text=9, vary_text=True)
REWORDED = "base model, asked to click right of the name"
BASE = dict.fromkeys(("base model", REWORDED), {"method": "none", "lr": 0.0})
TWICE = THREE | ON_V | RANK_2 | FEW_HEADS | UNEVEN | WITH_REPLAY | OWN_ANSWERS  # with two seeds, if skilled
METHODS = TWICE | TRUE_ANSWERS | OWN_OLD | AFTER_9 | LAYER_0 | AFTER_0_TO_9 | BASE

SMOLLM2 = {  # {method: its learning rate}
    "base model": 0.0,
    "LoRA": 0.001,
    "Partial LoRA": 0.004,
    "Image-LoRA": 0.016,
    "LoRA with own answers": 0.001,
    "Partial LoRA with own answers": 0.004,
    "Image-LoRA with own answers": 0.016,
}
SMOLLM2_BASES = FIRST_BASE, SECOND_BASE = "SmolLM2, first base", "SmolLM2, second base"
SMOLLM2_SETTINGS = {  # {(base, dtype): the setting of these runs}
    ("smollm_1", "float32"): FIRST_BASE,
    ("smollm_2", "float32"): SECOND_BASE,
    ("smollm_1", "bfloat16"): f"{FIRST_BASE}, in bfloat16",  # in which learning rates were compared
}
CHOSEN = {  # {setting: {method: the learning rate that validation screens chose}}
    "skilled": {method: fields["lr"] for method, fields in METHODS.items()},
    "referring": {method: fields["lr"] for method, fields in METHODS.items()},
    "unskilled": {REWORDED: 0.0, "LoRA": 0.005, "Partial LoRA": 0.005, "Partial LoRA on v": 0.04, "Image-LoRA": 0.08},
    **dict.fromkeys(SMOLLM2_SETTINGS.values(), SMOLLM2),
}
TRIED = {  # {setting: {method: learning rates, once on each model}}
    "skilled": {
        "LoRA": (0.000625, 0.00125, 0.0025, 0.005, 0.01, 0.02),
        "LoRA on v": (0.0025, 0.005, 0.01, 0.02, 0.04),
        "Partial LoRA": (0.00125, 0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA on v": (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
        "Image-LoRA": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
        "LoRA, rank 2": (0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA, rank 2": (0.005, 0.01, 0.02, 0.04),
    },
    "unskilled": {
        "LoRA": (0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA": (0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA on v": (0.01, 0.02, 0.04, 0.08),
        "Image-LoRA": (0.02, 0.04, 0.08, 0.16),
    },
}


# ---- Tables ----------------------------------------------------------------------------------------------------------

TITLES = {  # {measure, a column of the files: its title in a table}
    "parameters": "parameters",
    "gamma": "γ",
    "task_acc": "new task, %",
    "validation_acc": "new task on validation screens, %",
    "other_questions_acc": "other questions, %",  # the mean of the next three
    "what_is_at_acc": "what is at, %",
    "what_is_right_of_acc": "what is right of, %",
    "click_right_of_acc": "click right of, %",
    "same_words_acc": "same words, %",
    "word_problem_after_image_acc": "word problems after an image, %",
    "word_problem_acc": "word problems without an image, %",
    "own_answers_acc": "own answers correct, %",
    "image_share": "attention to the image, %",
    "name_alone_acc": "what is at, if places are forbidden, %",
    "places_for_names": "places given for names, %",
    "divergence_after_screen": "KL divergence after an image",
    "same_continuations": "openings continued as before, of 20",
}


class Column(NamedTuple):
    """What a table shows of a measure."""

    title: str
    measure: str
    show: str = "mean"  # over the models; or range, with the lowest and the highest; or spread, between seeds
    where: dict = {}  # of which rows, if not of all seeds and models with gamma = 1 and no text


class Table(NamedTuple):
    """A row for each method."""

    title: str
    setting: str
    methods: list[str]
    columns: list[Column]

    def where(self, column: Column) -> dict:
        """What the rows of a column have in common."""
        gamma = {} if "turned_down" in column.where else {"gamma": 1.0}
        return {"setting": self.setting, "text": 0} | gamma | column.where


def means(*measures: str) -> list[Column]:
    return [Column(TITLES[measure], measure) for measure in measures]


def ranges(*measures: str) -> list[Column]:
    return [Column(TITLES[measure], measure, "range") for measure in measures]


def turned_down(*measures: str) -> list[Column]:
    """At the smallest gamma that costs at most two points of the new task on validation screens."""
    return [Column(f"turned down: {TITLES[measure]}", measure, "range", {"turned_down": True}) for measure in measures]


# Rows of tables
RIVALS = ["LoRA", "Partial LoRA", "Partial LoRA on v", "Image-LoRA"]
MAIN = ["LoRA", "LoRA on v", "Partial LoRA", "Partial LoRA on v", "Image-LoRA", *OWN_ANSWERS]
REPLAYS = ("", " with true answers", " with own answers", " with own answers about old screens", " with replay")
REPLAYED = [method + replay for method in THREE for replay in REPLAYS]
AS_LARGE = [*RANK_2, "LoRA on v", "Partial LoRA on v", "Image-LoRA"]
TRAININGS = ("", " trained after 9", " trained after 0 to 9")
TRAINED_AFTER = ["base model", *(method + training for method in THREE for training in TRAININGS), *LAYER_0]

# Columns of tables
ACCURACIES = ("task_acc", "other_questions_acc")
OTHERS = ("what_is_at_acc", "what_is_right_of_acc", "click_right_of_acc", "same_words_acc")
PROBLEMS = ("word_problem_after_image_acc", "word_problem_acc")
ENGLISH = ("divergence_after_screen", "same_continuations")
BOTH_SKILLS = [
    Column(f"model {model} {kind} the skill", "task_acc", where={"setting": setting, "model": model})
    for setting, kind in (("skilled", "with"), ("unskilled", "without"))
    for model in MODELS
]
WITH_SEED_1 = [Column("own answers correct, %", "own_answers_acc", where={"seed": 1})]
WITH_SEED_1 += [Column("new task, %", "task_acc", where={"seed": 1})]
WITH_SEED_1 += [
    Column(f"others, model {model}, %", "other_questions_acc", where={"seed": 1, "model": model}) for model in MODELS
]
WITH_SEED_1 += [Column("same words, %", "same_words_acc", where={"seed": 1})]
AFTER_TEXT = [
    Column(f"{name} after {text}, %", measure, where={"seed": 1, "text": text})
    for name, measure in (("new task", "task_acc"), ("others", "other_questions_acc"))
    for text in (0, 1, 3, 9)
]
SPREADS = [
    Column("new task, points between seeds", "task_acc", "spread"),
    Column("other questions, points between seeds", "other_questions_acc", "spread"),
]

DOWN = turned_down("gamma", "task_acc", "other_questions_acc", "word_problem_after_image_acc")
SMOLLM2_DOWN = ranges(*ACCURACIES) + turned_down("gamma", *ACCURACIES)
SMOLLM2_MORE = means(*OTHERS[:3], "places_for_names", "name_alone_acc", *ENGLISH)

TABLES = [  # in the order of the page
    Table("tiny models, turned down", "skilled", MAIN, ranges(*ACCURACIES) + means(*PROBLEMS) + DOWN),
    *[Table(setting, setting, [*SMOLLM2], SMOLLM2_DOWN) for setting in SMOLLM2_BASES],
    *[Table(setting, setting, [*SMOLLM2], SMOLLM2_MORE) for setting in SMOLLM2_BASES],
    Table("tiny models, replay", "skilled", REPLAYED, WITH_SEED_1),
    Table("new task, %", "skilled", [REWORDED, *RIVALS], BOTH_SKILLS),
    Table("tiny models, text before the image", "skilled", TRAINED_AFTER, AFTER_TEXT),
    # Referring also asks what is at a place, so this is no other question after it.
    Table("tiny models, referring", "referring", RIVALS, ranges("task_acc", *OTHERS[1:])),
    Table("tiny models, few heads", "skilled", ["Image-LoRA", *FEW_HEADS], ranges(*ACCURACIES)),
    Table("tiny models, uneven heads", "skilled", [*UNEVEN], means(*ACCURACIES) + SPREADS),
]
GAMMAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
CURVES = [*MAIN, *RANK_2]  # measured at each of these, which tells what they keep at equal clicks
MORE_TEXT = "Image-LoRA trained after 9"  # word problems, and asked after as many or fewer
FEWER_PROBLEMS = (0, 1, 3)
FEWER_GAMMAS = (1.0, 0.8, 0.7, 0.6, 0.5, 0.4)


# ---- The rows of runs.csv --------------------------------------------------------------------------------------------


def seeds_of(setting: str, model: int, method: str) -> tuple[int, ...]:
    """A run of a model without the skill has the seed that the model was pretrained with."""
    if setting == "unskilled":
        return (model,)
    return (1, 2) if setting == "skilled" and method in TWICE else (1,)


def rows_of(table: Table) -> Iterator[Row]:
    """The rows that a table shows of models as they were trained."""
    for column, method, model in product(table.columns, table.methods, MODELS):
        where = table.where(column)
        if "turned_down" in where:
            continue  # see all_rows
        setting = where["setting"]
        for seed in seeds_of(setting, model, method):
            row = Row(setting, model, method, CHOSEN[setting][method], seed, 1.0, where["text"])
            if where.items() <= row._asdict().items():
                yield row


def all_rows() -> list[Row]:
    """Each row once: those of the tables, of the curves, and of the learning rates that were tried."""
    rows = []
    for table in TABLES:
        if table.setting in SETTINGS:
            rows += rows_of(table)
    for method, model, gamma in product(CURVES, MODELS, GAMMAS):
        lr = CHOSEN["skilled"][method]
        rows += [Row("skilled", model, method, lr, seed, gamma, 0) for seed in seeds_of("skilled", model, method)]
    for model, gamma, text in product(MODELS, FEWER_GAMMAS, FEWER_PROBLEMS):
        rows.append(Row("skilled", model, MORE_TEXT, CHOSEN["skilled"][MORE_TEXT], 1, gamma, text))
    for setting, tried in TRIED.items():
        for (method, rates), model in product(tried.items(), MODELS):
            seed, *_ = seeds_of(setting, model, method)
            rows += [Row(setting, model, method, lr, seed, 1.0, 0) for lr in rates]
    return list(dict.fromkeys(rows))
