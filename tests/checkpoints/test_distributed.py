"""torch.distributed.checkpoint: state dicts that it gathers, offloads and broadcasts; its files.

In one process, and with FSDP2 over several; loaded by as many, fewer or more.
"""

from pathlib import Path

import pytest

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from support import sharded  # noqa: E402

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("way", [way for way in sharded.WAYS if way != "broadcast"])
@pytest.mark.parametrize("setting", sharded.SETTINGS)
def test_without_processes(setting: str, way: str) -> None:
    """What refuses a type of the state dict does so here, too."""
    assert sharded.round_trip(setting, way, mesh=None) == "same bits"


def test_two_processes(tmp_path: Path) -> None:
    """Neither gloo nor NCCL sends int16, nor does anything gather a torch.dtype."""
    for verdicts in sharded.on_ranks(tmp_path / "two", 2, "round_trips(mesh)"):
        assert len(verdicts) == len(sharded.SETTINGS) * len(sharded.WAYS)
        assert {name: text for name, text in verdicts.items() if text != "same bits"} == {}


# Said of every file in a process that is alone.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_files_for_other_numbers_of_processes(tmp_path: Path) -> None:
    """From one process to two, and from two to one and to four, of which some have empty shards."""
    by_one, by_two = tmp_path / "by one", tmp_path / "by two"
    saved = sharded.save(by_one, mesh=None)
    both = f"[load({str(by_one)!r}, mesh), save({str(by_two)!r}, mesh)]"
    (loaded, saved_by_two), others = sharded.on_ranks(tmp_path / "two", 2, both)
    assert loaded == saved
    assert others == [loaded, saved_by_two]
    assert sharded.load(by_two, mesh=None) == saved_by_two
    for loaded in sharded.on_ranks(tmp_path / "four", 4, f"load({str(by_two)!r}, mesh)"):
        assert loaded == saved_by_two
