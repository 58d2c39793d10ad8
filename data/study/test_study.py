"""The evidence: how the base is made, how the comparison chooses, stops and goes on, and what the pages show."""

import json
import math
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import command, costs, prompts, screens, walk, words
from data.study import BASES, TWINS, bench, compare, controls, pretrain
from data.words import parse_point
from imagelora import safe_save
from tiny_vlm import TinyVLM, TinyVLMConfig

ROOT = Path(train.__file__).parent
COMMANDS = {
    "train": (train.Config, train.main_job),
    "walk": (train.Config, walk.walk),
    "costs": (costs.CostsConfig, costs.print_costs),
    "compare": (compare.CompareConfig, compare.compare),
    "controls": (controls.ControlsConfig, controls.print_controls),
    "pretrain": (pretrain.PretrainConfig, pretrain.pretrain),
}


@pytest.fixture
def directory(monkeypatch, tmp_path) -> Path:
    """A directory of its own, the current one, with a small base of random weights in base.pt."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "vision_hidden_size": 24, "vision_num_hidden_layers": 1}
    model = TinyVLM(TinyVLMConfig(vocab_size=len(words.VOCABULARY), patch_size=32, **sizes))
    safe_save({"config": asdict(model.config), "state": model.state_dict()}, tmp_path / "base.pt")
    monkeypatch.chdir(tmp_path)
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


class SerialPool:
    """A pool that runs everything in this process."""

    imap = map

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class SerialContext:
    """Stands in for multiprocessing's context."""

    def Pool(self, *arguments):
        return SerialPool()


# 1. Pretraining and the rules that need no fine-tuning
def test_pretraining_makes_a_base_and_its_twin_which_differ_in_their_last_questions(call, monkeypatch):
    """Of few steps and screens. The demo takes the files, and the controls are printed for both."""
    monkeypatch.setattr(controls, "SCREENS", 2)
    monkeypatch.setattr(pretrain, "POOL_SIZES", (30, 20))
    status, _, error = call("pretrain --see=2 --ground=2 --relate=1 --out=new.pt")
    assert status == 0, error
    record = json.loads(Path("new.json").read_text())
    assert record["relate"] == 1
    assert "relation_acc" in record["source"]
    assert "reworded_acc" in record["switches"]

    assert call("pretrain --start=new.grounded.pt --relate=1 --out=again.pt")[0] == 0
    assert call("pretrain --start=new.grounded.pt --relate=1 --out=twin.pt --unskilled")[0] == 0
    new, again, twin = (prompts.load_base(path).state_dict() for path in ("new.pt", "again.pt", "twin.pt"))
    assert all(torch.equal(new[name], again[name]) for name in new)
    assert not all(torch.equal(new[name], twin[name]) for name in new)
    assert call("train --method=none --steps=1 --test-screens=2 --base=new.pt")[0] == 0

    monkeypatch.setattr(controls, "BASES", {1: "new.pt", 2: "missing.pt"})
    monkeypatch.setattr(controls, "TWINS", {1: "twin.pt", 2: "twin.pt"})
    status, printed, error = call("controls")
    assert status == 0, error
    assert len(re.findall(r"^\|.*\|[\d.]+\|[\d.]+, [\d.]+\|$", printed, re.M)) == 7
    assert len(re.findall(r"^\|\w+\.pt\|[\d.]+\|(?:\d+, ){3}\d+\|(?:\d+, ){3}\d+\|$", printed, re.M)) == 3


def test_the_controls_are_printed_for_the_bases_that_exist_here(call, monkeypatch):
    """A fresh clone has only the first base, and no twin."""
    monkeypatch.setattr(controls, "SCREENS", 2)
    status, printed, error = call("controls")
    assert status == 0, error
    assert len(re.findall(r"^\|.*\|[\d.]+\|none here\|$", printed, re.M)) == 7
    assert re.search(r"^\|data/tiny_vlm.pt\|[\d.]+\|(\d+, ){3}\d+\|(\d+, ){3}\d+\|\Z", printed.strip(), re.M)


def test_pretraining_asks_what_is_right_of_a_name_and_where_that_is():
    rng = np.random.default_rng(0)
    samples = []
    for i in range(9):
        samples += pretrain.neighbour_samples(screens.draw_screen("source", "pretrain", i), rng)
    assert all("right of" in sample["instruction"] for sample in samples)
    names = [sample for sample in samples if sample["instruction"].startswith("what is")]
    places = [sample for sample in samples if parse_point(sample["answer"])]
    assert len(names) + len(places) == len(samples)
    assert len(names) == len(places) > 0


def test_pretraining_asks_a_word_problem_after_some_images():
    rng = np.random.default_rng(0)
    samples = [[{"instruction": "click wifi"}] for _ in range(9)]
    pretrain.insert_word_problems(samples, rng)
    counts = [sum("how many" in sample["instruction"] for sample in of_screen) for of_screen in samples]
    assert {*counts} == {0, 1}


def test_a_rule_is_found_on_some_answers_and_judged_on_others():
    """Each click is moved by the offset that is best for its name. No click is a miss, whatever the rule."""
    box_a, box_a_too, box_b = (0, 0, 16, 16), (8, 8, 24, 24), (64, 64, 80, 80)  # pixels; a bin has 8
    assert controls.best_offset([((28, 4), box_a), ((36, 12), box_a_too)]) in [
        (dx, dy) for dx in (-24, -16) for dy in (0, 8)
    ]
    validation = [
        (None, {"bbox": box_a, "name": "a"}, (28, 4)),
        (None, {"bbox": box_a_too, "name": "a"}, (36, 12)),
        (None, {"bbox": box_b, "name": "b"}, (4, 4)),
    ]
    assert controls.offset_rule(validation, validation) == 1
    test = [
        (None, {"bbox": (40, 40, 48, 48), "name": "a"}, (68, 44)),
        (None, {"bbox": (40, 40, 48, 48), "name": "b"}, None),
    ]
    assert controls.offset_rule(validation, test) == 1 / 2


def test_a_linear_map_reads_what_is_there_and_nothing_else():
    """From features that hold the class it reads the class, on new ones, too; from noise it is as good as chance."""
    torch.manual_seed(0)
    x = torch.randn(800, 20)
    classes = x[:, :4].argmax(1)  # one of four
    assert controls.linear_map_accuracy(x[:400], classes[:400], x[400:], classes[400:]) > 0.85
    noise = torch.randn(800, 20)
    assert controls.linear_map_accuracy(noise[:400], classes[:400], noise[400:], classes[400:]) < 0.35


def test_the_tokens_of_a_switch_are_those_at_its_place(monkeypatch):
    """In the lowest layer they are the normalized features of its patches."""
    monkeypatch.setattr(controls, "SCREENS", 3)
    screens_of_split, features = prompts.screens_and_features(BASES[1], "switches", "test", 3, "cpu")
    x, names = controls.switch_tokens(BASES[1], "test", "cpu")
    targets = [(i, target) for i, screen in enumerate(screens_of_split) for target in screen.targets()]
    assert x.shape == (4, len(targets), 96)
    assert [(*screens.LABELS, *screens.ICONS)[name] for name in names] == [target.name for _, target in targets]
    norm = prompts.load_base(BASES[1]).language_model.layers[0].input_layernorm
    for (i, target), of_switch in zip(targets, x[0]):
        left, top, right, bottom = target.click
        patches = [
            row * 8 + column
            for row in range(top // 16, (bottom - 1) // 16 + 1)
            for column in range(left // 16, (right - 1) // 16 + 1)
        ]
        torch.testing.assert_close(of_switch, norm(features[i, patches]).mean(0))


# 2. The comparison
@pytest.mark.parametrize(
    "bad", ["compare --out=.", "compare --workers=0", "pretrain --out=no/b.pt", "pretrain --start=no.pt"]
)
def test_what_a_command_of_the_study_cannot_do_is_one_sentence_and_writes_nothing(bad, call, directory):
    (directory / "compare.json").write_text('[{"part": "ladder"}]')  # no comparison
    status, _, error = call(bad)
    assert status == 2
    assert "error: " in error
    assert len(error) < 300
    assert {path.name for path in directory.rglob("*") if path.is_file()} == {"base.pt", "compare.json"}


def rows_of(base: str, *accuracies: float) -> list[dict]:
    """Rows of one base, with these accuracies on test and on validation screens."""
    return [{"base": base, "action_acc": accuracy, "validation_acc": accuracy} for accuracy in accuracies]


def test_the_chosen_rate_is_the_lowest_within_one_point_of_the_best():
    """In the mean over the bases."""
    tried = {
        0.01: rows_of("a", 0.96, 0.96),
        0.02: rows_of("a", 0.95, 1.0),
        0.04: rows_of("a", 0.98, 0.98),
        0.08: rows_of("a", 0.9, 0.97),
    }
    assert compare.best_rate(tried) == 0.04
    assert compare.chosen_rate(tried) == 0.02
    tried[0.01] = rows_of("a", 0.975, 0.975)
    assert compare.chosen_rate(tried) == 0.01


def test_a_cell_is_the_mean_over_bases_and_shows_each():
    rows = rows_of("a", 0.9) + rows_of("b", 0.8)
    assert compare.accuracy_on_each("action_acc")(rows) == "85.0 (90.0, 80.0)"
    assert compare.accuracy("action_acc")(rows) == "85.0"


class FakeRuns:
    """Takes the place of fine-tuning: the accuracy of a run follows from its learning rate alone."""

    def __init__(self, stop_after: int):
        self.done: list[train.Config] = []
        self.stop_after = stop_after

    def run(self, cfg: train.Config) -> dict:
        if len(self.done) == self.stop_after:
            self.stop_after = -1
            raise KeyboardInterrupt
        self.done.append(cfg)
        best = 0.005
        if cfg.base in TWINS.values():
            best = 0.02
        elif cfg.domain == "dark":
            best = 0.0003
        accuracy = 1 - abs(math.log2(cfg.lr / best)) / 50 if cfg.lr else 0.0
        fields = (
            "action_acc",
            "name_acc",
            "validation_acc",
            "word_problem_acc",
            "word_problem_after_image_acc",
            "source_acc",
            "word_problem_kl",
            "question_without_image_kl",
            "trainable_parameters",
            "adapter_flops_per_screen",
            "lora_flops_per_screen",
        )
        row = asdict(cfg) | dict.fromkeys(fields, accuracy)
        return row | {"lora_flops_per_screen": 1.0, "base_fingerprint": compare.fingerprint(cfg.base)}


@pytest.fixture
def fake_runs(directory, monkeypatch):
    """The comparison with fake runs and bases, in one process; it is stopped after 60 runs."""
    fake = FakeRuns(stop_after=60)
    monkeypatch.setattr(compare, "get_context", lambda method: SerialContext())
    monkeypatch.setattr(compare, "run", fake.run)
    monkeypatch.setattr(compare, "pretrain", lambda cfg: Path(cfg.out).write_text(cfg.out))
    monkeypatch.setattr(prompts, "ROOT", directory / "elsewhere")  # where a user may have made bases
    Path("data").mkdir()
    Path(BASES[1]).write_text("shipped")
    return fake


def test_the_comparison_goes_on_after_a_stop_and_runs_nothing_twice(call, fake_runs):
    assert call("compare --out=out")[0] == 130
    status, printed, error = call("compare --out=out")
    assert status == 0, error
    rows = json.loads(Path("out/compare.json").read_text())
    assert len(rows) == len(fake_runs.done) == len(set(fake_runs.done))
    assert call("compare --out=out")[:2] == (0, printed)
    assert len(fake_runs.done) == len(rows)


def test_a_base_is_fine_tuned_with_the_seed_that_it_was_pretrained_with(call, fake_runs):
    fake_runs.stop_after = -1
    assert call("compare --out=out")[0] == 0
    for cfg in fake_runs.done:
        assert cfg.base in (BASES.get(cfg.seed), TWINS[cfg.seed])
    assert {cfg.base for cfg in fake_runs.done} == {*BASES.values(), *TWINS.values()}


def test_replay_takes_the_rate_of_its_method_and_the_search_goes_on_elsewhere(call, fake_runs):
    """The fake runs are best at 0.005 on bases, at 0.02 on twins and below the grid on dark screens.

    They lose two points for each factor of two, so the chosen rate is the best one."""
    fake_runs.stop_after = -1
    assert call("compare --out=out")[0] == 0
    with_replay = {cfg.lr for cfg in fake_runs.done if cfg.replay and cfg.base in BASES.values()}
    assert with_replay == {0.005}
    on_twins = {cfg.lr for cfg in fake_runs.done if cfg.base in TWINS.values() and cfg.method != "none"}
    assert on_twins == {0.0025, 0.005, 0.01, 0.02, 0.04}
    on_dark_screens = {cfg.lr for cfg in fake_runs.done if cfg.domain == "dark" and cfg.method != "none"}
    assert on_dark_screens == {0.00125, 0.0025, 0.005, 0.01}


def test_rows_of_another_base_do_not_count_and_those_of_a_missing_base_do(call, fake_runs):
    fake_runs.stop_after = -1
    assert call("compare --out=out")[0] == 0
    before = len(fake_runs.done)
    of_first_twin = [cfg for cfg in fake_runs.done if cfg.base == TWINS[1]]
    Path(TWINS[1]).write_text("another")
    Path(BASES[2]).unlink()
    assert call("compare --out=out")[0] == 0
    assert len(fake_runs.done) == before + len(of_first_twin)


def test_every_line_and_column_of_the_tables_is_printed(call, fake_runs):
    fake_runs.stop_after = -1
    _, printed, _ = call("compare --out=out")
    lines = printed.splitlines()
    for table in compare.TABLES:
        titles = [table.title, *(column.title for column in table.columns)]
        start = lines.index(f"|{'|'.join(titles)}|")
        names = [line.split("|")[1] for line in lines[start + 2 : start + 2 + len(table.lines)]]
        assert names == list(table.lines)


def test_a_run_of_the_comparison_has_its_validation_accuracy_and_its_base_s_fingerprint(directory):
    """Beside the result of `train.run`."""
    cfg = train.Config(steps=1, num_heads=3, r=2, test_screens=2, device="cpu", base="base.pt")
    row = compare.run(cfg)
    assert row.keys() - train.run(cfg).keys() == {"validation_acc", "base_fingerprint"}
    assert row["base_fingerprint"] == compare.fingerprint("base.pt")


def test_the_bench_prints_a_ratio_for_each_method(capsys, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    monkeypatch.setattr(bench, "IDS", torch.tensor([[bench.IMAGE, 1, 2]]))
    bench.bench(bench.BenchConfig(rounds=1))
    ratios = re.findall(r"  \d\.\d{3}$", capsys.readouterr().out, re.M)
    assert len(ratios) == 4 * len(bench.METHODS[1:])


# 3. The pages
PAGES = ["README.md", "data/README.md", "data/study/README.md"]


def blocks_of(page: str) -> list[str]:
    """What stands in the page between lines of three backticks."""
    return re.findall(r"^```\w*\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_can_be_given(page):
    python = r"\bpython (?:-m data\.(?:study\.)?|(?=train))(\w+)(?:\.py)?(.*)"
    for name, options in re.findall(python, "\n".join(blocks_of(page))):
        if name in COMMANDS:
            settings_class, _ = COMMANDS[name]
            assert command(settings_class, lambda cfg: None, "", shlex.split(options, comments=True)) == 0


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_exist(page):
    targets = re.findall(r"(?:\]\(|src=\")(?!\w+:|#)([^)#\"\s]+)", (ROOT / page).read_text())
    assert targets
    for target in targets:
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_the_costs_of_a_page_are_as_the_command_prints_them(page, call):
    printed = call("costs")[1].splitlines()
    for block in blocks_of(page):
        if "values only" in block:
            assert set(block.splitlines()) <= set(printed)


def tables_of(text: str) -> dict[str, list[str]]:
    """{first cell of the header: the table's lines} of all Markdown tables."""
    tables = {}
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        lines = table.splitlines()
        tables[lines[0].split("|")[1]] = lines
    return tables


def test_the_tables_of_the_pages_are_those_that_the_comparison_prints(call, monkeypatch):
    """Whoever changes a run or a page sees it here. A page may leave out lines of a table, but no columns."""
    monkeypatch.setattr(compare, "get_context", lambda method: SerialContext())
    monkeypatch.setattr(compare, "run", None)  # nothing is missing
    printed = tables_of(call(f"compare --out={ROOT / 'data' / 'study'}")[1])
    num_tables = 0
    for page in PAGES:
        for title, lines in tables_of((ROOT / page).read_text()).items():
            if title in printed:
                num_tables += 1
                assert set(lines) <= set(printed[title]), title
    assert num_tables == len(printed)
