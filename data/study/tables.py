"""Files of runs, one per line, and the tables that show them."""

import csv
import io
import json
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


def mean(runs: list[dict], measure: str, layout="{:.1%}") -> str:
    """The mean of these runs, as text. The % is left out, because the title of the column has it."""
    return layout.format(np.mean([run[measure] for run in runs])).rstrip("%")


def mean_and_each(runs: list[dict], measure: str, layout="{:.1%}") -> str:
    """The mean and, in brackets, each run; or what all of them have in common; or nothing, if it was not measured."""
    values = [run[measure] for run in runs]
    if "" in values:
        return ""
    each = [layout.format(value).rstrip("%") for value in values]
    if len(set(each)) == 1:
        return each[0]
    return f"{mean(runs, measure, layout)} ({', '.join(each)})"


def table(title: str, columns: list[tuple], rows: list[tuple[str, list[dict]]], cell=mean_and_each) -> str:
    """columns: (title, measure), and the layout of a number where it is no percentage. rows: (name, its runs)."""
    texts = []
    for name, runs in rows:
        texts.append((name, *(cell(runs, *measure) for _, *measure in columns)))
    return markdown((title, *(column for column, *_ in columns)), *texts)


def markdown(header: tuple, *rows: tuple) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"|{'|'.join(line)}|\n" for line in lines)


def choose_rate(accuracies: dict[float, float]) -> float:
    """The lowest rate whose accuracy is within one point of the best: one run cannot tell a point from noise."""
    best = max(accuracies.values())
    return min(rate for rate in accuracies if accuracies[rate] >= best - 0.01)
