"""Models and optimizers that FSDP2 shards over processes, and the ways to save and load them.

For tests and, imported by them, for the processes that they start. All functions that are given a
mesh are collective; without one, the model is whole and there are no processes.
"""

import copy
import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import fusedopt
from support.files import ROOT
from support.processes import run_ranks
from support.tensors import BFLOAT16, FLOAT32, values

Made = tuple[nn.Module, Any]
# Dtype of the params, and options.
SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (FLOAT32, {}),
    "bfloat16 states": (FLOAT32, {"state_dtype": BFLOAT16}),
    "split": (BFLOAT16, {"master_weights": "split", "state_dtype": "bfloat16"}),
    "split8": (BFLOAT16, {"master_weights": "split8", "state_dtype": "bfloat16"}),
    "q8": (BFLOAT16, {"master_weights": "split8", "state_dtype": "q8"}),
    "masters": (BFLOAT16, {"master_weights": "float32"}),
    "average": (BFLOAT16, {"ema_decay": 0.9}),
    "everything": (
        BFLOAT16,
        {
            "master_weights": "split",
            "state_dtype": "bfloat16",
            "stochastic_rounding": True,
            "ema_decay": 0.9,
            "max_grad_norm": 1.0,
        },
    ),
}
FULL = {"full_state_dict": True}
# How a state dict of torch.distributed.checkpoint is asked for, and what loading it needs to know.
WAYS: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {
    "sharded": ({}, {}),
    "offloaded": ({"cpu_offload": True}, {}),
    "flattened": ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    "full": (FULL, FULL),
    "broadcast": ({**FULL, "cpu_offload": True}, {**FULL, "broadcast_from_rank0": True}),
}
NANS = torch.tensor([0x7F81, 0x7FFF, -0x7F, -1], dtype=torch.int16)  # if read as bfloat16


def make(setting: str, mesh: Any, seed: int = 0) -> Made:
    """Shards are uneven, and one process has nothing of the last bias."""
    dtype, options = SETTINGS[setting]
    torch.manual_seed(seed)
    # Rows of even and of odd length; and of whole groups of codes, with a vector behind them.
    sizes = (64, 128, 65, 1) if options.get("state_dtype") == "q8" else (3, 5, 34, 41, 1)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers).to(dtype)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    biases = [param for param in model.parameters() if param.dim() == 1]
    weights = [param for param in model.parameters() if param.dim() > 1]
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    return model, fusedopt.AdamW(groups, lr=0.01, **options)


def train(made: Made, *seeds: int) -> None:
    """Grads are drawn, and not of a loss, so that their bits do not depend on the processes."""
    model, optimizer = made
    for seed in seeds:
        for param in model.parameters():
            grad = values(*param.shape, dtype=param.dtype, seed=seed)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()


def trained(setting: str, mesh: Any) -> Made:
    made = make(setting, mesh)
    train(made, 1, 2, 3)
    for entries in made[1].state.values():
        if "param_remainder" in entries:  # any 16 bits may be there
            entry = local(entries["param_remainder"])
            entry.copy_(NANS.repeat(entry.numel())[: entry.numel()].view(entry.shape))
    return made


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def everything(made: Made, whole: bool = True) -> dict[str, str]:
    """The bits of all params and states, shortened; from whole tensors, so alike on all ranks.

    Or of what this process has of them: nothing is gathered then.
    """
    model, optimizer = made
    found = {}
    for name, param in model.named_parameters():
        for key, entry in {"param": param.detach(), **optimizer.state[param]}.items():
            numbers = entry.view(BFLOAT16) if entry.dtype == torch.int16 else entry
            if isinstance(numbers, DTensor):
                numbers = numbers.full_tensor() if whole else numbers.to_local()
            contents = numbers.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            digest = hashlib.sha256(contents).hexdigest()[:16]
            found[f"{key} of {name}"] = f"{entry.dtype} {tuple(entry.shape)} {digest}"
    return found


def bits_of_all(mesh: Any) -> dict[str, dict[str, str]]:
    """What three steps make of every setting."""
    found = {}
    for setting in SETTINGS:
        made = make(setting, mesh)
        train(made, 1, 2, 3)
        found[setting] = everything(made)
    return found


def round_trip(setting: str, way: str, mesh: Any) -> str:
    """What comes of a state dict that is loaded into a fresh optimizer, as far as it is here."""
    saving, loading = WAYS[way]
    original, copied = trained(setting, mesh), make(setting, mesh, seed=1)
    saved = get_optimizer_state_dict(*original, options=StateDictOptions(**saving))
    with torch.no_grad():
        for param, own in zip(copied[0].parameters(), original[0].parameters(), strict=True):
            param.copy_(own)
    options = StateDictOptions(**loading)
    set_optimizer_state_dict(*copied, copy.deepcopy(saved), options=options)
    before, loaded = (everything(made, whole=False) for made in (original, copied))
    for made in (original, copied):  # whatever was loaded, as other processes wait for this one
        train(made, 4, 5)
    after, went_on = (everything(made, whole=False) for made in (original, copied))
    if loaded != before:
        return "loaded otherwise"
    if after == before:
        return "no steps were made"
    return "same bits" if went_on == after else "goes on otherwise"


def round_trips(mesh: Any) -> dict[str, str]:
    return {
        f"{setting}, {way}": round_trip(setting, way, mesh) for setting in SETTINGS for way in WAYS
    }


# What was saved or loaded of each setting, and what steps made of it.
Contents = dict[str, list[dict[str, str]]]


def _then_trained(made: Made) -> list[dict[str, str]]:
    before = everything(made)
    train(made, 4, 5)
    return [before, everything(made)]


def save(folder: str | Path, mesh: Any) -> Contents:
    """A file of torch.distributed.checkpoint for each setting."""
    contents = {}
    for setting in SETTINGS:
        made = trained(setting, mesh)
        model, optimizer = get_state_dict(*made)
        dcp.save(
            {"model": model, "optimizer": optimizer},
            checkpoint_id=Path(folder, setting),
            no_dist=mesh is None,
        )
        contents[setting] = _then_trained(made)
    return contents


def load(folder: str | Path, mesh: Any) -> Contents:
    """What ``save()`` has saved, into models with other weights."""
    contents = {}
    for setting in SETTINGS:
        made = make(setting, mesh, seed=1)
        model, optimizer = get_state_dict(*made)
        dcp.load(
            {"model": model, "optimizer": optimizer},
            checkpoint_id=Path(folder, setting),
            no_dist=mesh is None,
        )
        set_state_dict(*made, model_state_dict=model, optim_state_dict=optimizer)
        contents[setting] = _then_trained(made)
    return contents


def evaluate_on_ranks(folder: Path, world: int, expression: str) -> list[Any]:
    """What an expression of this module's names and of ``mesh`` is in each of so many processes."""
    folder.mkdir()
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from support import sharded
sharded.print_on_rank({expression!r})
os._exit(0)  # gloo's threads may abort a process that ends while they do
"""
    return [json.loads(out) for out in run_ranks(folder, code, world)]


def print_on_rank(expression: str) -> None:
    """In a process of ``run_ranks()``."""
    rank, file, world = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    result = eval(expression, {**globals(), "mesh": init_device_mesh("cpu", (world,))})
    dist.barrier()
    print(json.dumps(result), flush=True)
