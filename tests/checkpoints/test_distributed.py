"""torch.distributed.checkpoint: state dicts that it gathers, offloads and broadcasts; its files.

In one process, and with FSDP2 over several; loaded by as many, fewer or more.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Shard  # noqa: E402

import fusedopt  # noqa: E402
from support import sharded  # noqa: E402
from support.optimizers import each_name  # noqa: E402
from support.processes import on_ranks  # noqa: E402

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("way", [way for way in sharded.WAYS if way != "broadcast"])
@pytest.mark.parametrize("setting", sharded.SETTINGS)
def test_without_processes(setting: str, way: str) -> None:
    """What refuses a type of the state dict does so here, too."""
    assert sharded.round_trip(setting, way, mesh=None) == "same bits"


@pytest.mark.unsanitized  # what each process steps are ordinary tensors
def test_two_processes(tmp_path: Path) -> None:
    """Neither gloo nor NCCL sends int16, nor does anything gather a torch.dtype."""
    for verdicts in sharded.evaluate_on_ranks(tmp_path / "two", 2, "round_trips(mesh)"):
        assert len(verdicts) == len(sharded.SETTINGS) * len(sharded.WAYS)
        assert {name: text for name, text in verdicts.items() if text != "same bits"} == {}


# Said of every file in a process that is alone.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.unsanitized
def test_files_for_other_numbers_of_processes(tmp_path: Path) -> None:
    """From one process to two, and from two to one and to four, of which some have empty shards."""
    by_one, by_two = tmp_path / "by one", tmp_path / "by two"
    saved = sharded.save(by_one, mesh=None)
    both = f"[load({str(by_one)!r}, mesh), save({str(by_two)!r}, mesh)]"
    (loaded, saved_by_two), others = sharded.evaluate_on_ranks(tmp_path / "two", 2, both)
    assert loaded == saved
    assert others == [loaded, saved_by_two]
    assert sharded.load(by_two, mesh=None) == saved_by_two
    for loaded in sharded.evaluate_on_ranks(tmp_path / "four", 4, f"load({str(by_two)!r}, mesh)"):
        assert loaded == saved_by_two


def made_by(package: Any, name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 1))
    options = {"momentum": 0.9} if name == "SGD" else {}  # torch loads no dict without tensors
    return model, getattr(package, name)(model.parameters(), lr=0.01, **options)


# Said of every file in a process that is alone.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("way", ["file", "full", "flattened"])
@pytest.mark.parametrize("to_torch", [False, True], ids=["from torch", "to torch"])
@each_name
def test_moves_between_us_and_torch(name: str, to_torch: bool, way: str, tmp_path: Path) -> None:
    """All keys of the loading optimizer's groups are looked for in what is loaded, or reversely."""
    packages = (fusedopt, torch.optim) if to_torch else (torch.optim, fusedopt)
    saved, loaded = (made_by(package, name, seed) for seed, package in enumerate(packages))
    sharded.train(saved, 1, 2)
    options = StateDictOptions(**sharded.WAYS[way][0] if way in sharded.WAYS else {})
    model, optimizer = get_state_dict(*saved, options=options)
    if way == "file":
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path, no_dist=True)
        model, optimizer = get_state_dict(*loaded)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path, no_dist=True)
    else:
        model, optimizer = copy.deepcopy((model, optimizer))
    set_state_dict(*loaded, model_state_dict=model, optim_state_dict=optimizer, options=options)
    for made in (saved, loaded):
        sharded.train(made, 3, 4)
    for ours, theirs in zip(loaded[0].parameters(), saved[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


# What is wrong with a state dict, and what is said of it.
WRONG = {
    "another optimizer's": r"group 0|has no 'eps'",
    "without an entry": "the state of the parameter at group 0, index 0 has no 'exp_avg'",
    "without a param's state": "Missing optimizer state for parameter '0.weight'",
    "another shape": r"exp_avg of the parameter at group 0, index 0 is of shape \(14, 2\)",
}


def spoilt(saved: Any, what: str, mesh: Any) -> Any:
    saved = copy.deepcopy(saved)
    state = saved["state"]
    if what == "another optimizer's":
        for entries in state.values():
            entries["momentum_buffer"] = entries.pop("exp_avg")
            del entries["exp_avg_sq"]
        for group in saved["param_groups"]:
            del group["eps"], group["betas"]
    elif what == "without an entry":
        del state["0.weight"]["exp_avg"]
    elif what == "without a param's state":
        del state["0.weight"]
    else:
        other = DTensor.from_local(torch.ones(7, 2), mesh, [Shard(0)], run_check=False)
        state["0.weight"]["exp_avg"] = other
    return saved


@on_ranks(2)
@pytest.mark.parametrize("on_all", [True, False], ids=["on all ranks", "on one rank"])
@pytest.mark.parametrize("what", WRONG)
def test_a_state_dict_that_does_not_fit(what: str, on_all: bool) -> None:
    """Each rank loads on its own: those on which it does not fit raise and have changed nothing,
    the others load, and none of them waits.
    """
    mesh = init_device_mesh("cpu", (2,))
    saved = get_optimizer_state_dict(*sharded.trained("plain", mesh))
    made = sharded.make("plain", mesh)
    get_optimizer_state_dict(*made)  # so that there is state to begin with
    optimizer = made[1]
    before, state = sharded.everything(made), dict(optimizer.state)
    if on_all or dist.get_rank() == 1:
        with pytest.raises((ValueError, RuntimeError), match=WRONG[what]):
            set_optimizer_state_dict(*made, spoilt(saved, what, mesh))
        assert optimizer.state == state
    else:
        set_optimizer_state_dict(*made, saved)
    after = sharded.everything(made)  # of whole tensors
    assert (after == before) == on_all
    sharded.train(made, 1)  # and goes on with what it has
    assert sharded.everything(made) != after


@on_ranks(2)
@pytest.mark.parametrize("is_cut", [False, True], ids=["missing", "cut off"])
def test_a_file_of_one_rank_is_missing(is_cut: bool, tmp_path: Path) -> None:
    """Both ranks say so, whichever of them would have read it. torch loads in place, so what was
    there to be read may have been loaded.
    """
    mesh = init_device_mesh("cpu", (2,))
    saved = get_optimizer_state_dict(*sharded.trained("plain", mesh))
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
    if dist.get_rank() == 0:
        file = tmp_path / "__1_0.distcp"
        content = file.read_bytes()
        file.unlink()
        if is_cut:
            file.write_bytes(content[:100])
    dist.barrier()
    loaded = get_optimizer_state_dict(*sharded.make("plain", mesh))
    words = "EOFError" if is_cut else r"No such file or directory: '.*__1_0\.distcp'"
    with pytest.raises(dcp.api.CheckpointException, match=words):
        dcp.load({"optimizer": loaded}, checkpoint_id=tmp_path)
