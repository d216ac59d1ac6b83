"""torchtitan's container of optimizers with fusedopt.AdamW, over FSDP2.

In a configuration of torchtitan, `Trainer.Config(optimizer=optimizer_config(), ...)` takes it.

Examples:
    python examples/torchtitan_optimizer.py
    torchrun --nproc-per-node 2 examples/torchtitan_optimizer.py
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig
from torchtitan.distributed.utils import clip_grad_norm_

from fusedopt.integrations.torchtitan import OptimizersContainer

BATCH, STEPS = 64, 60


def optimizer_config() -> OptimizersContainer.Config:
    """Two groups; the first pattern that a parameter's name matches is its own."""
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "state_dtype": "bfloat16"}
    return OptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(
                pattern="bias",
                optimizer_name="fusedopt.AdamW",
                optimizer_kwargs={**options, "weight_decay": 0.0},
            ),
            ParamGroupConfig(
                pattern=".*", optimizer_name="fusedopt.AdamW", optimizer_kwargs=options
            ),
        ]
    )


def main() -> None:
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **({} if "RANK" in os.environ else alone))
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizers = optimizer_config().build(model_parts=[model])
    schedules = LRSchedulersContainer.Config(warmup_steps=5).build(
        optimizers=optimizers, training_steps=STEPS
    )
    for step in range(STEPS):
        x = torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(step))
        x = x.tensor_split(world)[rank]
        loss = nn.functional.mse_loss(model(x), x.norm(dim=1, keepdim=True))
        optimizers.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(list(model.parameters()), 1.0)  # as torchtitan's Trainer does
        optimizers.step()
        schedules.step()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}  loss {mean:.4f}  grad norm {norm:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
