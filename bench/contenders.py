"""The optimizers that step.py compares, each set to do the same update with the same numbers.

A contender is one function: it gets parameter groups and the name of the optimizer and returns what
to call for a step. So a captured CUDA graph (its ``replay``) fits in as one more row of CONTENDERS.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import load_fusedopt

Groups = list[dict[str, Any]]
Step = Callable[[], object]

_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
HYPER: dict[str, dict[str, Any]] = {
    "AdamW": _ADAM | {"weight_decay": 1e-2},
    "Adam": _ADAM | {"weight_decay": 0.0},
    "SGD": {"lr": 1e-3, "momentum": 0.9},
}
# Memory streams of a one-pass step: param, grad and every state are read, all but grad are written.
STREAMS = {"AdamW": 7, "Adam": 7, "SGD": 5}
STATES = {"AdamW": 2, "Adam": 2, "SGD": 1}


class NotComparableError(Exception):
    """This contender cannot take part in this case; the text says why."""


@dataclass(frozen=True)
class Contender:
    name: str
    make: Callable[[Groups, str], Step]
    note: str = ""  # what a reader must know before comparing


def _fusedopt(groups: Groups, optimizer: str) -> Step:
    return getattr(load_fusedopt(), optimizer)(groups, **HYPER[optimizer]).step


def _torch(**kind: bool) -> Callable[[Groups, str], Step]:
    def make(groups: Groups, optimizer: str) -> Step:
        return getattr(torch.optim, optimizer)(groups, **HYPER[optimizer], **kind).step

    return make


def _package(
    module: str,
    classes: dict[str, str],
    options: dict[str, Any] | None = None,
    only_on: str | None = None,
) -> Callable[[Groups, str], Step]:
    """A contender from an optional package; ``classes`` maps our optimizer's name to theirs."""

    def make(groups: Groups, optimizer: str) -> Step:
        if optimizer not in classes:
            raise NotComparableError(f"{module} has no comparable {optimizer}")
        device = groups[0]["params"][0].device.type
        if only_on not in (None, device):
            raise NotComparableError(f"runs on {only_on} only")
        try:
            cls = getattr(importlib.import_module(module), classes[optimizer])
        except ModuleNotFoundError as error:
            raise NotComparableError(f"not installed ({error})") from error
        return cls(groups, **HYPER[optimizer], **(options or {})).step

    return make


def _deepspeed(groups: Groups, optimizer: str) -> Step:
    classes = dict.fromkeys(("AdamW", "Adam"), "DeepSpeedCPUAdam")
    options = {"adamw_mode": optimizer == "AdamW", "fp32_optimizer_states": False}
    return _package("deepspeed.ops.adam", classes, options, only_on="cpu")(groups, optimizer)


_SAME_NAMES = {name: name for name in HYPER}
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("fusedopt", _fusedopt),
        Contender("torch-fused", _torch(fused=True)),
        Contender("torch-foreach", _torch(foreach=True)),
        Contender("torch-loop", _torch(foreach=False, fused=False)),
        Contender("deepspeed", _deepspeed, "DeepSpeedCPUAdam"),
        Contender("optimi", _package("optimi", _SAME_NAMES, {"kahan_sum": False})),
        Contender(
            "torchao",
            _package("torchao.optim", {"AdamW": "_AdamW"}),
            "its AdamW without low-bit states, compiled for each shape",
        ),
        Contender(
            "bitsandbytes",
            _package("bitsandbytes.optim", _SAME_NAMES),
            "32-bit states whatever the dtype of the params",
        ),
    )
}


def _differs(contender: Contender, optimizer: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why the contender's update is not the optimizer's, or nothing if it is.

    A step that leaves work out looks fast. So three steps on one tensor, longer than any SIMD
    block, are compared with torch in float64. The bar is loose (1 % of the update, or 8 times
    the error of unfused torch in this dtype): it looks for another update, not for rounding.
    """

    def after_three_steps(which: Contender, at: torch.dtype) -> torch.Tensor:
        param = (start / 8).to(dtype).to(at).requires_grad_()
        param.grad = (start.flip(0) / 4).to(dtype).to(at)
        groups = [{"params": [param], "lr": 0.05}]
        step = which.make(groups, optimizer)
        for _ in range(3):
            step()
        return param.detach().double()

    start = torch.randn(4099, generator=torch.Generator().manual_seed(1)).to(device)
    exact = after_three_steps(CONTENDERS["torch-loop"], torch.float64)
    honest = (after_three_steps(CONTENDERS["torch-loop"], dtype) - exact).abs().max().item()
    update = (exact - (start / 8).to(dtype).double()).abs().max().item()
    error = (after_three_steps(contender, dtype) - exact).abs().max().item()
    if error <= max(8 * honest, 0.01 * update):
        return ""
    return f"NOT the same update: off by {error / update:.0%} of it"


def reason(error: Exception) -> str:
    """Why a contender is skipped, in one line."""
    if isinstance(error, NotComparableError):
        return str(error)
    first_line = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first_line}"


def qualify(
    contenders: list[Contender], optimizer: str, dtype: torch.dtype, device: torch.device
) -> tuple[dict[Contender, str], dict[str, str]]:
    """Who can take part, with a note, and who cannot, with the reason: tried on a small tensor."""
    notes, skipped = {}, {}
    for contender in contenders:
        try:
            difference = _differs(contender, optimizer, dtype, device)
        except Exception as error:  # other people's packages may raise anything
            skipped[contender.name] = reason(error)
        else:
            notes[contender] = "; ".join(filter(None, (contender.note, difference)))
    return notes, skipped
