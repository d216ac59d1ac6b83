"""A LightningModule: the optimizer clips, the callback evaluates its averages and logs its norm.

Examples:
    python examples/lightning_module.py
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusedopt
from fusedopt.integrations.lightning import FusedOptimizerCallback


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.training_step(batch, index), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # It clips, so the Trainer has no gradient_clip_val.
        return fusedopt.AdamW(self.parameters(), lr=1e-2, max_grad_norm=1.0, ema_decay=0.9)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="lightning-run", metavar="FOLDER", help="to save to")
    args = parser.parse_args()
    lightning.seed_everything(0)
    x = torch.randn(1024, 16)
    data = TensorDataset(x, x.norm(dim=1, keepdim=True))
    train, held_out = torch.utils.data.random_split(data, [960, 64])
    trainer = lightning.Trainer(
        max_epochs=5,
        default_root_dir=args.output,
        callbacks=[FusedOptimizerCallback(averages_in_checkpoints=True)],
        logger=False,
        log_every_n_steps=1,
    )
    trainer.fit(Regression(), DataLoader(train, 32), DataLoader(held_out, 32))
    for name, value in trainer.callback_metrics.items():
        print(f"{name} {value:.5f}")


if __name__ == "__main__":
    main()
