"""A word-level tokenizer: every word of data/ is a token, and so is every coordinate bin of each axis."""

import re

from data.screens import BIN, BINS, COLOURS, ICONS, LABELS, VERBS
from data.word_problems import MAX_NUMBER, NAMES, STEPS, THINGS

PAD, BOS, EOS, IMAGE = "<pad>", "<bos>", "<eos>", "<image>"
_WORDS = [PAD, BOS, EOS, IMAGE, "?", *(f"<{axis}{i}>" for axis in "xy" for i in range(BINS))]
_WORDS += [*LABELS, *ICONS, *COLOURS, "switch", *VERBS, *"what is at right of has then how many".split()]
_WORDS += [*NAMES, *THINGS, *dict.fromkeys(w for step in STEPS for w in step.split() if w != "{}")]
VOCABULARY = (*_WORDS, *map(str, range(MAX_NUMBER + 1)))
ID = {word: i for i, word in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    """Token ids of space-separated words. KeyError names a word that is not in the vocabulary."""
    return [ID[word] for word in text.split()]


def decode(ids: list[int]) -> str:
    """The words of token ids, up to the first <eos>."""
    words = [VOCABULARY[i] for i in ids]
    return " ".join(words[: words.index(EOS)] if EOS in words else words)


def parse_point(answer: str) -> tuple[float, float] | None:
    """'<x3> <y5>' -> that point in pixels, the centre of its bins; None where an answer is no point."""
    bins = re.fullmatch(r"<x(\d+)> <y(\d+)>", answer)
    return bins and tuple((int(i) + 0.5) * BIN for i in bins.groups())
