"""The pictures: what their colours and places say."""

import numpy as np
import pytest
import torch
from PIL import Image

from data import pictures
from data.prompts import BOS, ID, IMAGE, prompt_batch
from data.study import diagrams
from data.walk import relative_changes
from imagelora import attach
from test_imagelora import tiny_vlm


def test_fine_tuning_changes_only_what_the_picture_of_tensors_shows():
    """Words before the image stay in every layer. In the lowest one, queries stay and so do values of other heads."""
    model = tiny_vlm(vocab_size=len(ID))
    adapter = attach(model, heads={0: [1], 2: [0, 2]})
    for layer in adapter.layers.values():
        torch.nn.init.normal_(layer.B)
    prompt = prompt_batch([{"instruction": "click wifi"}], torch.randn(1, 16, 24), history=1)
    values, queries = relative_changes(model, adapter, prompt)
    assert values.shape == (3, 3, len(prompt["input_ids"][0]))
    assert queries.shape == (3, 6, len(prompt["input_ids"][0]))
    words, image, question = slice(-18), slice(-18, -2), slice(-2, None)
    assert (values[..., words] == 0).all()
    assert (queries[..., words] == 0).all()

    assert (values[0, 1, image] > 0).all()  # head 1 is the selected one
    assert (values[0, [0, 2]] == 0).all()
    assert (values[0, :, question] == 0).all()
    assert (queries[0] == 0).all()

    for above in (values[1:], queries[1:]):
        assert (above[..., image] > 0).all()
        assert (above[..., question] > 0).all()


def test_black_is_exactly_zero_and_the_smallest_change_is_not(tmp_path):
    """In the file, too, whose colours are few."""
    values = torch.rand(4, 6, 70)
    values[:, 3] = 0
    values[:, 4] = 1e-12
    tokens = [BOS, "nina", "has", *[IMAGE] * 64, "click", "wifi", "clock"]
    picture = pictures.changes(values, values, {0: [3]}, tokens, np.full((128, 128, 3), 240, np.uint8))
    pictures.save([picture], tmp_path / "tensors.png")
    drawn = Image.open(tmp_path / "tensors.png").convert("RGB")
    assert drawn.getpixel((800, 349)) == (0, 0, 0)
    assert max(drawn.getpixel((800, 363))) > 100


def test_the_rank_correlation_is_spearmans():
    """Only the order counts, and equal numbers share the mean of their ranks."""
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert diagrams.rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert diagrams.rank_correlation(x, -(x**3)) == pytest.approx(-1)
    assert diagrams.rank_correlation(x, np.array([1.0, 5.0, 5.0, 7.0])) == pytest.approx(4.5 / np.sqrt(5 * 4.5))
