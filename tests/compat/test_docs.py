"""docs/compat.md: its code runs as it stands, and its table is of what there is."""

import importlib
import re
from pathlib import Path

import pytest

from support.files import ROOT

pytestmark = pytest.mark.cpu_only

TEXT = (ROOT / "docs/compat.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)), ids=lambda index: f"block {index + 1}")
def test_code_runs(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = compile(BLOCKS[index], f"docs/compat.md, block {index + 1}", "exec")
    exec(code, {"__name__": "__main__"})


def test_every_module_has_a_row() -> None:
    rows = re.findall(r"^\| `fusedopt\.compat\.(\w+)` \|(.*?)\|", TEXT, re.MULTILINE)
    files = (ROOT / "fusedopt/compat").glob("[!_]*.py")
    assert {name for name, _ in rows} == {path.stem for path in files}
    for name, stand_ins in rows:
        module = importlib.import_module(f"fusedopt.compat.{name}")
        own = {
            cls
            for cls, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__ and isinstance(value, type)
        }
        assert set(re.findall(r"`(\w+)`", stand_ins)) == own
        assert module.convert_state_dict.__doc__
    assert len(BLOCKS) >= 2
