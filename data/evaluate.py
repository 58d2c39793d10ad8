"""Answers decoded and scored: the task, what else the model can do, and what a click gets without the adapter."""

from collections import defaultdict
from itertools import product

import numpy as np
import torch
from torch import Tensor

from data.prompts import CHUNK, load_base, questions, seen, training_batch, turn
from data.screens import BIN, DOMAINS, SIZE, Screen, grounding, is_hit, referring, relations
from data.words import decode, parse_point, word_problem

Given = tuple[Screen, dict, object]  # a screen, a sample about it, the point or the name that was answered


def exam(drawn: list[Screen], task="grounding") -> list[tuple[int, dict]]:
    """Every target of every screen asked once, or what is right of it: (number of the screen, sample)."""
    rng, asked = np.random.default_rng(0), []
    for i, screen in enumerate(drawn):
        if task == "relations":
            samples = relations(screen)
        elif task == "referring":
            samples = [referring(target) for target in screen.targets()]
        else:
            samples = [grounding(screen, target, rng) for target in screen.targets()]
        asked += [(i, sample) for sample in samples]
    return asked


@torch.no_grad()
def answer(model, samples: list[dict], features: Tensor, history=0) -> list[str]:
    """Greedy answers to `questions`."""
    answers = []
    for start in range(0, len(samples), CHUNK):
        part = slice(start, start + CHUNK)
        batch = questions(samples[part], features[part], history)
        out = model.generate(**batch, max_new_tokens=3)
        new = out[:, batch["input_ids"].shape[1] :]
        answers += map(decode, new.tolist())
    return answers


def evaluate(model, drawn: list[Screen], features: Tensor, task="grounding", history=0, reword=lambda sample: sample):
    """All targets of these screens -> (ScreenSpot's metrics, or name_acc or relation_acc; the answers).

    reword: a function that asks for the same in other words."""
    order, samples = zip(*exam(drawn, task))
    samples = [reword(sample) for sample in samples]
    answers = answer(model, samples, features[list(order)], history)
    if task == "grounding":
        answers = [parse_point(text) for text in answers]
        hits = [is_hit(point, sample["bbox"]) for point, sample in zip(answers, samples)]
        of_words = [hit for hit, sample in zip(hits, samples) if sample["data_type"] == "text"]
        of_icons = [hit for hit, sample in zip(hits, samples) if sample["data_type"] == "icon"]
        metrics = {
            "action_acc": float(np.mean(hits)),
            "text_acc": float(np.mean(of_words)),
            "icon_acc": float(np.mean(of_icons)),
            "wrong_format_num": answers.count(None),  # no points
        }
    else:
        correct = [given == sample["answer"] for given, sample in zip(answers, samples)]
        metrics = {"name_acc" if task == "referring" else "relation_acc": float(np.mean(correct))}
    metrics["num_total"] = len(samples)
    of_screens = [drawn[i] for i in order]
    return metrics, [*zip(of_screens, samples, answers)]


def evaluate_word_problems(model, features: Tensor, count=256) -> float:
    """Share of test word problems whose final number is correct, each asked after one image of features [N, P, D]."""
    problems = [word_problem("test", i) for i in range(count)]
    answers = answer(model, problems, features[torch.arange(count) % len(features)])
    correct = 0
    for given, problem in zip(answers, problems):
        correct += given.split()[-1:] == problem["answer"].split()[-1:]
    return correct / count


def measure(cfg, model):
    """(What the model can do: the task, source screens, word problems without and after an image; its answers)."""
    drawn, features = seen(cfg.base, cfg.domain, "test", cfg.test_screens, model.device)
    metrics, given = evaluate(model, drawn, features, cfg.task, cfg.history)
    source = seen(cfg.base, "source", "test", cfg.test_screens // 2 + 1, model.device)
    of_source, _ = evaluate(model, *source)
    metrics["source_acc"] = of_source["action_acc"]
    metrics["word_problem_acc"] = evaluate_word_problems(model, features[:, :0])
    metrics["word_problem_after_image_acc"] = evaluate_word_problems(model, features)
    return metrics, given


def score_line(domain: str, metrics: dict) -> str:
    """The metrics of `evaluate` in words, and the word problems where they were measured too."""
    line = "click accuracy on {screens} {action_acc:6.1%}  (words {text_acc:.1%}  icons {icon_acc:.1%})"
    if "name_acc" in metrics:
        line = "correct names on {screens} {name_acc:6.1%}"
    if "relation_acc" in metrics:
        line = "what is right of a name, on {screens} {relation_acc:6.1%}"
    if "word_problem_acc" in metrics:
        line += "\n         word problems {word_problem_acc:.1%}, after an image {word_problem_after_image_acc:.1%}"
    return line.format(screens=f"{domain.removesuffix('es')} screens", **metrics)


@torch.no_grad()
def text_logits(model) -> Tensor:
    """Logits of text-only prompts (test word problems with their answers) [256, T, V]."""
    told = [[turn(word_problem("test", i))] for i in range(256)]
    return model(training_batch([[]] * len(told), 0, told, model.device)["input_ids"]).logits


def hit_rate(logits: Tensor, labels: Tensor, boxes: list) -> float:
    """Share of a batch's clicks, given teacher-forced, that hit their boxes; None is the box of another question."""
    answers = logits[:, :-1][labels[:, 1:] >= 0].argmax(-1).view(-1, 3)  # each is x, y, <eos>
    points = [parse_point(decode(words)) for words in answers[:, :2].tolist()]
    hits = [is_hit(point, box) for point, box in zip(points, boxes) if box]
    return sum(hits) / max(len(hits), 1)


def few_answers(cfg, model) -> list[Given]:
    """The answer to one question about each of the first six screens."""
    drawn, features = seen(cfg.base, cfg.domain, "test", cfg.test_screens, model.device)
    _, given = evaluate(model, drawn[:6], features[:6], history=cfg.history)
    few = []
    for i, screen in enumerate(drawn[:6]):
        about = [answer for answer in given if answer[0] is screen]
        few.append(about[i % len(about)])  # words and icons
    return few


# ---- Controls: what a click gets from the frozen base, and without its switch ----------------------------------------


def click_right_of(sample: dict) -> dict:
    """The same click, asked for as pretraining asked for it: *click right of wifi*."""
    return sample | {"instruction": sample["instruction"].replace(" ", " right of ", 1)}


def best_move(pairs: list) -> tuple[int, int]:
    """The move (dx, dy), in whole bins and one for all, after which the most of these clicks are in their boxes."""

    def hits(move):
        dx, dy = move
        return sum(is_hit((x + dx, y + dy), box) for (x, y), box in pairs)

    steps = range(BIN - SIZE, SIZE, BIN)
    return max(product(steps, steps), key=hits)


def offset_rule(learn: list[Given], given: list[Given]) -> float:
    """Click accuracy of the base's clicks, moved for each name as was best on the answers `learn`. No click: a miss."""
    learned = defaultdict(list)
    for _, sample, point in learn:
        if point:
            learned[sample["name"]].append((point, sample["bbox"]))
    moves = {name: best_move(pairs) for name, pairs in learned.items()}
    hits = 0
    for _, sample, point in given:
        if point:
            dx, dy = moves.get(sample["name"], (0, 0))
            hits += is_hit((point[0] + dx, point[1] + dy), sample["bbox"])
    return hits / len(given)


def controls(cfg, model, base_given: list[Given]) -> dict:
    """Click accuracy of the base, moved by an offset for each name. Where there are switches also of the base, asked to
    click right of the name, and of the tuned model, the switches erased."""
    base = load_base(cfg.base, model.device)
    place = cfg.test_screens, model.device
    _, learn = evaluate(base, *seen(cfg.base, cfg.domain, "validation", *place), history=cfg.history)
    found = {"offset_acc": offset_rule(learn, base_given)}
    if DOMAINS[cfg.domain].switches:
        shown = seen(cfg.base, cfg.domain, "test", *place)
        erased = seen(cfg.base, cfg.domain, "test", *place, erased=True)
        metrics, _ = evaluate(base, *shown, history=cfg.history, reword=click_right_of)
        found["reworded_acc"] = metrics["action_acc"]
        metrics, _ = evaluate(model, *erased, history=cfg.history)
        found["erased_acc"] = metrics["action_acc"]
    return found
