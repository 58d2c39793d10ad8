"""What the pages name is there: their commands, tests and links, and one version."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import train
from data.command import command
from data.study import pretrain

ROOT = Path(train.__file__).parent
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("data/**/*.md")))]
TESTS = "".join(path.read_text() for path in [*ROOT.glob("test_*.py"), *ROOT.glob("data/**/test_*.py")])
COMMANDS = {"train.py": train.Config, "-m data.study.pretrain": pretrain.PretrainConfig}  # those that have options
if find_spec("pandas") and find_spec("matplotlib"):
    from data.study import figures, runs

    COMMANDS |= {"-m data.study.runs": runs.RunsConfig, "-m data.study.figures": figures.FiguresConfig}


def test_the_lesson_needs_neither_the_study_nor_its_packages():
    names = ["data.study", "pandas", "matplotlib"]
    check = f"import sys, train; print([name for name in {names} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "[]\n"


def anchors(page: Path) -> list[str]:
    """What a link to a page can have after its #: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_links_of_a_page_can_be_given(page):
    text = (ROOT / page).read_text()
    for program, options in re.findall(r"\b(?:python|torchrun) (?!-m pdb)(-m [\w.]+|[\w/.]+\.py)([^`#\n]*)", text):
        path = program
        if program.startswith("-m "):
            path = program.removeprefix("-m ").replace(".", "/") + ".py"
        assert (ROOT / path).exists(), program
        if program in COMMANDS:
            assert command(COMMANDS[program], lambda cfg: None, "", shlex.split(options)) == 0
    for word in re.findall(r"pytest[^`\n]* -k (\w+)", text):
        assert re.search(rf"def test_\w*{word}", TESTS), f"no test is named {word}"
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", text):
        linked_page = (ROOT / page).parent / target if target else ROOT / page
        assert linked_page.exists(), target
        assert not anchor or anchor in anchors(linked_page), f"{target}#{anchor}"


def test_the_map_says_how_long_each_file_is_and_where_the_method_ends():
    page = (ROOT / "README.md").read_text()
    lines = {name: int(count) for name, count in re.findall(r"^\|\[(.+?)\]\(\1\)\|(\d+)\|", page, re.M)}
    assert [*lines] == ["imagelora.py", "tiny_vlm.py", "train.py", "test_imagelora.py"]
    for name, count in lines.items():
        assert len((ROOT / name).read_text().splitlines()) == count, name
    method, _ = (ROOT / "imagelora.py").read_text().split("# ------ That is the method.")
    assert f"The method is its first {len(method.rstrip().splitlines())} lines" in page


def test_there_is_one_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
