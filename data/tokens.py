"""The vocabulary: text -> token ids -> text. Every word of the questions and answers is a token."""

from data.questions import ACTIONS, BINS, MAX_NUMBER, PEOPLE, THINGS, VERBS
from data.screens import COLOURS, ICONS, LABELS

PAD, BOS, EOS, IMAGE = "<pad>", "<bos>", "<eos>", "<image>"
_WORDS = [PAD, BOS, EOS, IMAGE, "?", *(f"<{axis}{i}>" for axis in "xy" for i in range(BINS))]
_WORDS += [*LABELS, *ICONS, *COLOURS, "switch", *VERBS, *"what is at right of has then how many".split()]
_WORDS += [*PEOPLE, *THINGS]
_WORDS += dict.fromkeys(word for sentence, _ in ACTIONS for word in sentence.split() if word != "{}")
VOCABULARY = (*_WORDS, *map(str, range(MAX_NUMBER + 1)))
ID = {word: i for i, word in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    """Token ids of space-separated words. KeyError names a word that is not in the vocabulary."""
    return [ID[word] for word in text.split()]


def decode(ids: list[int]) -> str:
    """The words of token ids, up to the first <eos>."""
    words = [VOCABULARY[i] for i in ids]
    return " ".join(words[: words.index(EOS)] if EOS in words else words)
