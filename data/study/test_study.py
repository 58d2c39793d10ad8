"""The evidence: bases can be made, runs are kept, and the pages show what the comparison prints."""

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
from data.study import compare, diagrams, pretrain, smollm
from data.study.muon import muon
from data.study.tables import choose_rate

torch.set_num_threads(1)
ROOT = Path(train.__file__).parent
RUNS = compare.read(ROOT / compare.CompareConfig.runs)
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("data/**/*.md")))]
TESTS = "".join(path.read_text() for path in [*ROOT.glob("test_*.py"), *ROOT.glob("data/**/test_*.py")])
COMMANDS = {  # those that have options
    "train.py": train.Config,
    "-m data.walk": walk.WalkConfig,
    "-m data.figures": figures.FiguresConfig,
    "-m data.study.compare": compare.CompareConfig,
    "-m data.study.pretrain": pretrain.PretrainConfig,
    "-m data.study.smollm": smollm.SmolConfig,
}


# 1. Base models
def test_the_same_seed_makes_the_same_base_and_without_the_skill_another(tmp_path, monkeypatch):
    """Of few steps and screens."""
    monkeypatch.setattr(pretrain, "POOL_SIZES", (20, 15))
    monkeypatch.setattr(pretrain, "TEST_SCREENS", 2)

    def make(name: str, *options: str) -> dict:
        few_steps = "--see 1 --ground 1 --relate 1 --out".split()
        arguments = [*few_steps, str(tmp_path / name), *options]
        assert command(pretrain.PretrainConfig, pretrain.pretrain, "", arguments) == 0
        return load_base(tmp_path / name).state_dict()

    base = make("base.pt")
    again = make("again.pt")
    unskilled = make("unskilled.pt", "--unskilled")
    assert all(torch.equal(base[name], again[name]) for name in base)
    assert not all(torch.equal(base[name], unskilled[name]) for name in base)


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


# 2. Runs
def test_a_missing_run_is_made_and_written_and_never_made_again(tmp_path, monkeypatch, capsys):
    """Of the shipped base: once frozen and once, with its influence, with a single head."""
    short = {"base": "data/tiny_vlm.pt", "steps": 1, "test_screens": 2}
    frozen = train.Config(**compare.BASE_MODEL, **short)
    one_head = train.Config(**compare.IMAGE_LORA | {"heads": "1.3"}, **short)
    monkeypatch.setattr(compare, "all_runs", lambda: [frozen, one_head])
    monkeypatch.setattr(compare, "REWORDED_SCREENS", 2)
    monkeypatch.setattr(compare, "tables", lambda runs: ["the tables"])
    monkeypatch.setattr(compare, "get_context", lambda method: multiprocessing.dummy)  # threads, not processes
    monkeypatch.setattr(prompts, "TRAIN_SCREENS", 16)
    monkeypatch.setattr(prompts, "PROBE_BATCHES", 1)
    file = tmp_path / "new" / "runs.csv"
    arguments = ["--runs", str(file), "--workers", "1"]
    assert command(compare.CompareConfig, compare.compare, "", arguments) == 0
    first, second = compare.read(file)
    assert first["task_acc"] < 0.5 < first["reworded_acc"]
    assert second["influence"] > 0
    assert "" not in [second[name] for name in compare.MEASURES if name != "reworded_acc"]

    monkeypatch.setattr(compare, "make_run", None)  # nothing can run
    assert command(compare.CompareConfig, compare.compare, "", arguments) == 0
    assert compare.read(file) == [first, second]
    assert capsys.readouterr().out.count("the tables") == 2


@pytest.mark.parametrize(
    "name, sentence", [("notes.csv", "is no file of runs"), ("new.csv", "there is no runs/bases/no.pt")]
)
def test_a_file_of_something_else_and_a_missing_base_are_refused(name, sentence, tmp_path, capsys, monkeypatch):
    """In one sentence, before anything runs."""
    monkeypatch.setattr(compare, "all_runs", lambda: [train.Config(base="runs/bases/no.pt")])
    (tmp_path / "notes.csv").write_text("base,seed\n")
    assert command(compare.CompareConfig, compare.compare, "", ["--runs", str(tmp_path / name)]) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.csv"]
    assert (tmp_path / "notes.csv").read_text() == "base,seed\n"


def test_the_file_holds_the_runs_of_the_study_and_no_others():
    kept = sorted(map(compare.key, RUNS))
    assert kept == sorted(compare.key(vars(run)) for run in compare.all_runs())


# 3. Learning rates, and differences
def test_the_chosen_rate_is_the_lowest_within_one_point_of_the_best():
    assert choose_rate({0.01: 0.9, 0.02: 0.971, 0.04: 0.98, 0.08: 0.5}) == 0.02
    assert choose_rate({0.01: 0.9, 0.02: 0.969, 0.04: 0.98, 0.08: 0.98}) == 0.04


@pytest.mark.parametrize("name", compare.RATES[compare.SKILLED])
def test_a_method_has_the_rate_that_validation_screens_choose(name):
    """Lower and higher ones were tried."""
    clicks = compare.mean_at_rates(RUNS, name, compare.SKILLED, "validation_acc")
    assert compare.METHODS[name]["lr"] == choose_rate(clicks)
    assert min(clicks) < choose_rate(clicks)
    assert max(clicks) > max(clicks, key=clicks.get)


def test_a_method_is_compared_with_its_rival_on_the_same_models_with_the_same_seeds():
    """LoRA is ahead of Image-LoRA by 2 and by 6 points, with two seeds: by 4 on the mean."""
    measures = dict.fromkeys(compare.MEASURES, "")
    runs = []
    for name, accuracies in (("LoRA", (0.93, 0.95)), ("Image-LoRA", (0.91, 0.89))):
        for base in compare.SKILLED:
            for seed, accuracy in enumerate(accuracies, 1):
                cfg = train.Config(**compare.METHODS[name], base=base, seed=seed)
                runs.append(vars(cfg) | measures | {"task_acc": accuracy})
    table = compare.differences(runs, "LoRA", "Image-LoRA")
    assert table.splitlines()[2:] == ["|new task|+4.0|+4.0|+4.0|6 of 6|"]


def test_the_rank_correlation_is_spearmans():
    """Only the order counts, and equal numbers share the mean of their ranks."""
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert diagrams.rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert diagrams.rank_correlation(x, np.array([1.0, 5.0, 5.0, 7.0])) == pytest.approx(4.5 / np.sqrt(5 * 4.5))


# 4. Pages
@pytest.mark.parametrize("table", compare.tables(RUNS), ids=lambda table: table.split("|")[1])
def test_a_table_of_the_studys_page_is_that_which_the_comparison_prints(table):
    """Whoever changes a run or the page sees it here."""
    header = table.splitlines()[0]
    shown = re.findall(rf"^{re.escape(header)}\n(?:\|.*\n)+", (ROOT / "data/study/README.md").read_text(), re.M)
    assert shown == [table]


def test_the_table_of_the_front_page_is_that_which_the_comparison_prints():
    smollm_runs = smollm.read(ROOT / smollm.SmolConfig.runs)
    assert compare.front_page(RUNS, smollm_runs) in (ROOT / "README.md").read_text()


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
