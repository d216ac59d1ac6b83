"""DistributedDataParallel: clipped steps, and averages for validation.

Examples:
    python examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fusedopt

BATCH, EPOCHS = 64, 5


def join_processes() -> torch.device:
    """Those that torchrun has started; without it, this one alone."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**({} if "RANK" in os.environ else alone))
    return device


def main() -> None:
    device = join_processes()
    torch.manual_seed(0)
    x = torch.randn(576, 16)
    y = x.norm(dim=1, keepdim=True)
    train, held_out = TensorDataset(x[64:], y[64:]), (x[:64].to(device), y[:64].to(device))
    sampler = DistributedSampler(train)
    batches = DataLoader(train, BATCH // dist.get_world_size(), sampler=sampler)

    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1)).to(device)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Every process has all grads: their norm is that of the whole model, and nothing need be said.
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0, ema_decay=0.9)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for inputs, targets in batches:
            predicted = parallel(inputs.to(device))
            nn.functional.mse_loss(predicted, targets.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with optimizer.swap_ema(), torch.no_grad():
            loss = nn.functional.mse_loss(model(held_out[0]), held_out[1])
        if dist.get_rank() == 0:
            print(f"epoch {epoch}  grad norm {optimizer.grad_norm:.5f}  held-out loss {loss:.5f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
