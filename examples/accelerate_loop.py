"""A training loop with accelerate: clipped steps, averages for validation, a saved state.

Examples:
    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedopt
from fusedopt.integrations import swap_ema

BATCH, EPOCHS = 32, 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="accelerate-run", metavar="FOLDER", help="to save to")
    parser.add_argument("--resume", action="store_true", help="go on from what is saved there")
    args = parser.parse_args()
    # Without being told, it joins no processes on a machine that has no GPU.
    no_gpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=no_gpu, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    x = torch.randn(1024, 16)
    data = TensorDataset(x, x.norm(dim=1, keepdim=True))
    train, held_out = torch.utils.data.random_split(data, [960, 64])

    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0, ema_decay=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    model, optimizer, train, held_out, schedule = accelerator.prepare(
        model, optimizer, DataLoader(train, BATCH), DataLoader(held_out, BATCH), schedule
    )
    if args.resume:
        accelerator.load_state(args.output)
    for epoch in range(EPOCHS):
        for inputs, targets in train:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()  # clips, so there is no accelerator.clip_grad_norm_()
                schedule.step()
                optimizer.zero_grad()
        losses = []
        with swap_ema(optimizer, model), torch.no_grad():
            for inputs, targets in held_out:
                found = nn.functional.mse_loss(model(inputs), targets, reduction="none")
                losses.append(accelerator.gather_for_metrics(found))
        norm, loss = optimizer.optimizer.grad_norm, torch.cat(losses).mean()
        accelerator.print(f"epoch {epoch}  grad norm {norm:.5f}  held-out loss {loss:.5f}")
    accelerator.save_state(args.output)  # with the optimizer's averages
    accelerator.end_training()


if __name__ == "__main__":
    main()
