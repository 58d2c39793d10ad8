"""The pictures of the pages can be drawn."""

import re
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import train
from data import prompts

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
from data.study import compare, figures, plan  # noqa: E402

SHOWN = Path(train.__file__).parent / "data/figures"


def test_the_command_draws_the_pictures_of_the_pages(tmp_path, capsys, monkeypatch):
    """Of a short run."""
    monkeypatch.setattr(train, "Config", partial(train.Config, steps=3, test_screens=2))
    monkeypatch.setattr(prompts, "PROBE_BATCHES", 1)
    figures.make_figures(figures.FiguresConfig(out=str(tmp_path), device="cpu"))
    assert re.search("\nlook     the attention of .* grew the most: from", capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in SHOWN.iterdir()}
    assert Image.open(tmp_path / "training.gif").n_frames == 4


def test_the_trade_off_shows_every_method_at_every_gamma():
    panels = figures.draw_trade_off(compare.read_runs()).axes
    assert len(panels) == len(plan.MODELS)
    for panel in panels:
        numbers_of_points = [len(line.get_xdata()) for line in panel.lines]
        assert numbers_of_points.count(len(plan.GAMMAS)) == 2 * len(figures.COLOURS)  # without and with own answers
