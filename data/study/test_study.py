"""The evidence: how the base is made, that runs are kept, and that the pages show what the comparison prints."""

import json
import multiprocessing.dummy
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import costs, figures, prompts, walk
from data.base import load_base
from data.command import command
from data.study import compare, pretrain, smollm
from data.study.muon import muon
from data.study.tables import choose_rate

torch.set_num_threads(1)
ROOT = Path(train.__file__).parent
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("data/**/*.md")))]
STUDY_PAGE = "data/study/README.md"
TESTS = "".join(path.read_text() for path in [*ROOT.glob("test_*.py"), *ROOT.glob("data/**/test_*.py")])
COMMANDS = {  # those that have options
    "train.py": train.Config,
    "-m data.walk": walk.WalkConfig,
    "-m data.figures": figures.FiguresConfig,
    "-m data.study.compare": compare.CompareConfig,
    "-m data.study.pretrain": pretrain.PretrainConfig,
    "-m data.study.smollm": smollm.SmolConfig,
}


@pytest.fixture
def runs():
    """The runs of the pages."""
    return compare.Runs(compare.CompareConfig())


# 1. Pretraining
def test_pretraining_makes_a_base_with_and_without_the_skill_which_differ_in_their_last_questions(
    tmp_path, monkeypatch
):
    """Of few steps and screens. The same seed gives the same base."""
    monkeypatch.setattr(pretrain, "POOL_SIZES", (20, 15))
    monkeypatch.setattr(pretrain, "TEST_SCREENS", 2)

    def make(name: str, *options: str) -> dict:
        few = "--see 1 --ground 1 --relate 1 --out".split()
        arguments = [*few, str(tmp_path / name), *options]
        assert command(pretrain.PretrainConfig, pretrain.pretrain, "", arguments) == 0
        return load_base(tmp_path / name).state_dict()

    new = make("new.pt")
    again = make("again.pt")
    monkeypatch.setattr(pretrain, "neighbour_samples", None)  # never asked what is right of a name
    unskilled = make("unskilled.pt", "--unskilled")
    assert all(torch.equal(new[name], again[name]) for name in new)
    assert not all(torch.equal(new[name], unskilled[name]) for name in new)
    record = json.loads((tmp_path / "new.json").read_text())
    shipped = json.loads((ROOT / "data/tiny_vlm.json").read_text())
    assert record.keys() == shipped.keys()


def test_a_step_of_muon_goes_downhill_along_a_nearly_orthogonal_matrix():
    for rows, columns in ((4, 6), (6, 4)):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(rows, columns))
        weight.grad = torch.randn(rows, columns)
        muon(weight, torch.zeros(rows, columns), lr=1.0)
        step = weight.detach() / max(1, rows / columns) ** 0.5
        singular_values = torch.linalg.svdvals(step)
        assert singular_values.min() > 0.6
        assert singular_values.max() < 1.3
        assert (step * weight.grad).sum() < 0


# 2. The comparison
def test_a_missing_run_is_made_and_written_and_never_made_again(tmp_path, monkeypatch):
    """Of the shipped base, of nothing that takes long and, with its three scores, of a single head."""
    monkeypatch.setattr(compare, "REWORDED_SCREENS", 2)
    monkeypatch.setattr(prompts, "PROBE_BATCHES", 1)
    monkeypatch.setattr(compare, "get_context", lambda method: multiprocessing.dummy)  # threads, not processes
    cfg = compare.CompareConfig(runs=str(tmp_path / "new" / "runs.csv"))
    shipped = {1: "data/tiny_vlm.pt"}
    short = {"steps": 1, "test_screens": 2}
    (frozen,) = compare.Runs(cfg).of("base model", shipped, **short)
    assert frozen["task_acc"] < 0.5 < frozen["reworded_acc"]
    (head,) = compare.Runs(cfg).of("Image-LoRA", shipped, heads="1.3", **short)
    assert min(head["influence"], head["influence_exact"], head["gate_score"]) > 0
    monkeypatch.setattr(compare, "run", None)  # nothing can run
    assert compare.Runs(cfg).of("base model", shipped) == [frozen]
    assert compare.Runs(cfg).of("Image-LoRA", shipped, heads="1.3") == [head]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["runs.csv"]


def test_what_the_comparison_cannot_do_is_one_sentence_and_changes_nothing(tmp_path, capsys):
    """A file that is none of runs; a base model that has not been made, before anything runs."""
    (tmp_path / "notes.csv").write_text("base,seed\n")
    for name, sentence in (
        ("notes.csv", "is no file of runs"),
        ("new.csv", "there is no runs/bases/2.pt"),
    ):
        assert command(compare.CompareConfig, compare.compare, "", ["--runs", str(tmp_path / name)]) == 2
        assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.csv"]
    assert (tmp_path / "notes.csv").read_text() == "base,seed\n"


def test_the_chosen_rate_is_the_lowest_within_one_point_of_the_best():
    assert choose_rate({0.01: 0.9, 0.02: 0.971, 0.04: 0.98, 0.08: 0.5}) == 0.02
    assert choose_rate({0.01: 0.9, 0.02: 0.969, 0.04: 0.98, 0.08: 0.98}) == 0.04


@pytest.mark.parametrize(
    "bases, tried, chosen_rates",
    [
        (compare.SKILLED, compare.TRIED, compare.RATES),
        (compare.UNSKILLED, compare.UNSKILLED_TRIED, compare.UNSKILLED_RATES),
    ],
)
def test_the_chosen_rates_follow_from_the_runs(runs, bases, tried, chosen_rates):
    """The best and the chosen rate are at neither end of those that were tried, unless the grid ends there."""
    for method, chosen in chosen_rates.items():
        accuracies = {}
        for lr in tried[method]:
            rows = runs.of(method, bases, compare.FIRST_MODELS, lr=lr)
            assert len(rows) == 3
            accuracies[lr] = np.mean([row["validation_acc"] for row in rows])
        best = max(accuracies, key=accuracies.get)
        assert chosen == choose_rate(accuracies), method
        assert chosen > min(accuracies) or chosen == compare.GRID[0], method
        assert best < max(accuracies) or best == compare.GRID[-1], method


# 3. The pages
@pytest.mark.parametrize("table", compare.TABLES)
def test_a_table_of_the_studys_page_is_that_which_the_comparison_prints(runs, table):
    """Whoever changes a run or the page sees it here."""
    printed = table(runs).splitlines()
    page = (ROOT / STUDY_PAGE).read_text()
    shown = re.findall(rf"^{re.escape(printed[0])}\n(?:\|.*\n)+", page, re.M)
    assert [block.splitlines() for block in shown] == [printed]


def anchors(page: Path) -> list[str]:
    """What a link to a page can have after its #: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_links_of_a_page_can_be_given(page):
    text = (ROOT / page).read_text()
    for program, options in re.findall(r"\b(?:python|torchrun) (-m [\w.]+|[\w/.]+\.py)([^`#\n]*)", text):
        path = program
        if program.startswith("-m "):
            path = program.removeprefix("-m ").replace(".", "/") + ".py"
        assert (ROOT / path).exists(), program
        if program in COMMANDS:
            assert command(COMMANDS[program], lambda cfg: None, "", shlex.split(options)) == 0
    for word in re.findall(r"pytest[^`\n]* -k (\w+)", text):
        assert re.search(rf"def test_\w*{word}", TESTS), f"no test is named {word}"
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", text):
        linked_page = (ROOT / page).parent / target if target else ROOT / page
        assert linked_page.exists(), target
        assert not anchor or anchor in anchors(linked_page), f"{target}#{anchor}"


def test_there_is_one_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_costs_of_the_pages_are_as_the_command_prints_them(capsys):
    costs.print_costs()
    printed = capsys.readouterr().out
    pages = "\n".join((ROOT / page).read_text() for page in PAGES)
    lines = re.findall(r"^visual tokens only.*", pages, re.M)
    assert lines
    assert all(line in printed for line in lines)
