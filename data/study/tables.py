"""Files of runs, one per line, and the tables that show them."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.command import write_file


def read_runs(path: Path, columns: tuple[str, ...]) -> list[dict]:
    """The runs of a file, which has at least these columns; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            why = f"it has no column {', '.join(sorted(missing))}"
            raise ValueError(f"{path} is no file of runs, because {why}; name another one, or move it away")
        return [{name: parse(text) for name, text in row.items()} for row in reader]


def parse(text: str):
    """A value of a run: written as JSON, unless it is a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def write_runs(path: Path, runs: list[dict]) -> None:
    """Writes a file of runs, one per line, which `read_runs` reads."""
    file = io.StringIO()
    writer = csv.DictWriter(file, runs[0].keys(), lineterminator="\n")
    writer.writeheader()
    for run in runs:
        writer.writerow({name: value if isinstance(value, str) else json.dumps(value) for name, value in run.items()})
    write_file(path, file.getvalue().encode())


def mean_and_range(measure: str, layout="{:.1%}", with_range=True) -> Callable[[list[dict]], str]:
    """A column's function, runs -> text: the mean and, in brackets, the range of a measure; or what all runs share.

    Empty if it was not measured. The % is left out, because the title of the column has it."""

    def cell(runs: list[dict]) -> str:
        values = [run[measure] for run in runs]
        if not values or "" in values:
            return ""
        mean, lowest, highest = (layout.format(f(values)).rstrip("%") for f in (np.mean, min, max))
        return mean if lowest == highest or not with_range else f"{mean} ({lowest}–{highest})"

    return cell


def table(title: str, columns: dict[str, Callable], rows: list[tuple[str, list[dict]]]) -> str:
    """A Markdown table. columns: {title: function, runs -> a cell's text}. rows: (name, runs), left out if no runs."""
    texts = [(name, *(cell(runs) for cell in columns.values())) for name, runs in rows if runs]
    return markdown((title, *columns), *texts)


def rate_table(title: str, lines: list[tuple[str, dict[float, float], float | None]]) -> str:
    """A Markdown table of accuracies. lines: (name, {learning rate: accuracy}, the chosen rate, bold, or None)."""
    tried = sorted({rate for _, accuracies, _ in lines for rate in accuracies})
    rows = []
    for name, accuracies, chosen in lines:
        texts = {rate: f"{100 * accuracy:.1f}" for rate, accuracy in accuracies.items()}
        texts[chosen] = f"**{texts[chosen]}**" if chosen in texts else ""
        rows.append((name, *(texts.get(rate, "") for rate in tried)))
    return markdown((title, *(f"{rate:g}" for rate in tried)), *rows)


def markdown(header: tuple, *rows: tuple) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"|{'|'.join(line)}|\n" for line in lines)


def choose_rate(accuracies: dict[float, float]) -> float:
    """The lowest rate whose accuracy is within one point of the best: one run cannot tell a point from noise."""
    best = max(accuracies.values())
    return min(rate for rate in accuracies if accuracies[rate] >= best - 0.01)
