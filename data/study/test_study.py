"""The evidence: how the base is made, and that the pages show what the comparison prints."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import command, costs, screens, walk
from data.base import load_base
from data.study import compare, pretrain
from data.words import parse_point

torch.set_num_threads(1)
ROOT = Path(train.__file__).parent
PAGES = ["README.md", "data/README.md", "data/study/README.md"]
COMMANDS = {
    "train": train.Config,
    "walk": walk.WalkConfig,
    "compare": compare.CompareConfig,
    "pretrain": pretrain.PretrainConfig,
}


class SerialPool:
    """A pool that runs everything in this process."""

    imap = map


# 1. Pretraining
def test_pretraining_makes_a_base_and_its_twin_which_differ_in_their_last_questions(tmp_path, monkeypatch):
    """Of few steps and screens."""
    monkeypatch.setattr(pretrain, "POOL_SIZES", (20, 15))
    monkeypatch.setattr(pretrain.abilities, "__defaults__", (2,))
    few = {"see": 2, "ground": 2, "relate": 1}
    pretrain.pretrain(pretrain.PretrainConfig(**few, out=str(tmp_path / "new.pt")))
    start = str(tmp_path / "new.grounded.pt")
    pretrain.pretrain(pretrain.PretrainConfig(**few, start=start, out=str(tmp_path / "again.pt")))
    pretrain.pretrain(pretrain.PretrainConfig(**few, start=start, unskilled=True, out=str(tmp_path / "twin.pt")))
    new, again, twin = (load_base(tmp_path / name).state_dict() for name in ("new.pt", "again.pt", "twin.pt"))
    assert all(torch.equal(new[name], again[name]) for name in new)
    assert not all(torch.equal(new[name], twin[name]) for name in new)
    record = json.loads((tmp_path / "new.json").read_text())
    assert {"relation_acc", "name_acc", "action_acc"} < record["source"].keys()
    assert "reworded_acc" in record["switches"]


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


# 2. The comparison and the pages
def test_what_is_missing_is_run_once_and_written(tmp_path, monkeypatch):
    done = []

    def fake_run(cfg):
        done.append(cfg)
        return dict.fromkeys(compare.KEY + compare.MEASURES, 0) | vars(cfg) | {"lr": f"{cfg.lr:g}"}

    monkeypatch.setattr(compare, "run", fake_run)
    for _ in range(2):
        rows = compare.Runs(tmp_path / "runs.csv", SerialPool()).of(compare.HALF, compare.TWINS)
        assert [row["base"] for row in rows] == [*compare.TWINS.values()]
    assert len(done) == len(compare.TWINS)


def test_the_chosen_rate_is_the_lowest_within_one_point_of_the_best():
    """On validation screens."""
    runs = compare.Runs(ROOT / "data/study/runs.csv", SerialPool())
    for method, (chosen, _) in compare.RATES.items():
        if method != compare.NOTHING:
            accuracy = {}
            for lr in compare.GRID:
                rows = runs.of(method, compare.BASES, compare.SEARCH_SEEDS, lr=lr)
                accuracy[lr] = compare.mean(rows, "validation_acc")
            good = [lr for lr in compare.GRID if accuracy[lr] >= max(accuracy.values()) - 0.01]
            assert chosen == good[0], method


def test_the_tables_of_the_pages_are_those_that_the_comparison_prints():
    """Whoever changes a run or a page sees it here. A page may leave out lines of a table, but no columns."""
    runs = compare.Runs(ROOT / "data/study/runs.csv", SerialPool())
    tables = [[f"|{'|'.join(line)}|" for line in table(runs)] for table in compare.TABLES]
    pages = "\n".join((ROOT / page).read_text() for page in PAGES)
    for header, *lines in tables:
        (shown,) = re.findall(rf"^{re.escape(header)}\n\|[-|]+\n((?:\|.*\n)+)", pages, re.M)
        assert set(shown.splitlines()) <= set(lines)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_links_of_a_page_can_be_given(page):
    text = (ROOT / page).read_text()
    for name, options in re.findall(r"\bpython (?:-m data\.(?:study\.)?)?(\w+)(?:\.py)?([^`#\n]*)", text):
        if name in COMMANDS:
            assert command(COMMANDS[name], lambda cfg: None, "", options.split()) == 0
    for target in re.findall(r"(?:\]\(|src=\")(?!\w+:|#)([^)#\"\s]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_costs_of_the_page_are_as_the_command_prints_them(capsys):
    costs.print_costs()
    printed = capsys.readouterr().out
    lines = re.findall(r"^visual tokens only.*", (ROOT / "README.md").read_text(), re.M)
    assert lines
    assert all(line in printed for line in lines)
