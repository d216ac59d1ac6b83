"""README and docs/: their Python code runs as it stands, and links lead to what is there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from support.files import ROOT

# Those in docs/stacks/ need other packages, which `make stacks` has.
PAGES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.glob("docs/*.md"))}
PAGES["README.md"] = ROOT / "README.md"
# A block may have a title that says what it needs: ```python title="needs a GPU"
BLOCK = re.compile(r"^```python(?: title=\"(.*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CAN_RUN = {"": lambda: True, "needs a GPU": torch.cuda.is_available}


def blocks(page: str) -> list[tuple[str, str]]:
    """(What it needs, code) of each."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert len(found) == len(re.findall(r"^ *```+ *\{?\.?py", text, re.MULTILINE))
    return found


# Said of every file in a process that is alone.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its order, with the names of the blocks before it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for index, (need, code) in enumerate(blocks(page)):
        if CAN_RUN[need]():
            exec(compile(code, f"{page}, block {index + 1}", "exec"), names)


@pytest.mark.cpu_only
def test_nearly_all_code_runs_everywhere() -> None:
    needs = [need for page in PAGES for need, _ in blocks(page)]
    assert len(needs) >= 15
    assert needs.count("") >= 0.9 * len(needs)
    assert all(
        "fusedopt" in "".join(code for _, code in blocks(page)) for page in PAGES if blocks(page)
    )


def optimizers_of(package: Any) -> set[str]:
    things = {name: getattr(package, name) for name in dir(package) if name[0] != "_"}
    kind = torch.optim.Optimizer
    return {
        name
        for name, thing in things.items()
        if isinstance(thing, type) and issubclass(thing, kind) and thing is not kind
    }


@pytest.mark.cpu_only
def test_all_optimizers_are_named() -> None:
    """Those that are here, and those that stay with torch."""
    ours, theirs = optimizers_of(fusedopt), optimizers_of(torch.optim)
    page = PAGES["docs/optimizers.md"].read_text(encoding="utf-8")
    tables = page.split("## Which stay with torch")
    named = [set(re.findall(r"^\| [`[](\w+)[`\]]", table, re.MULTILINE)) for table in tables]
    assert named == [ours, theirs - ours]
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:here|stay)[^|]* \| (.*) \|$", readme, re.MULTILINE)
    named = [set(re.findall(r"\w+", re.sub(r"\(.*?\)", "", row))) for row in rows]
    assert named == [ours & theirs, ours - theirs, theirs - ours]


OTHERS = ["CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md"]


@pytest.mark.cpu_only
@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.cpu_only
def test_every_page_can_be_found() -> None:
    """The navigation of the site names all pages that there are, and no others."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = re.search(r"^nav:\n((?: .*\n)+)", config, re.MULTILINE)
    assert nav
    named = set(re.findall(r"([\w/-]+\.md)", nav[1]))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert named == there | {"changelog.md", "contributing.md"}  # of the files at the root
