"""A word-level tokenizer: every word of data/ is a token, and so is every coordinate bin of each axis."""

from data.screens import BIN, BINS, COLOURS, ICONS, LABELS, VERBS
from data.word_problems import MAX_NUMBER, NAMES, STEPS, THINGS

PAD, BOS, EOS, IMAGE, ASK = "<pad>", "<bos>", "<eos>", "<image>", "?"
_WORDS = [PAD, BOS, EOS, IMAGE, ASK]
_WORDS += [f"<x{i}>" for i in range(BINS)] + [f"<y{i}>" for i in range(BINS)]
_WORDS += [*LABELS, *ICONS, *COLOURS, "switch", *VERBS, "what", "is", "at", "has", "then", "how", "many"]
_WORDS += [*NAMES, *THINGS, *dict.fromkeys(w for step in STEPS for w in step.split() if w != "{}")]
_WORDS += [str(n) for n in range(MAX_NUMBER + 1)]
VOCABULARY = tuple(_WORDS)
ID = {word: i for i, word in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    """Token ids of space-separated words. Raises ValueError naming a word that is not in the vocabulary."""
    try:
        return [ID[word] for word in text.split()]
    except KeyError as error:
        raise ValueError(f"unknown word {error.args[0]!r}; the tokenizer knows {len(VOCABULARY)} words") from None


def decode(ids: list[int]) -> str:
    """The words of token ids, up to the first <eos>."""
    words = [VOCABULARY[i] for i in ids]
    return " ".join(words[: words.index(EOS)] if EOS in words else words)


def parse_point(answer: str) -> tuple[float, float] | None:
    """'<x3> <y5>' -> that point in pixels, the centre of its bins; None where an answer is no point."""
    words = answer.split()
    if len(words) != 2 or words[0][:2] != "<x" or words[1][:2] != "<y":
        return None
    return (int(words[0][2:-1]) + 0.5) * BIN, (int(words[1][2:-1]) + 0.5) * BIN
