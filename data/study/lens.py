"""For pretrain.py and smollm.py: features learn to show what is in a patch, read as words through a logit lens.

Shapes:  N screens · P patches of a screen · D features · V words of a list
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from data.questions import BIN, BINS, centre_bins
from data.screens import COLOURS, ICONS, LABELS, SIZE, Screen

# What a patch should decode to: what it shows, its colour, and the x and y of the element's centre.
LENS = [(*LABELS, *ICONS, "switch"), COLOURS]
LENS += [tuple(f"<{axis}{i}>" for i in range(BINS)) for axis in "xy"]


def patch_targets(screen: Screen, patch_size: int, places: bool) -> np.ndarray:
    """[P, 8]: what each patch should show, as indices into the four lists of LENS, then the edges of its element's box.

    -1 where there is no target. A patch shows an element if they overlap by half of the patch or of the element.
    places: whether there are targets for the place, too."""
    starts = np.arange(0, SIZE, patch_size)
    targets = np.full((len(starts), len(starts), 8), -1.0, dtype=np.float32)
    for element in screen.elements:
        left, top, right, bottom = element.bbox
        target = [LENS[0].index(element.name), -1]
        if element.colour:
            target[1] = LENS[1].index(element.colour)
        if places:
            target += centre_bins(element.bbox)
            target += [edge / BIN for edge in element.bbox]
        width = np.minimum(right, starts + patch_size) - np.maximum(left, starts)  # of its part in each column
        height = np.minimum(bottom, starts + patch_size) - np.maximum(top, starts)
        overlap = np.outer(height.clip(0), width.clip(0))
        area = (right - left) * (bottom - top)
        is_shown = 2 * overlap >= min(area, patch_size**2)
        targets[is_shown, : len(target)] = target
    return targets.reshape(-1, 8)


def lens_loss(features: Tensor, targets: Tensor, words: list[Tensor], log_scale: Tensor) -> Tensor:
    """The cross-entropy of reading patches as words, by products with the words' embeddings. features: [N, P, D].

    words: the embeddings of k lists of words, each [V, D]. targets [N, P, k]: an index into each list, or -1."""
    loss = 0
    for embeddings, target in zip(words, targets.unbind(-1)):
        has_target = target >= 0  # [N, P]
        logits = log_scale.exp() * features[has_target] @ embeddings.T
        loss = loss + F.cross_entropy(logits, target[has_target].long())
    return loss
