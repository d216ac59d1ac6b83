"""Two trainings of the same GPT that differ in the optimizer's library alone."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from common import load_fusedopt
from gpt import GPT, Config, decay_groups
from torch.nn import functional

DECAY = {"AdamW": 0.1, "Adam": 0.0, "SGD": 1e-4}
HYPER: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 2e-3, "betas": (0.9, 0.95)},
    "Adam": {"lr": 2e-3, "betas": (0.9, 0.95)},
    "SGD": {"lr": 0.1, "momentum": 0.9},
}
TORCH_KINDS: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@dataclass
class Run:
    """One of the two trainings and all it has measured."""

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)

    def train(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        start = _now(tokens.device)
        self.optimizer.zero_grad()
        logits = self.model(tokens).flatten(0, 1).float()
        loss = functional.cross_entropy(logits, targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        before = _now(tokens.device)
        self.optimizer.step()
        after = _now(tokens.device)
        self.schedule.step()
        self.losses.append(loss.item())
        self.optimizer_s.append(after - before)
        self.step_s.append(_now(tokens.device) - start)

    def figures(self, tokens_per_step: int) -> dict[str, float]:
        """Medians over the steps, which a disturbed step does not move, and one total."""
        step, optimizer = statistics.median(self.step_s), statistics.median(self.optimizer_s)
        shares = [part / whole for part, whole in zip(self.optimizer_s, self.step_s, strict=True)]
        return {
            "step_ms": 1e3 * step,
            "optimizer_ms": 1e3 * optimizer,
            "optimizer_total_s": sum(self.optimizer_s),
            "optimizer_share": statistics.median(shares),
            "tokens_per_s": tokens_per_step / step,
            "final_loss": tail_mean(self.losses),
        }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def tail_mean(losses: Sequence[float]) -> float:
    """Loss over the last tenth of the run: one batch alone is noisy."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the run, then a cosine down to a tenth."""
    warm_up = min(1.0, (step + 1) / max(1, steps // 10))
    return warm_up * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps)))


def start_run(
    name: str, model: GPT, library: ModuleType, kind: str, steps: int, options: dict[str, Any]
) -> Run:
    optimizer = getattr(library, kind)(decay_groups(model, DECAY[kind]), **HYPER[kind], **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    return Run(name, model, optimizer, schedule)


def start_runs(args: argparse.Namespace) -> list[Run]:
    torch.manual_seed(args.seed)
    first = GPT(Config()).to(args.device, getattr(torch, args.dtype))
    torch_name, torch_kind = f"torch.optim ({args.torch})", TORCH_KINDS[args.torch]
    return [
        start_run(name, copy.deepcopy(first), library, args.optimizer, args.steps, options)
        for name, library, options in (
            ("fusedopt", load_fusedopt(), {}),
            (torch_name, torch.optim, torch_kind),
        )
    ]
