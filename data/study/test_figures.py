"""The pictures of the pages can be drawn, and show what they say."""

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from data import prompts

pd = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
from data.study import figures  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(train.__file__).parent


def test_the_command_draws_the_pictures_of_the_pages(tmp_path, monkeypatch):
    """Of a short run."""
    monkeypatch.setattr(train, "Config", partial(train.Config, steps=3, test_screens=2))
    monkeypatch.setattr(prompts, "PROBE_BATCHES", 1)
    figures.make_figures(figures.FiguresConfig(out=str(tmp_path), device="cpu"))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "data/figures").iterdir()}
    assert Image.open(tmp_path / "training.gif").n_frames == 4  # before training, and after each step


def test_a_thick_line_is_the_mean_and_a_thin_one_is_a_seed():
    """A method without rows has none."""
    rows = []
    for seed, gamma in product((1, 2, 3), (1.0, 0.5)):
        rows.append(("LoRA", seed, gamma, 90 + seed, 50 * gamma + seed))
    runs = pd.DataFrame(rows, columns=["method", "seed", "gamma", "hit", "kept"])
    _, ax = figures.plt.subplots()
    figures.draw_curves(ax, runs, "hit", "kept", "gamma", "seed")
    *thin, thick, ring = [line.get_xydata().tolist() for line in ax.lines]
    assert thin == [[[90 + seed, 25 + seed], [90 + seed, 50 + seed]] for seed in (1, 2, 3)]
    assert ring == [[92, 52]]
    assert thick == [[92, 27], [92, 52]]
