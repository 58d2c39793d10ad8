"""Screens and their questions as token ids: the batches of training, and the prompts of an evaluation.

    <bos> [word problems] <image> x P, a question and its answer; the loss is on the answer only

Shapes:  B sequences · T tokens · N screens · P visual tokens of each · D hidden size
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.questions import ACTIONS, BINS, MAX_NUMBER, PEOPLE, THINGS, VERBS, random_samples, with_hint, word_problem
from data.screens import COLOURS, ICONS, LABELS, Screen

PROBE_BATCHES = 16  # that the probe sees; it draws a new A for each, so more batches mean less noise
TRAIN_SCREENS = 2048  # a run draws its batches from at most this many
SCREENS_PER_STEP = 16  # sequences of a training step, each with one question about a screen
IGNORED = -100  # the label of a token that is not to be predicted

# Every word of the questions and answers is a token.
PAD, BOS, EOS, IMAGE = "<pad>", "<bos>", "<eos>", "<image>"
_WORDS = [PAD, BOS, EOS, IMAGE, "?", *(f"<{axis}{i}>" for axis in "xy" for i in range(BINS))]
_WORDS += [*LABELS, *ICONS, *COLOURS, "switch", *VERBS, *"what is at right of has then how many".split()]
_WORDS += [*PEOPLE, *THINGS]
_WORDS += dict.fromkeys(word for sentence, _ in ACTIONS for word in sentence.split() if word != "{}")
VOCABULARY = (*_WORDS, *map(str, range(MAX_NUMBER + 1)))
ID = {word: i for i, word in enumerate(VOCABULARY)}
Turn = tuple[list[int], list[int]]  # ids and labels of an instruction and its answer


def encode(text: str) -> list[int]:
    """Token ids of space-separated words. KeyError names a word that is not in the vocabulary."""
    return [ID[word] for word in text.split()]


def decode(ids: list[int]) -> str:
    """The words of token ids, up to the first <eos>."""
    words = [VOCABULARY[i] for i in ids]
    return " ".join(words[: words.index(EOS)] if EOS in words else words)


def turn(sample: dict, learn=True) -> Turn:
    """An instruction and its answer, ended by <eos>. learn: whether the answer has labels."""
    instruction = encode(sample["instruction"])
    answer = encode(f"{sample['answer']} {EOS}")
    labels = [IGNORED] * len(instruction)
    labels += answer if learn else [IGNORED] * len(answer)
    return instruction + answer, labels


def pad(rows: list, value: int, side="right") -> Tensor:
    """Rows of different lengths -> [B, T]."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def pack_sequences(samples: list[list[dict]], prefixes: list[list[Turn]], num_patches: int, device="cpu") -> dict:
    """{input_ids, labels} [B, T]: for each screen the turns of its prefix, its image, and its samples as turns."""
    image = [ID[IMAGE]] * num_patches, [IGNORED] * num_patches
    rows_of_ids, rows_of_labels = [], []
    for samples_of_screen, prefix in zip(samples, prefixes):
        turns = [*prefix, image, *map(turn, samples_of_screen)]
        rows_of_ids.append([ID[BOS]] + [i for ids, _ in turns for i in ids])
        rows_of_labels.append([IGNORED] + [label for _, labels in turns for label in labels])
    return {
        "input_ids": pad(rows_of_ids, ID[PAD]).to(device),
        "labels": pad(rows_of_labels, IGNORED).to(device),
    }


def prompt_batch(samples: list[dict], features: Tensor, num_problems=0) -> dict:
    """The model's arguments for samples, each after word problems and its image: features [B, P or 0, D]."""
    prefix = [ID[BOS]]
    for i in range(num_problems):
        ids, _ = turn(word_problem("validation", i))
        prefix += ids
    prefix += [ID[IMAGE]] * features.shape[1]
    rows = [prefix + encode(sample["instruction"]) for sample in samples]
    ids = pad(rows, ID[PAD], "left").to(features.device)
    return {"input_ids": ids, "attention_mask": (ids != ID[PAD]).long(), "image_features": features}


def random_click(screen: Screen, rng) -> dict:
    """The new task's question about a random switch of a screen."""
    (sample,) = random_samples(screen, 1, rng, distinct=True)
    return sample


def training_samples(
    seed: int, index: int, data: tuple, replay_data=None, replay=2, hint="none", sample_of=random_click
) -> tuple[list[list[dict]], Tensor]:
    """The questions of step number `index`, a list of one for each of its screens; and the features [B, P, D] of these.

    data: (screens, features [N, P, D]) of the new task. sample_of: a function of a screen and a random generator that
    makes the new task's question. hint: "question" puts the correct place in front of it. replay: in how many sequences
    the question is one of replay_data instead, a data.replay.ReplayData or None."""
    screens, features_of_screens = data
    rng = np.random.default_rng([seed, index])
    picks = rng.choice(len(screens), SCREENS_PER_STEP, replace=False)
    features = features_of_screens[picks]
    samples = [sample_of(screens[pick], rng) for pick in picks]
    if hint == "question":
        samples = [with_hint(sample) for sample in samples]
    for sequence in range(replay if replay_data else 0):
        pick = rng.integers(len(replay_data.samples))
        about_screen = replay_data.samples[pick]
        features[sequence] = replay_data.features[pick]
        samples[sequence] = about_screen[rng.integers(len(about_screen))]
    return [[sample] for sample in samples], features


def training_batch(cfg, data: tuple, index: int, replay_data=None, sample_of=random_click) -> dict:
    """Batch number `index` of a run, the model's arguments: input_ids and labels [B, T], image_features [B, P, D].

    cfg: a train.Config. data, replay_data, sample_of: see `training_samples`."""
    samples, features = training_samples(cfg.seed, index, data, replay_data, cfg.replay, cfg.hint, sample_of)

    # Word problems stand before each screen. Their answers have no labels.
    num_problems = cfg.text
    if cfg.vary_text:
        num_problems = np.random.default_rng([cfg.seed, index, 1]).integers(cfg.text, endpoint=True)
    prefixes = []
    for number in range(len(samples) * index, len(samples) * (index + 1)):  # of the sequence in the run
        problems = [word_problem("train", number * cfg.text + k) for k in range(num_problems)]
        prefixes.append([turn(problem, learn=False) for problem in problems])

    batch = pack_sequences(samples, prefixes, features.shape[1], features.device)
    return batch | {"image_features": features}
