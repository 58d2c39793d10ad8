"""Screens and their questions as token ids: the batches of training, and the prompts of an evaluation.

    <bos> [word problems] <image> x P, then questions with their answers; the loss is on answers only

Shapes:  B sequences · T tokens · N screens · P visual tokens a screen · D hidden size
"""

from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.screens import Screen, ask, draw_screen
from data.words import BOS, EOS, ID, IMAGE, PAD, encode, word_problem
from tiny_vlm import TinyVLM

ROOT = Path(__file__).parent.parent
PROBE_BATCHES = 16  # of training data; each has its own random A, so the more, the less noise
TRAIN_SCREENS = 2048
SCREENS, QUESTIONS = 8, 5  # screens of a training step, and questions about each, packed into one sequence
REPLAYED = 3  # word problems in place of these, in sequences of replay
CHUNK = 256  # screens or prompts at a time, where nothing is learned
Turn = list[tuple[int, int]]  # (id, label) of each word of an instruction and its answer; -100: not to be predicted


def turn(sample: dict, learn=True) -> Turn:
    words = [(word, -100) for word in encode(sample["instruction"])]
    for word in encode(f"{sample['answer']} {EOS}"):
        words.append((word, word if learn else -100))
    return words


def pad(rows: list, value: int, side="right") -> Tensor:
    """Rows of different lengths -> [B, T]."""
    return pad_sequence([*map(torch.tensor, rows)], batch_first=True, padding_value=value, padding_side=side)


def training_batch(asked: list, patches: int, before: list[list[Turn]], device="cpu") -> dict:
    """{input_ids, labels} [B, T] of a sequence a screen: the turns `before` it, its image, the samples `asked`."""
    rows = []
    for samples, told in zip(asked, before):
        row = [(ID[BOS], -100)]
        row += chain(*told)
        row += [(ID[IMAGE], -100)] * patches
        row += chain(*map(turn, samples))
        rows.append(row)
    ids, labels = pad(rows, -100).to(device).unbind(-1)
    return {"input_ids": ids.where(ids >= 0, ID[PAD]), "labels": labels}


def questions(samples: list[dict], features: Tensor, history=0) -> dict:
    """The model's arguments for samples, each after `history` word problems and its image: features [B, P or 0, D]."""
    before = [ID[BOS]]
    for i in range(history):
        before += [word for word, _ in turn(word_problem("validation", i))]
    before += [ID[IMAGE]] * features.shape[1]
    rows = [before + encode(sample["instruction"]) for sample in samples]
    ids = pad(rows, ID[PAD], "left").to(features.device)
    mask = (ids != ID[PAD]).long()
    return {"input_ids": ids, "attention_mask": mask, "image_features": features}


def available(device: str) -> str:
    """The device; of "auto" the accelerator, if there is one. ValueError where it is not available."""
    found = torch.accelerator.current_accelerator(check_available=True)
    there = [found.type, "cpu"] if found else ["cpu"]
    if device not in ("auto", *there):
        raise ValueError(f"device {device} is not available here; expected one of {', '.join(there)}")
    return there[0] if device == "auto" else device


def load_base(base: str, device="cpu") -> TinyVLM:
    """The model in a file, by its path from here or from the project's directory."""
    own = ROOT / base
    path = own if own.exists() and not Path(base).exists() else base
    return TinyVLM.from_pretrained(path).to(device)


def pixels(drawn: list[Screen]) -> Tensor:
    """pixel_values [N, 3, side, side] in 0..1."""
    images = torch.from_numpy(np.stack([screen.image for screen in drawn]))
    return images.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def image_features(encode, drawn: list[Screen], device="cpu") -> Tensor:
    """What a vision encoder makes of screens, [N, P, D]. It is frozen in fine-tuning, so once is enough."""
    features = []
    for i in range(0, len(drawn), CHUNK):
        some = pixels(drawn[i : i + CHUNK])
        features.append(encode(some.to(device)))
    return torch.cat(features)


@lru_cache(16)  # so many that runs on three bases in turn find theirs again
def seen(base: str, domain: str, split: str, count: int, device, erased=False):
    """(The first screens of a split, what the base's frozen vision encoder makes of them [N, P, D])."""
    drawn = [draw_screen(domain, split, i, erased=erased) for i in range(count)]
    return drawn, image_features(load_base(base, device).get_image_features, drawn, device)


def training_data(cfg, device):
    """The screens that a run draws its batches from, as `seen`."""
    count = min((PROBE_BATCHES + cfg.steps) * SCREENS, TRAIN_SCREENS)
    return seen(cfg.base, cfg.domain, "train", count, device)


def batch_of(cfg, data: tuple, i: int):
    """(The arguments of the model, the boxes asked for) of batch number i; the probe takes the first ones.

    It holds no pixels: image_features are what the frozen vision encoder has made of its screens, once for all."""
    drawn, features = data
    rng = np.random.default_rng([cfg.seed, i])
    picks = rng.choice(len(drawn), SCREENS, replace=False)
    before = []
    for sequence in range(SCREENS * i, SCREENS * (i + 1)):
        problems = [word_problem("train", sequence * cfg.history + k) for k in range(cfg.history)]
        before.append([turn(problem, learn=False) for problem in problems])
    refer = float(cfg.task == "referring")
    asked = [ask(drawn[pick], QUESTIONS, rng, refer, distinct=True) for pick in picks]
    for sequence in range(cfg.replay if i >= PROBE_BATCHES else 0):  # the probe's heads are those without replay
        asked[sequence] = [word_problem("train", int(rng.integers(10**9))) for _ in range(REPLAYED)]
    batch = training_batch(asked, features.shape[1], before, features.device)
    batch["image_features"] = features[picks]
    return batch, [sample.get("bbox") for sample in chain(*asked)]
