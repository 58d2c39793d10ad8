"""The pictures of the pages can be drawn, and show what they say."""

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image

import imagelora
import train
from data import evaluate, prompts
from data.base import load_base, screens_and_features

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


def test_a_patch_matters_as_much_as_leaving_its_row_out_of_M_changes_the_answer(monkeypatch):
    model = load_base("data/tiny_vlm.pt")
    screens, features = screens_and_features(model, "new", "test", 1)
    _, (answer, *_) = evaluate.evaluate(model, screens, features)
    adapter = imagelora.attach(model)
    for value_adapter in adapter.layers.values():
        torch.nn.init.normal_(value_adapter.B, std=0.1)
    falls, rises = figures.patch_effects(train.FinetuningRun({}, model, adapter, [answer], [answer]), answer)
    assert falls.shape == rises.shape == (64,)

    sample = answer.sample
    prompt = prompts.prompt_batch([{"instruction": f"{sample['instruction']} {sample['answer']}"}], features)
    x, y = prompt["input_ids"][0, -2:]

    def log_probability() -> torch.Tensor:
        logits = model(**prompt).logits[0].log_softmax(-1)
        return logits[-3, x] + logits[-2, y]

    before = log_probability()
    visual_rows = imagelora.visual_rows
    monkeypatch.setattr(imagelora, "visual_rows", lambda *args: visual_rows(*args)[torch.arange(64) != 5])
    torch.testing.assert_close(before - log_probability(), falls[5], atol=1e-4, rtol=1e-4)
