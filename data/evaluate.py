"""Answers and their score: the task, what else the model can do, and the controls that a score is compared with."""

from collections import defaultdict
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.prompts import CHUNK, load_base, pack_sequences, prompt_batch, screens_and_features, turn
from data.screens import (
    BIN,
    DOMAINS,
    SIZE,
    Box,
    Screen,
    grounding_sample,
    is_hit,
    referring_sample,
    relation_samples,
)
from data.words import decode, parse_point, word_problem

Point = tuple[float, float]  # x, y in pixels


class Answer(NamedTuple):
    """What a model answered to a sample about a screen."""

    screen: Screen
    sample: dict  # {"instruction", "answer", of a click "bbox", "name", "data_type", too}
    output: Point | str | None  # a click; or a name; None where a click was asked for and the answer is no point


def all_samples(screens: list[Screen], task="grounding") -> list[tuple[int, dict]]:
    """Every target of every screen asked for once, or what is right of it: (number of the screen, sample)."""
    rng = np.random.default_rng(0)
    numbered = []
    for i, screen in enumerate(screens):
        if task == "relations":
            samples = relation_samples(screen)
        elif task == "referring":
            samples = [referring_sample(target) for target in screen.targets()]
        else:
            samples = [grounding_sample(screen, target, rng) for target in screen.targets()]
        numbered += [(i, sample) for sample in samples]
    return numbered


@torch.no_grad()
def generate_answers(model, samples: list[dict], features: Tensor, history=0) -> list[str]:
    """The model's greedy answers to samples, each after `history` word problems and its image [B, P or 0, D]."""
    answers = []
    for start in range(0, len(samples), CHUNK):
        part = slice(start, start + CHUNK)
        batch = prompt_batch(samples[part], features[part], history)
        ids = model.generate(**batch, max_new_tokens=3)
        new_ids = ids[:, batch["input_ids"].shape[1] :]
        answers += [decode(row) for row in new_ids.tolist()]
    return answers


def evaluate(
    model,
    screens: list[Screen],
    features: Tensor,
    task="grounding",
    history=0,
    reword: Callable[[dict], dict] | None = None,
) -> tuple[dict, list[Answer]]:
    """Ask for all targets of these screens -> (ScreenSpot's metrics, or name_acc or relation_acc; the answers).

    features: of the screens, [N, P, D]. reword: a function that asks for a sample's target in other words."""
    numbers, samples = zip(*all_samples(screens, task))
    if reword:
        samples = [reword(sample) for sample in samples]
    outputs = generate_answers(model, samples, features[list(numbers)], history)
    if task == "grounding":
        outputs = [parse_point(text) for text in outputs]
        metrics = click_metrics(outputs, samples)
    else:
        accuracy = float(np.mean([output == sample["answer"] for output, sample in zip(outputs, samples)]))
        metrics = {"name_acc" if task == "referring" else "relation_acc": accuracy}
    metrics["num_total"] = len(samples)
    answers = [Answer(screens[i], sample, output) for i, sample, output in zip(numbers, samples, outputs)]
    return metrics, answers


def click_metrics(clicks: list[Point | None], samples: list[dict]) -> dict:
    """ScreenSpot's metrics: the accuracy on all targets, on text and on icons; how many answers are no point."""
    hits = {"text": [], "icon": []}
    for click, sample in zip(clicks, samples):
        hits[sample["data_type"]].append(is_hit(click, sample["bbox"]))
    return {
        "action_acc": float(np.mean(hits["text"] + hits["icon"])),
        "text_acc": float(np.mean(hits["text"])),
        "icon_acc": float(np.mean(hits["icon"])),
        "wrong_format_num": clicks.count(None),
    }


def evaluate_word_problems(model, features: Tensor, count=256) -> float:
    """Share of test word problems whose final number is correct, each asked after one image of features [N, P, D]."""
    problems = [word_problem("test", i) for i in range(count)]
    answers = generate_answers(model, problems, features[torch.arange(count) % len(features)])
    correct = 0
    for answer, problem in zip(answers, problems):
        correct += answer.split()[-1:] == problem["answer"].split()[-1:]
    return correct / count


def measure(cfg, model) -> tuple[dict, list[Answer]]:
    """What the model can do: the task, clicks on source screens, word problems without and after an image.

    Returns the metrics, and the answers of the task."""
    screens, features = screens_and_features(cfg.base, cfg.domain, "test", cfg.test_screens, model.device)
    metrics, answers = evaluate(model, screens, features, cfg.task, cfg.history)
    source = screens_and_features(cfg.base, "source", "test", cfg.test_screens // 2 + 1, model.device)
    source_metrics, _ = evaluate(model, *source)
    metrics["source_acc"] = source_metrics["action_acc"]
    metrics["word_problem_acc"] = evaluate_word_problems(model, features[:, :0])
    metrics["word_problem_after_image_acc"] = evaluate_word_problems(model, features)
    return metrics, answers


def score_line(domain: str, metrics: dict) -> str:
    """The metrics of `evaluate` in a sentence, and the word problems if they were measured, too."""
    line = "click accuracy on {screens} {action_acc:6.1%}  (words {text_acc:.1%}  icons {icon_acc:.1%})"
    if "name_acc" in metrics:
        line = "correct names on {screens} {name_acc:6.1%}"
    if "relation_acc" in metrics:
        line = "what is right of a name, on {screens} {relation_acc:6.1%}"
    if "word_problem_acc" in metrics:
        line += "\n         word problems {word_problem_acc:.1%}, after an image {word_problem_after_image_acc:.1%}"
    return line.format(screens=f"{domain.removesuffix('es')} screens", **metrics)


@torch.no_grad()
def text_only_logits(model) -> Tensor:
    """Logits of 256 prompts without an image (test word problems with their answers), [256, T, V]."""
    prefixes = [[turn(word_problem("test", i))] for i in range(256)]
    batch = pack_sequences([[]] * len(prefixes), prefixes, 0, model.device)
    return model(batch["input_ids"]).logits


def hit_rate(logits: Tensor, labels: Tensor, boxes: list[Box | None]) -> float:
    """Share of a training batch's clicks that hit their box, with teacher forcing. Word problems have box None."""
    answers = logits[:, :-1][labels[:, 1:] >= 0].argmax(-1).view(-1, 3)  # each is x, y, <eos>
    points = [parse_point(decode(ids)) for ids in answers[:, :2].tolist()]
    hits = [is_hit(point, box) for point, box in zip(points, boxes) if box]
    return sum(hits) / max(len(hits), 1)


def film_frame(cfg, model) -> list[Answer]:
    """The answer to one question about each of the first six test screens."""
    screens, features = screens_and_features(cfg.base, cfg.domain, "test", cfg.test_screens, model.device)
    _, answers = evaluate(model, screens[:6], features[:6], history=cfg.history)
    frame = []
    for i, screen in enumerate(screens[:6]):
        about_screen = [answer for answer in answers if answer.screen is screen]
        frame.append(about_screen[i % len(about_screen)])  # so that some are of text and some of icons
    return frame


# ---- Controls: what a click gets from the frozen base, and without its switch ----------------------------------------


def click_right_of(sample: dict) -> dict:
    """The same click, asked for as pretraining asked for it: *click right of wifi*."""
    return sample | {"instruction": sample["instruction"].replace(" ", " right of ", 1)}


def best_offset(clicks_and_boxes: list[tuple[Point, Box]]) -> tuple[int, int]:
    """The offset (dx, dy), in whole bins and one for all, after which the most of these clicks are in their boxes."""

    def num_hits(offset):
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


def measure_controls(cfg, model, base_answers: list[Answer]) -> dict:
    """Click accuracy of the base, moved by an offset for each name. Where there are switches also of the base, asked to
    click right of the name, and of the tuned model, the switches erased."""
    base = load_base(cfg.base, model.device)
    count = cfg.test_screens
    validation = screens_and_features(cfg.base, cfg.domain, "validation", count, model.device)
    _, validation_answers = evaluate(base, *validation, history=cfg.history)
    accuracies = {"offset_acc": offset_rule(validation_answers, base_answers)}
    if DOMAINS[cfg.domain].switches:
        whole = screens_and_features(cfg.base, cfg.domain, "test", count, model.device)
        erased = screens_and_features(cfg.base, cfg.domain, "test", count, model.device, erased=True)
        metrics, _ = evaluate(base, *whole, history=cfg.history, reword=click_right_of)
        accuracies["reworded_acc"] = metrics["action_acc"]
        metrics, _ = evaluate(model, *erased, history=cfg.history)
        accuracies["erased_acc"] = metrics["action_acc"]
    return accuracies
