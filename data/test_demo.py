"""The demo: the model and its base, batches and measures, the methods, and what the commands print and write."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from data import costs, evaluate, gamma, prompts, questions, replay, screens
from data.base import load_base, save_base, screens_and_features
from data.command import command, write_file
from data.heads import choose_heads
from data.rivals import LoRA
from imagelora import attach, load
from test_imagelora import EARLY, TEXT, tiny_vlm

ROOT = Path(train.__file__).parent


BASE = load_base("data/tiny_vlm.pt")
TRAIN_DATA = screens_and_features(BASE, "new", "train", 64)  # (screens, features [N, P, D])


def read(ids: torch.Tensor) -> str:
    """The words of token ids, without padding."""
    return " ".join(prompts.VOCABULARY[token] for token in ids).replace(" <pad>", "")


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
    """It can click, name and relate on old screens, and clicks no switch."""
    record = json.loads((ROOT / "data/tiny_vlm.json").read_text())
    assert record["task_acc"] <= 0.02
    some_screens, features = screens_and_features(BASE, "old", "test", 12)
    for kind in questions.KINDS:
        recorded = record["same_words_acc" if kind == "click" else f"{kind}_acc"]
        accuracy, _ = evaluate.evaluate(BASE, some_screens, features, kind)
        assert recorded >= 0.94
        assert accuracy == pytest.approx(recorded, abs=0.12), kind
    assert evaluate.evaluate_word_problems(BASE, features[:, :0], count=32) > 0.95
    assert evaluate.evaluate_word_problems(BASE, features, count=32) > 0.95


# 2. Batches and measures
VERB = rf"^({'|'.join(questions.VERBS)})"


@pytest.mark.parametrize("task", ["grounding", "referring"])
@pytest.mark.parametrize("num_problems, packed", [(0, False), (2, False), (2, True)])
def test_a_training_batch_has_labels_on_answers_only_and_no_target_twice(task, num_problems, packed):
    """One question about each screen, or five that share a sequence. Word problems before the screen have no labels."""
    batch = prompts.training_batch(train.Config(task=task, text=num_problems, packed=packed), TRAIN_DATA, 0)
    num_screens, num_questions = (8, 5) if packed else (16, 1)
    assert len(batch["input_ids"]) == num_screens
    question = r"what is at <x\d+> <y\d+>" if task == "referring" else r"(?:click|tap|press|select) \w+(?: \w+)?"
    answer = r"((?:\w+ )?\w+ <eos>)" if task == "referring" else r"(<x\d+> <y\d+> <eos>)"
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        before, after = read(ids).split(" <image>" * 64)
        assert before.startswith("<bos>")
        assert before.count("how many") == num_problems
        turns = re.fullmatch(rf"(?: {question} {answer}){{{num_questions}}}", after)
        assert turns, after
        answers = re.findall(rf"{question} {answer}", after)
        assert read(labels[labels >= 0]) == " ".join(answers)
        assert torch.equal(ids[labels >= 0], labels[labels >= 0])


def test_a_varied_text_is_drawn_anew_for_each_step():
    """From none to --text word problems stand before all screens of a step."""
    counts = set()
    for index in range(20):
        batch = prompts.training_batch(train.Config(text=3, vary_text=True), TRAIN_DATA, index)
        counts_of_step = {read(ids).count("how many") for ids in batch["input_ids"]}
        assert len(counts_of_step) == 1
        counts |= counts_of_step
    assert counts == {0, 1, 2, 3}


PLACE = r"<x\d+> <y\d+>"


def test_a_hint_in_training_is_the_correct_place():
    """It stands before the question or before the image, and nothing else changes."""
    plain, in_question, before_image = [
        [read(ids) for ids in prompts.training_batch(train.Config(hint=hint), TRAIN_DATA, 0)["input_ids"]]
        for hint in ("none", "question", "before_image")
    ]
    image = " <image>" * 64
    for expected, hinted, hinted_early in zip(plain, in_question, before_image):
        (place,) = re.findall(PLACE, expected)
        assert hinted == expected.replace(image, f"{image} {place}")
        assert hinted_early == expected.replace(image, f" {place}{image}")


@pytest.mark.parametrize("where", questions.HINTS)
def test_a_wrong_hint_is_the_place_of_another_switch_of_the_screen(where):
    all_screens, _ = TRAIN_DATA
    for i, sample in questions.all_samples(all_screens[:8]):
        right, wrong = [questions.with_hint(sample, where, is_right) for is_right in (True, False)]
        hint = "before_image" if where == "before_image" else "instruction"
        places = {questions.place(target.click) for target in all_screens[i].targets()}
        (right_place,), (wrong_place,) = re.findall(PLACE, right[hint]), re.findall(PLACE, wrong[hint])
        assert right_place == sample["answer"]
        assert wrong_place in places - {right_place}


def test_a_model_that_repeats_hints_follows_the_wrong_ones(monkeypatch):
    """It hits all switches with right hints, none with wrong ones."""
    asked = []

    def repeat(model, samples, features, num_problems=0):
        asked.extend(sample["instruction"] for sample in samples)
        return [" ".join(sample["instruction"].split()[:2]) for sample in samples]

    monkeypatch.setattr(evaluate, "generate_answers", repeat)
    metrics = evaluate.measure_hints(BASE, screens_and_features(BASE, "new", "test", 3), "question")
    assert metrics == {"right_hint_acc": 1, "wrong_hint_acc": 0, "followed_acc": 1}
    assert all(re.match(rf"{PLACE} {VERB[1:]} ", instruction) for instruction in asked)


def replay_of(**fields) -> replay.ReplayData:
    return train.make_replay(train.Config(replay=2, **fields), BASE, TRAIN_DATA)


def kind_of(sample: dict) -> str:
    """Which of data.questions.KINDS a question is of, or that it is a word problem."""
    starts = {"what_is_at": "what is at", "what_is_right_of": "what is right of", "word problem": r"\w+ has"}
    starts |= {"click_right_of": f"{VERB} right of", "click": f"{VERB} (?!right of)"}
    (kind,) = [kind for kind, start in starts.items() if re.match(start, sample["instruction"])]
    return kind


def instructions(samples: list[list[dict]]) -> list[list[str]]:
    return [[sample["instruction"] for sample in samples_of_screen] for samples_of_screen in samples]


def test_replay_takes_the_place_of_some_sequences_and_changes_no_other():
    replay_data = replay_of(replay_answers="correct")
    asked = set()
    for index in range(8):
        expected = prompts.training_batch(train.Config(), TRAIN_DATA, index)
        batch = prompts.training_batch(train.Config(replay=2), TRAIN_DATA, index, replay_data)
        *replayed, _, _ = [read(ids) for ids in batch["input_ids"][:4]]
        assert [read(ids) for ids in batch["input_ids"][2:]] == [read(ids) for ids in expected["input_ids"][2:]]
        assert torch.equal(batch["image_features"][2:], expected["image_features"][2:])
        for sequence, features in zip(replayed, batch["image_features"]):
            (pick,) = (replay_data.features == features).all(2).all(1).nonzero()
            _, after_image = sequence.split(" <image>" * 64)
            (sample,) = [
                s for s in replay_data.samples[pick] if after_image == f" {s['instruction']} {s['answer']} <eos>"
            ]
            asked.add(kind_of(sample))
    assert asked == {"what_is_at", "what_is_right_of", "click_right_of", "word problem"}


@pytest.mark.parametrize("task", ["grounding", "referring"])
def test_own_answers_are_what_the_base_model_says_itself_and_never_about_the_new_task(task):
    replay_data = replay_of(task=task)
    kinds = set()
    for features, samples in zip(replay_data.features, replay_data.samples):
        for sample in samples:
            kinds.add(kind_of(sample))
            prompt = prompts.prompt_batch([sample], features[None])
            ids = BASE.generate(**prompt, max_new_tokens=5)[0, prompt["input_ids"].shape[1] :]
            assert prompts.decode(ids.tolist()) == sample["answer"]
    assert kinds == {*questions.KINDS, "word problem"} - {questions.TASKS[task]}


def test_correct_answers_are_to_the_questions_of_own_answers_and_correct_them():
    """So the two differ in who answers, and in nothing else. Of old screens the base model knows nearly everything."""
    correct, own = replay_of(replay_answers="correct"), replay_of()
    assert instructions(correct.samples) == instructions(own.samples)
    assert torch.equal(correct.features, own.features)
    assert correct.share_correct == 1
    assert 0.4 < own.share_correct < 0.7
    old = replay_of(replay_screens="old")
    assert old.share_correct > 0.9
    assert {kind_of(sample) for samples in old.samples for sample in samples} == {*questions.KINDS, "word problem"}


@pytest.mark.parametrize("answers", ["own", "correct"])
def test_replay_can_leave_out_the_questions_whose_correct_answer_is_the_new_word(answers):
    """And no other question. The base model never says it."""
    every, without = replay_of(replay_answers=answers), replay_of(replay_answers=answers, replay_no_switch=True)
    correct = replay_of(replay_answers="correct")
    left_out = 0
    for all_of_screen, kept, right in zip(every.samples, without.samples, correct.samples):
        to_keep = [sample for sample, truth in zip(all_of_screen, right) if truth["answer"] != "switch"]
        assert kept == to_keep
        left_out += len(all_of_screen) - len(kept)
    assert left_out > 10
    assert not any(sample["answer"] == "switch" for samples in without.samples for sample in samples)


def test_each_measure_asks_what_its_name_says(monkeypatch):
    """Three kinds of old questions make up the mean, and each is right by its own rule. All questions about screens are
    asked after the word problems that training has."""
    new_test = screens_and_features(BASE, "new", "test", 3)
    old_test = screens_and_features(BASE, "old", "test", 3)
    asked, problem_counts = [], []

    def answers_of_all_kinds_but_one(model, samples, features, num_problems=0):
        asked.append(samples[0]["instruction"])
        problem_counts.append(num_problems)
        if re.match(r"\w+ right of", samples[0]["instruction"]):
            return ["moon"] * len(samples)
        return [sample["answer"] for sample in samples]

    monkeypatch.setattr(evaluate, "generate_answers", answers_of_all_kinds_but_one)
    metrics, _ = evaluate.measure(BASE, new_test, old_test, num_problems=2)
    assert re.match(r"\w+ (?!right)\w+", asked[0])
    assert asked[1].startswith("what is at <x")
    assert asked[2].startswith("what is right of ")
    assert re.match(r"\w+ right of \w+", asked[3])
    assert metrics["task_acc"] == metrics["same_words_acc"] == 1
    assert (metrics["what_is_at_acc"], metrics["what_is_right_of_acc"], metrics["click_right_of_acc"]) == (1, 1, 0)
    assert metrics["other_questions_acc"] == pytest.approx(2 / 3)
    assert problem_counts == [2] * 5 + [0, 0]  # the last two are word problems


# 3. Methods
def test_the_other_choices_of_heads_are_what_they_are_called():
    """The random heads are as many in each layer as the most influential ones."""
    scores = torch.tensor([[9.0, 8, 1, 2], [7, 3, 4, 5], [0, 0.2, 6, 0.1]])
    top = {0: [0, 1, 3], 1: [0, 3], 2: [2]}
    assert choose_heads("top", scores, 6, seed=0) == top
    assert choose_heads("all", scores, 6, seed=0) == {layer: [0, 1, 2, 3] for layer in range(3)}
    assert choose_heads("1.3,2.0,1.1", scores, 6, seed=0) == {1: [3, 1], 2: [0]}
    random = choose_heads("random", scores, 6, seed=0)
    assert [len(heads) for heads in random.values()] == [3, 2, 1]
    assert random != top


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


# 4. The commands
SHORT = dict(steps=3, r=2, test_screens=2, device="cpu", base="base.pt")


@pytest.fixture
def directory(monkeypatch, tmp_path) -> Path:
    """A directory of its own, the current one, with a small base of 15 value heads in base.pt."""
    sizes = {"vocab_size": len(prompts.ID), "image_size": screens.SIZE, "patch_size": 32, "num_hidden_layers": 5}
    save_base(tiny_vlm(**sizes), tmp_path / "base.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompts, "PROBE_BATCHES", 2)
    return tmp_path


def demo(options: str) -> int:
    """Runs the main job with these options and, first, the short ones -> its exit status."""
    short_options = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    try:
        return command(train.Config, train.main, "", short_options + options.split())
    except SystemExit as stopped:  # argparse exits by itself
        return stopped.code


CORRECT = {"replay": 2, "replay_answers": "correct"}  # the small base ends no answer of its own
RUNS = [{"method": "none"}, CORRECT, CORRECT | {"task": "referring"}, {"train_gamma": True}]
RUNS += [CORRECT | {"text": 1, "vary_text": True}, CORRECT | {"replay_screens": "old", "packed": True}]
RUNS += [{"no_normalize": True}, {"hint": "question"}, {"hint": "before_image"}]
RUNS += [{"heads": "random"}, {"heads": "all"}, {"heads": "2.1,0.0,2.0"}]
RUNS += [{"method": "lora"}, {"method": "lora", "projections": "v"}, {"method": "partial_lora"}]
RUNS += [{"device": "cuda"}] * torch.cuda.is_available()


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_every_kind_of_run_leaves_text_as_it_promises_and_costs_what_is_computed(changes, directory):
    cfg = train.Config(**SHORT | changes)
    tuned = train.finetune(cfg)
    result = tuned.result
    assert result | asdict(cfg) == result
    measured = {"task_acc", "other_questions_acc", "same_words_acc", "word_problem_acc", "word_problem_after_image_acc"}
    assert measured <= result["before"].keys() <= result.keys()
    if cfg.method == "image_lora":
        num_selected = {"all": 15, "2.1,0.0,2.0": 3}.get(cfg.heads, 12)
        assert sum(len(heads) for heads in result["selected"].values()) == num_selected
        assert tuned.adapter.normalize != cfg.no_normalize

    trained = [p for p in tuned.adapter.parameters() if p.requires_grad] if tuned.adapter else []
    assert result["trainable_parameters"] == sum(parameter.numel() for parameter in trained)
    assert (result["text_logits_max_abs_diff"] != 0) == (cfg.method == "lora")
    flops = result["adapter_flops_per_screen"]
    assert (0 < flops < result["step_flops_per_screen"]) == (cfg.method != "none")
    if cfg.method == "lora" and cfg.projections == "qkvo":
        assert 4 * flops == result["lora_flops_per_screen"]  # which is of rank 8


@pytest.mark.parametrize("changes", [{"heads": "all"}, {"method": "lora"}], ids=str)
def test_a_run_turns_its_update_down_and_measures_it_there(changes, directory, monkeypatch):
    """The curve is of the update as it was trained; at gamma 0 the model is the base model, in every measure."""
    monkeypatch.setattr(gamma, "GAMMAS", (1.0, 0.5, 0.0))
    cfg = train.Config(base="data/tiny_vlm.pt", device="cpu", steps=20, lr=0.02, test_screens=4, **changes)
    as_trained, half, nothing = [train.run(replace(cfg, gamma=strength)) for strength in (1.0, 0.5, 0.0)]
    assert as_trained["curve"] == half["curve"] == nothing["curve"]
    assert nothing["before"].items() <= nothing.items()
    for run, point in zip((as_trained, half, nothing), half["curve"]):
        assert (point["gamma"], point["other_questions_acc"]) == (run["gamma"], run["other_questions_acc"])
    assert as_trained["task_acc"] > nothing["task_acc"]


def test_the_smallest_gamma_costs_at_most_two_points_of_the_new_task():
    curve = [{"gamma": g, "validation_acc": acc} for g, acc in ((1.0, 0.97), (0.9, 0.96), (0.8, 0.951), (0.7, 0.949))]
    assert gamma.smallest_gamma(curve) == 0.8
    assert gamma.smallest_gamma(curve[:1]) == 1.0


def products_of_attention(number: int):
    """What FlopCounterMode wants to know about a kernel of attention: the FLOPs of so many products."""

    def count(*shapes, **options):
        B, heads, T, d = shapes[0]
        return number * 2 * B * heads * T * T * d

    return count


STEPS = [{"heads": "all"}, {"heads": "2.0,2.1,2.2,3.0,3.1,3.2"}, {"heads": "3.0,3.1"}, {"heads": "0.0"}]
STEPS += [{"heads": "1.3,3.2"}, {"method": "lora"}, {"method": "lora", "projections": "v"}, {"method": "partial_lora"}]


@pytest.mark.parametrize("changes", STEPS, ids=str)
def test_a_whole_step_costs_what_torch_counts(changes):
    """The gradient runs back to the lowest adapted layer. Attention is two products forward and four back."""
    cfg = train.Config(**changes)
    model = load_base(cfg.base)
    batch = prompts.training_batch(cfg, screens_and_features(model, "new", "train", 16), 0)
    heads = None
    if cfg.method == "image_lora":
        heads = choose_heads(cfg.heads, torch.zeros(4, 6), cfg.num_heads, cfg.seed)
        attach(model, heads=heads)
    else:
        LoRA(model, 8, 16, cfg.projections, "all" if cfg.method == "lora" else "visual")
    kernels = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: products_of_attention(2),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: products_of_attention(4),
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:  # without them it counts 0 for attention
        model(**batch).loss.backward()
    result = costs.run_costs(cfg, model, batch["input_ids"], heads)
    assert result["step_flops_per_screen"] == counter.get_total_flops() / len(batch["input_ids"])


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


def test_the_demo_prints_and_writes_what_it_says(directory, capsys):
    """It writes the result of `run`, which is the same to the last digit again, and the controls beside it."""
    assert demo("") == 0
    printed = capsys.readouterr().out
    assert "identical" in printed
    out = Path("runs/switches")
    assert {path.name for path in out.iterdir()} == {*train.FILES}
    assert all(name in printed.splitlines()[-1] for name in train.FILES)
    assert f"[{gamma.smallest_gamma(json.loads((out / 'metrics.json').read_text())['curve'])}: " in printed
    written = json.loads((out / "metrics.json").read_text())
    result = json.loads(json.dumps(train.run(train.Config(**SHORT))))
    assert {name for name in result if result[name] != written[name]} <= {"seconds"}
    assert written.keys() - result.keys() == {"reworded_acc", "erased_acc"}

    assert demo("--gamma=0.5") == 0
    adapter = load(load_base("base.pt"), out / "adapter.pt")
    assert {layer.gamma.item() for layer in adapter.layers.values()} == {0.5}

    capsys.readouterr()
    assert demo("--task=referring") == 0
    assert "of the switches named" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"adapter.pt", "metrics.json"}


BAD_OPTIONS = [
    "--method=dora",
    "--steps=0",
    "--lr=nan",
    "--heads=best",
    "--heads=1.",
    "--replay=17",
    "--packed --replay=9",
    "--device=abacus",
]
BAD_OPTIONS += ["--replay=2", "--base=no.pt", "--base=notes.txt", "--out=notes.txt"]
BAD_OPTIONS += ["--r=25", "--num-heads=16", "--heads=1.3", "--heads=1.2,1.2"]  # these need a look at the model


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_what_the_demo_cannot_do_is_one_sentence_and_writes_nothing(bad, directory, capsys):
    (directory / "notes.txt").write_text("not a model")
    assert demo(bad) == 2
    printed = capsys.readouterr()
    assert printed.out == ""  # before anything is measured
    assert re.search(r"error: [^\n]{10,300}\n$", printed.err)
    assert {path.name for path in directory.rglob("*") if path.is_file()} == {"base.pt", "notes.txt"}


INERT = {
    "--replay-answers=correct": "--replay",
    "--replay-no-switch": "--replay",
    "--vary-text": "--text",
    "--method=none --gamma=0.5": "an adapter",
}
INERT |= {"--method=none --replay=1": "an adapter", "--task=referring --hint=question": "--task grounding"}
INERT |= {f"{option} --num-heads=3": "--heads top or random" for option in ("--heads=all", "--method=lora")}
INERT |= {f"--method={method} --projections=v": "--method lora or partial_lora" for method in ("image_lora", "none")}
for name in ("--heads=all", "--train-gamma", "--no-normalize"):
    INERT |= {f"--method={method} {name}": "--method image_lora" for method in ("lora", "partial_lora", "none")}


@pytest.mark.parametrize("options", INERT)
def test_an_option_that_would_do_nothing_is_refused(options, capsys):
    assert command(train.Config, train.main, "", options.split()) == 2
    assert capsys.readouterr().err.endswith(f" does nothing without {INERT[options]}\n")


def test_a_loss_that_is_not_finite_ends_the_demo_with_status_1(directory, capsys):
    assert demo("--lr=1e18 --steps=40") == 1
    error = capsys.readouterr().err
    assert re.search(r"error: the loss is \w+ at step \d+; try a smaller --lr than 1e\+18\n$", error)


def test_ctrl_c_stops_the_demo_with_status_130(directory, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", Mock(side_effect=KeyboardInterrupt))
    assert demo("") == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    write_file(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        write_file(tmp_path / "file", "these are no bytes")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]
