"""The demo: the model and its base, the tiny world, and what the commands print and write."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import evaluate, prompts, screens, walk, words
from data.base import image_features, load_base, screens_and_features
from data.baselines import choose_heads
from data.screens import DOMAINS, SPLITS, Element, Screen, draw_screen, is_hit
from imagelora import load
from test_imagelora import EARLY, TEXT, tiny_vlm
from tiny_vlm import TinyVLM

ROOT = Path(train.__file__).parent


def save(model: TinyVLM, path: Path) -> None:
    torch.save({"config": asdict(model.config), "state": model.state_dict()}, path)


def read(ids: torch.Tensor) -> str:
    """The words of token ids."""
    return " ".join(words.VOCABULARY[token] for token in ids)


# 1. The model
def test_query_heads_of_a_group_share_a_value_head():
    """A model of grouped heads is the model with as many value heads as query heads whose values are repeated."""
    grouped = tiny_vlm()
    ungrouped = tiny_vlm(num_key_value_heads=6)
    state = grouped.state_dict()
    for name in state:
        if re.search(r"language.*[kv]_proj", name):
            heads = state[name].unflatten(0, (3, 4))
            state[name] = heads.repeat_interleave(2, 0).flatten(0, 1)
    ungrouped.load_state_dict(state)
    torch.testing.assert_close(ungrouped(**EARLY).logits, grouped(**EARLY).logits)


def test_a_placeholder_is_never_an_answer():
    """Where all logits are equal the answer is the first token, unless that is the image's placeholder."""
    model = tiny_vlm(image_token_id=0)
    model.language_model.norm.weight.data.zero_()
    answer = model.generate(torch.tensor([TEXT]), max_new_tokens=3)[0, len(TEXT) :]
    assert answer.tolist() == [1, 1, 1]


def test_the_shipped_base_is_what_its_record_says():
    """It can click, name and relate on source screens, and clicks no switch."""
    record = json.loads((ROOT / "data/tiny_vlm.json").read_text())
    assert record["source"]["action_acc"] >= 0.99
    assert record["source"]["name_acc"] >= 0.97
    assert record["source"]["relation_acc"] >= 0.94
    assert record["word_problem_acc"] >= 0.99
    assert record["word_problem_after_image_acc"] >= 0.99
    assert record["switches"]["action_acc"] <= 0.02

    model = load_base("data/tiny_vlm.pt")
    some_screens = [draw_screen("source", "test", i) for i in range(12)]
    features = image_features(model.get_image_features, some_screens)
    for task, metric in (("referring", "name_acc"), ("relations", "relation_acc"), ("grounding", "action_acc")):
        metrics, _ = evaluate.evaluate(model, some_screens, features, task)
        assert metrics[metric] == pytest.approx(record["source"][metric], abs=0.12), metric
    assert evaluate.evaluate_word_problems(model, features[:, :0], count=32) > 0.95
    assert evaluate.evaluate_word_problems(model, features, count=32) > 0.95


# 2. The world: screens, words, prompts
@pytest.mark.parametrize("domain", DOMAINS)
def test_a_screen_is_a_function_of_domain_split_index_and_seed(domain):
    """So no two splits share one."""
    places = [(domain, split, index, seed) for split in SPLITS for index in range(6) for seed in range(2)]
    images = {draw_screen(*place).image.tobytes() for place in places}
    assert len(images) == len(places)
    assert draw_screen(*places[7]).image.tobytes() in images


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_instruction_names_exactly_one_element_and_its_answer_is_a_hit(domain):
    rng = np.random.default_rng(0)
    for index in range(12):
        screen = draw_screen(domain, "train", index)
        targets = screen.targets()
        for target in targets:
            instruction = screens.referring_sample(target)["instruction"]
            point = words.parse_point(instruction.removeprefix("what is at "))
            assert [other for other in targets if is_hit(point, other.click)] == [target]
            for by_colour in (False, True):
                sample = screens.grounding_sample(screen, target, rng, by_colour)
                _, *named = sample["instruction"].split()
                assert [other for other in targets if {*named} <= {other.name, other.colour}] == [target]
                assert sample["bbox"] == target.click
                assert is_hit(words.parse_point(sample["answer"]), target.click)


def test_right_and_bottom_edges_of_a_box_are_outside():
    box = (2, 3, 5, 7)
    assert is_hit((2, 3), box)
    assert not is_hit((5, 3), box)
    assert not is_hit((2, 7), box)
    assert not is_hit(None, box)


def test_a_switch_is_right_of_its_name_and_erasing_it_changes_nothing_else():
    """So what the erased screens show is due to the switch."""
    for index in range(20):
        screen = draw_screen("switches", "test", index)
        erased = draw_screen("switches", "test", index, erased=True)
        assert erased.targets() == screen.targets() == list(erased.elements)
        changed = (screen.image != erased.image).any(-1)
        for element in screen.elements:
            left, top, right, bottom = element.bbox
            assert changed[top:bottom, left:right].any() == (element.name == "switch")
            if element.name != "switch":
                assert element.click[0] - right >= screens.GAP
            changed[top:bottom, left:right] = False
        assert not changed.any()


def test_what_is_right_of_a_name_begins_there_and_shares_half_the_lower_ones_height():
    boxes = {"a": (0, 0, 9, 9), "b": (9, 4, 20, 30), "c": (21, 5, 30, 15), "d": (60, 0, 70, 9), "e": (8, 0, 12, 9)}
    elements = tuple(Element(name, "", box, box) for name, box in boxes.items())
    samples = screens.relation_samples(Screen(np.zeros(0), elements))
    assert [sample["instruction"] for sample in samples] == [f"what is right of {name}" for name in "abe"]
    assert [sample["answer"] for sample in samples] == ["b", "c", "d"]


def test_word_problems_of_the_test_are_new_sentence_pairs_and_new_numbers():
    """So nobody can answer them from memory."""
    sentences = {}
    numbers = {}
    for split in SPLITS:
        stories = [words.word_problem(split, i)["instruction"].partition(" has ")[2] for i in range(600)]
        sentences[split] = {re.sub(r"\d+", "", story.partition(" then ")[2]) for story in stories}
        triples = [tuple(re.findall(r"\d+", story)) for story in stories]
        numbers[split] = {triple for triple in triples if len(triple) == 3}  # one that doubles has two
    for split in SPLITS:
        if split != "test":
            assert not sentences["test"] & sentences[split]
            assert not numbers["test"] & numbers[split]
    assert sentences["test"]
    assert numbers["test"]


@pytest.mark.parametrize("refer", [0.0, 1.0])
def test_a_training_batch_has_labels_on_answers_only_and_no_target_twice(refer):
    rng = np.random.default_rng(0)
    some_screens = [draw_screen("source", "train", i) for i in range(8)]
    samples = [screens.random_samples(screen, 5, rng, refer, distinct=True) for screen in some_screens]
    batch = prompts.pack_sequences(samples, [[]] * 8, num_patches=16)
    for ids, labels, five in zip(batch["input_ids"], batch["labels"], samples):
        turns = [f"{sample['instruction']} {sample['answer']} <eos>" for sample in five]
        assert read(ids).replace(" <pad>", "") == " ".join(["<bos>", *["<image>"] * 16, *turns])
        assert read(labels[labels >= 0]) == " ".join(f"{sample['answer']} <eos>" for sample in five)
        assert torch.equal(ids[labels >= 0], labels[labels >= 0])
        asked_for = {sample["instruction" if refer else "bbox"] for sample in five}
        assert len(asked_for) == len(five) == 5


def test_replay_asks_for_clicks_on_source_screens_and_for_word_problems_but_not_in_the_probe():
    """The other sequences of the step, and the probe's batches, are the same as without replay."""
    base = "data/tiny_vlm.pt"
    without = train.Config(steps=1, base=base)
    replay = train.Config(steps=1, base=base, replay=2)
    data = prompts.training_data(without, "cpu")
    replay_data = prompts.training_data(replay, "cpu")
    index = prompts.PROBE_BATCHES
    probe = prompts.training_batch(replay, replay_data, index - 1)
    assert torch.equal(probe.inputs["input_ids"], prompts.training_batch(without, data, index - 1).inputs["input_ids"])

    batch = prompts.training_batch(replay, replay_data, index)
    expected = prompts.training_batch(without, data, index)
    for sequence in range(2, 8):
        text = read(batch.inputs["input_ids"][sequence]).replace(" <pad>", "")
        assert text == read(expected.inputs["input_ids"][sequence]).replace(" <pad>", "")
    assert torch.equal(batch.inputs["image_features"][2:], expected.inputs["image_features"][2:])
    assert batch.boxes[14:] == expected.boxes[10:]
    for sequence in range(2):
        text = read(batch.inputs["input_ids"][sequence])
        assert len(re.findall(r"<x\d+> <y\d+> <eos>", text)) == 5
        assert text.count("how many") == 2
        assert text.rindex("<y") < text.index("how many")
        feature = batch.inputs["image_features"][sequence]
        (pick,) = (replay_data.source_features == feature).all(2).all(1).nonzero()
        clicks = [target.click for target in replay_data.source_screens[pick].targets()]
        boxes = batch.boxes[7 * sequence : 7 * sequence + 7]
        assert {*boxes[:5]} <= {*clicks}
        assert boxes[5:] == [None, None]


def test_the_hit_rate_of_a_batch_is_the_share_of_its_clicks_and_leaves_word_problems_out():
    click = {"instruction": "click wifi", "answer": "<x3> <y5>"}  # in pixels 28, 44
    batch = prompts.pack_sequences([[click, words.word_problem("train", 0), click]], [[]], num_patches=1)
    ids = batch["input_ids"]
    logits = torch.nn.functional.one_hot(ids.roll(-1, 1), len(words.VOCABULARY)).float()  # each predicts the next
    inside, outside = (24, 40, 32, 48), (0, 0, 28, 48)
    assert evaluate.hit_rate(logits, batch["labels"], [inside, None, inside]) == 1
    assert evaluate.hit_rate(logits, batch["labels"], [inside, None, outside]) == 0.5


def test_answers_without_an_image_are_compared_by_logits_and_by_kl_divergence():
    """The KL divergence of the next token's distribution, base || tuned, is a mean over tokens that are no padding."""
    sizes = {kind: ids.shape for kind, ids in evaluate.text_only_prompts().items()}
    base = {kind: torch.zeros(*size, 2) for kind, size in sizes.items()}  # two tokens, each with probability 1/2
    assert set(evaluate.text_only_changes(base, base).values()) == {0}

    tuned = {kind: logits.clone() for kind, logits in base.items()}
    tuned["question_without_image"][..., 0] = np.log(3)  # now 3/4 and 1/4
    is_padding = evaluate.text_only_prompts()["word_problem"] == words.ID[words.PAD]
    tuned["word_problem"][is_padding] = torch.tensor([9.0, 0.0])
    changes = evaluate.text_only_changes(base, tuned)
    assert is_padding.any()
    assert changes["text_logits_max_abs_diff"] == 9
    assert changes["word_problem_kl"] == 0
    assert changes["question_without_image_kl"] == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25))


# 3. Other choices of heads
def test_the_other_choices_of_heads_are_what_they_are_called():
    """All are spread evenly over the layers."""
    scores = torch.tensor([[9.0, 8, 1, 2], [7, 3, 4, 5], [0, 0.2, 6, 0.1]])
    assert choose_heads("top", scores, 6, 0) == choose_heads("gate", scores, 6, 0) == {0: [0, 1], 1: [0, 3], 2: [1, 2]}
    assert choose_heads("bottom", scores, 6, 0) == {0: [2, 3], 1: [1, 2], 2: [0, 3]}
    assert choose_heads("all", scores, 6, 0) == {layer: [0, 1, 2, 3] for layer in range(3)}
    drawn = [choose_heads("random", scores, 6, seed) for seed in range(9)]
    assert all({layer: len(heads) for layer, heads in each.items()} == {0: 2, 1: 2, 2: 2} for each in drawn)
    assert len({str(each) for each in drawn}) > 1


# 4. The commands
SHORT = dict(steps=3, num_heads=3, r=2, test_screens=2, device="cpu", base="base.pt")


@pytest.fixture
def directory(monkeypatch, tmp_path) -> Path:
    """A directory of its own, the current one, with a small base in base.pt."""
    save(tiny_vlm(vocab_size=len(words.VOCABULARY), image_size=screens.SIZE, patch_size=32), tmp_path / "base.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompts, "PROBE_BATCHES", 2)
    screens_and_features.cache_clear()  # it may hold those of another base.pt
    return tmp_path


RUNS = [{"method": "none"}, {"replay": 2}, {"heads": "gate"}, {"heads": "all"}]
RUNS += [{"method": "lora"} | changes for changes in ({}, {"tokens": "visual"}, {"projections": "v"})]
RUNS += [{"device": "cuda"}] * torch.cuda.is_available()


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_every_kind_of_run_leaves_text_as_it_promises_and_costs_what_is_computed(changes, directory):
    cfg = train.Config(**SHORT | changes)
    tuned = train.finetune(cfg)
    result = tuned.result
    assert result | asdict(cfg) == result
    assert result["lr"] == train.RATES[cfg.method]
    all_tokens = cfg.method == "lora" and cfg.tokens == "all"
    for change in ("text_logits_max_abs_diff", "word_problem_kl", "question_without_image_kl"):
        assert (result[change] != 0) == all_tokens
    trained = sum(parameter.numel() for parameter in tuned.adapter.parameters()) if tuned.adapter else 0
    assert result["trainable_parameters"] == trained
    assert (result["adapter_flops_per_screen"] > 0) == (cfg.method != "none")
    if all_tokens and cfg.projections == "qkvo":
        assert 4 * result["adapter_flops_per_screen"] == result["lora_flops_per_screen"]  # LoRA's are told for rank 8


def test_the_demo_and_then_the_walk_print_and_write_what_they_say(directory, capsys):
    train.main(train.Config(**SHORT))
    printed = capsys.readouterr().out
    starts = [line.split()[0] for line in printed.splitlines() if line[0] != " "]
    assert starts == "base before probe select after text controls cost saved".split()
    assert "identical" in printed
    out = Path("runs/switches")
    assert {path.name for path in out.iterdir()} == {"adapter.pt", "metrics.json", "predictions.png"}
    assert Image.open(out / "predictions.png").size[0] > 1000
    assert load(load_base("base.pt"), out / "adapter.pt")
    assert "erased_acc" in json.loads((out / "metrics.json").read_text())

    walk.walk(walk.WalkConfig(base="base.pt"))
    printed = capsys.readouterr().out
    assert "rows adapted: 1 .. 16" in printed
    assert re.search(r"by forward pass: \[16(, 0)*\]", printed)
    assert re.search(r"moved by 0% in layer 0, [1-9]", printed)


def test_lora_prints_how_far_text_has_moved(directory, capsys):
    train.main(train.Config(**SHORT | {"method": "lora"}))
    printed = capsys.readouterr().out
    assert "changed (max |difference|" in printed
    assert "mean KL divergence from the base" in printed


@pytest.mark.parametrize("bad", ["--method=dora", "--steps=many", "--base=no.pt", "--num-heads=25"])
def test_what_a_command_cannot_do_is_one_sentence(bad):
    ran = subprocess.run([sys.executable, "train.py", "--steps=1", bad], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "error: " in ran.stderr
    assert "Traceback" not in ran.stderr
