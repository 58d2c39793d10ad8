"""What frozen bases can do, and what they hit on switch screens by rules that need no fine-tuning.

python -m data.study.controls        a table: bases with the skill beside those without it
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from data import DEVICES, Settings, command, option
from data.evaluate import click_right_of, evaluate, evaluate_word_problems, offset_rule, score_line
from data.prompts import find_device, image_features, load_base, screens_and_features
from data.screens import draw_screen
from data.study import BASES, TWINS

SCREENS = 400  # of each kind, that a base is judged on
WORDINGS = "click wifi", "click right of wifi", "click switch", "click switch right of wifi", "click wifi switch"


def abilities(model) -> dict:
    """What a base can do on test screens of each kind, and with word problems. It is printed, too."""
    record = {}
    for domain in ("source", "dark", "switches"):
        screens = [draw_screen(domain, "test", i) for i in range(SCREENS)]
        features = image_features(model.get_image_features, screens, model.device)
        record[domain] = {}
        for task in ("relations", "referring", "grounding"):  # clicks last: num_total is theirs
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


@dataclass(frozen=True)
class ControlsConfig(Settings):
    device: str = option("cpu", "where to compute", DEVICES)


def reworded(sample: dict, wording: str) -> dict:
    """The same click, asked for in the words of WORDINGS."""
    verb, name = sample["instruction"].split(" ", 1)
    return sample | {"instruction": wording.replace("click", verb).replace("wifi", name)}


def at_the_left(sample: dict) -> dict:
    """The name asked for not of this place, but of one at the same height near the left edge."""
    return sample | {"instruction": re.sub(r"<x\d+>", "<x2>", sample["instruction"])}


def rules(base: str, device: str) -> dict[str, float]:
    """What a base gets right on test screens with switches: asked in these words; its clicks moved by an offset a name;
    a switch's name, asked of a place left of it."""
    model = load_base(base, device)
    test = screens_and_features(base, "switches", "test", SCREENS, device)
    validation = screens_and_features(base, "switches", "validation", SCREENS, device)
    accuracies = {}
    for wording in WORDINGS:
        metrics, _ = evaluate(model, *test, reword=lambda sample, wording=wording: reworded(sample, wording))
        accuracies[wording] = metrics["action_acc"]
    _, validation_answers = evaluate(model, *validation)
    _, test_answers = evaluate(model, *test)
    accuracies["an offset for each name"] = offset_rule(validation_answers, test_answers)
    metrics, _ = evaluate(model, *test, "referring", reword=at_the_left)
    accuracies["referring: what is at the left, at this height"] = metrics["name_acc"]
    return accuracies


def print_rules(cfg: ControlsConfig) -> None:
    """A line a rule; the values of the three bases, then of the three without the skill, in %."""
    missing = [base for base in BASES + TWINS if not Path(base).exists()]
    if missing:
        raise ValueError(f"there is no {missing[0]}; python -m data.study.compare makes it")
    of_bases = [rules(base, find_device(cfg.device)) for base in BASES + TWINS]
    print("|frozen, on switch screens|the bases %|their twins %|\n|---|---|---|")
    for rule in of_bases[0]:
        values = [f"{100 * accuracies[rule]:.1f}" for accuracies in of_bases]
        print(f"|{rule}|{', '.join(values[:3])}|{', '.join(values[3:])}|")


if __name__ == "__main__":
    sys.exit(command(ControlsConfig, print_rules, __doc__))
