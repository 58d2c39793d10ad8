"""The tables of the pages are what the comparison prints, and the learning rates are those that it chooses."""

import re
from pathlib import Path

import pytest

from data.study import runs, smollm

pd = pytest.importorskip("pandas")
from data.study import compare  # noqa: E402

ROOT = Path(__file__).parents[2]
RUNS = compare.read_runs()
SKILLED = RUNS[RUNS.setting == "skilled"]
SMOLLM2 = RUNS[RUNS.setting == "SmolLM2"]


@pytest.mark.parametrize("table", compare.tables(RUNS), ids=lambda table: table.lstrip("|").split("|")[0][:40])
def test_a_table_of_a_page_is_that_which_the_comparison_prints(table):
    """Whoever changes a run or a page sees it here."""
    pages = (ROOT / "README.md").read_text() + (ROOT / "data/study/README.md").read_text()
    first_line = re.escape(table.splitlines()[0])
    shown = re.findall(rf"^{first_line}\n(?:\S.*\n)*", pages, re.M)
    assert [part.removesuffix("```\n") for part in shown] == [table]


def test_the_chosen_rate_is_the_lowest_within_one_point_of_the_best():
    assert compare.choose_rate(pd.Series({0.01: 90, 0.02: 97.1, 0.04: 98, 0.08: 50})) == 0.02
    assert compare.choose_rate(pd.Series({0.01: 90, 0.02: 96.9, 0.04: 98, 0.08: 98})) == 0.04


@pytest.mark.parametrize("method", compare.TRIED_AT_RATES)
def test_a_method_has_the_rate_that_validation_screens_choose(method):
    """Lower and higher ones were tried."""
    of_method = SKILLED[SKILLED.method == method]
    chosen = runs.METHODS[method]["lr"]
    assert set(compare.at_chosen_rates(of_method).lr) == {chosen}
    clicks = compare.once(of_method).groupby("lr").validation_acc.mean()
    assert clicks.index.min() < chosen
    assert clicks.idxmax() < clicks.index.max()


@pytest.mark.parametrize("method", [method for method in smollm.RATES if method in set(SMOLLM2.method)])
def test_a_method_on_smollm2_has_the_rate_that_validation_screens_choose(method):
    of_method = SMOLLM2[SMOLLM2.method == method]
    assert set(compare.at_chosen_rates(of_method).lr) == {smollm.RATES[method]}


def test_a_method_is_compared_with_its_rival_on_the_same_models_with_the_same_seeds():
    """LoRA is ahead of Image-LoRA by 2 and by 6 points, with two seeds: by 4 on the mean."""
    rows = []
    for method, accuracies in (("LoRA", (93, 95)), ("Image-LoRA", (91, 89))):
        for model in (1, 2, 3):
            for seed, accuracy in enumerate(accuracies, 1):
                rows.append(("skilled", model, method, 0.01, seed, accuracy, accuracy))
    columns = ["setting", "model", "method", "lr", "seed", "task_acc", "validation_acc"]
    made = pd.DataFrame(rows, columns=columns).reindex(columns=RUNS.columns)
    table = compare.differences(made, "LoRA", "Image-LoRA")
    assert table.splitlines()[2] == "|new task|+4.0|+4.0|+4.0|6 of 6|"
    with pytest.raises(ValueError, match="has no method DoRA"):
        compare.differences(made, "DoRA", "Image-LoRA")


def test_the_diagrams_can_be_drawn():
    pytest.importorskip("matplotlib")
    from data.study import diagrams

    lines = diagrams.trade_off(SKILLED).axes[0].lines
    assert len(lines) == 2 * len(diagrams.COLOURS) + len(diagrams.REPLAY)
    names = [text.get_text() for text in diagrams.heads(SKILLED).axes[0].texts]
    assert len(names) == 24 + 1
    assert names[0] == "0.0"
    assert names[-1] == "rank correlation 0.51"
