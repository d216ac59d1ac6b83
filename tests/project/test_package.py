"""What is published: the source distribution, its metadata, wheels, CHANGELOG.md, CITATION.cff."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import pytest

import fusedopt
from support.files import ROOT

# Of the sources alone.
pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

# A link to a file of the repository, or an image.
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)[^)]*\)")


def source_distribution(folder: Path) -> tuple[set[str], Message]:
    """Names of its files, and its metadata; of a copy that is not built, and without a compiler."""
    pytest.importorskip("setuptools", "77", reason="setuptools is a build requirement only")
    copy = folder / "copy"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    built = shutil.ignore_patterns("__pycache__", "*.so")
    for name in (".ci", ".github", "bench", "csrc", "docs", "examples", "fusedopt", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder],
        cwd=copy,
        env={**os.environ, "FUSEDOPT_CUDA": "0", "CXX": "no-compiler"},
        check=True,
        capture_output=True,
    )
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name for member in tar if member.isfile()}
        (top,) = {name.partition("/")[0] for name in names}
        metadata = tar.extractfile(f"{top}/PKG-INFO")
        assert metadata
        return {name.removeprefix(f"{top}/") for name in names}, BytesParser().parse(metadata)


def files(folder: str, pattern: str = "**/*") -> set[str]:
    """Of the repository, without what was built or is an editor's."""
    paths = (path for path in (ROOT / folder).glob(pattern) if path.is_file())
    names = {str(path.relative_to(ROOT)) for path in paths}
    return {name for name in names if not re.search(r"__pycache__|\.so$|/\.", name)}


def test_source_distribution(tmp_path: Path) -> None:
    names, metadata = source_distribution(tmp_path)
    documents = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"}
    wanted = {"setup.py", "pyproject.toml", "Makefile", "mkdocs.yml", ".ci/run"} | documents
    for folder in (".github", "bench", "csrc", "docs", "examples", "fusedopt", "tests"):
        assert files(folder)
        wanted |= files(folder)
    assert wanted - names == set()

    assert metadata["Name"] == "fusedopt"
    assert metadata["Version"] == fusedopt.__version__
    assert metadata["License-Expression"] == "MIT"
    classifiers = metadata.get_all("Classifier", [])
    assert [name for name in classifiers if name.startswith("License")] == []  # PEP 639
    minor = int(metadata["Requires-Python"].removeprefix(">=3."))
    assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert f"Programming Language :: Python :: 3.{minor - 1}" not in classifiers
    assert "Typing :: Typed" in classifiers

    # On an index page, no link leads to a file of the repository.
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    description = metadata.get_payload(decode=True).decode()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert len(LINK.findall(readme)) >= 6
    assert LINK.findall(description) == []
    kept = [line for line in readme.splitlines() if line and not LINK.search(line)]
    assert [line for line in description.splitlines() if line in kept] == kept
    assert "CONTRIBUTING.md" in description


def test_wheels_are_built_alike_by_make_and_by_the_workflow() -> None:
    """For the Pythons of the classifiers, from shared objects, with the libgomp of torch."""
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert f"\nCPYTHONS := {' '.join(pythons)}\n" in makefile
    cpythons = [f"cp{python.replace('.', '')}-manylinux*" for python in pythons]
    assert f'\nbuild = "{" ".join(cpythons)}"\n' in project
    for pattern in ('--build-base=[^"]*', "auditwheel repair --exclude [^ ]+"):
        (used,) = re.findall(pattern, makefile)
        assert used in project


def test_citation_is_of_this_version() -> None:
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    fields = dict(line.split(": ", 1) for line in lines if re.match(r"[\w-]+: ", line))
    assert fields["cff-version"] == "1.2.0"
    assert fields["title"] == "fusedopt"
    assert fields["version"] == fusedopt.__version__
    assert fields["license"] == "MIT"


def test_changelog_begins_with_what_is_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    first, *releases = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert first == "Unreleased"
    for release in releases:  # the newest first, and none newer than this
        assert re.fullmatch(r"\[?\d+\.\d+\.\d+\]? - \d{4}-\d\d-\d\d", release), release
    if releases:
        assert releases[0].startswith((fusedopt.__version__, f"[{fusedopt.__version__}]"))
    groups = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert groups


def test_every_stack_has_tests() -> None:
    """And every file of tests of stacks is named."""
    text = (ROOT / "docs/stacks.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "stack | " not in line]
    named = [re.findall(r"`(tests/[\w/]+\.py)`", row) for row in rows]
    assert len(rows) >= 12
    assert all(named)
    found = {name for names in named for name in names}
    assert {name for name in found if not (ROOT / name).exists()} == set()
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/stacks/test_*.py")}
    assert files <= set(re.findall(r"`(tests/[\w/]+\.py)`", text))
