"""Files of runs, one a line, and the tables that show them."""

import csv
import io
import json
from pathlib import Path

import numpy as np

from data import write_file


def read_rows(path: Path, columns: tuple[str, ...]) -> list[dict]:
    """The rows of a file of runs, which has at least these columns; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if not {*columns} <= {*(reader.fieldnames or ())}:
            raise ValueError(f"{path} is no file of runs; name another one, or move it away to start anew")
        return [{name: parse(text) for name, text in row.items()} for row in reader]


def parse(text: str):
    """A number, a list or the like is written as JSON, a text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def write_rows(path: Path, rows: list[dict]) -> None:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()})
    write_file(path, file.getvalue().encode())


def mean(rows: list[dict], measure: str, layout="{:.1%}") -> str:
    """The mean of these runs. Percentages have no sign, because it stands in the title of the column."""
    return layout.format(np.mean([row[measure] for row in rows])).rstrip("%")


def mean_and_each(rows: list[dict], measure: str, layout="{:.1%}") -> str:
    """The mean and, in brackets, each run; or what all of them have in common; or nothing, if it was not measured."""
    values = [row[measure] for row in rows]
    if "" in values:
        return ""
    each = [layout.format(value).rstrip("%") for value in values]
    if len(set(each)) == 1:
        return each[0]
    return f"{mean(rows, measure, layout)} ({', '.join(each)})"


def table(title: str, columns: list[tuple], lines: list[tuple[str, list[dict]]], cell=mean_and_each) -> str:
    """columns: (title, measure), and the layout of a number where it is no percentage. lines: (name, rows of runs)."""
    texts = []
    for name, rows in lines:
        texts.append((name, *(cell(rows, *measure) for _, *measure in columns)))
    return markdown((title, *(name for name, *_ in columns)), *texts)


def markdown(header: tuple, *lines: tuple) -> str:
    rows = [header, ("---",) * len(header), *lines]
    return "".join(f"|{'|'.join(row)}|\n" for row in rows)
