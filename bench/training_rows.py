"""The rows of training_step.py: who is compared with whom, and what fusedopt promises there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from clocks import Entrant
from common import spread
from race import bandwidths, ratio
from training_work import Work, ours, theirs

BF16, FP16 = torch.bfloat16, torch.float16
SPLIT: dict[str, Any] = {"master_weights": "split", "state_dtype": BF16}
CLIP, DECAY = 1.0, 0.999


@dataclass(frozen=True)
class Bar:
    """``of`` is compared with ``against``: how many times as fast, or by bytes per second."""

    of: str = "fusedopt"
    against: str = "torch"
    cpu: float | None = None  # None: measured, and nothing is promised
    cuda: float | None = None
    by_bytes: bool = False

    @property
    def text(self) -> str:
        if self.by_bytes:
            return f"bytes/s, {self.of} / {self.against}"
        return f"time, {self.against} / {self.of}"

    def value(self, entrants: dict[str, Entrant]) -> dict[str, float]:
        """Medians of what each round gave."""
        mine, other = entrants[self.of], entrants[self.against]
        if not self.by_bytes:
            return ratio(other, mine)
        pairs = zip(bandwidths(mine), bandwidths(other), strict=True)
        return spread([one / two for one, two in pairs])


@dataclass(frozen=True)
class Row:
    title: str
    workload: str
    works: tuple[Work, ...]
    bars: tuple[Bar, ...]
    busy: bool = False  # beside another process
    devices: tuple[str, ...] = ("cpu", "cuda")  # where it runs unless asked for by name


PLAIN = (ours(), theirs())
CLIPPED = (ours(max_grad_norm=CLIP), theirs(clip=CLIP))
OF_FP32: dict[str, Any] = {"against": "fusedopt-fp32", "cuda": 0.9, "by_bytes": True}
ROWS = {
    "plain": Row(
        "AdamW, all options off, GPT-2 124M", "gpt2-124m", PLAIN, (Bar(cpu=1.0, cuda=1.5),)
    ),
    "clip": Row("AdamW + clip, GPT-2 124M", "gpt2-124m", CLIPPED, (Bar(cpu=1.3, cuda=1.3),)),
    "clip-many": Row(
        "AdamW + clip, 1000 x 1000", "many-1000x1000", CLIPPED, (Bar(cpu=8.0, cuda=8.0),)
    ),
    "bf16-states": Row(
        "AdamW, fp32 params, bf16 states, 64 Mi",
        "one-64Mi",
        (ours(state_dtype=BF16), theirs()),
        (Bar(cpu=1.0, cuda=1.3),),
    ),
    "bf16": Row(
        "AdamW in bf16, 64 Mi",
        "one-64Mi",
        (
            ours("all-bf16", BF16),
            ours("split", BF16, **SPLIT),
            ours("fusedopt-fp32"),
            theirs(BF16),
        ),
        (
            Bar("all-bf16", cpu=1.0),
            Bar("split", cpu=1.0),
            Bar("all-bf16", **OF_FP32),
            Bar("split", **OF_FP32),
        ),
    ),
    "busy": Row(
        "AdamW, GPT-2 124M, one other process busy",
        "gpt2-124m",
        PLAIN,
        (Bar(cpu=2.0),),
        busy=True,
        devices=("cpu",),
    ),
    "ema": Row(
        "AdamW + EMA, GPT-2 124M",
        "gpt2-124m",
        (ours(ema_decay=DECAY), theirs(ema=DECAY)),
        (Bar(cpu=1.3, cuda=1.3),),
    ),
    "grad-scaler": Row(
        "AdamW under GradScaler, fp16, GPT-2 124M",
        "gpt2-124m",
        (ours(dtype=FP16, scaled=True), theirs(FP16, scaled=True)),
        (Bar(cuda=1.3),),
        devices=("cuda",),
    ),
}
