"""Replay: some sequences of a step hold other questions than the new task's, so that a model keeps what it knew.

The base model answers them itself, which needs no labels: Learning without Forgetting (arXiv 1606.09282).
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from data.evaluate import MAX_NEW_TOKENS, generate_answers, read_answers
from data.questions import OTHER_KINDS, random_sample, word_problem

NUM_QUESTIONS = 5  # about each screen of replay
NUM_PROBLEMS = 2  # word problems after each of them


class ReplayData(NamedTuple):
    features: Tensor  # of the screens, [N, P, D]
    samples: list[list[dict]]  # about each screen
    share_correct: float  # of the answers


def make_replay_data(model, data: tuple, seed: int, answer=generate_answers, num_problems=NUM_PROBLEMS) -> ReplayData:
    """Other questions about a quarter of the screens, because the model takes time to answer.

    data: (screens, features [N, P, D]) of the new task. Nothing is asked in its own words, because the model would
    teach what they meant before. answer: a function of model, samples and features that gives the answers.
    num_problems: word problems after each screen. ValueError if no answer can be used."""
    screens, features = data
    rng = np.random.default_rng(seed)
    numbers, samples = [], []  # the screen of each question, and the question with its correct answer
    for i, screen in enumerate(screens[: len(screens) // 4]):
        random = [random_sample(screen, str(rng.choice(OTHER_KINDS)), rng) for _ in range(NUM_QUESTIONS)]
        about_screen = [sample for sample in random if sample]  # None: nothing is right of any name
        about_screen += [word_problem("train", i * num_problems + k) for k in range(num_problems)]
        numbers += [i] * len(about_screen)
        samples += about_screen
    texts = answer(model, samples, features[numbers])
    samples_of_screens = {}
    for i, sample, text in zip(numbers, samples, texts):
        # An answer that was cut off would teach to stop in the middle.
        if 0 < len(text.split()) < MAX_NEW_TOKENS:
            samples_of_screens.setdefault(i, []).append(sample | {"answer": text})
    if not samples_of_screens:
        raise ValueError("the base model ended none of its answers, so there is nothing to replay")
    share_correct, _ = read_answers([screens[i] for i in numbers], samples, texts)
    return ReplayData(features[[*samples_of_screens]], [*samples_of_screens.values()], share_correct)
