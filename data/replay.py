"""Replay: some sequences of a step hold other questions than the new task's, so that a model keeps what it knew.

The questions are about old screens or about new ones, and some are word problems. The answers are correct, or they are
the base model's own, which need no labels: Learning without Forgetting (arXiv 1606.09282).
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from data.base import screens_and_features
from data.evaluate import MAX_NEW_TOKENS, generate_answers, is_correct
from data.questions import KINDS, TASKS, random_sample, word_problem

NUM_QUESTIONS = 5  # about each screen of replay
NUM_PROBLEMS = 2  # word problems after each of them


class ReplayData(NamedTuple):
    features: Tensor  # of the screens, [N, P, D]
    samples: list[list[dict]]  # about each screen
    share_correct: float  # of the answers


def make_replay_data(
    model,
    new_data: tuple,
    answers: str,
    seed: int,
    old_screens=False,
    no_switch=False,
    task="grounding",
    num_problems=NUM_PROBLEMS,
    generate=generate_answers,
) -> ReplayData:
    """Other questions about a quarter of the screens, because the model takes time to answer.

    answers: "correct" or "own", the model's. new_data: (screens, features [N, P, D]) of the new task, which is one of
    TASKS. old_screens: ask about as many old ones instead, also in the new task's own words; about the new ones, the
    model would teach what these words meant. no_switch: leave out questions whose correct answer is "switch", a word
    that is new with the new screens. num_problems: word problems after each screen. generate: what replaces
    `generate_answers`, for a model of another kind."""
    screens, features = new_data
    count = len(screens) // 4
    kinds = tuple(kind for kind in KINDS if kind != TASKS[task])
    if old_screens:
        screens, features = screens_and_features(model, "old", "train", count)
        kinds = KINDS
    screens, features = screens[:count], features[:count]
    rng = np.random.default_rng(seed)
    numbers, samples = [], []  # the screen of each question, and the question with its correct answer
    for i, screen in enumerate(screens):
        for _ in range(NUM_QUESTIONS):
            sample = random_sample(screen, str(rng.choice(kinds)), rng)
            # On some screens there is nothing right of any name.
            if sample and not (no_switch and sample["answer"] == "switch"):
                numbers.append(i)
                samples.append(sample)
        for k in range(num_problems):
            numbers.append(i)
            samples.append(word_problem("train", i * num_problems + k))
    texts = [sample["answer"] for sample in samples]
    if answers == "own":
        texts = generate(model, samples, features[numbers])
    samples_of_screens = [[] for _ in screens]
    for i, sample, text in zip(numbers, samples, texts):
        # An answer that was cut off would teach to stop in the middle.
        if 0 < len(text.split()) < MAX_NEW_TOKENS:
            samples_of_screens[i].append(sample | {"answer": text})
    if not any(samples_of_screens):
        raise ValueError("the base model ended none of its answers, so there is nothing to replay; use correct answers")
    asked = [i for i, samples_of_screen in enumerate(samples_of_screens) if samples_of_screen]
    share_correct = float(np.mean([is_correct(sample, text) for sample, text in zip(samples, texts)]))
    return ReplayData(features[asked], [samples_of_screens[i] for i in asked], share_correct)
