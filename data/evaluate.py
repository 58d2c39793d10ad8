"""Answers decoded and scored: the task, what else the model can do, and what a click gets without looking."""

from collections import defaultdict
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.prompts import CHUNK, image_features, load_base, questions, seen, training_batch, turn
from data.screens import BIN, DOMAINS, SIZE, Screen, draw_screen, grounding, is_hit, referring, relations
from data.words import decode, parse_point, word_problem

BASE_SCREENS = 400  # of each kind, that a base model is judged on
SHIFTS = (0, 0), (3, 0), (-3, 0), (5, 2), (2, -4), (6, 4)  # pixels right and down
STRIP = 14  # pixels above and below a click
Given = tuple[Screen, dict, object]  # a screen, a sample about it, the point or the name that was answered


def exam(drawn: list[Screen], task="grounding") -> list[tuple[int, dict]]:
    """Every target of every screen asked once, or what is right of it: (number of the screen, sample)."""
    rng = np.random.default_rng(0)
    about = {
        "grounding": lambda screen: [grounding(screen, target, rng) for target in screen.targets()],
        "referring": lambda screen: [referring(target) for target in screen.targets()],
        "relations": relations,
        "reworded": lambda screen: [click_right_of(sample) for sample in about["grounding"](screen)],
    }
    asked = []
    for i, screen in enumerate(drawn):
        asked += [(i, sample) for sample in about[task](screen)]
    return asked


def click_right_of(sample: dict) -> dict:
    """The same click, asked for as pretraining asked for it: *click right of wifi*."""
    return sample | {"instruction": sample["instruction"].replace(" ", " right of ", 1)}


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


def evaluate(model, drawn: list[Screen], features: Tensor, task="grounding", history=0):
    """All targets of these screens -> (ScreenSpot's metrics, or name_acc or relation_acc; the answers)."""
    order, samples = zip(*exam(drawn, task))
    answers = answer(model, samples, features[list(order)], history)
    if task in ("grounding", "reworded"):
        answers = [*map(parse_point, answers)]
        hits = np.array([is_hit(point, sample["bbox"]) for point, sample in zip(answers, samples)])
        words = np.array([sample["data_type"] == "text" for sample in samples])
        metrics = {
            "action_acc": float(hits.mean()),
            "text_acc": float(hits[words].mean()),
            "icon_acc": float(hits[~words].mean()),
            "wrong_format_num": answers.count(None),  # no points
        }
    else:
        right = [given == sample["answer"] for given, sample in zip(answers, samples)]
        metrics = {"name_acc" if task == "referring" else "relation_acc": float(np.mean(right))}
    metrics["num_total"] = len(samples)
    of_screens = [drawn[i] for i in order]
    return metrics, [*zip(of_screens, samples, answers)]


def evaluate_word_problems(model, features: Tensor, count=256) -> float:
    """Share of test word problems whose final number is right, each asked after one of the images of `questions`."""
    problems = [word_problem("test", i) for i in range(count)]
    answers = answer(model, problems, features[torch.arange(count) % len(features)])
    right = 0
    for given, problem in zip(answers, problems):
        right += given.split()[-1:] == problem["answer"].split()[-1:]
    return right / count


def examined(cfg, model, split: str, switches="shown"):
    """The screens that a run is judged on, as `seen`."""
    return seen(cfg.base, cfg.domain, split, cfg.test_screens, model.device, switches)


def measure(cfg, model):
    """(What the model can do: the task, source screens, word problems without and after an image; its answers)."""
    drawn, features = examined(cfg, model, cfg.split)
    metrics, given = evaluate(model, drawn, features, cfg.task, cfg.history)
    source = seen(cfg.base, "source", "test", cfg.test_screens // 2 + 1, model.device)
    metrics["source_acc"] = evaluate(model, *source)[0]["action_acc"]
    metrics["word_problem_acc"] = evaluate_word_problems(model, features[:, :0])
    metrics["word_problem_after_image_acc"] = evaluate_word_problems(model, features)
    return metrics, given


def score_line(domain: str, metrics: dict) -> str:
    """The metrics of `evaluate` in words, and the word problems where they were measured too."""
    line = "click accuracy on {domain} screens {action_acc:6.1%}  (words {text_acc:.1%}  icons {icon_acc:.1%})"
    if "name_acc" in metrics:
        line = "names right on {domain} screens {name_acc:6.1%}"
    if "relation_acc" in metrics:
        line = "what is right of a name, on {domain} screens {relation_acc:6.1%}"
    if "word_problem_acc" in metrics:
        line += "    word problems {word_problem_acc:.1%}"
    return line.format(domain=domain, **metrics)


def abilities(model) -> dict:
    """What a base model can do on test screens of each kind, and with word problems. It is printed, too."""
    found = {}
    for domain in ("source", "settings", "row", "dark"):
        drawn = [draw_screen(domain, "test", i) for i in range(BASE_SCREENS)]
        features = image_features(model.get_image_features, drawn)
        found[domain] = {}
        for task in ("grounding", "referring", "relations")[: 3 if domain == "source" else 2]:
            metrics, _ = evaluate(model, drawn, features, task)
            print(score_line(domain, metrics))
            found[domain] = metrics | found[domain]  # the numbers of clicks stay those of clicks
        if DOMAINS[domain].paired:
            metrics = skilled(model, drawn[:100], features[:100])  # as many as a run is judged on
            print("asked to click right of the name {reworded_acc:.1%}, with help {helped_acc:.1%}".format(**metrics))
            found[domain] |= metrics
    found["word_problem_acc"] = evaluate_word_problems(model, features[:, :0])
    print(f"word problems {found['word_problem_acc']:.1%}")
    return found


def skilled(model, drawn: list[Screen], features: Tensor) -> dict:
    """What a base model hits asked to click right of the name; and with help: it is shown only the strip around its own
    click on the name, at six places, and the median of its clicks counts."""
    metrics, reworded = evaluate(model, drawn, features, "reworded")
    _, names = evaluate(model, drawn, features)
    samples, clicks = [sample for _, sample, _ in reworded], []
    for right, down in SHIFTS:
        shown = []
        for screen, _, point in names:
            picture = Image.new("RGB", (SIZE, SIZE), tuple(screen.image[0, 0]))
            y = int(point[1]) if point else 0
            top = max(0, y - STRIP)
            picture.paste(Image.fromarray(screen.image[top : y + STRIP]), (right, top + down))
            shown.append(replace(screen, image=np.asarray(picture)))
        answers = answer(model, samples, image_features(model.get_image_features, shown))
        clicks.append([point and (point[0] - right, point[1] - down) for point in map(parse_point, answers)])
    hits = 0
    for sample, points in zip(samples, zip(*clicks)):
        given = [point for point in points if point]
        hits += bool(given) and is_hit(np.median(given, 0), sample["bbox"])
    return {"reworded_acc": metrics["action_acc"], "helped_acc": float(hits / len(samples))}


@torch.no_grad()
def text_logits(model) -> Tensor:
    """Logits of text-only prompts (test word problems with their answers) [256, T, V]."""
    told = [[turn(word_problem("test", i))] for i in range(256)]
    ids = training_batch([[]] * len(told), 0, told)["input_ids"]
    return model(ids.to(model.device)).logits


def hit_rate(logits: Tensor, labels: Tensor, boxes: list) -> float:
    """Share of a batch's clicks, given teacher-forced, that hit their targets."""
    answers = logits[:, :-1][labels[:, 1:] >= 0].argmax(-1).view(-1, 3)  # each is x, y, <eos>
    points = [parse_point(decode(words)) for words in answers[:, :2].tolist()]
    return sum(map(is_hit, points, boxes)) / len(boxes)


def few_answers(cfg, model) -> list[Given]:
    """The answer to one question about each of the first six screens."""
    drawn, features = examined(cfg, model, cfg.split)
    _, given = evaluate(model, drawn[:6], features[:6], history=cfg.history)
    few = []
    for i, screen in enumerate(drawn[:6]):
        about = [answer for answer in given if answer[0] is screen]
        few.append(about[i % len(about)])  # words and icons
    return few


# ---- Controls: what a click gets without looking for the switch ------------------------------------------------------


def best_move(pairs: list) -> tuple[int, int]:
    """The move (dx, dy), in whole bins and one for all, after which the most of these clicks are in their boxes."""

    def hits(move):
        return sum(is_hit((x + move[0], y + move[1]), box) for (x, y), box in pairs)

    steps = range(BIN - SIZE, SIZE, BIN)
    return max(product(steps, steps), key=hits)


def rule(learn: list[Given], given: list[Given], kind="", start=lambda point: point) -> float:
    """Click accuracy of a rule: from start(the base model's click), move as was best on the answers `learn`.

    One move for all, or with `kind` (a field of the samples) one for each of these. No point is a miss."""
    learned = defaultdict(list)
    for _, sample, point in learn:
        if point:
            learned[sample.get(kind)].append((start(point), sample["bbox"]))
    moves = {which: best_move(pairs) for which, pairs in learned.items()}
    hits = 0
    for _, sample, point in given:
        if point:
            x, y = start(point)
            dx, dy = moves.get(sample.get(kind), (0, 0))
            hits += is_hit((x + dx, y + dy), sample["bbox"])
    return hits / len(given)


def controls(cfg, model, base_given: list[Given]) -> dict:
    """Click accuracy of trivial rules, and of the model where it could not or should not hit.

    The rules: a constant; the base's click, moved by an offset for each kind of name, or for each name. They are found
    on the base's answers about validation screens. Where names have switches: the base, asked to click what is right
    of the name; the tuned model, with the switches erased, or exchanged with their names."""
    base = load_base(cfg.base, model.device)
    _, learn = evaluate(base, *examined(cfg, model, "validation"), history=cfg.history)
    found = {
        "constant_acc": rule(learn, base_given, start=lambda point: (BIN / 2, BIN / 2)),
        "offset_acc": rule(learn, base_given, "data_type"),
        "name_offset_acc": rule(learn, base_given, "name"),
    }
    if not DOMAINS[cfg.domain].paired:
        return found
    metrics, _ = evaluate(base, *examined(cfg, model, cfg.split), "reworded", cfg.history)
    found["reworded_acc"] = metrics["action_acc"]
    for switches in ("erased", "exchanged"):
        metrics, _ = evaluate(model, *examined(cfg, model, cfg.split, switches), history=cfg.history)
        found[f"{switches}_acc"] = metrics["action_acc"]
    return found
