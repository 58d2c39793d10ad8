"""The demo: the model and its base, batches and measures, the methods, and what the command prints and writes."""

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import imagelora
import train
from data import costs, evaluate, gamma, prompts, questions, replay, screens
from data.base import load_base, screens_and_features
from data.command import command, write_file
from test_imagelora import EARLY, tiny_vlm

ROOT = Path(train.__file__).parent
BASE = load_base("data/tiny_vlm.pt")
TRAIN_DATA = screens_and_features(BASE, "new", "train", 64)  # (screens, features [N, P, D])
VERB = rf"({'|'.join(questions.VERBS)})"
PLACE = r"<x\d+> <y\d+>"
IMAGE = " <image>" * 64


def read(ids: torch.Tensor) -> str:
    """The words of token ids, without padding."""
    return " ".join(prompts.VOCABULARY[token] for token in ids).replace(" <pad>", "")


def rows_of(batch: dict) -> list[str]:
    return [read(ids) for ids in batch["input_ids"]]


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


def test_the_shipped_base_is_what_its_record_says():
    """It can click, name and relate on old screens, and clicks no switch."""
    record = json.loads((ROOT / "data/tiny_vlm.json").read_text())
    assert record["task_acc"] <= 0.02
    some_screens, features = screens_and_features(BASE, "old", "test", 12)
    for kind in questions.KINDS:
        recorded = record["same_words_acc" if kind == "click" else f"{kind}_acc"]
        accuracy, _ = evaluate.evaluate(BASE, some_screens, features, kind)
        assert recorded >= 0.94
        assert accuracy == pytest.approx(recorded, abs=0.12), kind
    for images in (features[:, :0], features):
        assert evaluate.evaluate_word_problems(BASE, images, count=32) > 0.95


# 2. Batches and measures
def test_a_training_batch_has_labels_on_answers_only():
    """Word problems before each screen have no labels. If text varies, each step draws a number of them."""
    counts = set()
    for index in range(16):
        batch = prompts.training_batch(train.Config(text=2, vary_text=True), TRAIN_DATA, index)
        assert len(batch["input_ids"]) == 16
        (count,) = {row.count("how many") for row in rows_of(batch)}
        counts.add(count)
        for row, ids, labels in zip(rows_of(batch), batch["input_ids"], batch["labels"]):
            after_image = row.partition(IMAGE)[2]
            (answer,) = re.fullmatch(rf" (?:{VERB[1:-1]}) \w+(?: \w+)? ({PLACE} <eos>)", after_image).groups()
            assert read(labels[labels >= 0]) == answer
            assert torch.equal(ids[labels >= 0], labels[labels >= 0])
    assert counts == {0, 1, 2}
    same_for_all_steps = prompts.training_batch(train.Config(text=2), TRAIN_DATA, 0)
    assert {row.count("how many") for row in rows_of(same_for_all_steps)} == {2}


def test_a_hint_is_the_correct_place_in_training_and_that_of_another_switch_in_the_test():
    """It stands before the question, and nothing else changes."""
    batches = [prompts.training_batch(train.Config(hint=hint), TRAIN_DATA, 0) for hint in ("none", "question")]
    for without_hint, with_hint in zip(*map(rows_of, batches)):
        (place,) = re.findall(PLACE, without_hint)
        assert with_hint == without_hint.replace(IMAGE, f"{IMAGE} {place}")
    all_screens, _ = TRAIN_DATA
    for i, sample in questions.all_samples(all_screens[:8]):
        places = {questions.place(target.click) for target in all_screens[i].targets()}
        assert sample["elsewhere"] in places - {sample["answer"]}
        wrong = questions.with_hint(sample, right=False)["instruction"]
        assert wrong == f"{sample['elsewhere']} {sample['instruction']}"


def test_a_model_that_repeats_hints_follows_the_wrong_ones():
    """It hits all switches with right hints, none with wrong ones."""

    def repeat(model, samples, features, num_problems):
        return [" ".join(sample["instruction"].split()[:2]) for sample in samples]

    metrics = evaluate.measure_hints(BASE, screens_and_features(BASE, "new", "test", 3), repeat)
    assert metrics == {"right_hint_acc": 1, "wrong_hint_acc": 0, "followed_acc": 1}


def kind_of(sample: dict) -> str:
    """Which of data.questions.KINDS a question is of, or that it is a word problem."""
    starts = {"what_is_at": "what is at", "what_is_right_of": "what is right of", "word problem": r"\w+ has"}
    starts |= {"click_right_of": f"{VERB} right of", "click": f"{VERB} (?!right of)"}
    (kind,) = [kind for kind, start in starts.items() if re.match(start, sample["instruction"])]
    return kind


def test_replay_holds_the_base_models_own_answers_and_never_about_the_new_task():
    """It takes the place of some sequences, and changes no other."""
    replay_data = replay.make_replay_data(BASE, TRAIN_DATA, seed=1)
    assert 0.4 < replay_data.share_correct < 0.7
    kinds = set()
    for features, samples in zip(replay_data.features, replay_data.samples):
        for sample in samples:
            kinds.add(kind_of(sample))
            prompt = prompts.prompt_batch([sample], features[None])
            ids = BASE.generate(**prompt, max_new_tokens=5)[0, prompt["input_ids"].shape[1] :]
            assert prompts.decode(ids.tolist()) == sample["answer"]
    assert kinds == {*questions.OTHER_KINDS, "word problem"}

    expected = prompts.training_batch(train.Config(), TRAIN_DATA, 3)
    batch = prompts.training_batch(train.Config(replay=2), TRAIN_DATA, 3, replay_data)
    assert rows_of(batch)[2:] == rows_of(expected)[2:]
    assert torch.equal(batch["image_features"][2:], expected["image_features"][2:])
    for row, features in zip(rows_of(batch)[:2], batch["image_features"]):
        (pick,) = (replay_data.features == features).all(2).all(1).nonzero()
        turns = [f"{IMAGE} {s['instruction']} {s['answer']} <eos>" for s in replay_data.samples[pick]]
        assert row.removeprefix("<bos>") in turns


def test_each_measure_asks_what_its_name_says(monkeypatch):
    """Three kinds of old questions make up the mean. All about screens are asked after as much text as in training."""
    new_test = screens_and_features(BASE, "new", "test", 3)
    old_test = screens_and_features(BASE, "old", "test", 3)
    asked = []

    def answers_of_all_kinds_but_one(model, samples, features, num_problems=0):
        asked.append((kind_of(samples[0]), num_problems))
        is_wrong = asked[-1][0] == "click_right_of"
        return ["moon" if is_wrong else sample["answer"] for sample in samples]

    monkeypatch.setattr(evaluate, "generate_answers", answers_of_all_kinds_but_one)
    metrics, _ = evaluate.measure(BASE, new_test, old_test, num_problems=2)
    assert asked == [(kind, 2) for kind in (*questions.KINDS, "click")] + [("word problem", 0)] * 2
    assert metrics["task_acc"] == metrics["same_words_acc"] == 1
    assert (metrics["what_is_at_acc"], metrics["what_is_right_of_acc"], metrics["click_right_of_acc"]) == (1, 1, 0)
    assert metrics["other_questions_acc"] == pytest.approx(2 / 3)


def test_a_patch_matters_as_much_as_leaving_its_row_out_of_M_changes_the_answer(monkeypatch):
    model = load_base("data/tiny_vlm.pt")
    new_test = screens_and_features(model, "new", "test", 1)
    _, (answer, *_) = evaluate.evaluate(model, *new_test)
    adapter = imagelora.attach(model)
    for value_adapter in adapter.layers.values():
        torch.nn.init.normal_(value_adapter.B, std=0.1)
    falls, rises = evaluate.patch_effects(model, answer)
    assert falls.shape == rises.shape == (64,)

    sample = answer.sample
    prompt = prompts.prompt_batch([{"instruction": f"{sample['instruction']} {sample['answer']}"}], new_test[1])
    x, y = prompt["input_ids"][0, -2:]

    def log_probability() -> torch.Tensor:
        logits = model(**prompt).logits[0].log_softmax(-1)
        return logits[-3, x] + logits[-2, y]

    before = log_probability()
    visual_rows = imagelora.visual_rows
    monkeypatch.setattr(imagelora, "visual_rows", lambda *args: visual_rows(*args)[torch.arange(64) != 5])
    torch.testing.assert_close(before - log_probability(), falls[5], atol=1e-4, rtol=1e-4)


# 3. The methods
SHORT = dict(steps=3, r=2, device="cpu", base="base.pt")


@dataclass
class QuickConfig(train.Config):
    test_screens: int = 2


@pytest.fixture
def directory(monkeypatch, tmp_path) -> Path:
    """A directory of its own, the current one, with a small base of 15 value heads in base.pt."""
    sizes = {"vocab_size": len(prompts.ID), "image_size": screens.SIZE, "patch_size": 32, "num_hidden_layers": 5}
    model = tiny_vlm(**sizes)
    torch.save({"config": asdict(model.config), "state": model.state_dict()}, tmp_path / "base.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompts, "PROBE_BATCHES", 2)
    monkeypatch.setattr(prompts, "TRAIN_SCREENS", 32)
    return tmp_path


RUNS = [{}, {"heads": "all", "no_normalize": True}, {"heads": "2.1,1.0,2.0", "text": 1}, {"hint": "question"}]
RUNS += [{"method": "lora"}, {"method": "lora", "projections": "mlp"}, {"method": "partial_lora", "projections": "all"}]
RUNS += [{"device": "cuda"}] * torch.cuda.is_available()


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_every_kind_of_run_leaves_text_as_it_promises(changes, directory):
    cfg = QuickConfig(**SHORT | changes)
    result = train.run(cfg)
    assert result | asdict(cfg) == result
    assert ("wrong_hint_acc" in result) == (cfg.hint == "question")
    if cfg.method == "image_lora":
        expected = {"top": 12, "all": 15, "2.1,1.0,2.0": 3}[cfg.heads]
        assert sum(len(heads) for heads in result["selected"].values()) == expected
    assert (result["text_logits_max_abs_diff"] != 0) == (cfg.method == "lora")
    if cfg.method == "lora" and cfg.projections == "qkvo":
        assert 4 * result["trainable_parameters"] == result["lora_trainable_parameters"]  # which is of rank 8
        assert 4 * result["adapter_flops_per_screen"] == result["lora_flops_per_screen"]


def test_random_heads_are_as_many_in_each_layer_as_the_most_influential_ones():
    cfg = train.Config(num_heads=6)
    batch_of = partial(prompts.training_batch, cfg, TRAIN_DATA)
    top, random = [train.choose_heads(replace(cfg, heads=heads), BASE, batch_of) for heads in ("top", "random")]
    assert [len(heads) for heads in random.values()] == [len(heads) for heads in top.values()]
    assert random != top


@pytest.mark.parametrize("changes", [{"heads": "all"}, {"method": "lora"}], ids=str)
def test_a_run_turns_its_update_down_and_measures_it_there(changes, directory, monkeypatch):
    """The curve is of the update as it was trained; at gamma 0 the model is the base model, in every measure."""
    monkeypatch.setattr(gamma, "GAMMAS", (1.0, 0.5, 0.0))
    monkeypatch.setattr(prompts, "TRAIN_SCREENS", 400)
    cfg = train.Config(device="cpu", steps=20, lr=0.02, test_screens=4, **changes)
    half, nothing = [train.run(replace(cfg, gamma=strength)) for strength in (0.5, 0.0)]
    assert half["curve"] == nothing["curve"]
    assert nothing["before"].items() <= nothing.items()
    as_trained, *lower = half["curve"]
    assert [point["other_questions_acc"] for point in lower] == [run["other_questions_acc"] for run in (half, nothing)]
    assert as_trained["validation_acc"] > lower[-1]["validation_acc"]


def test_the_smallest_gamma_costs_at_most_two_points_of_the_new_task():
    curve = [{"gamma": g, "validation_acc": acc} for g, acc in ((1.0, 0.97), (0.9, 0.96), (0.8, 0.951), (0.7, 0.949))]
    assert gamma.smallest_gamma(curve) == 0.8


def products_of_attention(number: int):
    """What FlopCounterMode wants to know about a kernel of attention: the FLOPs of so many products."""
    return lambda queries, *shapes, **options: number * 2 * queries[2] * math.prod(queries)  # [B, heads, T, d]


ALL_HEADS = {layer: [*range(6)] for layer in range(4)}
STEPS = [({}, heads) for heads in (ALL_HEADS, {2: [0, 1, 2], 3: [1, 2]}, {3: [0]})]
STEPS += [({"method": "lora", "projections": projections}, None) for projections in ("qkvo", "v", "mlp")]
STEPS += [({"method": "partial_lora", "projections": "all"}, None)]


@pytest.mark.parametrize("changes, heads", STEPS, ids=str)
def test_a_whole_step_costs_what_torch_counts(changes, heads):
    """The gradient runs back to the lowest adapted layer. Attention is two products forward and four back."""
    cfg = train.Config(**changes)
    model = load_base(cfg.base)
    batch = prompts.training_batch(cfg, TRAIN_DATA, 0)
    adapter = train.attach_adapter(cfg, model, heads)
    kernels = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: products_of_attention(2),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: products_of_attention(4),
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:  # without them it counts 0 for attention
        model(**batch).loss.backward()
    result = costs.run_costs(cfg, model, batch["input_ids"], heads)
    assert result["step_flops_per_screen"] == counter.get_total_flops() / len(batch["input_ids"])
    assert result["trainable_parameters"] == sum(p.numel() for p in adapter.parameters() if p.requires_grad)


def test_the_costs_that_the_page_tells_are_those_that_are_printed(capsys):
    costs.main()
    printed = re.findall(r"LoRA +([\d.]+) ", capsys.readouterr().out)
    assert "takes {}, Partial LoRA's {} and Image-LoRA's {}".format(*printed) in (ROOT / "data/README.md").read_text()


# 4. The command
def demo(options: str) -> int:
    """Runs the main job with these options and, first, the short ones -> its exit status."""
    short_options = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    try:
        return command(QuickConfig, train.main, "", short_options + options.split())
    except SystemExit as stopped:  # argparse exits by itself
        return stopped.code


def test_the_demo_prints_and_writes_what_it_says(directory, capsys):
    """The same to the last digit if it runs again."""
    assert demo("") == 0
    printed = capsys.readouterr().out
    assert "identical" in printed
    out = Path("runs/switches")
    assert {path.name for path in out.iterdir()} == {*train.FILES}
    assert all(name in printed.splitlines()[-1] for name in train.FILES)
    written = json.loads((out / "metrics.json").read_text())
    assert f"[{gamma.smallest_gamma(written['curve'])}: " in printed
    result = json.loads(json.dumps(train.run(QuickConfig(**SHORT))))
    assert {name for name in result if result[name] != written[name]} <= {"seconds"}
    assert written.keys() - result.keys() == {"reworded_acc", "erased_acc"}

    assert demo("--gamma=0.5") == 0
    adapter = imagelora.load(load_base("base.pt"), out / "adapter.pt")
    assert {layer.gamma.item() for layer in adapter.layers.values()} == {0.5}
    assert demo("--method=lora") == 0
    assert {path.name for path in out.iterdir()} == {"predictions.png", "metrics.json"}


BAD_OPTIONS = ["--method=dora", "--steps=0", "--lr=nan", "--replay=17", "--device=abacus", "--base=no.pt"]
BAD_OPTIONS += ["--base=notes.txt", "--out=notes.txt", "--projections=v", "--method=lora --heads=all", "--vary-text"]
BAD_OPTIONS += ["--heads=all --num-heads=3", "--heads=best", "--test-screens=3"]
# These need a look at the model.
BAD_OPTIONS += ["--r=25", "--method=lora --r=1000000000", "--num-heads=16", "--heads=1.3"]


@pytest.mark.parametrize("bad", [*BAD_OPTIONS, "--replay=2"])  # the small base ends no answer of its own
def test_what_the_demo_cannot_do_is_one_sentence_and_writes_nothing(bad, directory, capsys):
    (directory / "notes.txt").write_text("not a model")
    assert demo(bad) == 2
    printed = capsys.readouterr()
    assert printed.out == ""  # before anything is measured
    assert re.search(r"error: [^\n]{10,300}\n$", printed.err)
    assert {path.name for path in directory.rglob("*") if path.is_file()} == {"base.pt", "notes.txt"}


def test_a_loss_that_is_not_finite_and_ctrl_c_stop_the_demo(directory, capsys, monkeypatch):
    assert demo("--lr=1e18 --steps=40") == 1
    error = capsys.readouterr().err
    assert re.search(r"error: the loss is \w+ at step \d+; try a smaller --lr than 1e\+18\n$", error)
    monkeypatch.setattr(train, "train", Mock(side_effect=KeyboardInterrupt))
    assert demo("") == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    write_file(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        write_file(tmp_path / "file", "these are no bytes")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]
