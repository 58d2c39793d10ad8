"""The tables of the pages are what the comparison prints, and the learning rates are those that it chooses."""

import re
from pathlib import Path

import pytest

from data.study import plan

pd = pytest.importorskip("pandas")
from data.study import compare  # noqa: E402

ROOT = Path(__file__).parents[2]
RUNS = compare.read_runs()


@pytest.mark.parametrize("table", compare.tables(RUNS), ids=lambda table: table.lstrip("|").split("|")[0][:40])
def test_a_table_of_a_page_is_that_which_the_comparison_prints(table):
    """Whoever changes a run or a page sees it here."""
    pages = (ROOT / "README.md").read_text() + (ROOT / "data/study/README.md").read_text()
    first_line = re.escape(table.splitlines()[0])
    shown = re.findall(rf"^{first_line}\n(?:\S.*\n)*", pages, re.M)
    assert [part.removesuffix("```\n") for part in shown] == [table]


COMPARED = [(setting, method) for setting, tried in plan.TRIED.items() for method in tried]
COMPARED += [("SmolLM2", method) for method in plan.SMOLLM2]


@pytest.mark.parametrize("setting, method", COMPARED)
def test_the_chosen_rate_is_the_lowest_within_one_point_of_the_best_on_validation_screens(setting, method):
    """Where models have the skill, lower and higher ones were tried."""
    runs = compare.once(compare.rows_where(RUNS, {"setting": setting, "method": method}))
    clicks = runs.groupby("lr").validation_acc.mean()
    chosen = plan.CHOSEN[setting][method]
    assert chosen == clicks.index[clicks >= clicks.max() - 1].min()
    if setting == "skilled":
        assert clicks.index.min() < chosen
        assert clicks.idxmax() < clicks.index.max()


def test_a_method_is_compared_with_its_rival_on_the_same_models_with_the_same_seeds():
    """LoRA is ahead of Image-LoRA by 2 and by 6 points, with two seeds: by 4 on the mean."""
    rows = []
    for method, accuracies in (("LoRA", (93, 95)), ("Image-LoRA", (91, 89))):
        for model in (1, 2, 3):
            for seed, accuracy in enumerate(accuracies, 1):
                lr = plan.CHOSEN["skilled"][method]
                rows.append(plan.Row("skilled", model, method, lr, seed, 1.0, 0)._asdict() | {"task_acc": accuracy})
    made = pd.DataFrame(rows).reindex(columns=RUNS.columns)
    table = compare.differences(made, "LoRA", "Image-LoRA")
    assert table.splitlines()[2] == "|new task|+4.0|+4.0|+4.0|6 of 6|"
    with pytest.raises(ValueError, match="has no method DoRA"):
        compare.differences(made, "DoRA", "Image-LoRA")
