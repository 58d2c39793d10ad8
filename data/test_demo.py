"""The demo as it is told: the model and its base, the tiny world, what commands print and write."""

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import SPLITS, command, costs, evaluate, prompts, screens, words
from data.baselines import choose_heads
from data.screens import DOMAINS, draw_screen, is_hit
from data.walk import walk
from imagelora import load, safe_save, select_heads
from test_imagelora import EARLY, TEXT, tiny_vlm
from tiny_vlm import TinyVLM, TinyVLMConfig

ROOT = Path(train.__file__).parent


def save(model, path):
    safe_save({"config": asdict(model.config), "state": model.state_dict()}, path)


# 1. The model
def test_query_heads_of_a_group_share_a_value_head_and_no_placeholder_is_an_answer():
    """Grouped heads are whole heads whose keys and values are repeated."""
    grouped, whole = tiny_vlm(), tiny_vlm(num_key_value_heads=6)
    state = grouped.state_dict()
    for name in [name for name in state if re.search(r"language.*[kv]_proj", name)]:
        state[name] = state[name].unflatten(0, (3, 4)).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(state)
    torch.testing.assert_close(whole(**EARLY).logits, grouped(**EARLY).logits)
    undecided = tiny_vlm(image_token_id=0)  # all logits are equal: the answer is the first token but the placeholder
    undecided.language_model.norm.weight.data.zero_()
    assert undecided.generate(torch.tensor([TEXT]), max_new_tokens=3)[0, len(TEXT) :].tolist() == [1, 1, 1]


def test_a_damaged_base_is_refused_in_one_sentence_or_loads_exactly_what_was_saved(tmp_path):
    """A flipped bit anywhere, a cut, and what is no model; a size that would leave a picture's edge unseen."""
    save(tiny_vlm(), path := tmp_path / "base.pt")
    whole, saved, refused = path.read_bytes(), TinyVLM.from_pretrained(path).state_dict(), 0
    places = range(0, len(whole), len(whole) // 60)
    flipped = [whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :] for place in places]
    for content in (b"", b"{}", whole[: len(whole) // 2], *flipped):
        path.write_bytes(content)
        try:
            torch.testing.assert_close(TinyVLM.from_pretrained(path).state_dict(), saved, rtol=0, atol=0)
        except ValueError as error:
            assert "is not a saved TinyVLM" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 30
    with pytest.raises(ValueError, match="image_size 128 is not a multiple of patch_size 30"):
        TinyVLMConfig(patch_size=30)


def test_the_shipped_base_is_what_its_record_says():
    """It grounds, refers and relates on source screens, and clicks no switch."""
    record, model = json.loads((ROOT / "data/tiny_vlm.json").read_text()), prompts.load_base("data/tiny_vlm.pt")
    source = record["source"]
    assert source["action_acc"] >= 0.99 and source["name_acc"] >= 0.97 and source["relation_acc"] >= 0.94
    assert record["word_problem_acc"] >= 0.99 and record["word_problem_after_image_acc"] >= 0.99
    assert record["switches"]["action_acc"] <= 0.02
    for domain, task in (("source", "referring"), ("source", "relations"), ("dark", "grounding")):
        twelve = [draw_screen(domain, "test", i) for i in range(12)]
        features = prompts.image_features(model.get_image_features, twelve)
        (name, accuracy), *_ = evaluate.evaluate(model, twelve, features, task)[0].items()
        assert accuracy == pytest.approx(record[domain][name], abs=0.12), (domain, name)
    for shown in (features[:, :0], features):
        assert evaluate.evaluate_word_problems(model, shown, count=32) > 0.95


# 2. The world: screens, words, prompts
@pytest.mark.parametrize("domain", DOMAINS)
def test_every_instruction_names_exactly_one_element_and_its_answer_is_a_hit(domain):
    """On screens that are a function of domain, split, index and seed, so no two splits share one."""
    places = [(domain, split, index, seed) for split in SPLITS for index in range(6) for seed in range(2)]
    drawn, rng = [draw_screen(*place) for place in places], np.random.default_rng(0)
    assert len({screen.image.tobytes() for screen in drawn + [draw_screen(*places[7])]}) == len(places)
    assert [is_hit(point, (2, 3, 5, 7)) for point in ((2, 3), (5, 3), (2, 7), None)] == [True, False, False, False]
    for screen, target in ((each, target) for each in drawn for target in each.targets()):
        point = words.parse_point(screens.referring_sample(target)["instruction"].removeprefix("what is at "))
        assert [e for e in screen.targets() if is_hit(point, e.click)] == [target]
        for by_colour in (False, True):
            sample = screens.grounding_sample(screen, target, rng, by_colour)
            named = set(sample["instruction"].split()[1:])
            assert [e for e in screen.targets() if named <= {e.name, e.colour}] == [target]
            assert is_hit(words.parse_point(sample["answer"]), target.click) and sample["bbox"] == target.click


def test_a_switch_is_right_of_its_name_and_erased_it_is_all_that_changes():
    """So what a control shows is due to the switch."""
    for index in range(20):
        drawn, erased = (draw_screen("switches", "test", index, erased=erased) for erased in (False, True))
        assert erased.targets() == drawn.targets() == list(erased.elements)
        changed = (drawn.image != erased.image).any(-1)
        for element in drawn.elements:
            left, top, right, bottom = element.bbox
            assert changed[top:bottom, left:right].any() == (element.name == "switch")
            assert not element.click or element.click[0] - right >= screens.GAP
            changed[top:bottom, left:right] = False
        assert not changed.any()


def test_what_is_right_of_a_name_begins_there_and_shares_half_the_lower_ones_height():
    """A question of pretraining, in which neither question nor answer is a place."""
    places = {"a": (0, 0, 9, 9), "b": (9, 4, 20, 30), "c": (21, 5, 30, 15), "d": (60, 0, 70, 9), "e": (8, 0, 12, 9)}
    elements = tuple(screens.Element(name, "", box, box) for name, box in places.items())
    told = [
        (each["instruction"], each["answer"])
        for each in screens.relation_samples(screens.Screen(np.zeros(0), elements))
    ]
    assert told == [(f"what is right of {name}", other) for name, other in ("ab", "bc", "ed")]


def test_word_problems_of_the_test_are_new_sentence_pairs_and_new_numbers():
    """So a correct answer is no memory."""
    new, known = set(), set()
    for split in SPLITS:
        texts = [words.word_problem(split, i)["instruction"].partition(" has ")[2] for i in range(600)]
        seen = new if split == "test" else known
        seen |= {re.sub(r"\d+", "", text.partition(" then ")[2]) for text in texts}
        seen |= {tuple(found) for found in (re.findall(r"\d+", text) for text in texts) if len(found) == 3}
    assert new and not new & known


@pytest.mark.parametrize("refer, learn", [(0.0, False), (0.0, True), (1.0, True)])
def test_a_training_batch_has_labels_on_answers_only_and_no_target_twice(refer, learn):
    """Words before the image are told, and learned only where that is wanted."""
    drawn, problem = [draw_screen("dark", "train", i) for i in range(8)], words.word_problem("train", 0)
    before, rng = [[prompts.turn(problem, learn)]] * len(drawn), np.random.default_rng(0)
    asked = [screens.random_samples(screen, 5, rng, refer, distinct=True) for screen in drawn]
    for ids, labels, samples in zip(*prompts.pack_sequences(asked, before, 16).values(), asked):
        told, answers = (" ".join(words.VOCABULARY[t] for t in row) for row in (ids, labels[labels >= 0]))
        first, *others = (f"{each['instruction']} {each['answer']} <eos>" for each in (problem, *samples))
        assert told.replace(" <pad>", "") == " ".join(["<bos>", first, *["<image>"] * 16, *others])
        assert answers == " ".join(f"{each['answer']} <eos>" for each in [problem] * learn + samples)
        assert torch.equal(ids[labels >= 0], labels[labels >= 0])
        assert len({each["instruction" if refer else "bbox"] for each in samples}) == len(samples) == 5


def test_a_rule_is_found_on_some_answers_and_judged_on_others():
    """No click is a miss, whatever the rule."""
    boxes = [(0, 0, 16, 16), (8, 8, 24, 24), (64, 64, 80, 80)]  # of pixels; a bin has 8
    learn = [(None, {"bbox": box, "name": name}, (box[0] + 28, box[1] + 4)) for box, name in zip(boxes, "aab")]
    learn[2] = (*learn[2][:2], (4, 4))
    assert evaluate.best_offset([*zip([(28, 4), (36, 12)], boxes)]) in [(dx, dy) for dx in (-24, -16) for dy in (0, 8)]
    given = [(None, {"bbox": (40, 40, 48, 48), "name": name}, point) for name, point in (("a", (68, 44)), ("b", None))]
    assert evaluate.offset_rule(learn, learn) == 1 and evaluate.offset_rule(learn, given) == 1 / 2


# 3. The commands
SHORT = dict(steps=3, num_heads=3, r=2, test_screens=2, device="cpu", base="base.pt")
OPTIONS = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items())
COMMANDS = {
    "train": (train.Config, train.main_job),
    "walk": (train.Config, walk),
    "costs": (costs.CostsConfig, costs.print_costs),
}


@pytest.fixture
def say(monkeypatch, tmp_path, capsys):
    """A command, in a directory of its own, on a small base: its status, its prints, its last error line."""
    save(tiny_vlm(vocab_size=len(words.VOCABULARY), image_size=screens.SIZE, patch_size=32), tmp_path / "base.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompts, "PROBE_BATCHES", 2)
    prompts.screens_and_features.cache_clear()  # of another base.pt

    def run(line: str) -> tuple[int, str, str]:
        name, *options = shlex.split(line)
        try:
            status = command(*COMMANDS[name], "", options)
        except SystemExit as stopped:  # of argparse
            status = stopped.code
        printed = capsys.readouterr()
        return status, printed.out, re.split("[\r\n]", printed.err.strip())[-1]

    return run


CHOICES = "top", "gate", "matched", "random", "all"
RUNS = [{"method": "none"}, {"gamma_lr": 0.0}, {"task": "referring"}, {"history": 1}, {"domain": "dark"}, {"replay": 2}]
RUNS += [{"method": "lora"} | changes for changes in ({}, {"tokens": "visual"}, {"projections": "v"})]
RUNS += [{"heads": heads} for heads in CHOICES] + [{"device": "cuda"}] * torch.cuda.is_available()


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_every_kind_of_run_leaves_text_as_it_promises_and_costs_what_is_computed(changes, say, capsys):
    """In a row of the Config's fields and what was measured, without a print or a file."""
    row = train.run(cfg := train.Config(**SHORT | changes))
    assert capsys.readouterr().out == "" and [path.name for path in Path().iterdir()] == ["base.pt"]
    assert row.keys() > asdict(cfg).keys() and row["heads"] == cfg.heads and row["lr"] == train.RATES[cfg.method]
    accuracy = "name_acc" if cfg.task == "referring" else "action_acc"
    assert {accuracy, "source_acc", "num_total"} < row["before"].keys() < row.keys()
    all_tokens = cfg.method == "lora" and cfg.tokens == "all"
    assert (row["text_logits_max_abs_diff"] == 0) == (not all_tokens)
    flops, step = row["adapter_flops_per_screen"], row["step_flops_per_screen"]
    assert row["counted_flops_per_screen"] == flops and (0 < flops < step) == (cfg.method != "none")
    whole = all_tokens and cfg.projections == "qkvo"
    assert (4 * flops == row["lora_flops_per_screen"]) == whole  # told of r = 8
    if cfg.method == "image_lora":
        assert sum(map(len, row["selected"].values())) == (9 if cfg.heads == "all" else 3)


def test_the_controls_of_the_probe_are_what_they_are_called():
    """Matched heads share the layers' budget of the best ones, random heads only their number."""
    scores = torch.tensor([[9.0, 8, 1, 2], [7, 3, 4, 5], [0, 0, 6, 0.1]])
    chosen = {choice: choose_heads(choice, scores, 5, 1.0, 0) for choice in CHOICES}
    budget = {layer: len(heads) for layer, heads in chosen["top"].items()}
    assert budget == {layer: len(heads) for layer, heads in chosen["matched"].items()} and len(budget) > 1
    assert chosen["top"] == chosen["gate"] == select_heads(scores, 5, 1.0) != chosen["matched"]
    assert sum(map(len, chosen["random"].values())) == 5 and chosen["all"] == {k: [0, 1, 2, 3] for k in range(3)}
    with pytest.raises(ValueError, match="unknown choice of heads 'best'"):
        choose_heads("best", scores, 5, 1.0, 0)


def test_the_demo_prints_and_writes_what_it_says_and_is_the_same_to_the_last_digit_again(say):
    """What it writes is the row of `run`, and the controls beside it."""
    status, printed, error = say(f"train {OPTIONS} --film")
    said = [line.split()[0] for line in printed.splitlines() if line[0] != " "]
    assert status == 0 and said == "base before probe select after text controls cost saved".split(), error
    assert all(text in printed for text in ("identical", "right of the name", "counted = computed", "training step"))
    out, cfg = Path("runs/switches"), train.Config(**SHORT | {"film": True})
    assert {path.name for path in out.iterdir()} == set(printed.split("runs/switches/ ")[1].split())
    assert load(prompts.load_base("base.pt"), out / "adapter.pt") and Image.open(out / "training.gif").n_frames == 4
    written, row = json.loads((out / "metrics.json").read_text()), json.loads(json.dumps(train.run(cfg)))
    assert {name for name in row if row[name] != written[name]} <= {"seconds"}
    assert all(name.endswith("_acc") for name in written.keys() - row.keys())


def test_the_walk_follows_a_question_and_shows_where_a_head_looks(say):
    """Rows are adapted in the prompt alone, and queries of the lowest adapted layer stay as they were."""
    status, printed, error = say(f"walk {OPTIONS} --out=out")
    assert status == 0 and Image.open("out/look.png").size == (1660, 2008), error
    assert "rows adapted: 1 .. 16" in printed and "identical" in printed
    assert re.search(r"by forward pass: \[16(, 0)*\]", printed) and re.search(r"moved by 0% in layer 0, [1-9]", printed)


BAD = ["--domain=marble", "--what=1", "--steps=many", "--seed=-1", "--tau=inf", "--r=0", "--num-heads=10", "--r=25"]
BAD += ["--lr=nan", "--out=/dev/null/x", "--base=no.pt", "--device=abacus", "--lr=1e18 --steps=40", "extra"]
BAD += ["--film --task=referring", "--heads=random --num-heads=10", "--heads=best", "--replay=9"]
BAD = [f"train {OPTIONS} {bad}" for bad in BAD] + [f"walk {OPTIONS} --method=lora", "costs --visual-tokens=0"]


@pytest.mark.parametrize("bad", BAD)
def test_what_a_command_cannot_do_is_one_sentence_and_writes_nothing(bad, say):
    """Status 2; 1 where the loss was not finite."""
    status, _, error = say(bad)
    assert status == (1 if "1e18" in bad else 2) and "error: " in error and len(error) < 300, error
    assert [path.name for path in Path().rglob("*") if path.is_file()] == ["base.pt"]
