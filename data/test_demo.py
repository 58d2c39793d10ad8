"""The demo: the model and its base, the tiny world, and what the commands print and write."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import SPLITS, command, costs, evaluate, prompts, screens, walk, words
from data.baselines import choose_heads
from data.screens import DOMAINS, Element, Screen, draw_screen, is_hit
from imagelora import load, safe_save, select_heads
from test_imagelora import EARLY, TEXT, tiny_vlm
from tiny_vlm import TinyVLM, TinyVLMConfig

ROOT = Path(train.__file__).parent


def save(model: TinyVLM, path: Path) -> None:
    safe_save({"config": asdict(model.config), "state": model.state_dict()}, path)


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


def test_a_damaged_base_is_refused_in_one_sentence_or_loads_exactly_what_was_saved(tmp_path):
    """Whichever bit of the file is flipped, and if it is cut or holds no model."""
    path = tmp_path / "base.pt"
    save(tiny_vlm(), path)
    content = path.read_bytes()
    state = TinyVLM.from_pretrained(path).state_dict()
    damaged = [b"", b"{}", content[: len(content) // 2]]
    for place in range(0, len(content), len(content) // 60):
        flipped = bytes([content[place] ^ 1 << place % 8])
        damaged.append(content[:place] + flipped + content[place + 1 :])
    refused = 0
    for each in damaged:
        path.write_bytes(each)
        try:
            loaded = TinyVLM.from_pretrained(path).state_dict()
        except ValueError as error:
            assert "is not a saved TinyVLM" in str(error)
            assert "\n" not in str(error)
            refused += 1
        else:
            torch.testing.assert_close(loaded, state, rtol=0, atol=0)
    assert refused > 30


def test_a_size_that_would_hide_the_edge_of_a_picture_is_refused():
    with pytest.raises(ValueError, match="image_size 128 is not a multiple of patch_size 30"):
        TinyVLMConfig(patch_size=30)


def test_the_shipped_base_is_what_its_record_says():
    """It can click, name and relate on source screens, and clicks no switch."""
    record = json.loads((ROOT / "data/tiny_vlm.json").read_text())
    assert record["source"]["action_acc"] >= 0.99
    assert record["source"]["name_acc"] >= 0.97
    assert record["source"]["relation_acc"] >= 0.94
    assert record["word_problem_acc"] >= 0.99
    assert record["word_problem_after_image_acc"] >= 0.99
    assert record["switches"]["action_acc"] <= 0.02

    model = prompts.load_base("data/tiny_vlm.pt")
    for domain, task, metric in (
        ("source", "referring", "name_acc"),
        ("source", "relations", "relation_acc"),
        ("dark", "grounding", "action_acc"),
    ):
        some_screens = [draw_screen(domain, "test", i) for i in range(12)]
        features = prompts.image_features(model.get_image_features, some_screens)
        metrics, _ = evaluate.evaluate(model, some_screens, features, task)
        assert metrics[metric] == pytest.approx(record[domain][metric], abs=0.12), (domain, metric)
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


@pytest.mark.parametrize("refer, learn", [(0.0, False), (0.0, True), (1.0, True)])
def test_a_training_batch_has_labels_on_answers_only_and_no_target_twice(refer, learn):
    """A word problem before the image is learned only if that is wanted."""
    rng = np.random.default_rng(0)
    some_screens = [draw_screen("dark", "train", i) for i in range(8)]
    problem = words.word_problem("train", 0)
    prefixes = [[prompts.turn(problem, learn)]] * 8
    samples = [screens.random_samples(screen, 5, rng, refer, distinct=True) for screen in some_screens]
    batch = prompts.pack_sequences(samples, prefixes, num_patches=16)
    for ids, labels, five in zip(batch["input_ids"], batch["labels"], samples):
        first, *others = [f"{sample['instruction']} {sample['answer']} <eos>" for sample in (problem, *five)]
        text = " ".join(["<bos>", first, *["<image>"] * 16, *others])
        assert read(ids).replace(" <pad>", "") == text
        learned = [problem, *five] if learn else five
        assert read(labels[labels >= 0]) == " ".join(f"{sample['answer']} <eos>" for sample in learned)
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
CHOICES = ("top", "bottom", "gate", "matched", "random", "all")


def test_the_other_choices_of_heads_are_what_they_are_called():
    """Matched heads share the layers' budget of the top ones, random heads only their number."""
    scores = torch.tensor([[9.0, 8, 1, 2], [7, 3, 4, 5], [0, 0, 6, 0.1]])
    chosen = {choice: choose_heads(choice, scores, 5, 1.0, 0) for choice in CHOICES}
    assert chosen["top"] == chosen["gate"] == select_heads(scores, 5, 1.0)
    budget = {layer: len(heads) for layer, heads in chosen["top"].items()}
    assert {layer: len(heads) for layer, heads in chosen["matched"].items()} == budget
    assert len(budget) > 1
    assert chosen["matched"] != chosen["top"]
    assert sum(len(heads) for heads in chosen["random"].values()) == 5
    assert chosen["all"] == {layer: [0, 1, 2, 3] for layer in range(3)}


def test_the_bottom_heads_are_the_least_influential_of_each_layer_shared_out_evenly():
    scores = torch.tensor([[9.0, 8, 1, 2], [7, 3, 4, 5], [0, 0.2, 6, 0.1]])
    assert choose_heads("bottom", scores, 6, 1.0, 0) == {0: [2, 3], 1: [1, 2], 2: [0, 3]}


def test_an_unknown_choice_of_heads_is_refused():
    with pytest.raises(ValueError, match="unknown choice of heads 'best'"):
        choose_heads("best", torch.ones(3, 4), 5, 1.0, 0)


# 4. The commands
SHORT = dict(steps=3, num_heads=3, r=2, test_screens=2, device="cpu", base="base.pt")
OPTIONS = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items())
COMMANDS = {
    "train": (train.Config, train.main_job),
    "walk": (train.Config, walk.walk),
    "costs": (costs.CostsConfig, costs.print_costs),
}


@pytest.fixture
def directory(monkeypatch, tmp_path) -> Path:
    """A directory of its own, the current one, with a small base in base.pt."""
    save(tiny_vlm(vocab_size=len(words.VOCABULARY), image_size=screens.SIZE, patch_size=32), tmp_path / "base.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompts, "PROBE_BATCHES", 2)
    prompts.screens_and_features.cache_clear()  # it may hold those of another base.pt
    return tmp_path


@pytest.fixture
def call(directory, capsys):
    """A function that runs a command line -> (its exit status, what it prints, the last line of its errors)."""

    def call(line: str) -> tuple[int, str, str]:
        name, *options = shlex.split(line)
        try:
            status = command(*COMMANDS[name], "", options)
        except SystemExit as stopped:  # argparse exits by itself
            status = stopped.code
        printed = capsys.readouterr()
        return status, printed.out, re.split("[\r\n]", printed.err.strip())[-1]

    return call


def test_every_command_sets_how_threads_wait_before_it_imports_torch():
    """Afterwards it would have no effect."""
    code = "import os, sys; import data; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert printed.stdout == "False 1000\n", printed.stderr
    source = (ROOT / "train.py").read_text()
    assert source.index("\nfrom data import") < source.index("\nimport torch")


RUNS = [{"method": "none"}, {"gamma_lr": 0.0}, {"task": "referring"}, {"history": 1}, {"domain": "dark"}, {"replay": 2}]
RUNS += [{"method": "lora"} | changes for changes in ({}, {"tokens": "visual"}, {"projections": "v"})]
RUNS += [{"task": "referring", "replay": 1}]
RUNS += [{"heads": heads} for heads in CHOICES]
RUNS += [{"device": "cuda"}] * torch.cuda.is_available()


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_every_kind_of_run_leaves_text_as_it_promises_and_costs_what_is_computed(changes, directory, capsys):
    """It prints nothing, writes no file, and returns the Config's fields and what was measured."""
    cfg = train.Config(**SHORT | changes)
    result = train.run(cfg)
    assert capsys.readouterr().out == ""
    assert [path.name for path in directory.iterdir()] == ["base.pt"]

    assert result | asdict(cfg) == result
    assert result["lr"] == train.RATES[cfg.method]
    accuracy = "name_acc" if cfg.task == "referring" else "action_acc"
    assert {accuracy, "source_acc", "num_total"} < result["before"].keys() < result.keys()
    num_selected = {"image_lora": 9 if cfg.heads == "all" else 3}.get(cfg.method, 0)
    assert sum(len(heads) for heads in (result["selected"] or {}).values()) == num_selected

    all_tokens = cfg.method == "lora" and cfg.tokens == "all"
    for change in ("text_logits_max_abs_diff", "word_problem_kl", "question_without_image_kl"):
        assert (result[change] != 0) == all_tokens

    flops = result["adapter_flops_per_screen"]
    assert result["counted_flops_per_screen"] == flops
    assert (0 < flops < result["step_flops_per_screen"]) == (cfg.method != "none")
    if all_tokens and cfg.projections == "qkvo":
        assert 4 * flops == result["lora_flops_per_screen"]  # LoRA's are told for rank 8


def test_the_demo_prints_and_writes_what_it_says_and_is_the_same_to_the_last_digit_again(call):
    """It writes the result of `run`, and the controls beside it."""
    status, printed, error = call(f"train {OPTIONS} --film")
    assert status == 0, error
    starts = [line.split()[0] for line in printed.splitlines() if line[0] != " "]
    assert starts == "base before probe select after text controls cost saved note".split()
    assert printed.count("old task, clicks on source screens") == 2
    assert "identical" in printed
    assert "right of the name" in printed
    assert "counted = computed" in printed

    out = Path("runs/switches")
    saved = re.search("saved    runs/switches/ (.*)", printed)[1].split()
    assert {path.name for path in out.iterdir()} == {*saved}
    assert load(prompts.load_base("base.pt"), out / "adapter.pt")
    assert Image.open(out / "training.gif").n_frames == 4
    written = json.loads((out / "metrics.json").read_text())
    result = json.loads(json.dumps(train.run(train.Config(**SHORT | {"film": True}))))
    assert {name for name in result if result[name] != written[name]} <= {"seconds"}
    assert written.keys() - result.keys() == {"reworded_acc", "erased_acc"}


def test_lora_prints_how_far_text_has_moved(call):
    status, printed, error = call(f"train {OPTIONS} --method=lora")
    assert status == 0, error
    assert "changed (max |difference|" in printed
    assert "mean KL divergence from the base" in printed


def test_the_walk_follows_a_question_and_shows_where_a_head_looks(call):
    """Rows are adapted in the prompt alone, and queries of the lowest adapted layer stay as they were."""
    status, printed, error = call(f"walk {OPTIONS} --out=out")
    assert status == 0, error
    width, height = Image.open("out/look.png").size
    assert width == 1660
    assert height > 1660
    assert "rows adapted: 1 .. 16" in printed
    assert re.search(r"by forward pass: \[16(, 0)*\]", printed)
    assert re.search(r"moved by 0% in layer 0, [1-9]", printed)


def test_the_walk_takes_the_adapter_that_the_demo_has_saved_if_it_was_trained_alike(call, monkeypatch):
    trainings = []

    def count_training(*arguments):
        trainings.append(arguments)
        return train_steps(*arguments)

    train_steps = train.train
    monkeypatch.setattr(train, "train", count_training)
    assert call(f"train {OPTIONS} --out=out")[0] == 0
    assert len(trainings) == 1
    status, printed, _ = call(f"walk {OPTIONS} --out=out")
    assert status == 0
    assert "walking with out/adapter.pt" in printed
    assert len(trainings) == 1
    status, printed, _ = call(f"walk {OPTIONS} --out=out --seed=2")
    assert status == 0
    assert "has seed = 1, not 2: training anew" in printed
    assert len(trainings) == 2


def test_a_note_of_the_walk_names_what_a_head_looks_at_most():
    """The name or the switch whose patches get the largest share of attention."""
    screen = draw_screen("switches", "test", 0)
    for target in screen.targets():
        for box, note in ((target.bbox, target.full_name()), (target.click, f"{target.full_name()} switch")):
            left, top, right, bottom = box
            weights = torch.zeros(screens.SIZE, screens.SIZE)  # a patch a pixel
            weights[top:bottom, left:right] = 0.5 / ((bottom - top) * (right - left))
            assert walk.most_watched(screen, weights.flatten()) == (f"50% on {note}", box)


BAD_OPTIONS = ["--domain=marble", "--what=1", "--steps=many", "--seed=-1", "--tau=inf", "--r=0", "--num-heads=10"]
BAD_OPTIONS += ["--r=25", "--lr=nan", "--out=/dev/null/x", "--base=no.pt", "--device=abacus", "--lr=1e18 --steps=40"]
BAD_OPTIONS += ["extra", "--film --task=referring", "--heads=random --num-heads=10", "--heads=best", "--replay=9"]
BAD = [f"train {OPTIONS} {bad}" for bad in BAD_OPTIONS]
BAD += [f"walk {OPTIONS} --method=lora", "costs --visual-tokens=0"]


@pytest.mark.parametrize("bad", BAD)
def test_what_a_command_cannot_do_is_one_sentence_and_writes_nothing(bad, call, directory):
    """The status is 2, or 1 if the loss was not finite."""
    status, _, error = call(bad)
    assert status == (1 if "1e18" in bad else 2)
    assert "error: " in error
    assert len(error) < 300
    assert [path.name for path in directory.rglob("*") if path.is_file()] == ["base.pt"]
