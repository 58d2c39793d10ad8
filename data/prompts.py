"""Screens and their questions as token ids: the batches of training, and the prompts of an evaluation.

    <bos> [word problems] <image> x P, a question and its answer; the loss is on the answer only

Shapes:  B sequences · T tokens · N screens · P visual tokens of each · D hidden size
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.questions import ACTIONS, BINS, MAX_NUMBER, PEOPLE, THINGS, VERBS, random_samples, with_hint, word_problem
from data.screens import COLOURS, ICONS, LABELS

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


def image_ids(sample: dict, num_patches: int) -> list[int]:
    """The placeholders of a sample's image, after the hint if one stands before it."""
    return encode(sample.get("before_image", "")) + [ID[IMAGE]] * num_patches


def pack_sequences(samples: list[list[dict]], prefixes: list[list[Turn]], num_patches: int, device="cpu") -> dict:
    """{input_ids, labels} [B, T]: for each screen the turns of its prefix, its image, and its samples as turns."""
    rows_of_ids, rows_of_labels = [], []
    for samples_of_screen, prefix in zip(samples, prefixes):
        image = image_ids(samples_of_screen[0], num_patches)
        turns = [*prefix, (image, [IGNORED] * len(image)), *map(turn, samples_of_screen)]
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
    rows = []
    for sample in samples:
        rows.append(prefix + image_ids(sample, features.shape[1]) + encode(sample["instruction"]))
    ids = pad(rows, ID[PAD], "left").to(features.device)
    return {"input_ids": ids, "attention_mask": (ids != ID[PAD]).long(), "image_features": features}


def training_samples(
    seed: int, index: int, data: tuple, replay_data=None, replay=2, hint="none"
) -> tuple[list[list[dict]], Tensor]:
    """The questions of step number `index`, a list for each of its screens; and the screens' features [B, P, D].

    data: (screens, features [N, P, D]) of the new task. replay_data: a data.replay.ReplayData, or None. replay: how
    many sequences hold other questions in place of the new task, if there is replay. hint: where the correct place
    stands."""
    all_screens, all_features = data
    rng = np.random.default_rng([seed, index])
    picks = rng.choice(len(all_screens), SCREENS_PER_STEP, replace=False)
    features = all_features[picks]
    samples = [random_samples(all_screens[pick], 1, rng, distinct=True) for pick in picks]
    if hint != "none":
        samples = [[with_hint(sample, hint) for sample in samples_of_screen] for samples_of_screen in samples]
    for sequence in range(replay if replay_data else 0):
        pick = rng.integers(len(replay_data.samples))
        of_screen = replay_data.samples[pick]
        features[sequence] = replay_data.features[pick]
        samples[sequence] = [of_screen[rng.integers(len(of_screen))]]
    return samples, features


def training_batch(cfg, data: tuple, index: int, replay_data=None) -> dict:
    """Batch number `index` of a run, the model's arguments: input_ids and labels [B, T], image_features [B, P, D].

    cfg: a train.Config. data, replay_data: see `training_samples`."""
    samples, features = training_samples(cfg.seed, index, data, replay_data, cfg.replay, cfg.hint)
    return batch_after_text(samples, features, index, cfg.text, cfg.text)


def batch_after_text(samples: list[list[dict]], features: Tensor, index: int, num_problems: int, spacing: int) -> dict:
    """The same batch with word problems before each screen: `num_problems` of the `spacing` that are its own. Their
    answers have no labels."""
    prefixes = []
    for number in range(len(samples) * index, len(samples) * (index + 1)):  # of the sequence in the run
        problems = [word_problem("train", number * spacing + k) for k in range(num_problems)]
        prefixes.append([turn(problem, learn=False) for problem in problems])
    batch = pack_sequences(samples, prefixes, features.shape[1], features.device)
    return batch | {"image_features": features}
