"""Break it yourself: each line that the table of data/README.md changes breaks the test that the table names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = (ROOT / "imagelora.py").read_text()
PAGE = (ROOT / "data/README.md").read_text()
# [(a line, what stands in its place, the command that fails), ...]
BREAKS = re.findall(r"^\|`([^`]+)`\|`([^`]+)`\|`(pytest test_imagelora.py -k \w+)`\|", PAGE, re.M)
assert len(BREAKS) == 7


@pytest.mark.parametrize("line, in_its_place, command", BREAKS)
def test_a_changed_line_breaks_the_test_of_what_it_is_for(line, in_its_place, command, tmp_path):
    assert CODE.count(line) == 1
    (tmp_path / "imagelora.py").write_text(CODE.replace(line, in_its_place))
    for name in ("test_imagelora.py", "tiny_vlm.py", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    ended = subprocess.run([sys.executable, "-m", *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stdout  # a test has failed; 2 would be an error
    assert re.search(r"^E +(AssertionError|assert|RuntimeError)", ended.stdout, re.M)
