"""Synthetic screens, word problems and the tokenizer; everything is reproducible from (domain, split, index, seed)."""

SPLITS = ("train", "validation", "test")


def split_id(split: str) -> int:
    """Position of `split` in SPLITS: part of every sample's random seed, so that no two splits share a sample."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    return SPLITS.index(split)
