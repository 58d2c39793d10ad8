"""The evidence: bases and rows can be made, and the page says what the rows say."""

import multiprocessing.dummy
import re
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import train
from data import prompts
from data.base import load_base
from data.command import command
from data.questions import is_hit, parse_point
from data.screens import draw_screen
from data.study import pretrain
from data.study.optimize import Muon

pd = pytest.importorskip("pandas")
from data.study import compare, methods, runs  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(train.__file__).parent
RUNS = compare.read_runs()
RATES = compare.choose_rates(RUNS)


# 1. Base models
def make_base(path: Path, *options: str) -> dict:
    """The state of a base that the command makes."""
    assert command(pretrain.PretrainConfig, pretrain.pretrain, "", ["--out", str(path), *options]) == 0
    return load_base(path).state_dict()


def test_the_same_seed_makes_the_same_base_and_without_the_skill_another(tmp_path, monkeypatch):
    """Of few steps and screens."""
    for name, value in {"STEPS": 1, "POOL_SIZES": (20, 15), "TEST_SCREENS": 2}.items():
        monkeypatch.setattr(pretrain, name, value)
    base, again = make_base(tmp_path / "base.pt"), make_base(tmp_path / "again.pt")
    unskilled = make_base(tmp_path / "unskilled.pt", "--unskilled")
    assert all(torch.equal(base[name], again[name]) for name in base)
    assert not all(torch.equal(base[name], unskilled[name]) for name in base)


def test_a_language_model_is_taught_to_repeat_a_place_and_its_eyes_stay(tmp_path, monkeypatch):
    for name, value in {"COPY_STEPS": 3, "COPY_SCREENS": 16, "TEST_SCREENS": 2}.items():
        monkeypatch.setattr(pretrain, name, value)
    taught = make_base(tmp_path / "copying.pt", "--copying", "data/tiny_vlm.pt")
    base = load_base("data/tiny_vlm.pt").state_dict()
    assert {name.split(".")[0] for name in base if not torch.equal(base[name], taught[name])} == {"language_model"}


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_steps_of_muon_are_torchs_but_for_their_rounding(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizers = Muon([ours], lr=0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.05)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


# 2. Methods and rows
def test_a_methods_name_says_what_is_trained():
    row = methods.Row("skilled", 2, "Partial LoRA on the MLP, rank 2 with own answers", 0.005, 3, 1.0, 0)
    cfg = methods.config(row)
    assert (cfg.method, cfg.projections, cfg.r, cfg.replay) == ("partial_lora", "mlp", 2, 2)
    assert (cfg.base, cfg.lr, cfg.seed) == ("data/tiny_vlm.pt", 0.005, 3)
    probed = methods.config(row._replace(method="Image-LoRA in 12 heads by the probe, without 1/√|S|"))
    assert (probed.heads, probed.num_heads, probed.no_normalize) == ("top", 12, True)
    with pytest.raises(ValueError, match="'LoRA by magic' is no method"):
        methods.config(row._replace(method="LoRA by magic"))


def test_the_files_hold_each_row_once_and_each_has_a_meaning():
    rows = [row for path in compare.FILES for row in methods.rows_of(pd.read_csv(path))]
    assert len(rows) == len({*rows})
    for row in rows:
        assert methods.config(row).lr == row.lr


def test_the_line_below_is_asked_for_in_the_words_of_the_new_task():
    """The switch of the next line is the target, and the last line is not asked."""
    screen = draw_screen("new", "test", 0)
    lines = screen.targets()
    samples = methods.below_samples(screen, np.random.default_rng(0))
    assert len(samples) == len(lines) - 1
    for line, below, sample in zip(lines, lines[1:], samples):
        assert sample["instruction"].endswith(line.name)
        assert is_hit(parse_point(sample["answer"]), below.click)
        assert sample["bbox"] == below.click


@pytest.fixture
def few(monkeypatch):
    """Few steps and screens, and threads instead of processes."""
    monkeypatch.setattr(train, "Config", partial(train.Config, test_screens=2))
    for name, setting in methods.SETTINGS.items():
        monkeypatch.setitem(methods.SETTINGS, name, setting._replace(steps=20, bases=methods.SKILLED))
    monkeypatch.setattr(prompts, "TRAIN_SCREENS", 64)
    monkeypatch.setattr(runs, "REWORDED_SCREENS", 2)
    monkeypatch.setattr(runs, "get_context", lambda method: multiprocessing.dummy)
    runs.screens_of.cache_clear()


def plan_of(rows: list[methods.Row], directory: Path) -> str:
    """A file that plans these."""
    pd.DataFrame(rows).to_csv(directory / "plan.csv", index=False)
    return str(directory / "plan.csv")


def test_rows_that_a_file_lacks_are_made_and_never_again(tmp_path, few, monkeypatch):
    """Trained once but asked in three ways, trained with hints, frozen, asked in other words."""
    trained = methods.Row("skilled", 1, "Image-LoRA with own answers", 0.01, 1, 1.0, 0)
    rows = [trained, trained._replace(gamma=0.0), trained._replace(text=1)]
    rows += [trained._replace(method="LoRA with hints", lr=0.0025)]
    rows += [trained._replace(method=method, lr=0.0) for method in methods.UNTRAINED]
    trainings = Mock(side_effect=train.train)
    monkeypatch.setattr(train, "train", trainings)
    out = tmp_path / "new" / "rows.csv"
    arguments = ["--plan", plan_of(rows, tmp_path), "--out", str(out), "--workers", "1"]
    assert command(runs.RunsConfig, runs.main, "", arguments) == 0
    assert trainings.call_count == 2
    made = pd.read_csv(out)
    assert methods.rows_of(made) == rows
    assert {*made} <= {*RUNS}
    as_trained, without_update, after_text, hinted, frozen, reworded = made.task_acc
    assert without_update == frozen != as_trained
    assert frozen < 0.5 < reworded
    assert made.wrong_hint_acc.notna().tolist() == [False, False, False, True, False, False]
    assert made.replay_answers_acc.notna().tolist() == [True, True, True, False, False, False]

    before = out.read_bytes()
    assert command(runs.RunsConfig, runs.main, "", arguments) == 0
    assert trainings.call_count == 2
    assert out.read_bytes() == before


@pytest.mark.parametrize("setting", ["unskilled", "copying", "below"])
def test_a_row_of_each_setting_can_be_made(setting, few):
    """Trained for some steps and asked. Other settings are made above, and in test_smollm.py."""
    row = methods.Row(setting, 2, "Partial LoRA on all linear layers", 0.00125, 1, 1.0, 0)
    (line,) = runs.make_rows("cpu", [row])
    assert methods.Row(**{name: line[name] for name in methods.Row._fields}) == row
    assert 0 <= line["task_acc"] <= 1


def test_a_missing_base_or_column_is_told_before_anything_runs(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    plan = plan_of([methods.Row("copying", 1, "LoRA", 0.01, 1, 1.0, 0)], tmp_path)
    assert command(runs.RunsConfig, runs.main, "", ["--plan", plan, "--out", str(out)]) == 2
    assert "there is no runs/bases/1-copying.pt; first make it" in capsys.readouterr().err
    Path(plan).write_text("model,lr\n1,0.01\n")
    assert command(runs.RunsConfig, runs.main, "", ["--plan", plan, "--out", str(out)]) == 2
    assert "must have the columns setting, model, method" in capsys.readouterr().err
    assert not out.exists()


# 3. Numbers
@pytest.mark.parametrize("page", ["README.md", "data/study/README.md"])
def test_a_table_of_the_page_is_that_which_the_comparison_prints(page):
    """Whoever changes a row or the page sees it here. README's map is no such table."""
    page = (ROOT / page).read_text()
    printed = compare.page_tables(compare.compare(RUNS))
    for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert table in printed or table.startswith("|read|")


@pytest.mark.parametrize("setting, method", RATES)
def test_lower_and_higher_rates_than_the_chosen_one_were_tried(setting, method):
    """Of each method that has rows at several."""
    tried = RUNS[(RUNS.setting == setting) & (RUNS.method == method)].lr.unique()
    if len(tried) > 1:
        assert min(tried) < RATES[setting, method] < max(tried)


def test_the_lowest_rate_within_one_point_of_the_best_is_chosen():
    """Each counts with its first seed on each model."""
    row = {"setting": "skilled", "method": "LoRA", "gamma": 1.0, "text": 0, "seed": 1}
    clicks = {0.001: (94, 95), 0.002: (96, 97.5), 0.004: (97, 98)}  # of two models; the best mean is 97.5
    rates = [(lr, model, acc) for lr, of_models in clicks.items() for model, acc in enumerate(of_models)]
    lines = [row | {"lr": lr, "model": model, "validation_acc": acc} for lr, model, acc in rates]
    later_seed = row | {"lr": 0.001, "model": 0, "seed": 2, "validation_acc": 100}
    assert compare.choose_rates(pd.DataFrame([*lines, later_seed])) == {("skilled", "LoRA"): 0.002}


def test_methods_are_compared_where_they_hit_equally_many_switches():
    """Halfway between two gammas, so are the other questions; what happens at larger ones does not count."""
    points = [(1.0, 98, 40), (0.9, 96, 60), (0.8, 94, 80), (0.7, 50, 90)]
    curve = pd.DataFrame(points, columns=["gamma", "task_acc", "other_questions_acc"])
    assert compare.kept_at_clicks(curve, 95) == 70
    assert np.isnan(compare.kept_at_clicks(curve, 99))  # it never gets there
    assert np.isnan(compare.kept_at_clicks(curve, 40))  # it is above this everywhere
