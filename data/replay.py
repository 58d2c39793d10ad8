"""Replay: some sequences of a step hold other questions than the new task's, so that a model keeps what it knew.

old      old questions about screens without switches, with true answers
own      questions about the new screens, with the base model's own answers: Learning without Forgetting (arXiv
         1606.09282). It needs no old screens and no labels
own_old  the base model's own answers about screens without switches
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from data.base import screens_and_features
from data.evaluate import MAX_NEW_TOKENS, generate_answers
from data.prompts import QUESTIONS_PER_SCREEN
from data.questions import KINDS, TASKS, random_question
from data.screens import Screen


class ReplayData(NamedTuple):
    """What sequences of replay are made of."""

    screens: list[Screen]
    features: Tensor  # of the screens, [N, P, D]
    kinds: tuple[str, ...]  # of questions, see KINDS
    own_answers: list[list[dict]] | None  # the base model's, as samples about each screen; None: true answers


def make_replay_data(
    model, new_data: tuple, replay_with: str, seed: int, task="grounding", generate=generate_answers
) -> ReplayData:
    """The screens of replay, the kinds of questions about them and, if they are replayed, the base model's own answers.

    replay_with: old, own or own_old, see above. Own answers are about a quarter of the screens, because they take time.
    new_data: (screens, features [N, P, D]) of the new task, which is one of TASKS. generate: replaces
    `generate_answers` for a model of another kind."""
    screens, features = new_data
    if replay_with != "own":
        screens, features = screens_and_features(model, "source", "train", len(screens))
    if replay_with == "old":
        return ReplayData(screens, features, KINDS, None)
    # In the new task's own words, the base model would teach the old meaning.
    kinds = tuple(kind for kind in KINDS if kind != TASKS[task])
    count = len(screens) // 4
    screens, features = screens[:count], features[:count]
    return ReplayData(screens, features, kinds, own_answers(model, screens, features, kinds, seed, generate))


def own_answers(
    model, screens: list[Screen], features: Tensor, kinds: tuple[str, ...], seed: int, generate
) -> list[list[dict]]:
    """The model's own greedy answers to five random questions of these kinds about each screen, as samples."""
    rng = np.random.default_rng(seed)
    numbers, samples = [], []
    for i, screen in enumerate(screens):
        for _ in range(QUESTIONS_PER_SCREEN):
            numbers.append(i)
            samples.append({"instruction": random_question(screen, str(rng.choice(kinds)), rng)})
    samples_of_screens = [[] for _ in screens]
    for i, sample, answer in zip(numbers, samples, generate(model, samples, features[numbers])):
        # An answer that was cut off would teach to stop in the middle.
        if 0 < len(answer.split()) < MAX_NEW_TOKENS:
            samples_of_screens[i].append(sample | {"answer": answer})
    return samples_of_screens
