"""Replay: some sequences of a step hold other questions than the new task's, so that a model keeps what it knew.

old      questions about screens without switches, with true answers
new      questions about the new screens, with true answers
own      the same questions about the new screens, with the base model's own answers: Learning without Forgetting (arXiv
         1606.09282). It needs no old screens and no labels
own_old  the base model's own answers about screens without switches
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from data.base import screens_and_features
from data.evaluate import MAX_NEW_TOKENS, generate_answers, is_correct
from data.prompts import QUESTIONS_PER_SCREEN
from data.questions import KINDS, TASKS, random_sample
from data.screens import Screen


class ReplayData(NamedTuple):
    screens: list[Screen]
    features: Tensor  # of the screens, [N, P, D]
    samples: list[list[dict]] | None = None  # about each screen; None: questions of all kinds are drawn for each step
    share_correct: float | None = None  # of the base model's own answers


def make_replay_data(
    model, new_data: tuple, replay_with: str, seed: int, task="grounding", generate=generate_answers
) -> ReplayData:
    """The screens of replay and, unless they are drawn for each step, the samples about each screen.

    replay_with: old, new, own or own_old, see above. All but old are about a quarter of the screens, because the model
    takes time to answer. new_data: (screens, features [N, P, D]) of the new task, which is one of TASKS. generate: what
    replaces `generate_answers`, for a model of another kind."""
    screens, features = new_data
    if replay_with in ("old", "own_old"):
        screens, features = screens_and_features(model, "old", "train", len(screens))
    if replay_with == "old":
        return ReplayData(screens, features)
    # In the new task's own words, the base model would teach the old meaning.
    kinds = tuple(kind for kind in KINDS if kind != TASKS[task])
    count = len(screens) // 4
    screens, features = screens[:count], features[:count]
    rng = np.random.default_rng(seed)
    numbers, samples = [], []  # the screen of each question, and the question with its true answer
    for i, screen in enumerate(screens):
        for _ in range(QUESTIONS_PER_SCREEN):
            sample = random_sample(screen, str(rng.choice(kinds)), rng)
            if sample:  # on some screens there is nothing right of any name
                numbers.append(i)
                samples.append(sample)
    texts = [sample["answer"] for sample in samples]
    share_correct = None
    if replay_with != "new":
        texts = generate(model, samples, features[numbers])
        share_correct = float(np.mean([is_correct(sample, text) for sample, text in zip(samples, texts)]))
    samples_of_screens = [[] for _ in screens]
    for i, sample, text in zip(numbers, samples, texts):
        # An answer that was cut off would teach to stop in the middle.
        if 0 < len(text.split()) < MAX_NEW_TOKENS:
            samples_of_screens[i].append(sample | {"answer": text})
    return ReplayData(screens, features, samples_of_screens, share_correct)
