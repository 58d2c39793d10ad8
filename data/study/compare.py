"""The numbers of the pages, from the rows of tiny models (runs.csv) and of SmolLM2 (smollm.csv).

python -m data.study.compare     prints the tables of the page, at once; then more, and what each learning rate gives

*Kept where 95 % are hit* means: the other questions that are right at the gamma where a run hits 95 % of the switches,
interpolated between neighbouring gammas. A mean is over models and seeds, and brackets hold the lowest and the highest
run.
"""

import sys
from pathlib import Path

import numpy as np

from data.study import plan

try:
    import pandas as pd
except ImportError:
    if __name__ != "__main__":
        raise
    print('error: the tables need pandas; install it by pip install ".[study]"', file=sys.stderr)
    sys.exit(2)

FOLDER = Path(__file__).parent
HIT = (94, 95, 96)  # percent of the switches, at which methods are compared
D, MLP, LAYERS = 96, 384, 4  # sizes of the tiny models
TEXTS = {"none": "", "nine": plan.NINE, "0 to 9, with own answers": plan.VARIED}  # {trained after: ending of a method}


def read_runs() -> pd.DataFrame:
    """The rows of both files, accuracies in percent. The bases of SmolLM2 count as its models."""
    smollm2 = pd.read_csv(FOLDER / "smollm.csv")
    smollm2 = smollm2.assign(setting="SmolLM2", model=smollm2.base.map(plan.SMOLLM2_BASES), text=0)
    runs = pd.concat([pd.read_csv(FOLDER / "runs.csv"), smollm2], ignore_index=True)
    shares = [name for name in runs if name.endswith("_acc") or name.startswith("image_share")]
    runs[shares] *= 100
    return runs


def rows_where(runs: pd.DataFrame, **where) -> pd.DataFrame:
    """The rows whose columns hold these values."""
    for name, value in where.items():
        runs = runs[runs[name] == value]
    return runs


def chosen_rate(setting: str, method: str) -> float:
    return plan.SMOLLM2_RATES[method] if setting == "SmolLM2" else plan.fields_of(method)["lr"]


def at_chosen_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows at the learning rate that was chosen for their method in their setting."""
    return runs[[lr == chosen_rate(*names) for *names, lr in zip(runs.setting, runs.method, runs.lr)]]


def kept_at_clicks(curve: pd.DataFrame, clicks: float) -> float:
    """The other questions where a curve, from its lowest gamma up, first reaches so many clicks. It is linear between
    two gammas. NaN if it does not get there, or has more of them at its lowest gamma already."""
    curve = curve.sort_values("gamma")
    hits, others = curve.task_acc.to_numpy(), curve.other_questions_acc.to_numpy()
    if not hits[0] < clicks <= hits.max():
        return np.nan
    after = int((hits >= clicks).argmax())
    return float(np.interp(clicks, hits[after - 1 : after + 1], others[after - 1 : after + 1]))


def kept(runs: pd.DataFrame, setting: str, methods, clicks: float) -> pd.DataFrame:
    """What each run keeps where so many switches are hit: a row for each method, a column for each (model, seed)."""
    runs = rows_where(runs, setting=setting, text=0)
    cells = {}
    for (method, model, seed), curve in runs[runs.method.isin(methods)].groupby(["method", "model", "seed"]):
        if len(curve) > 1:
            cells[method, model, seed] = kept_at_clicks(curve, clicks)
    cells = pd.Series(cells).rename_axis(["method", "model", "seed"])
    return cells.unstack(["model", "seed"]).sort_index(axis="columns").reindex(methods)


def of_runs(runs: pd.DataFrame, measure: str, setting="skilled", text=0) -> pd.DataFrame:
    """A measure as trained: a row for each method, a column for each (model, seed)."""
    runs = rows_where(runs, setting=setting, text=text, gamma=1)
    return runs.pivot_table(measure, "method", ["model", "seed"])


def of_models(runs: pd.DataFrame, measure: str, title: str, setting="skilled", text=0) -> pd.DataFrame:
    """The same, means over the seeds: a column for each model."""
    models = of_runs(runs, measure, setting, text).T.groupby("model").mean().T
    return models.rename(columns=lambda model: f"{title}, model {model}")


def with_range(cells: pd.DataFrame) -> pd.Series:
    """{method: the mean, with the lowest and the highest run}"""
    return cells.apply(lambda row: f"{row.mean():.1f} ({row.min():.1f}–{row.max():.1f})", axis="columns")


def parameters_of(method: str) -> int:
    """Trained parameters of a method on a tiny model: A has r rows or columns for each input, B for each output."""
    fields = plan.fields_of(method)
    r = fields.get("r", 8)
    if fields["method"] == "image_lora":
        return LAYERS * r * 2 * D
    sizes = {"v": 2 * D, "qk": 4 * D, "qkvo": 8 * D, "mlp": 2 * (D + MLP), "all": 8 * D + 2 * (D + MLP)}
    return LAYERS * r * sizes[fields.get("projections", "qkvo")]


# ---- Tables ----------------------------------------------------------------------------------------------------------


def markdown(title: str, cells: pd.DataFrame) -> str:
    """A table with a row for each row of cells, whose index holds the rows' names."""
    texts = cells.map(lambda cell: cell if isinstance(cell, str) else f"{cell:.1f}".replace("nan", ""))
    rows = [[title, *cells], ["---"] * (1 + len(cells.columns)), *texts.itertuples()]
    return "".join(f"|{'|'.join(row)}|\n" for row in rows)


def equal_clicks(runs: pd.DataFrame) -> str:
    """What each method keeps where 95 % of the switches are hit."""
    cells = kept(runs, "skilled", plan.AT_EQUAL_CLICKS, 95)
    models = cells.T.groupby("model").mean().T.rename(columns="model {}".format)
    models.insert(0, "parameters", [f"{parameters_of(method):,}" for method in models.index])
    models["lowest and highest run"] = [f"{row.min():.1f}–{row.max():.1f}" for _, row in cells.iterrows()]
    models["runs that hit so many"] = [f"{row.count()} of {len(row)}" for _, row in cells.iterrows()]
    return markdown("other questions, %, where 95 % are hit", models)


def text_before(runs: pd.DataFrame) -> str:
    """The new task by the word problems before an image in training and when asked."""
    cells = {}
    for trained, ending in TEXTS.items():
        for text in plan.TEXT:
            hits = with_range(of_runs(runs, "task_acc", text=text))
            cells[f"trained after {trained}, asked after {text}"] = hits.reindex(plan.with_ending(plan.THREE, ending))
    cells = pd.DataFrame({title: column.to_list() for title, column in cells.items()}, index=[*plan.THREE])
    return markdown("switches hit, %", cells.T)


def hints(runs: pd.DataFrame) -> str:
    """Clicks of models that were trained with hints."""
    columns = [of_models(runs, "wrong_hint_acc", "wrong hint"), of_models(runs, "task_acc", "none")]
    return markdown(
        "switches hit, %", pd.concat(columns, axis="columns").loc[plan.with_ending(plan.HINTED, " with hints")]
    )


def heads(runs: pd.DataFrame) -> str:
    """Hits, and other questions, of few heads: each run has other random heads, or a probe of its own."""
    methods = ["Image-LoRA" + ending.format(count) for count in (4, 12) for ending in (plan.PROBE, plan.RANDOM)]
    cells = {}
    for measure, title in (("task_acc", "hit"), ("other_questions_acc", "others")):
        for model in plan.MODELS:
            of_model = of_runs(rows_where(runs, model=model), measure)
            cells[f"{title}, model {model}"] = with_range(of_model.loc[methods].dropna(axis="columns", how="all"))
    return markdown("as trained, %", pd.DataFrame(cells))


def replay(runs: pd.DataFrame) -> str:
    """The other questions with and without replay, where 95 % of the switches are hit."""
    runs = rows_where(runs, seed=1)
    cells = kept(runs, "skilled", [*plan.THREE, *plan.with_ending(plan.THREE, plan.OWN)], 95)
    return markdown(
        "other questions, %, where 95 % are hit", cells.droplevel(1, axis="columns").rename(columns="model {}".format)
    )


def smollm2(runs: pd.DataFrame) -> str:
    """The same on SmolLM2: empty where a curve does not cross so many."""
    methods = [method for method in plan.SMOLLM2 if method != "base model"]
    shown = {}
    for clicks in (93, *HIT[:2]):
        cells = kept(runs, "SmolLM2", methods, clicks)
        for model, _ in cells:
            shown[f"{clicks} %, model {model}"] = cells[model, 1]
    return markdown("SmolLM2, other questions, %, where so many are hit", pd.DataFrame(shown).loc[methods])


def rates(runs: pd.DataFrame) -> list[str]:
    """Validation clicks at each learning rate, of tiny models and of SmolLM2's model 1; the chosen rate is bold."""
    tables = []
    for setting, tried in (("skilled", plan.TRIED), ("SmolLM2", plan.SMOLLM2_TRIED)):
        rows = rows_where(tried_runs(runs, setting), gamma=1, text=0)
        cells = rows.pivot_table("validation_acc", "method", "lr").loc[[*tried]].map("{:.1f}".format).replace("nan", "")
        for method in cells.index:
            rate = chosen_rate(setting, method)
            cells.loc[method, rate] = f"**{cells.loc[method, rate]}**"
        tables.append(
            markdown(f"{setting}: validation clicks, %, at the learning rate", cells.rename(columns="{:g}".format))
        )
    return tables


def tried_runs(runs: pd.DataFrame, setting: str) -> pd.DataFrame:
    """The runs by which learning rates were compared: one for each rate and model; of SmolLM2 on model 1."""
    tried = plan.SMOLLM2_TRIED if setting == "SmolLM2" else plan.TRIED
    runs = rows_where(runs, setting=setting, seed=1)
    runs = rows_where(runs, model=1) if setting == "SmolLM2" else runs
    return runs[[lr in tried.get(method, ()) for method, lr in zip(runs.method, runs.lr)]]


def page_tables(runs: pd.DataFrame) -> list[str]:
    """Those of the page, which a test compares with it. runs: at the chosen rates."""
    return [equal_clicks(runs), text_before(runs), hints(runs)]


def print_all(runs: pd.DataFrame) -> None:
    chosen = at_chosen_rates(runs)
    print("\n".join([*page_tables(chosen), replay(chosen), smollm2(chosen), heads(chosen), *rates(runs)]))
    for measure in runs.filter(like="_acc").columns.append(pd.Index(["divergence_after_screen"])):
        rows = chosen[(chosen.gamma == 1) & chosen[measure].notna()]
        cells = rows.pivot_table(measure, ["setting", "method", "text"], "model", sort=False)
        cells["mean"] = cells.mean(axis="columns")
        print(f"\n{measure}, as trained, by model\n{cells.to_string(float_format='{:.2f}'.format, na_rep='')}")


if __name__ == "__main__":
    print_all(read_runs())
