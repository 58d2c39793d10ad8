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
from data import costs, evaluate, prompts, questions, replay, screens
from data.base import load_base, save_base, screens_and_features
from data.command import command, write_file
from data.heads import choose_heads
from data.rivals import LoRA
from imagelora import attach, load
from test_imagelora import EARLY, TEXT, tiny_vlm

ROOT = Path(train.__file__).parent


BASE = load_base("data/tiny_vlm.pt")
TRAIN_DATA = screens_and_features(BASE, "switches", "train", 64)  # (screens, features [N, P, D])


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
    """It can click, name and relate on screens without switches, and clicks no switch."""
    record = json.loads((ROOT / "data/tiny_vlm.json").read_text())
    assert record["task_acc"] <= 0.02
    some_screens, features = screens_and_features(BASE, "source", "test", 12)
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
@pytest.mark.parametrize("history", [0, 2])
def test_a_training_batch_has_labels_on_answers_only_and_no_target_twice(task, history):
    """Five questions about a screen share a sequence. Word problems before the screen have no labels."""
    batch = prompts.training_batch(train.Config(task=task, history=history), TRAIN_DATA, 0)
    question = r"what is at <x\d+> <y\d+>" if task == "referring" else r"(?:click|tap|press|select) \w+(?: \w+)?"
    answer = r"((?:\w+ )?\w+ <eos>)" if task == "referring" else r"(<x\d+> <y\d+> <eos>)"
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        before, after = read(ids).split(" <image>" * 64)
        assert before.startswith("<bos>")
        assert before.count("how many") == history
        turns = re.fullmatch(rf"(?: {question} {answer}){{5}}", after)
        assert turns, after
        answers = re.findall(rf"{question} {answer}", after)
        assert read(labels[labels >= 0]) == " ".join(answers)
        assert torch.equal(ids[labels >= 0], labels[labels >= 0])


def test_a_varied_history_is_drawn_anew_for_each_step():
    """From none to --history word problems stand before all screens of a step."""
    counts = set()
    for index in range(20):
        batch = prompts.training_batch(train.Config(history=3, vary_history=True), TRAIN_DATA, index)
        counts_of_step = {read(ids).count("how many") for ids in batch["input_ids"]}
        assert len(counts_of_step) == 1
        counts |= counts_of_step
    assert counts == {0, 1, 2, 3}


def kinds_of_questions(screen: screens.Screen) -> dict:
    """{question with its true answer: its kind}, of all questions about a screen that replay can ask."""
    kind_of = {}
    for kind in questions.KINDS:
        for _, sample in questions.all_samples([screen], kind):
            question = re.sub(VERB, "click", sample["instruction"])
            kind_of[f"{question} {sample['answer']}"] = kind
    return kind_of


def test_replay_asks_old_questions_of_every_kind_and_changes_no_other_sequence():
    replay_data = replay.make_replay_data(BASE, TRAIN_DATA, "old", seed=1)
    kinds = set()
    for index in range(8):
        expected = prompts.training_batch(train.Config(), TRAIN_DATA, index)
        batch = prompts.training_batch(train.Config(replay=1), TRAIN_DATA, index, replay_data)
        replayed, *others = [read(ids) for ids in batch["input_ids"]]
        assert others == [read(ids) for ids in expected["input_ids"][1:]]
        assert torch.equal(batch["image_features"][1:], expected["image_features"][1:])

        *asked, first_problem, second_problem, end = replayed.split(" <image>" * 64)[1].split(" <eos>")
        assert len(asked) == prompts.QUESTIONS_PER_SCREEN
        assert "how many" in first_problem
        assert "how many" in second_problem
        assert end == ""
        (pick,) = (replay_data.features == batch["image_features"][0]).all(2).all(1).nonzero()
        kind_of = kinds_of_questions(replay_data.screens[pick])
        for text in asked:
            kinds.add(kind_of[re.sub(VERB, "click", text.strip())])
    assert kinds == set(questions.KINDS)


@pytest.mark.parametrize("task, replay_with", [("grounding", "own"), ("grounding", "own_old"), ("referring", "own")])
def test_replay_of_own_answers_holds_what_the_base_model_says_itself_and_never_asks_the_new_task(task, replay_with):
    cfg = train.Config(replay=1, replay_with=replay_with, task=task)
    replay_data = replay.make_replay_data(BASE, TRAIN_DATA, replay_with, cfg.seed, task)
    new_screens, _ = TRAIN_DATA
    assert (replay_data.screens == new_screens[:16]) == (replay_with == "own")
    starts = {"what_is_at": "what is at", "what_is_right_of": "what is right of"}
    starts |= {"click_right_of": f"{VERB} right of", "click": f"{VERB} (?!right of)"}
    kinds = set()
    for features, samples in zip(replay_data.features, replay_data.samples):
        assert len(samples) <= prompts.QUESTIONS_PER_SCREEN
        for sample in samples:
            kinds.update(kind for kind, start in starts.items() if re.match(start, sample["instruction"]))
            prompt = prompts.prompt_batch([sample], features[None])
            ids = BASE.generate(**prompt, max_new_tokens=5)[0, prompt["input_ids"].shape[1] :]
            assert prompts.decode(ids.tolist()) == sample["answer"]
    assert kinds == set(questions.KINDS) - {questions.TASKS[task]}
    replayed = read(prompts.training_batch(cfg, TRAIN_DATA, 0, replay_data)["input_ids"][0])
    assert any(all(sample["answer"] in replayed for sample in samples) for samples in replay_data.samples)


def test_replay_of_new_true_answers_asks_what_own_answers_ask_and_corrects_them():
    """So the two differ in who answers, and in nothing else."""
    new, own = [replay.make_replay_data(BASE, TRAIN_DATA, replay_with, seed=1) for replay_with in ("new", "own")]
    agreements = []
    for screen, true_samples, own_samples in zip(new.screens, new.samples, own.samples):
        assert [sample["instruction"] for sample in own_samples] == [sample["instruction"] for sample in true_samples]
        switches = {questions.description(screen, name): name.click for name in screen.targets()}
        for true, own_sample in zip(true_samples, own_samples):
            question, _, name = true["instruction"].partition(" right of ")
            if question.startswith("what is at "):
                place = question.removeprefix("what is at ")
                there = [element.full_name() for element in screen.elements if questions.place(element.bbox) == place]
                assert true["answer"] in there
            elif question == "what is":
                assert true["answer"] == "switch"
            else:
                assert true["bbox"] == switches[name]
                assert true["answer"] == questions.place(switches[name])
            agreements.append(evaluate.is_correct(true, own_sample["answer"]))
    assert 0.3 < own.share_correct < 0.6
    assert own.share_correct == pytest.approx(sum(agreements) / len(agreements))
    assert new.share_correct is None


def test_each_measure_asks_what_its_name_says(monkeypatch):
    """Three kinds of old questions make up the mean, and each is right by its own rule. All questions about screens are
    asked after the word problems that training has."""
    switch_test = screens_and_features(BASE, "switches", "test", 3)
    source_test = screens_and_features(BASE, "source", "test", 3)
    asked, histories = [], []

    def answers_of_all_kinds_but_one(model, samples, features, history=0):
        asked.append(samples[0]["instruction"])
        histories.append(history)
        if re.match(r"\w+ right of", samples[0]["instruction"]):
            return ["moon"] * len(samples)
        return [sample["answer"] for sample in samples]

    monkeypatch.setattr(evaluate, "generate_answers", answers_of_all_kinds_but_one)
    metrics, _ = evaluate.measure(BASE, switch_test, source_test, history=2)
    assert re.match(r"\w+ (?!right)\w+", asked[0])
    assert asked[1].startswith("what is at <x")
    assert asked[2].startswith("what is right of ")
    assert re.match(r"\w+ right of \w+", asked[3])
    assert metrics["task_acc"] == metrics["same_words_acc"] == 1
    assert (metrics["what_is_at_acc"], metrics["what_is_right_of_acc"], metrics["click_right_of_acc"]) == (1, 1, 0)
    assert metrics["other_questions_acc"] == pytest.approx(2 / 3)
    assert histories == [2] * 5 + [0, 0]  # the last two are word problems


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


RUNS = [{"method": "none"}, {"replay": 2}, {"task": "referring", "replay": 1}, {"train_gamma": True}]
RUNS += [{"history": 1, "vary_history": True, "replay": 1, "replay_with": "own"}, {"no_normalize": True}]
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
    monkeypatch.setattr(evaluate, "GAMMAS", (1.0, 0.5, 0.0))
    cfg = train.Config(base="data/tiny_vlm.pt", device="cpu", steps=20, lr=0.02, test_screens=4, **changes)
    as_trained, half, nothing = [train.run(replace(cfg, gamma=gamma)) for gamma in (1.0, 0.5, 0.0)]
    assert as_trained["curve"] == half["curve"] == nothing["curve"]
    assert nothing["before"].items() <= nothing.items()
    for run, point in zip((as_trained, half, nothing), half["curve"]):
        assert (point["gamma"], point["other_questions_acc"]) == (run["gamma"], run["other_questions_acc"])
    assert as_trained["other_questions_acc"] != nothing["other_questions_acc"]


def test_the_smallest_gamma_costs_at_most_two_points_of_the_new_task():
    curve = [{"gamma": g, "validation_acc": acc} for g, acc in ((1.0, 0.97), (0.9, 0.96), (0.8, 0.951), (0.7, 0.949))]
    assert evaluate.smallest_gamma(curve) == 0.8
    assert evaluate.smallest_gamma(curve[:1]) == 1.0


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
    batch = prompts.training_batch(cfg, screens_and_features(model, "switches", "train", 8), 0)
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
    assert f"[{evaluate.smallest_gamma(json.loads((out / 'metrics.json').read_text())['curve'])}: " in printed
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


BAD_OPTIONS = ["--method=dora", "--steps=0", "--lr=nan", "--heads=best", "--heads=1.", "--replay=9", "--device=abacus"]
BAD_OPTIONS += ["--base=no.pt", "--base=notes.txt", "--out=notes.txt"]
BAD_OPTIONS += ["--r=25", "--num-heads=16", "--heads=1.3", "--heads=1.2,1.2"]  # these need a look at the model


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_what_the_demo_cannot_do_is_one_sentence_and_writes_nothing(bad, directory, capsys):
    (directory / "notes.txt").write_text("not a model")
    assert demo(bad) == 2
    printed = capsys.readouterr()
    assert printed.out == ""  # before anything is measured
    assert re.search(r"error: [^\n]{10,300}\n$", printed.err)
    assert {path.name for path in directory.rglob("*") if path.is_file()} == {"base.pt", "notes.txt"}


INERT = {"--replay-with=own": "--replay", "--vary-history": "--history", "--method=none --gamma=0.5": "an adapter"}
INERT |= {"--method=none --replay=1": "an adapter"}
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
