"""The tables of the pages are what the comparison prints, and the learning rates are those that it chooses."""

import re
from pathlib import Path

import numpy as np
import pytest

from data.study import plan

pd = pytest.importorskip("pandas")
from data.study import compare  # noqa: E402

ROOT = Path(__file__).parents[2]
RUNS = compare.read_runs()


@pytest.mark.parametrize("number", range(3))
def test_a_table_of_the_page_is_that_which_the_comparison_prints(number):
    """Whoever changes a run or the page sees it here."""
    table = compare.page_tables(compare.at_chosen_rates(RUNS))[number]
    page = (ROOT / "data/study/README.md").read_text()
    first_line = re.escape(table.splitlines()[0])
    assert re.findall(rf"^{first_line}\n(?:\|.*\n)*", page, re.M) == [table]


COMPARED = [("skilled", method) for method in plan.TRIED] + [("SmolLM2", method) for method in plan.SMOLLM2_TRIED]


@pytest.mark.parametrize("setting, method", COMPARED)
def test_the_chosen_rate_is_the_lowest_within_one_point_of_the_best_on_validation_screens(setting, method):
    """Lower ones and higher ones were tried."""
    rows = compare.rows_where(compare.tried_runs(RUNS, setting), method=method, gamma=1, text=0)
    clicks = rows.groupby("lr").validation_acc.mean()
    chosen = compare.chosen_rate(setting, method)
    assert chosen == clicks.index[clicks >= clicks.max() - 1].min()
    assert clicks.index.min() < chosen < clicks.index.max()


def made_up_curve(method: str, points: list[tuple]) -> pd.DataFrame:
    """Rows of a run with these gammas, clicks and other questions, the same clicks on test and validation screens."""
    rows = []
    for gamma, clicks, others in points:
        row = plan.Row("skilled", 1, method, 0.01, 1, gamma, 0)._asdict()
        rows.append(row | {"task_acc": clicks, "validation_acc": clicks, "other_questions_acc": others})
    return pd.DataFrame(rows)


def test_methods_are_compared_where_they_hit_equally_many_switches():
    """Halfway between two gammas, so are the other questions; what happens at larger ones does not count."""
    curve = made_up_curve("Image-LoRA", [(1.0, 98, 40), (0.9, 96, 60), (0.8, 94, 80), (0.7, 50, 90)])
    assert compare.kept_at_clicks(curve, 95) == 70
    assert np.isnan(compare.kept_at_clicks(curve, 99))  # it never gets there
    assert np.isnan(compare.kept_at_clicks(curve, 40))  # it is above this everywhere
