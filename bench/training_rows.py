"""The rows of training_step.py: who is compared with whom, and what fusedopt promises there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from clocks import Entrant
from common import spread
from race import bandwidths, ratio
from training_work import SHORT, Work, ours, theirs

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
    avx2: float | None = None  # instead of cpu where AVX-512 is not used
    by_bytes: bool = False

    def promised(self, device: torch.device, isa: str) -> float | None:
        if device.type == "cuda":
            return self.cuda
        return self.cpu if isa == "avx512" or self.avx2 is None else self.avx2

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
    is_alike: bool = True  # all works do the same to the params
    on_gpu: str | None = None  # the workload there, if it is another one


def setting(
    title: str, cuda: float, dtype: torch.dtype = BF16, on_cpu: bool = True, **options: Any
) -> Row:
    """One large tensor, by the bytes, beside the plain step in float32 and beside a copy."""
    bars = (
        Bar("setting", "fusedopt-fp32", cpu=1 / 1.2, avx2=1 / 1.6, by_bytes=True),
        Bar("setting", "copy", cuda=cuda, by_bytes=True),
    )
    works = (ours("setting", dtype, **options), ours("fusedopt-fp32"))
    return Row(
        f"AdamW, {title}",
        "one-64Mi",
        works,
        bars if on_cpu else bars[1:],
        is_alike=not options.keys() & {"ema_decay", "max_grad_norm"},
        on_gpu="one-256Mi",
    )


def rounded(title: str, dtype: torch.dtype = BF16, **options: Any) -> Row:
    """Stochastic rounding beside rounding to nearest."""
    works = (
        ours("stochastic", dtype, stochastic_rounding=True, **options),
        ours("nearest", dtype, stochastic_rounding=False, **options),
    )
    bars = (
        Bar("stochastic", "nearest", cpu=1 / 1.5),
        Bar("stochastic", "copy", cuda=0.93, by_bytes=True),
    )
    return Row(f"AdamW, stochastic rounding, {title}", "one-64Mi", works, bars, on_gpu="one-256Mi")


NEAREST: dict[str, Any] = {"stochastic_rounding": False}
MASTERS: dict[str, Any] = {"master_weights": "float32", "state_dtype": torch.float32}
SPLIT_FP32: dict[str, Any] = {"master_weights": "split", "state_dtype": torch.float32}
SPLIT_BF16: dict[str, Any] = SPLIT | NEAREST
FP32_STATES: dict[str, Any] = {"state_dtype": torch.float32}
SETTINGS = {
    "of-bf16": setting("bf16", 0.97, **NEAREST),
    "of-fp16": setting("fp16", 0.97, FP16),
    "of-bf16-states": setting(
        "fp32, bf16 states", 0.95, torch.float32, state_dtype=BF16, **NEAREST
    ),
    "of-fp32-states": setting("bf16, fp32 states", 0.95, **FP32_STATES),
    "of-masters": setting("bf16, fp32 masters and states", 0.95, **MASTERS),
    "of-masters-fp32-grads": setting(
        "bf16, fp32 grads, masters and states", 0.95, grad_dtype=torch.float32, **MASTERS
    ),
    "of-split": setting("bf16, split masters, fp32 states", 0.95, **SPLIT_FP32),
    "of-split-bf16-states": setting("bf16, split masters, bf16 states", 0.95, **SPLIT_BF16),
    "of-fp32-ema": setting("fp32 + EMA", 0.95, torch.float32, ema_decay=DECAY),
    "of-bf16-ema": setting("bf16 + EMA", 0.95, ema_decay=DECAY, **NEAREST),
    "of-masters-ema": setting("bf16, fp32 masters + EMA", 0.95, ema_decay=DECAY, **MASTERS),
    "of-split-ema": setting("bf16, split, bf16 states + EMA", 0.95, ema_decay=DECAY, **SPLIT_BF16),
    "of-bf16-clip": setting("bf16 + clip", 0.94, max_grad_norm=CLIP, **NEAREST),
    "of-split-clip": setting("bf16, split + clip", 0.94, max_grad_norm=CLIP, **SPLIT_BF16),
    "of-fp32-misaligned": setting(
        "fp32, grads one off", 0.85, torch.float32, offset=1, on_cpu=False
    ),
    "of-bf16-misaligned": setting("bf16, grads one off", 0.85, offset=1, on_cpu=False, **NEAREST),
    "rounded-bf16": rounded("bf16"),
    "rounded-bf16-states": rounded("fp32, bf16 states", torch.float32, state_dtype=BF16),
    "rounded-fp32-states": rounded("bf16, fp32 states", **FP32_STATES),
}

# Grads that are no ordinary numbers, and what the states come to with them.
UNUSUAL = {
    "zeros": 0.0,
    "subnormals": 1e-40,
    "tiny": 1e-30,
    "infinities": float("inf"),
    "nans": float("nan"),
}


def values(dtype: torch.dtype) -> Row:
    works = tuple(ours(name, dtype, grad_value=value) for name, value in UNUSUAL.items())
    bars = tuple(Bar(name, "ordinary", cpu=1 / 1.3) for name in UNUSUAL)
    title = f"AdamW, {SHORT[dtype]}, unusual numbers"
    return Row(
        title, "one-4Mi", (*works, ours("ordinary", dtype)), bars, devices=("cpu",), is_alike=False
    )


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
    **SETTINGS,
    "values-fp32": values(torch.float32),
    "values-bf16": values(BF16),
}
