"""Break it yourself: each line that the table of data/README.md changes breaks the test that the table names."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
CODE = (ROOT / "imagelora.py").read_text()
TESTS = (ROOT / "test_imagelora.py").read_text()
PAGE = (ROOT / "data/README.md").read_text()
# [(a line, what stands in its place, what fails), ...]
BREAKS = re.findall(r"^\|`([^`]+)`\|`([^`]+)`\|`pytest test_imagelora.py -k (\w+)`\|", PAGE, re.M)


def functions_testing(code: str, monkeypatch) -> dict:
    """The functions of test_imagelora.py, which test this code in place of imagelora.py."""
    for name, source in (("imagelora", code), ("test_imagelora", TESTS)):
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, f"{name}.py", "exec"), vars(module))
    return vars(module)


def run(test) -> None:
    """A test with each of its parameters, as pytest runs it."""
    (names, cases), *_ = [mark.args for mark in getattr(test, "pytestmark", [])] or [("", [()])]
    for case in cases:
        arguments = case if isinstance(case, tuple) else (case,)
        test(**dict(zip(re.findall(r"\w+", names), arguments)))


def test_the_table_has_seven_changes():
    assert len(BREAKS) == 7


@pytest.mark.parametrize("line, in_its_place, name", BREAKS)
def test_a_changed_line_breaks_the_test_of_what_it_is_for(line, in_its_place, name, monkeypatch):
    assert CODE.count(line) == 1
    functions = functions_testing(CODE.replace(line, in_its_place), monkeypatch)
    (test,) = [function for function_name, function in functions.items() if name in function_name]
    with pytest.raises((AssertionError, RuntimeError)):
        run(test)
