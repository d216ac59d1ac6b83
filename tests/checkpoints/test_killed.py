"""Training that is killed goes on from its last complete checkpoint."""

import json
from pathlib import Path

import pytest

from support.files import ROOT, run_python

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)


@pytest.mark.cpu_only
@pytest.mark.unsanitized  # it forks
def test_killed_between_and_during_saves(tmp_path: Path) -> None:
    """At every file that a save opens, renames or removes; to the bits of an undisturbed run."""
    code = f"""
import sys, warnings
sys.path.insert(0, {str(ROOT / "tests")!r})
warnings.simplefilter("ignore")  # that there is one process is said at every save
from support import killed
killed.kill_everywhere({str(tmp_path)!r})
"""
    found = json.loads(run_python("-c", code))
    assert found["killed"] >= 3 * 3  # steps, and files of each checkpoint
    assert found["wrong"] == []
