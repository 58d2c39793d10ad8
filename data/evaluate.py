"""Asks a model questions and scores the answers: on the task, on what else it can do, and in the controls."""

from functools import partial
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import imagelora
from data.base import CHUNK, image_features, load_base, screens_and_features
from data.prompts import decode, pack_sequences, prompt_batch
from data.questions import OTHER_KINDS, Point, all_samples, click_right_of, is_hit, parse_point, with_hint, word_problem
from data.screens import Screen

MAX_NEW_TOKENS = 3  # two words or coordinates and <eos>


class Answer(NamedTuple):
    """What a model answered to a sample about a screen."""

    screen: Screen
    sample: dict  # {"instruction", "answer"}; of a click also "bbox"
    output: Point | str | None  # a click; or a name; None where a click was asked for and the answer is no point


@torch.no_grad()
def generate_answers(model, samples: list[dict], features: Tensor, num_problems=0) -> list[str]:
    """The model's greedy answers to samples, each after `num_problems` word problems and its image [B, P or 0, D]."""
    answers = []
    for start in range(0, len(samples), CHUNK):
        part = slice(start, start + CHUNK)
        batch = prompt_batch(samples[part], features[part], num_problems)
        ids = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS)
        new_ids = ids[:, batch["input_ids"].shape[1] :]
        answers += [decode(row) for row in new_ids.tolist()]
    return answers


def is_right(answer: Answer) -> bool:
    """Whether a click hits its target, or a name is the correct one."""
    if "bbox" in answer.sample:
        return is_hit(answer.output, answer.sample["bbox"])
    return answer.output == answer.sample["answer"]


def read_answers(screens: list[Screen], samples: list[dict], texts: list[str]) -> tuple[float, list[Answer]]:
    """(Share of correct answers, answers) from what a model wrote about these screens."""
    answers = []
    for screen, sample, text in zip(screens, samples, texts):
        answers.append(Answer(screen, sample, parse_point(text) if "bbox" in sample else text))
    return float(np.mean([is_right(answer) for answer in answers])), answers


def evaluate(
    model, screens: list[Screen], features: Tensor, kind="click", num_problems=0, reword=None, generate=None
) -> tuple[float, list[Answer]]:
    """Ask one question of a kind about each target -> (share of correct answers, answers).

    features: of the screens, [N, P, D]. kind: see data.questions.all_samples. num_problems: word problems before each
    screen. reword: a function that asks for a sample's target in other words. generate: what replaces
    `generate_answers`, for a model of another kind."""
    numbers, samples = zip(*all_samples(screens, kind))
    if reword:
        samples = [reword(sample) for sample in samples]
    texts = (generate or generate_answers)(model, samples, features[list(numbers)], num_problems)
    return read_answers([screens[i] for i in numbers], samples, texts)


def evaluate_word_problems(model, features: Tensor, count=256) -> float:
    """Share of test word problems whose final number is correct, each asked after one image of features [N, P, D], or
    without an image if P is 0."""
    problems = [word_problem("test", i) for i in range(count)]
    texts = generate_answers(model, problems, features[torch.arange(count) % len(features)])
    # An answer is the number after each step. [-1:] is empty if the answer is.
    return sum(text.split()[-1:] == problem["answer"].split()[-1:] for text, problem in zip(texts, problems)) / count


def measure(model, new_test: tuple, old_test: tuple, kind="click", num_problems=0) -> tuple[dict, list[Answer]]:
    """What the model can do on test screens, and its answers to the new task, whose questions are of this kind.

    new_test, old_test: (screens, features) of new and old screens. num_problems: word problems before each screen.

    task_acc             the new task, on new screens
    other_questions_acc  what fine-tuning never asks, on old screens: the mean of the measures of OTHER_KINDS
    same_words_acc       a click on a name, asked for in the new task's words, on old screens
    word_problem_acc, word_problem_after_image_acc   arithmetic, without an image and after one"""
    task_acc, answers = evaluate(model, *new_test, kind, num_problems)
    metrics = {"task_acc": task_acc} | measure_other_questions(model, old_test, num_problems)
    metrics["same_words_acc"], _ = evaluate(model, *old_test, num_problems=num_problems)
    _, features = new_test
    metrics["word_problem_acc"] = evaluate_word_problems(model, features[:, :0])
    metrics["word_problem_after_image_acc"] = evaluate_word_problems(model, features)
    return metrics, answers


def measure_other_questions(model, old_test: tuple, num_problems=0, generate=None) -> dict:
    """The measures of OTHER_KINDS and their mean. Arguments as of `evaluate`."""
    metrics = {}
    for kind in OTHER_KINDS:
        metrics[f"{kind}_acc"], _ = evaluate(model, *old_test, kind, num_problems, generate=generate)
    return metrics | {"other_questions_acc": float(np.mean([*metrics.values()]))}


def measure_briefly(model, new_test: tuple, old_test: tuple, kind="click", num_problems=0, generate=None) -> dict:
    """The new task and the other questions. Arguments as of `measure` and `evaluate`."""
    measures = measure_other_questions(model, old_test, num_problems, generate)
    measures["task_acc"], _ = evaluate(model, *new_test, kind, num_problems, generate=generate)
    return measures


def measure_hints(model, new_test: tuple, generate=None) -> dict:
    """Clicks on the new screens where each question has a hint.

    right_hint_acc: with the correct place; wrong_hint_acc: with the place of another switch of the screen, and then
    followed_acc: the share of clicks on that place, which are wrong. generate: as of `evaluate`."""
    right_hint_acc, _ = evaluate(model, *new_test, reword=with_hint, generate=generate)
    wrong_hint_acc, answers = evaluate(model, *new_test, reword=partial(with_hint, right=False), generate=generate)
    followed_acc = float(np.mean([answer.output == parse_point(answer.sample["elsewhere"]) for answer in answers]))
    return {"right_hint_acc": right_hint_acc, "wrong_hint_acc": wrong_hint_acc, "followed_acc": followed_acc}


def measure_controls(cfg, model) -> dict:
    """Click accuracies on new screens: of the base, asked to click right of the name; and of the tuned model, where the
    switches are erased."""
    base = load_base(cfg.base, model.device)
    new_test = screens_and_features(base, "new", "test", cfg.test_screens)
    reworded, _ = evaluate(base, *new_test, num_problems=cfg.text, reword=click_right_of)
    erased_test = screens_and_features(base, "new", "test", cfg.test_screens, erased=True)
    erased, _ = evaluate(model, *erased_test, num_problems=cfg.text)
    return {"reworded_acc": reworded, "erased_acc": erased}


@torch.no_grad()
def text_only_logits(model) -> Tensor:
    """Next-token logits [256, T, V] of test word problems with their answers, without an image."""
    problems = [[word_problem("test", i)] for i in range(256)]
    packed = pack_sequences(problems, [[]] * len(problems), num_patches=0)
    return model(packed["input_ids"].to(model.device)).logits


# ---- Which patch carries a click -------------------------------------------------------------------------------------


@torch.no_grad()
def patch_effects(model, answer: Answer) -> tuple[Tensor, Tensor]:
    """What each patch does to the log-probability of the correct answer, [P]: how far it falls if this patch's row of M
    is zero, and how far it rises from the base model's if all other rows are. The model has an Image-LoRA."""
    features = image_features(model.get_image_features, [answer.screen], model.device)  # [1, P, D]
    patch = torch.eye(features.shape[1], dtype=torch.bool, device=model.device)  # [P, P], in sequence i it is patch i
    question = {"instruction": f"{answer.sample['instruction']} {answer.sample['answer']}"}
    batch = prompt_batch([question] * len(patch), features.expand(len(patch), -1, -1))
    visual_rows = imagelora.visual_rows

    def log_probability(kept: Tensor) -> Tensor:
        """Of the answer's two tokens, in each sequence, if only these rows of M are kept."""
        with mock.patch.object(imagelora, "visual_rows", lambda *args: visual_rows(*args).view(kept.shape)[kept]):
            logits = model(**batch).logits[:, -3:-1]
        return logits.log_softmax(-1).gather(2, batch["input_ids"][:, -2:, None]).sum((1, 2))

    none, alone, all_others, all_of_them = map(log_probability, (patch & False, patch, ~patch, patch | True))
    return all_of_them - all_others, alone - none
