"""What the study varies in the demo's runs, and what it measures of a step."""

import re
from dataclasses import replace

import pytest
import torch

from data import questions
from data.command import command
from data.rivals import LoRA
from data.study import costs, variations
from data.study.variations import Config, make_replay, training_batch
from data.test_demo import BASE, IMAGE, PLACE, TRAIN_DATA, VERB, kind_of, read, rows_of
from test_imagelora import EARLY, tiny_vlm


@pytest.mark.parametrize("task, packed", [("grounding", True), ("referring", False), ("referring", True)])
def test_five_questions_may_share_a_sequence_and_places_may_be_given(task, packed):
    batch = training_batch(Config(task=task, packed=packed), TRAIN_DATA, 0)
    num_screens, num_questions = (8, 5) if packed else (16, 1)
    assert len(batch["input_ids"]) == num_screens
    turn = rf" {VERB} \w+(?: \w+)? {PLACE} <eos>"
    if task == "referring":
        turn = rf" what is at {PLACE} (?:\w+ )?\w+ <eos>"
    for row, labels in zip(rows_of(batch), batch["labels"]):
        assert re.fullmatch(rf"<bos>{IMAGE}(?:{turn}){{{num_questions}}}", row), row
        assert read(labels[labels >= 0]).count("<eos>") == num_questions


def test_a_varied_text_is_drawn_anew_for_each_step():
    """From none to `text` word problems stand before all screens of a step."""
    counts = set()
    for index in range(20):
        batch = training_batch(Config(text=3, vary_text=True), TRAIN_DATA, index)
        (count,) = {row.count("how many") for row in rows_of(batch)}
        counts.add(count)
    assert counts == {0, 1, 2, 3}


def replay_of(**fields):
    return make_replay(Config(replay=2, **fields), BASE, TRAIN_DATA)


def instructions(samples: list[list[dict]]) -> list[list[str]]:
    return [[sample["instruction"] for sample in samples_of_screen] for samples_of_screen in samples]


def test_correct_answers_are_to_the_questions_of_own_answers_and_correct_them():
    """So the two differ in who answers, and in nothing else. Of old screens the base model knows nearly everything."""
    correct, own = replay_of(replay_answers="correct"), replay_of()
    assert instructions(correct.samples) == instructions(own.samples)
    assert torch.equal(correct.features, own.features)
    assert correct.share_correct == 1
    old = replay_of(replay_screens="old")
    assert old.share_correct > 0.9
    assert {kind_of(sample) for samples in old.samples for sample in samples} == {*questions.KINDS, "word problem"}

    without = replay_of(replay_answers="correct", replay_no_switch=True)
    to_keep = [[sample for sample in samples if sample["answer"] != "switch"] for samples in correct.samples]
    assert without.samples == to_keep != correct.samples


def test_heads_are_random_or_all_or_named():
    """The random ones are as many in each layer as the most influential ones."""
    cfg = Config(num_heads=6)
    choose = lambda heads: variations.choose_heads(replace(cfg, heads=heads), BASE, TRAIN_DATA)  # noqa: E731
    top, random = choose("top"), choose("random")
    assert [len(heads) for heads in random.values()] == [len(heads) for heads in top.values()]
    assert random != top
    assert choose("all") == {layer: [0, 1, 2, 3, 4, 5] for layer in range(4)}
    assert choose("1.3,2.0,1.1") == {1: [3, 1], 2: [0]}


def test_merged_lora_is_the_same_model():
    model = tiny_vlm()
    lora = LoRA(model, 2, 4)
    for B in lora.B:
        torch.nn.init.normal_(B, std=0.1)
    adapted = model(**EARLY).logits
    lora.merge()
    torch.testing.assert_close(model(**EARLY).logits, adapted)
    with lora.disabled():
        torch.testing.assert_close(model(**EARLY).logits, adapted)
    torch.testing.assert_close(model(**EARLY).logits, adapted)


class OneLayer(torch.nn.Module):
    """GELU between a trained and a frozen projection, and two trained projections that read the same input."""

    def __init__(self):
        super().__init__()
        self.A = torch.nn.Linear(6, 2, bias=False)
        self.A2 = torch.nn.Linear(6, 4, bias=False)
        self.frozen = torch.nn.Linear(2, 4, bias=False).requires_grad_(False)

    def forward(self, x):
        return self.frozen(torch.nn.functional.gelu(self.A(x))) + self.A2(x)


def test_saved_bytes_count_each_storage_once_and_no_weight():
    """Both trained projections save x [5, 6], and GELU saves its input [5, 2]; the frozen one needs only its weight."""
    x = torch.randn(5, 6)
    assert costs.saved_bytes(OneLayer(), {"x": x}) == (5 * 6 + 5 * 2) * x.element_size()
    assert costs.saved_bytes(OneLayer().bfloat16(), {"x": x.bfloat16()}) == (5 * 6 + 5 * 2) * 2
    assert costs.saved_bytes(OneLayer().requires_grad_(False), {"x": x}) == 0


def test_the_command_measures_what_a_step_costs_beside_the_arithmetic(monkeypatch, capsys):
    """Image-LoRA in the upper half of the layers saves less than in all of them, and LoRA on q, k, v and o more."""
    monkeypatch.setattr(costs, "SMALL", replace(costs.SMALL, hidden_size=64, vocab_size=50))
    costs.main(costs.CostsConfig(device="cpu"), limit=0)
    printed = capsys.readouterr().out
    assert "visual tokens only" in printed
    ratios = {}
    for name, *numbers in re.findall(r"^(.*LoRA in .*layers) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.M):
        ratios[name.strip()] = [float(number) for number in numbers]
    assert ratios.pop("Image-LoRA in all layers") == [1, 1, 1]
    flops, _, saved = ratios["Image-LoRA in the upper half of the layers"]
    assert 0.5 < flops < 0.9
    assert 0.4 < saved < 0.6
    flops, _, saved = ratios["LoRA in all layers"]
    assert flops > 1
    assert saved > 1


def test_costs_on_an_unknown_device_are_one_sentence(capsys):
    assert command(costs.CostsConfig, costs.main, "", ["--device=abacus"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"error: there is no device abacus here; [^\n]+\n", printed.err)
