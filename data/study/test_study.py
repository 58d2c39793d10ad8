"""The evidence: how the base is made, how the comparison chooses, stops and goes on, and what the pages name."""

import json
import math
import re
import shlex
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from data import command, prompts, screens, test_demo
from data.study import BASES, TWINS, bench, compare, controls, pretrain
from data.words import parse_point

ROOT, say, COMMANDS = test_demo.ROOT, test_demo.say, test_demo.COMMANDS
SERIAL = Mock(Pool=lambda *of_a_pool: nullcontext(Mock(imap=map)))  # a pool of this one process
COMMANDS |= {
    "compare": (compare.CompareConfig, compare.compare),
    "controls": (controls.ControlsConfig, controls.print_rules),
    "pretrain": (pretrain.PretrainConfig, pretrain.pretrain),
}


def test_pretraining_makes_a_base_and_its_twin_which_differ_in_their_last_questions(say, monkeypatch):
    """Of few steps and screens: files that the demo takes. The rules that need no fine-tuning are told of both."""
    monkeypatch.setattr(controls, "SCREENS", 2)
    monkeypatch.setattr(pretrain, "POOL_SIZES", (30, 20))
    status, _, error = say("pretrain --see=2 --ground=2 --relate=1 --out=new.pt")
    assert status == 0, error
    record = json.loads(Path("new.json").read_text())
    assert "relation_acc" in record["source"] and "reworded_acc" in record["switches"] and record["relate"] == 1
    last = []
    for out, option in (("again", ""), ("twin", "--unskilled")):
        assert say(f"pretrain --start=new.grounded.pt --relate=1 --out={out}.pt {option}")[0] == 0
        last.append(prompts.load_base(f"{out}.pt").state_dict())
    new = prompts.load_base("new.pt").state_dict()
    assert [all(torch.equal(new[name], other[name]) for name in new) for other in last] == [True, False]
    assert say("train --method=none --steps=1 --test-screens=2 --base=new.pt")[0] == 0
    monkeypatch.setattr(controls, "BASES", ("new.pt",) * 3)
    monkeypatch.setattr(controls, "TWINS", ("twin.pt",) * 3)
    status, printed, error = say("controls")
    assert status == 0 and len(re.findall(r"^\|.*\|([\d., ]+)\|([\d., ]+)\|$", printed, re.M)) == 7, error


def test_what_pretraining_asks_of_a_name_s_neighbour_is_its_name_and_its_place_and_words_stand_after_images():
    drawn = [screens.draw_screen("source", "pretrain", i) for i in range(9)]
    rng = test_demo.np.random.default_rng(0)
    asked = [pretrain.neighbour_samples(screen, rng) for screen in drawn]
    places = [bool(parse_point(sample["answer"])) for samples in asked for sample in samples]
    assert all("right of" in sample["instruction"] for samples in asked for sample in samples) and len({*places}) == 2
    pretrain.insert_word_problems(asked, rng)
    problems = [["how many" in sample["instruction"] for sample in samples].count(True) for samples in asked]
    assert {*problems} == {0, 1}


@pytest.mark.parametrize(
    "bad", ["compare --out=.", "compare --workers=0", "pretrain --out=no/b.pt", "pretrain --start=no.pt"]
)
def test_what_a_command_of_the_study_cannot_do_is_one_sentence_and_writes_nothing(bad, say):
    Path("compare.json").write_text('[{"part": "ladder"}]')  # no comparison
    status, _, error = say(bad)
    assert status == 2 and "error: " in error and len(error) < 300, error
    assert {path.name for path in Path().rglob("*") if path.is_file()} == {"base.pt", "compare.json"}
    assert say("controls")[0] == 2  # there are no bases


def test_the_comparison_chooses_rates_stops_goes_on_and_runs_nothing_twice(say, monkeypatch):
    """The rate is the best of the mean over the bases, of equals the lower; base i has the seeds i, 10 + i, 20 + i."""
    done, made = [], set()
    monkeypatch.setattr(compare, "get_context", lambda method: SERIAL)

    def run(cfg):
        done.append(cfg)
        if len(done) == 61:
            raise KeyboardInterrupt
        best = 0.01 if cfg.method == "lora" else math.sqrt(0.02 * 0.04)  # between two
        accuracy = round(1 - abs(math.log(cfg.lr / best)) / 9 if cfg.lr else 0, 9)
        names = "action_acc validation_acc word_problem_acc word_problem_after_image_acc source_acc".split()
        names += ["trainable_parameters", "adapter_flops_per_screen"]
        base = {"base_fingerprint": compare.fingerprint(cfg.base)}
        return asdict(cfg) | {"device": "cpu"} | base | dict.fromkeys(names, accuracy)

    def make(cfg):
        made.add(cfg.out)
        Path(cfg.out).write_text(cfg.out)

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare, "pretrain", make)
    monkeypatch.setattr(compare, "ROOT", Path("elsewhere"))  # where a user may have made bases
    Path("data").mkdir()
    Path(BASES[0]).write_text("shipped")
    assert say("compare --out=out")[0] == 130
    status, printed, error = say("compare --out=out")
    rows = json.loads(Path("out/compare.json").read_text())
    assert status == 0 and len(rows) + 1 == len(done) == len(set(done)) + 1, error
    assert sum(row["method"] != "none" for row in rows) <= 380
    own = {(base, i) for bases in (BASES, TWINS) for i, base in enumerate(bases, 1)}
    assert {(row["base"], row["seed"] % 10) for row in rows} == own
    assert {row["seed"] for row in rows if row["heads"] == "random"} == {1, 2, 3, 11, 12, 13, 21, 22, 23}
    assert {base for base, _ in own} - made == {"data/tiny_vlm.pt"}
    assert {row["lr"] for row in rows if row["replay"] or row["num_heads"] < 12} == {0.01, 0.02}
    assert {row["lr"] for row in rows if row["base"] in TWINS} == {0.0, 0.005, 0.01, 0.02, 0.04}  # and neighbours
    lines = [line for lines, _ in compare.TABLES.values() for line in lines] + [*compare.TUNED]
    assert all(printed.count(f"\n|{line}|") == lines.count(line) for line in lines)
    assert printed.count("**") == 2 * (len(compare.TABLES) + 1 + len(compare.TUNED))  # titles, chosen rates
    assert say("compare --out=out")[:2] == (0, printed) and len(done) == len(rows) + 1
    Path(TWINS[0]).write_text("another")  # its rows no longer count; where there is no base, its last ones do
    Path(BASES[1]).unlink()
    again = len(done) + sum(row["base"] == TWINS[0] for row in rows)
    assert say("compare --out=out")[:2] == (0, printed) and len(done) == again


def test_a_cell_is_the_mean_over_bases_and_shows_each_where_they_are_apart():
    near, apart, drawn = (
        [{"action_acc": accuracy, "base": base} for accuracy, base in zip(accuracies, "abab")]
        for accuracies in ((0.91, 0.9), (0.9, 0.8), (0.91, 0.8, 0.89, 0.8))
    )
    assert compare.percent(near) == "90.5 ±0.7"
    assert compare.percent(apart) == compare.percent(drawn) == "85 (90.0, 80.0)"


def test_the_bench_prints_a_ratio_for_each_method(capsys, monkeypatch):
    assert pytest.importorskip("transformers") and pytest.importorskip("peft")
    monkeypatch.setattr(bench, "IDS", torch.tensor([[bench.IMAGE, 1, 2]]))
    bench.bench(bench.BenchConfig(rounds=1))
    assert len(re.findall(r"  \d\.\d{3}$", capsys.readouterr().out, re.M)) == 4 * len(bench.METHODS[1:])


# The pages
PAGES = ["README.md", "data/README.md", "data/study/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_links_of_a_page_exist_and_costs_are_as_shown(page, say):
    """Each command is one that can be given."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    for name, options in re.findall(
        r"\bpython (?:-m data\.(?:study\.)?|(?=train))(\w+)(?:\.py)?(.*)", "\n".join(blocks)
    ):
        if name in COMMANDS:
            assert command(COMMANDS[name][0], lambda cfg: None, "", shlex.split(options, comments=True)) == 0
    targets = re.findall(r"(?:\]\(|src=\")(?!\w+:|#)([^)#\"\s]+)", text)
    assert targets and all(((ROOT / page).parent / target).exists() for target in targets), targets
    costs = say("costs")[1].splitlines()
    assert all(set(block.splitlines()) <= set(costs) for block in blocks if "values only" in block)


def test_the_tables_of_the_pages_are_those_that_the_comparison_prints(say, monkeypatch):
    """Whoever changes a run or a page sees it here: the cells of a line with a deviation or three bases are printed."""
    monkeypatch.setattr(compare, "get_context", lambda method: SERIAL)
    monkeypatch.setattr(compare, "run", None)  # nothing is missing
    printed, found = {}, 0
    for line in say(f"compare --out={ROOT / 'data' / 'study'}")[1].splitlines():
        name, *cells = line.strip("|").split("|")
        printed.setdefault(name, []).extend(cells)
    for line in "\n".join((ROOT / page).read_text() for page in PAGES).splitlines():
        name, *cells = line.strip("|").split("|")
        if name in printed and re.search(r"\d ±\d|\(\d+\.\d, |\d · \d|text alone\|", line):
            found += 1
            rest = iter(printed[name])
            assert all(cell in rest for cell in cells), line  # in the order of the columns
    assert found > 20
