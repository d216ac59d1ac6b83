"""docs/stacks/*.md: their code runs, here or as a part of an example; what they name is there."""

import importlib.util
import re
from pathlib import Path
from textwrap import dedent

import pytest

from support.files import ROOT

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.unsanitized,
    pytest.mark.filterwarnings("ignore"),  # of other packages, about where they run
]

PAGES = sorted((ROOT / "docs/stacks").glob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def statements(text: str) -> str:
    """Without its indent, and with one for each line, however deep it begins."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def is_of_an_example(block: str) -> bool:
    files = (ROOT / "examples").glob("*.py")
    return any(f"\n{statements(block)}\n" in f"\n{statements(f.read_text())}\n" for f in files)


@each_page
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that are no part of an example, one after the other."""
    assert blocks(page)
    own = [block for block in blocks(page) if not is_of_an_example(block)]
    for package in re.findall(r"^(?:import|from) (\w+)", "\n".join(own), re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"make stacks installs {package}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"__name__": "__main__"}
    for number, block in enumerate(own):
        exec(compile(dedent(block), f"{page.name}, block {number + 1}", "exec"), names)


@each_page
def test_names_files(page: Path) -> None:
    """Among them an example and tests; and docs/stacks.md leads to the page."""
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [link for link in links if "/examples/" in link]
    tests = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert tests
    assert [name for name in tests if not (ROOT / name).exists()] == []
    assert f"(stacks/{page.name})" in (ROOT / "docs/stacks.md").read_text()
