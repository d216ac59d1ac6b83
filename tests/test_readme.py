"""README's Python code runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_there_is_code_that_uses_the_package() -> None:
    assert any("fusedopt" in block for block in BLOCKS)


@pytest.mark.parametrize("index", range(len(BLOCKS)), ids=lambda index: f"block {index + 1}")
def test_code_runs(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block on its own, in an empty folder: a reader copies one of them."""
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[index], f"README.md, block {index + 1}", "exec"), {"__name__": "__main__"})
