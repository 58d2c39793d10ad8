"""What frozen bases can do, and what they hit on switch screens by rules that need no fine-tuning.

    python -m data.study.controls

It prints a table with the bases that exist here: those with the skill, and beside them their twins without it. A fresh
clone has only the first base; `python -m data.study.compare` makes the others.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product

from data import DEVICES, Settings, command, option, progress
from data.evaluate import (
    Answer,
    Point,
    click_right_of,
    evaluate,
    evaluate_word_problems,
    score_line,
)
from data.prompts import base_path, find_device, image_features, load_base, screens_and_features
from data.screens import BIN, SIZE, Box, draw_screen, is_hit
from data.study import BASES, TWINS

SCREENS = 400  # of each kind, that a base is judged on
WORDINGS = "click wifi", "click right of wifi", "click switch", "click switch right of wifi", "click wifi switch"


@dataclass(frozen=True)
class ControlsConfig(Settings):
    device: str = option("cpu", "where to compute", DEVICES)


# ---- What a base can do ----------------------------------------------------------------------------------------------


def abilities(model) -> dict:
    """What a base can do on test screens of each kind, and with word problems. Prints it, too."""
    record = {}
    for domain in ("source", "dark", "switches"):
        screens = [draw_screen(domain, "test", i) for i in range(SCREENS)]
        features = image_features(model.get_image_features, screens, model.device)
        record[domain] = {}
        for task in ("relations", "referring", "grounding"):  # clicks last, so that num_total is theirs
            if task != "relations" or domain == "source":
                metrics, _ = evaluate(model, screens, features, task)
                print(score_line(domain, metrics))
                record[domain] |= metrics
    reworded, _ = evaluate(model, screens, features, reword=click_right_of)
    record["switches"]["reworded_acc"] = reworded["action_acc"]
    record["word_problem_acc"] = evaluate_word_problems(model, features[:, :0])
    record["word_problem_after_image_acc"] = evaluate_word_problems(model, features)
    line = "asked to click right of the name {:.1%}    word problems {:.1%}, after an image {:.1%}"
    print(line.format(reworded["action_acc"], record["word_problem_acc"], record["word_problem_after_image_acc"]))
    return record


# ---- Rules that need no fine-tuning ----------------------------------------------------------------------------------


def in_other_words(sample: dict, wording: str) -> dict:
    """The same click, asked for as in one of WORDINGS."""
    verb, name = sample["instruction"].split(" ", 1)
    return sample | {"instruction": wording.replace("click", verb).replace("wifi", name)}


def at_the_left(sample: dict) -> dict:
    """The question for a place's name, asked about the place near the left edge at the same height."""
    return sample | {"instruction": re.sub(r"<x\d+>", "<x2>", sample["instruction"])}


def best_offset(clicks_and_boxes: list[tuple[Point, Box]]) -> tuple[int, int]:
    """The offset (dx, dy), in whole bins and one for all, after which the most of these clicks are in their boxes."""

    def num_hits(offset: tuple[int, int]) -> int:
        dx, dy = offset
        return sum(is_hit((x + dx, y + dy), box) for (x, y), box in clicks_and_boxes)

    steps = range(BIN - SIZE, SIZE, BIN)
    return max(product(steps, steps), key=num_hits)


def offset_rule(validation: list[Answer], test: list[Answer]) -> float:
    """Click accuracy on the answers `test` if each click is moved by the offset that is best for its name on the
    answers `validation`. No click is a miss."""
    by_name = defaultdict(list)
    for _, sample, click in validation:
        if click:
            by_name[sample["name"]].append((click, sample["bbox"]))
    offsets = {name: best_offset(clicks_and_boxes) for name, clicks_and_boxes in by_name.items()}
    hits = 0
    for _, sample, click in test:
        if click:
            dx, dy = offsets.get(sample["name"], (0, 0))
            hits += is_hit((click[0] + dx, click[1] + dy), sample["bbox"])
    return hits / len(test)


def rules(base: str, device: str) -> dict[str, float]:
    """What share a base gets right on test screens with switches: clicks, asked for in other words; its clicks, moved
    by an offset for each name; names of switches, asked for at the left end of their line."""
    model = load_base(base, device)
    test = screens_and_features(base, "switches", "test", SCREENS, device)
    validation = screens_and_features(base, "switches", "validation", SCREENS, device)
    accuracies = {}
    for wording in WORDINGS:
        metrics, _ = evaluate(model, *test, reword=partial(in_other_words, wording=wording))
        accuracies[wording] = metrics["action_acc"]
    _, validation_answers = evaluate(model, *validation)
    _, test_answers = evaluate(model, *test)
    accuracies["an offset for each name"] = offset_rule(validation_answers, test_answers)
    metrics, _ = evaluate(model, *test, "referring", reword=at_the_left)
    accuracies["referring: what is at the left, at this height"] = metrics["name_acc"]
    return accuracies


def print_rules(cfg: ControlsConfig) -> None:
    """A line for each rule: its values in % on the bases, then on the twins, as far as they exist here."""
    device = find_device(cfg.device)
    existing = [base for base in (*BASES.values(), *TWINS.values()) if base_path(base).exists()]
    accuracies = {base: rules(base, device) for base in progress(existing, "bases")}
    print("|frozen, on switch screens|the bases %|their twins %|\n|---|---|---|")
    for rule in accuracies[existing[0]]:
        cells = []
        for group in (BASES, TWINS):
            values = [f"{100 * accuracies[base][rule]:.1f}" for base in group.values() if base in accuracies]
            cells.append(", ".join(values) or "none here")
        print(f"|{rule}|{'|'.join(cells)}|")
    print(f"bases: {', '.join(existing)}")


if __name__ == "__main__":
    sys.exit(command(ControlsConfig, print_rules, __doc__))
