"""The evidence: bases can be made, a run is made once, what the pages ask for can be done, and their pictures drawn."""

import json
import multiprocessing.dummy
import re
import shlex
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import imagelora
import train
from data import evaluate, prompts
from data.base import load_base, screens_and_features
from data.command import command
from data.study import copying, plan, pretrain, runs, smollm
from data.study.muon import muon

torch.set_num_threads(1)
ROOT = Path(train.__file__).parent
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("data/**/*.md")))]
TESTS = "".join(path.read_text() for path in [*ROOT.glob("test_*.py"), *ROOT.glob("data/**/test_*.py")])
COMMANDS = {  # those that have options
    "train.py": train.Config,
    "-m data.study.pretrain": pretrain.PretrainConfig,
    "-m data.study.copying": copying.CopyingConfig,
    "-m data.study.runs": runs.RunsConfig,
    "-m data.study.smollm": smollm.SmolConfig,
}
CAN_DRAW = find_spec("pandas") is not None and find_spec("matplotlib") is not None
needs_matplotlib = pytest.mark.skipif(not CAN_DRAW, reason="without pandas or matplotlib")
if CAN_DRAW:
    import pandas as pd

    from data.study import figures

    COMMANDS |= {"-m data.study.figures": figures.FiguresConfig}


# 1. Base models
def test_the_same_seed_makes_the_same_base_and_without_the_skill_another(tmp_path, monkeypatch):
    """Of few steps and screens."""
    for name, value in {"STEPS": 1, "POOL_SIZES": (20, 15), "TEST_SCREENS": 2}.items():
        monkeypatch.setattr(pretrain, name, value)

    def make(name: str, *options: str) -> dict:
        assert command(pretrain.PretrainConfig, pretrain.pretrain, "", ["--out", str(tmp_path / name), *options]) == 0
        return load_base(tmp_path / name).state_dict()

    base = make("base.pt")
    again = make("again.pt")
    unskilled = make("unskilled.pt", "--unskilled")
    assert all(torch.equal(base[name], again[name]) for name in base)
    assert not all(torch.equal(base[name], unskilled[name]) for name in base)


def test_a_language_model_is_taught_to_repeat_a_place_and_its_eyes_stay(tmp_path, monkeypatch):
    """In a few steps it learns a little: the record says how much."""
    for name, value in {"STEPS": 3, "SCREENS": 16, "TEST_SCREENS": 2}.items():
        monkeypatch.setattr(copying, name, value)
    path = tmp_path / "copying.pt"
    assert command(copying.CopyingConfig, copying.teach, "", ["--out", str(path)]) == 0
    base, taught = load_base("data/tiny_vlm.pt").state_dict(), load_base(path).state_dict()
    changed = {name.split(".")[0] for name in base if not torch.equal(base[name], taught[name])}
    assert changed == {"language_model"}
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["copied_acc"] < 0.1 < 0.5 < record["other_questions_acc"]
    sample = copying.copying_sample(np.random.default_rng(0))
    assert sample["instruction"] == f"{sample['answer']} how many"


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_steps_of_muon_are_torchs_but_for_their_rounding(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    momentum = torch.zeros(shape)
    optimizer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.05)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape)
        muon(ours, momentum, lr=0.1)
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


# 2. Runs
def make_runs(path: Path) -> int:
    """Runs the command -> its exit status."""
    return command(runs.RunsConfig, runs.main, "", ["--out", str(path), "--workers", "1"])


def test_a_missing_run_is_made_and_written_and_never_made_again(tmp_path, monkeypatch, capsys):
    """Of the shipped base: trained once but asked in three ways, trained with hints, frozen, asked in other words."""
    trained = plan.Row("skilled", 1, "Image-LoRA with own answers", 0.01, 1, 1.0, 0)
    planned = [trained, trained._replace(gamma=0.0), trained._replace(text=1)]
    planned += [plan.Row("skilled", 1, "LoRA with hints", 0.0025, 1, 1.0, 0)]
    planned += [plan.Row("skilled", 1, method, 0.0, 1, 1.0, 0) for method in ("base model", plan.REWORDED)]
    monkeypatch.setattr(runs, "all_rows", lambda: planned)
    monkeypatch.setitem(runs.SETTINGS, "skilled", (plan.SKILLED, {"steps": 20, "test_screens": 2}))
    monkeypatch.setattr(runs, "SHARE_QUESTIONS", 2)
    monkeypatch.setattr(runs, "REWORDED_SCREENS", 2)
    monkeypatch.setattr(runs, "get_context", lambda method: multiprocessing.dummy)  # threads, not processes
    monkeypatch.setattr(prompts, "TRAIN_SCREENS", 16)
    trainings = Mock(side_effect=train.train)
    monkeypatch.setattr(train, "train", trainings)
    path = tmp_path / "new" / "runs.csv"
    assert make_runs(path) == 0
    assert trainings.call_count == 2
    made = runs.read_rows(path, runs.COLUMNS)
    keys = [tuple(line[name] for name in plan.Row._fields) for line in made]
    assert keys == [tuple(map(str, row)) for row in planned]
    as_trained, without_update, after_text, hinted, frozen, reworded = made
    assert all(as_trained[name] for name in runs.ANSWERS)
    assert [name for name in runs.ANSWERS if not without_update[name]] == [*runs.AS_TRAINED]
    assert [name for name in runs.ANSWERS if not after_text[name]] == ["validation_acc", *runs.AS_TRAINED]
    assert all(without_update[name] == frozen[name] for name in runs.ANSWERS if without_update[name])
    assert as_trained["task_acc"] != frozen["task_acc"]
    assert float(frozen["task_acc"]) < 0.5 < float(reworded["task_acc"])
    assert [0 < float(line["replay_answers_acc"] or 0) < 1 for line in made] == [True] * 3 + [False] * 3
    assert [line["wrong_hint_acc"] != "" for line in made] == [False] * 3 + [True] + [False] * 2
    assert [0 < float(line["image_share_0"] or 0) < 1 for line in made] == [False] * 4 + [True, False]

    monkeypatch.setattr(runs, "make_rows", None)  # nothing can run
    assert make_runs(path) == 0
    assert "holds all runs" in capsys.readouterr().out
    assert runs.read_rows(path, runs.COLUMNS) == made


@pytest.mark.parametrize(
    "name, sentence", [("notes.csv", "is no file of runs"), ("new.csv", "there is no runs/bases/no.pt")]
)
def test_a_file_of_something_else_and_a_missing_base_are_refused(name, sentence, tmp_path, capsys, monkeypatch):
    """In one sentence, before anything runs."""
    monkeypatch.setitem(plan.SKILLED, 2, "runs/bases/no.pt")
    (tmp_path / "notes.csv").write_text("base,seed\n")
    assert make_runs(tmp_path / name) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.csv"]
    assert (tmp_path / "notes.csv").read_text() == "base,seed\n"


def test_a_new_measure_is_a_new_column(tmp_path):
    """The runs that were made before are kept as they are."""
    path = tmp_path / "runs.csv"
    path.write_text("method,lr,task_acc\nLoRA,0.0025,0.30000000000000004\n")
    runs.add_rows(path, [{"method": "LoRA", "lr": 0.005, "new_acc": 0.5}], ("method", "lr"))
    assert path.read_text().splitlines() == [
        "method,lr,task_acc,new_acc",
        "LoRA,0.0025,0.30000000000000004,",
        "LoRA,0.005,,0.5",
    ]


def test_the_file_holds_rows_of_the_plan_alone_and_each_once():
    lines = runs.read_rows(ROOT / "data/study/runs.csv", runs.COLUMNS)
    kept = [tuple(line[name] for name in plan.Row._fields) for line in lines]
    assert len(kept) == len(set(kept))
    assert set(kept) <= {tuple(map(str, row)) for row in plan.all_rows()}


# 3. Pages
def test_the_lesson_needs_neither_the_study_nor_its_packages():
    names = ["data.study", "pandas", "matplotlib"]
    check = f"import sys, train; print([name for name in {names} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "[]\n"


def test_a_missing_package_is_told_with_the_command_that_installs_it():
    run = "import sys, runpy; sys.modules['pandas'] = None; runpy.run_module('data.study.compare', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert re.fullmatch(r'error: .* pip install "\.\[study\]"\n', ended.stderr)


def anchors(page: Path) -> list[str]:
    """What a link to a page can have after its #: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_links_of_a_page_can_be_given(page):
    text = (ROOT / page).read_text()
    for program, options in re.findall(r"\b(?:python|torchrun) (?!-m pdb)(-m [\w.]+|[\w/.]+\.py)([^`#\n]*)", text):
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


# 4. Pictures
@needs_matplotlib
def test_the_command_draws_the_pictures_of_the_pages(tmp_path, monkeypatch):
    """Of a short run."""
    monkeypatch.setattr(train, "Config", partial(train.Config, steps=3, test_screens=2))
    monkeypatch.setattr(prompts, "PROBE_BATCHES", 1)
    figures.make_figures(figures.FiguresConfig(out=str(tmp_path), device="cpu"))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "data/figures").iterdir()}
    assert Image.open(tmp_path / "training.gif").n_frames == 4  # before training, and after each step


@needs_matplotlib
def test_a_thick_line_is_the_mean_and_a_thin_one_is_a_seed():
    """A method without rows has none."""
    rows = []
    for seed, gamma in product((1, 2, 3), (1.0, 0.5)):
        rows.append(("LoRA", seed, gamma, 90 + seed, 50 * gamma + seed))
    runs = pd.DataFrame(rows, columns=["method", "seed", "gamma", "hit", "kept"])
    _, ax = figures.plt.subplots()
    figures.draw_curves(ax, runs, "hit", "kept", "gamma", "seed")
    *thin, ring, thick = [line.get_xydata().tolist() for line in ax.lines]
    assert thin == [[[90 + seed, 25 + seed], [90 + seed, 50 + seed]] for seed in (1, 2, 3)]
    assert ring == [[92, 52]]
    assert thick == [[92, 27], [92, 52]]


@needs_matplotlib
def test_a_patch_matters_as_much_as_leaving_its_row_out_of_M_changes_the_answer(monkeypatch):
    model = load_base("data/tiny_vlm.pt")
    screens, features = screens_and_features(model, "new", "test", 1)
    _, (answer, *_) = evaluate.evaluate(model, screens, features)
    adapter = imagelora.attach(model)
    for value_adapter in adapter.layers.values():
        torch.nn.init.normal_(value_adapter.B, std=0.1)
    falls, rises = figures.patch_effects(train.FinetuningRun({}, model, adapter, [answer], [answer]), answer)
    assert falls.shape == rises.shape == (64,)

    sample = answer.sample
    prompt = prompts.prompt_batch([{"instruction": f"{sample['instruction']} {sample['answer']}"}], features)
    x, y = prompt["input_ids"][0, -2:]

    def log_probability() -> torch.Tensor:
        logits = model(**prompt).logits[0].log_softmax(-1)
        return logits[-3, x] + logits[-2, y]

    before = log_probability()
    visual_rows = imagelora.visual_rows
    monkeypatch.setattr(imagelora, "visual_rows", lambda *args: visual_rows(*args)[torch.arange(64) != 5])
    torch.testing.assert_close(before - log_probability(), falls[5], atol=1e-4, rtol=1e-4)
