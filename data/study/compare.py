"""The evidence on tiny models: fine-tuning runs, which are in runs.csv, one per line, and the tables of the page.

python -m data.study.compare                                        print the tables, at once
python -m data.study.compare --method LoRA --rival "Partial LoRA"   how far one method is ahead of another
python -m data.study.compare --runs runs/mine.csv                   make all runs anew, in some hours; if stopped, go on

The base models that the runs need are made by data.study.pretrain.

A number in a table is the mean over three base models. On models with the skill, the methods were trained with two
seeds on each. Brackets hold the lowest and the highest of the three models, each of which is a mean over its seeds.

We say that one method is ahead of another if it is ahead in each of the six runs, compared on the same model with the
same seed. If two methods were equal, chance would do this once in 32 comparisons. On other tasks, at other learning
rates and on models without the skill there is one run on each model. There, the two ranges must not overlap, either.
"""

import sys
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from data import prompts
from data.base import file_path, find_device, load_base, screens_and_features
from data.command import command, make_directory, option
from data.evaluate import evaluate
from data.questions import click_right_of
from data.study import smollm
from data.study.tables import choose_rate, markdown, mean_and_range, rate_table, read_runs, table, write_runs
from imagelora import score_heads

# ---- What is compared ------------------------------------------------------------------------------------------------

# Base models 1 to 3 of each kind. Those without the skill were never asked what is right of a name.
SKILLED = ("data/tiny_vlm.pt", "runs/bases/2.pt", "runs/bases/3.pt")
UNSKILLED = ("runs/bases/1-unskilled.pt", "runs/bases/2-unskilled.pt", "runs/bases/3-unskilled.pt")
SEEDS = (1, 2)


def heads_of(*layers: int) -> str:
    """All six heads of these layers."""
    return ",".join(f"{layer}.{head}" for layer in layers for head in range(6))


# Fields of train.Config. Each learning rate is the one that `choose_rate` chooses among those of RATES. With replay, in
# fewer heads, of another rank and on other tasks, a method keeps its rate.
BASE_MODEL = {"method": "none", "lr": 0.0}
LORA = {"method": "lora", "lr": 0.0025}
LORA_ON_V = {"method": "lora", "projections": "v", "lr": 0.005}
PARTIAL_LORA = {"method": "partial_lora", "lr": 0.005}  # arXiv 2401.16420, there on all linear layers
PARTIAL_LORA_ON_V = {"method": "partial_lora", "projections": "v", "lr": 0.005}
IMAGE_LORA = {"heads": "all", "lr": 0.01}
METHODS = {
    "base model": BASE_MODEL,
    "LoRA": LORA,
    "LoRA on v": LORA_ON_V,
    "LoRA at text tokens alone": LORA | {"method": "text_lora"},  # a control, like the next
    "LoRA on v at text tokens alone": LORA_ON_V | {"method": "text_lora"},
    "Partial LoRA": PARTIAL_LORA,
    "Partial LoRA on v": PARTIAL_LORA_ON_V,
    "Partial LoRA on v, rank 4": PARTIAL_LORA_ON_V | {"r": 4},
    "Image-LoRA": IMAGE_LORA,
    "Image-LoRA in 12 heads by the probe": IMAGE_LORA | {"heads": "top", "num_heads": 12},
    "Image-LoRA in 12 random heads": IMAGE_LORA | {"heads": "random", "num_heads": 12},
    "Image-LoRA in 4 heads by the probe": IMAGE_LORA | {"heads": "top", "num_heads": 4},
    "Image-LoRA in 4 random heads": IMAGE_LORA | {"heads": "random", "num_heads": 4},
    "LoRA with replay": LORA | {"replay": 1},
    "Partial LoRA with replay": PARTIAL_LORA | {"replay": 1},
    "Image-LoRA with replay": IMAGE_LORA | {"replay": 1},
    "Image-LoRA in layer 0": IMAGE_LORA | {"heads": heads_of(0)},
    "Image-LoRA in layer 1": IMAGE_LORA | {"heads": heads_of(1)},
    "Image-LoRA in layer 2": IMAGE_LORA | {"heads": heads_of(2)},
    "Image-LoRA in layer 3": IMAGE_LORA | {"heads": heads_of(3)},
    "Image-LoRA in layers 0 and 1": IMAGE_LORA | {"heads": heads_of(0, 1)},
    "Image-LoRA in layers 2 and 3": IMAGE_LORA | {"heads": heads_of(2, 3)},
}
SINGLE_HEADS = [IMAGE_LORA | {"heads": head} for head in heads_of(0, 1, 2, 3).split(",")]  # for the picture heads.png
FINE_TUNED = tuple(name for name in METHODS if name != "base model")  # with each seed
OTHER_TASKS = ({"task": "referring"}, {"history": 9})
RIVALS = ("LoRA", "Partial LoRA", "Partial LoRA on v", "Image-LoRA")  # on other tasks, and without the skill

# The learning rates that were tried, once on each model.
RATES = {
    SKILLED: {
        "LoRA": (0.000625, 0.00125, 0.0025, 0.005, 0.01, 0.02),
        "LoRA on v": (0.0025, 0.005, 0.01, 0.02, 0.04),
        "Partial LoRA": (0.00125, 0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA on v": (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
        "Image-LoRA": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
    },
    UNSKILLED: {
        "LoRA": (0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA": (0.0025, 0.005, 0.01, 0.02),
        "Partial LoRA on v": (0.01, 0.02, 0.04, 0.08),
        "Image-LoRA": (0.02, 0.04, 0.08, 0.16),
    },
}


def all_runs() -> list[train.Config]:
    """Every run of the tables and the pictures."""
    with_each_seed = [METHODS[name] for name in FINE_TUNED]
    once = [BASE_MODEL]
    once += [METHODS[name] | {"lr": lr} for name, rates in RATES[SKILLED].items() for lr in rates]
    once += [METHODS[name] | task for task in OTHER_TASKS for name in RIVALS]
    without_skill = [BASE_MODEL]
    without_skill += [METHODS[name] | {"lr": lr} for name, rates in RATES[UNSKILLED].items() for lr in rates]

    runs = []
    for base in SKILLED:
        runs += [train.Config(**settings, base=base, seed=seed) for settings in with_each_seed for seed in SEEDS]
        runs += [train.Config(**settings, base=base, seed=1) for settings in once]
    runs += [train.Config(**settings, base=SKILLED[0], seed=1) for settings in SINGLE_HEADS]
    for seed, base in enumerate(UNSKILLED, 1):  # the seed that the base was pretrained with
        runs += [train.Config(**settings, base=base, seed=seed) for settings in without_skill]
    return list({key(vars(run)): run for run in runs}.values())  # each once: the chosen rates are among those tried


# ---- Runs ------------------------------------------------------------------------------------------------------------

SETTINGS = tuple("method projections heads num_heads r lr task history replay".split())
MEASURES = {  # {column of the file: title in a table}
    "task_acc": "new task, %",
    "validation_acc": "new task on validation screens, %",
    "other_questions_acc": "other questions, %",  # the mean of the next three
    "what_is_at_acc": "what is at, %",
    "what_is_right_of_acc": "what is right of, %",
    "click_right_of_acc": "click right of, %",
    "same_words_acc": "same words, %",
    "word_problem_after_image_acc": "word problems after an image, %",
    "word_problem_acc": "word problems without an image, %",
    "reworded_acc": "base model, asked to click right of the name",  # not of other methods
    "influence": "influence",  # of the head, where only one is adapted
}
COLUMNS = ("base", "seed", *SETTINGS, *MEASURES)
DEFAULTS = {field.name: field.default for field in fields(train.Config)}
REWORDED_SCREENS = 400  # test screens of reworded_acc


@dataclass(frozen=True)
class CompareConfig:
    method: str = option("", "print how many points this method is ahead of the rival", ("", *FINE_TUNED))
    rival: str = option("Image-LoRA", "the method that it is compared with", FINE_TUNED)
    runs: str = option("data/study/runs.csv", "file of runs; in any file but this one, missing runs are made")
    workers: int = option(2, "processes that make runs, of one thread each")
    device: str = option("cpu", "where to compute: cpu, cuda, mps, or auto")


def key(run: dict) -> tuple:
    """What tells this run from all others."""
    return tuple(run[name] for name in ("base", "seed", *SETTINGS))


def read(path: Path) -> list[dict]:
    return [run | {"heads": str(run["heads"])} for run in read_runs(path, COLUMNS)]  # 1.3 is a head here, and no number


def make_missing_runs(cfg: CompareConfig) -> None:
    """Make the runs that the file lacks, and write each at once. ValueError, before any, if a base is not there."""
    path = file_path(cfg.runs)
    runs = read(path)
    known = {key(run) for run in runs}
    missing = [replace(run, device=cfg.device) for run in all_runs() if key(vars(run)) not in known]
    for run in missing:
        if not file_path(run.base).exists():
            raise ValueError(f"there is no {run.base}; first make it by data.study.pretrain, as its page says")
    if not missing:
        return
    make_directory(path.parent)
    with get_context("spawn").Pool(cfg.workers, torch.set_num_threads, (1,)) as pool:
        for result in tqdm(pool.imap_unordered(make_run, missing), "runs", len(missing)):
            runs.append({name: result.get(name, "") for name in COLUMNS})
            write_runs(path, runs)


def make_run(cfg: train.Config) -> dict:
    """What `train.run` returns, and the measures that only the study needs."""
    tuned = train.finetune(cfg)
    validation_screens = screens_and_features(tuned.model, "switches", "validation", cfg.test_screens)
    result = dict(tuned.result)
    result["validation_acc"], _ = evaluate(tuned.model, *validation_screens, cfg.task, cfg.history)
    if cfg.method == "none":
        test_screens = screens_and_features(tuned.model, "switches", "test", REWORDED_SCREENS)
        result["reworded_acc"], _ = evaluate(tuned.model, *test_screens, cfg.task, cfg.history, click_right_of)
    if cfg.heads.count(".") == 1:
        model = load_base(cfg.base, find_device(cfg.device))
        data = screens_and_features(model, "switches", "train", prompts.TRAIN_SCREENS)
        batches = [prompts.training_batch(cfg, data, i) for i in range(prompts.PROBE_BATCHES)]
        layer, head = map(int, cfg.heads.split("."))
        result["influence"] = score_heads(model, batches, seed=cfg.seed)[layer, head].item()
    return result


def find(runs: list[dict], settings: dict, bases=SKILLED, seed=None) -> list[dict]:
    """The runs with these settings, which are fields of train.Config; the fields that are not named have defaults."""
    wanted = DEFAULTS | settings
    same = [run for run in runs if all(run[name] == wanted[name] for name in SETTINGS)]
    return [run for run in same if run["base"] in bases and seed in (None, run["seed"])]


def mean_of_each_model(runs: list[dict]) -> list[dict]:
    """For each base model, the mean of each measure over its seeds, or "" where it was not measured."""
    means = []
    for base in sorted({run["base"] for run in runs}):
        values = {name: [run[name] for run in runs if run["base"] == base] for name in MEASURES}
        means.append({name: "" if "" in values[name] else np.mean(values[name]) for name in MEASURES})
    return means


def mean_at_rates(runs: list[dict], name: str, bases: tuple, measure: str) -> dict[float, float]:
    """{learning rate: mean over the models, each trained once}, of a method."""
    seed = 1 if bases == SKILLED else None  # the models without the skill were each trained with another seed
    at_rates = {lr: find(runs, METHODS[name] | {"lr": lr}, bases, seed) for lr in RATES[bases][name]}
    return {lr: np.mean([run[measure] for run in found]) for lr, found in at_rates.items() if found}


# ---- Tables, in the order of the page --------------------------------------------------------------------------------

MAIN = ("base model", "LoRA", "LoRA on v", "Partial LoRA", "Partial LoRA on v", "Image-LoRA")
MAIN += ("LoRA with replay", "Partial LoRA with replay", "Image-LoRA with replay")
FEW_HEADS = ("Image-LoRA", *(name for name in METHODS if "heads" in name), "Partial LoRA on v, rank 4")
LAYERS = [name for name in METHODS if "in layer" in name]
WHY = ("LoRA on v", "LoRA on v at text tokens alone", "Partial LoRA on v")  # which tokens are adapted: on v,
WHY += ("LoRA", "LoRA at text tokens alone", "Partial LoRA")  # and on q, k, v and o


def front_page(runs: list[dict], smollm_runs: list[dict]) -> str:
    """What each method learns and what it keeps, on SmolLM2 and on tiny models with the skill: means alone."""
    new_task = smollm.mean_where_measured("task_acc", "{:.0%}", False)
    others = smollm.mean_where_measured("other_questions_acc", "{:.0%}", False)
    texts = smollm.mean_where_measured("same_continuations", "{:.0f}", False)
    rows = []
    for name in ("base model", *RIVALS, "LoRA with replay", "Image-LoRA with replay"):
        on_smollm = smollm.find(smollm_runs, name)
        on_tiny = mean_of_each_model(find(runs, METHODS[name]))
        rows.append(
            (name, new_task(on_smollm), others(on_smollm), texts(on_smollm), new_task(on_tiny), others(on_tiny))
        )
    titles = "SmolLM2: new task, %", "others, %", "texts continued as before, of 20", "tiny: new task, %", "others, %"
    return markdown(("fine-tuned with", *titles), *rows)


def tables(runs: list[dict]) -> list[str]:
    kinds = ("what_is_at_acc", "what_is_right_of_acc", "click_right_of_acc")
    words = ("same_words_acc", "word_problem_after_image_acc", "word_problem_acc")
    accuracies = ("task_acc", "other_questions_acc")
    # Referring also asks what is at a place, so this is no other question after it.
    after_referring = ("task_acc", "what_is_right_of_acc", "click_right_of_acc", "same_words_acc")
    return [
        methods_table("tiny models with the skill", MAIN, accuracies, kinds + words, runs),
        models_table("other questions, %", "other_questions_acc", WHY, runs),
        methods_table("tiny models, layers", LAYERS, accuracies, (), runs),
        methods_table("tiny models, few heads", FEW_HEADS, accuracies, (), runs),
        both_kinds_table(runs),
        methods_table("tiny models, referring", RIVALS, after_referring, (), runs, task="referring"),
        methods_table("tiny models, long text", RIVALS, (*accuracies, "same_words_acc"), (), runs, history=9),
        rates_table("new task with the skill, %", SKILLED, "validation_acc", runs),
        rates_table("other questions with the skill, %", SKILLED, "other_questions_acc", runs),
        rates_table("new task without the skill, %", UNSKILLED, "validation_acc", runs),
    ]


def methods_table(title: str, names, with_range: tuple, means: tuple, runs: list[dict], **changes) -> str:
    """A row for each method and a column for each measure: those with a range, then means alone.

    changes: other fields of train.Config, for example task="referring"."""
    columns = {MEASURES[measure]: mean_and_range(measure) for measure in with_range}
    columns |= {MEASURES[measure]: mean_and_range(measure, with_range=False) for measure in means}
    return table(title, columns, [(name, mean_of_each_model(find(runs, METHODS[name] | changes))) for name in names])


def models_table(title: str, measure: str, names, runs: list[dict]) -> str:
    """A row for each method and a column for each model with the skill; and the mean of the new task."""
    rows = []
    for name in names:
        models = mean_of_each_model(find(runs, METHODS[name]))
        of_models = [f"{100 * model[measure]:.1f}" for model in models]
        rows.append((name, *of_models, mean_and_range("task_acc", with_range=False)(models)))
    return markdown((title, "model 1", "model 2", "model 3", "new task, %"), *rows)


def both_kinds_table(runs: list[dict]) -> str:
    """A row for each method and a column for each base model, at the learning rate that was chosen for its kind."""

    def cells(measure: str, skilled: dict, unskilled: dict) -> list[str]:
        found = find(runs, skilled) + find(runs, unskilled, UNSKILLED)
        of_models = [[run[measure] for run in found if run["base"] == base] for base in SKILLED + UNSKILLED]
        return [f"{100 * np.mean(values):.1f}" if values else "" for values in of_models]

    rows = [(MEASURES["reworded_acc"], *cells("reworded_acc", BASE_MODEL, BASE_MODEL))]
    for name in RIVALS:
        lr = choose_rate(mean_at_rates(runs, name, UNSKILLED, "validation_acc"))
        rows.append((name, *cells("task_acc", METHODS[name], METHODS[name] | {"lr": lr})))
    titles = [f"model {number} {kind} the skill" for kind in ("with", "without") for number in (1, 2, 3)]
    return markdown(("new task, %", *titles), *rows)


def rates_table(title: str, bases: tuple, measure: str, runs: list[dict]) -> str:
    """A row for each method and a column for each learning rate; the one that validation screens chose is bold."""
    lines = []
    for name in RATES[bases]:
        clicks = mean_at_rates(runs, name, bases, "validation_acc")
        if clicks:
            lines.append((name, mean_at_rates(runs, name, bases, measure), choose_rate(clicks)))
    return rate_table(f"{title} at the learning rate", lines)


def differences(runs: list[dict], method: str, rival: str) -> str:
    """How many points a method is ahead of its rival on each model, and in how many of the runs it is ahead."""
    of_rival = {(run["base"], run["seed"]): run for run in find(runs, METHODS[rival])}
    ahead = []  # for each run of the method, how far it is ahead in each measure
    for run in find(runs, METHODS[method]):
        other = of_rival[run["base"], run["seed"]]
        ahead.append(run | {name: run[name] - other[name] for name in MEASURES if run[name] != ""})
    models = mean_of_each_model(ahead)
    rows = []
    for name, title in MEASURES.items():
        if models[0][name] != "":
            count = sum(run[name] > 0 for run in ahead)
            points = [f"{100 * model[name]:+.1f}" for model in models]
            rows.append((title.removesuffix(", %"), *points, f"{count} of {len(ahead)}"))
    return markdown((f"{method}, points ahead of {rival}", "model 1", "model 2", "model 3", "ahead in runs"), *rows)


def compare(cfg: CompareConfig) -> None:
    if cfg.runs != CompareConfig.runs:
        make_missing_runs(cfg)
    runs = read(file_path(cfg.runs))
    if cfg.method:
        print(differences(runs, cfg.method, cfg.rival))
    else:
        smollm_runs = smollm.read(file_path(smollm.SmolConfig.runs))
        print("\n".join([front_page(runs, smollm_runs), *tables(runs)]))


if __name__ == "__main__":
    sys.exit(command(CompareConfig, compare, __doc__))
