"""Which value heads a run adapts: train.Config.heads, and what it means for a model."""

import re

import numpy as np
import torch
from torch import Tensor

from imagelora import Heads, attach, select_heads


def check_heads(model, choice: str, count: int, r: int) -> None:
    """ValueError unless the model has these heads and can have this rank. It is better to fail before measuring."""
    scores = torch.ones(model.config.num_hidden_layers, model.config.num_key_value_heads)  # any will do
    attach(model, r, heads=choose_heads(choice, scores, count, seed=0)).detach()


def choose_heads(choice: str, scores: Tensor, count: int, seed: int) -> Heads:
    """`count` value heads by their scores [L, H], or those of a list. ValueError unless the choice is as in
    train.Config.heads."""
    if not re.fullmatch(r"top|random|all|\d+\.\d+(,\d+\.\d+)*", choice):
        raise ValueError(f"heads must be top, random, all or a list such as 1.3,2.0, got {choice!r}")
    num_layers, heads_in_layer = scores.shape
    if choice == "all":
        return {layer: list(range(heads_in_layer)) for layer in range(num_layers)}
    selected = {}
    if "." in choice:
        for item in choice.split(","):
            layer, head = map(int, item.split("."))
            selected.setdefault(layer, []).append(head)
        return selected
    rng = np.random.default_rng(seed)
    for layer, heads in select_heads(scores, count).items():
        if choice == "random":
            heads = rng.permutation(heads_in_layer)[: len(heads)].tolist()
        selected[layer] = sorted(heads)
    return selected
