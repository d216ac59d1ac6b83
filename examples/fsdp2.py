"""FSDP2 (fully_shard): a bfloat16 model whose optimizer has its float32 weights, and checkpoints.

The params are sharded, gathered and computed with in bfloat16. The 16 bits that they lack of
float32 are in the optimizer's state. A checkpoint can be loaded by another number of processes.

Examples:
    python examples/fsdp2.py
    torchrun --nproc-per-node 2 examples/fsdp2.py --checkpoint checkpoint  # again: it goes on
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusedopt

BATCH, STEPS = 64, 20


def join_processes() -> torch.device:
    """Those that torchrun has started; without it, this one alone."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**({} if "RANK" in os.environ else alone))
    return device


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def sharded_model(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block(32) for _ in range(2)]
    model = nn.Sequential(nn.Linear(16, 32), *blocks, nn.Linear(32, 1)).to(device, torch.bfloat16)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """This process's share of the batch of all."""
    x = torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(step))
    x = x.tensor_split(dist.get_world_size())[dist.get_rank()].to(device)
    return x.bfloat16(), x.norm(dim=1, keepdim=True)


def state_of(model: nn.Module, optimizer: fusedopt.AdamW, step: int) -> dict[str, Any]:
    """What a checkpoint holds, each process its shards."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "step": step}


def load(folder: Path, model: nn.Module, optimizer: fusedopt.AdamW) -> int:
    """The latest checkpoint, if there is one; the number of steps that it has made."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0
    state = state_of(model, optimizer, 0)
    dcp.load(state, checkpoint_id=found[-1])
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return int(state["step"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="to go on from, and to save to"
    )
    checkpoint = parser.parse_args().checkpoint
    device = join_processes()
    model = sharded_model(device)
    optimizer = fusedopt.AdamW(
        model.parameters(),
        lr=3e-3,
        master_weights="split",
        state_dtype=torch.bfloat16,
        max_grad_norm=1.0,  # by the norm over all shards: DTensors name their processes
    )
    start = load(checkpoint, model, optimizer) if checkpoint else 0
    for step in range(start, start + STEPS):
        x, y = batch(step, device)
        loss = nn.functional.mse_loss(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}  loss {mean:.4f}  grad norm {optimizer.grad_norm:.4f}")
    if checkpoint:
        steps = start + STEPS
        dcp.save(state_of(model, optimizer, steps), checkpoint_id=checkpoint / f"step-{steps:06}")
    dist.barrier()  # gloo's threads may abort a process that ends while they save
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
