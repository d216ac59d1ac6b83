"""For train_gpt.py: the processes of torchrun, a model spread over them, and checkpoints of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpt import GPT, Batches, Run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def join_processes(device: torch.device) -> torch.device:
    """Those that torchrun has started, or this one alone; the first alone prints."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**({} if "RANK" in os.environ else alone))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def spread(model: GPT, how: str | None) -> nn.Module:
    """What is to be called in the model's place. Sharding is in place, before the optimizer."""
    if how == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if how == "fsdp":
        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def is_true_of_the_first(fact: bool) -> bool:
    """Whether to stop, say: clocks differ, and all processes have to do the same."""
    if not dist.is_initialized():
        return fact
    told = torch.tensor(int(fact))
    if dist.get_backend() == "nccl":
        told = told.cuda()
    dist.broadcast(told, 0)
    return bool(told)


def save(folder: Path, step: int, runs: list[Run], batches: Batches) -> None:
    """In a folder of its own for each step."""
    state = {"batches": batches.generator.get_state(), "runs": {r.name: state_of(r) for r in runs}}
    dcp.save(state, checkpoint_id=folder / f"step-{step:06}", no_dist=not dist.is_initialized())


def load(folder: Path, runs: list[Run], batches: Batches) -> int:
    """The latest checkpoint, by as many processes as one likes; how many steps it has made."""
    found = sorted(folder.glob("step-*"))
    if not found:
        raise SystemExit(f"--resume: there is no checkpoint in {folder}")
    state = {"batches": batches.generator.get_state(), "runs": {r.name: state_of(r) for r in runs}}
    dcp.load(state, checkpoint_id=found[-1], no_dist=not dist.is_initialized())
    batches.generator.set_state(state["batches"])
    for run in runs:
        saved = state["runs"][run.name]
        set_state_dict(
            run.model,
            run.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        run.schedule.load_state_dict(saved["schedule"])
        run.losses = saved["losses"]
    return len(runs[0].losses)


def state_of(run: Run) -> dict[str, Any]:
    """Of sharded tensors, the shards of this process."""
    model, optimizer = get_state_dict(run.model, run.optimizer)
    schedule = run.schedule.state_dict()
    return {"model": model, "optimizer": optimizer, "schedule": schedule, "losses": run.losses}
