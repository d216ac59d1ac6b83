"""DeepSpeed: its ZeRO stages around fusedopt.AdamW, which have to be told that they may.

Examples:
    python examples/deepspeed_zero.py
    torchrun --nproc-per-node 2 examples/deepspeed_zero.py --stage 3
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import fusedopt

BATCH, STEPS = 64, 60


def join_processes() -> None:
    """Those that a launcher has started; without one, this one alone."""
    if not torch.cuda.is_available():
        # Its collectives for CPUs would be compiled first, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"  # which DeepSpeed looks for
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=2, choices=range(4), help="of ZeRO")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    args = parser.parse_args()
    join_processes()
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "zero_optimization": {"stage": args.stage},
        # For any optimizer that is not DeepSpeed's. Else it refuses.
        "zero_allow_untested_optimizer": True,
        # Else, with offloading, it insists on an optimizer of its own.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed hands out partitions, whose norm is not that of all grads: it has to clip, and
        # the optimizer has no max_grad_norm.
        "gradient_clipping": 1.0,
    }
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        x = torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(step))
        x = x.tensor_split(world)[rank].to(engine.device)
        loss = nn.functional.mse_loss(engine(x), x.norm(dim=1, keepdim=True))
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0 and (step + 1) % 10 == 0:
            norm = engine.get_global_grad_norm()
            print(f"step {step + 1}  loss {mean:.4f}  grad norm {norm:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
