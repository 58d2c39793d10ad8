"""What can be known of frozen bases: what they hit on switch screens by rules, and where they look for a name.

    python -m data.study.controls

It prints two tables with the bases that exist here: those with the skill, and their twins without it. A fresh clone has
only the first base; `python -m data.study.compare` makes the others.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

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
from data.screens import BIN, ICONS, LABELS, SIZE, Box, draw_screen, is_hit
from data.study import BASES, TWINS
from data.walk import attention_shares, patches_of
from data.words import BOS, ID, IMAGE

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


# ---- What the layers know --------------------------------------------------------------------------------------------


def clicks_and_attention(base: str, device: str) -> tuple[float, list[float]]:
    """The click accuracy on source screens; and how much the last token of a question looks at the name asked for.

    The second is, for each layer, the share of its attention, in the mean over questions, of the head where that is
    largest."""
    model = load_base(base, device)
    screens, features = screens_and_features(base, "source", "test", SCREENS, device)
    metrics, _ = evaluate(model, screens, features)
    return metrics["action_acc"], attention_shares(model, screens, features).amax(1).tolist()


@torch.no_grad()
def switch_tokens(base: str, split: str, device: str) -> tuple[Tensor, Tensor]:
    """What each layer's v_proj reads at the visual tokens of a switch, in the mean over its patches, and whose it is.

    Returns X [L, N, D] for N switches and the indices of their names [N]."""
    model = load_base(base, device)
    screens, features = screens_and_features(base, "switches", split, SCREENS, device)
    layers = []
    hooks = []
    for layer in model.language_model.layers:
        hook = layer.self_attn.v_proj.register_forward_pre_hook(lambda module, inputs: layers.append(inputs[0]))
        hooks.append(hook)
    prompt = [ID[BOS]] + [ID[IMAGE]] * model.config.num_patches
    model(torch.tensor([prompt] * len(screens), device=device), image_features=features)
    for hook in hooks:
        hook.remove()
    side = round(model.config.num_patches**0.5)
    grids = torch.stack(layers)[:, :, 1:].mT.unflatten(-1, (side, side))  # [L, N, D, side, side]
    tokens = []
    names = []
    for i, screen in enumerate(screens):
        for target in screen.targets():
            tokens.append(patches_of(target.click, grids[:, i]).mean((-2, -1)))  # [L, D]
            names.append((*LABELS, *ICONS).index(target.name))
    return torch.stack(tokens, dim=1), torch.tensor(names, device=device)


def linear_map_accuracy(x: Tensor, classes: Tensor, test_x: Tensor, test_classes: Tensor) -> float:
    """The share of test_x [N, D] whose class is the largest output of the linear map that fits x to one-hot classes.

    Ridge regression on standardized features, with a constant."""
    mean = x.mean(0)
    deviation = x.std(0)
    x = F.pad((x - mean) / deviation, (0, 1), value=1.0)  # the last feature is the constant
    test_x = F.pad((test_x - mean) / deviation, (0, 1), value=1.0)
    penalty = 0.01 * len(x) * torch.eye(x.shape[1], device=x.device)
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ F.one_hot(classes).float())
    return (test_x @ weights).argmax(1).eq(test_classes).float().mean().item()


def names_read(base: str, device: str) -> list[float]:
    """For each layer the share of switches whose name a linear map reads from the visual tokens of the switch."""
    x, names = switch_tokens(base, "train", device)
    test_x, test_names = switch_tokens(base, "test", device)
    return [linear_map_accuracy(x[i], names, test_x[i], test_names) for i in range(len(x))]


# ---- What is printed -------------------------------------------------------------------------------------------------


def percent(shares: list[float]) -> str:
    return ", ".join(f"{100 * share:.0f}" for share in shares)


def print_controls(cfg: ControlsConfig) -> None:
    """The rules, in % on the bases and on the twins that exist here; then what the layers of each of them know."""
    device = find_device(cfg.device)
    existing = [base for base in (*BASES.values(), *TWINS.values()) if base_path(base).exists()]
    accuracies = {}
    layers = []
    for base in progress(existing, "bases"):
        accuracies[base] = rules(base, device)
        clicks, attention = clicks_and_attention(base, device)
        layers.append(f"|{base}|{100 * clicks:.1f}|{percent(attention)}|{percent(names_read(base, device))}|")
    print("|frozen, on switch screens|the bases %|their twins %|\n|---|---|---|")
    for rule in accuracies[existing[0]]:
        cells = []
        for group in (BASES, TWINS):
            values = [f"{100 * accuracies[base][rule]:.1f}" for base in group.values() if base in accuracies]
            cells.append(", ".join(values) or "none here")
        print(f"|{rule}|{'|'.join(cells)}|")
    titles = "attention to the name asked for, in each layer, %|name read from its switch, in each layer, %"
    print(f"\n|frozen|old task, %|{titles}|")
    print("|---|---|---|---|")
    print("\n".join(layers))


if __name__ == "__main__":
    sys.exit(command(ControlsConfig, print_controls, __doc__))
