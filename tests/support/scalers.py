"""GradScalers: torch's and ours, and what a step under one of them is."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fusedopt
from support.device import DEVICE
from support.tensors import by_id, params_of, set_grads

BAD = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
each_bad = pytest.mark.parametrize("bad", **by_id(BAD))
SCALERS: dict[str, Any] = {"fusedopt": fusedopt.GradScaler, "torch": torch.amp.GradScaler}
each_scaler = pytest.mark.parametrize("scaler_type", **by_id(SCALERS))


@dataclass(frozen=True)
class Way:
    """A scaler, options of the optimizer, and whether step() is what unscales and skips."""

    scaler_type: Any
    options: dict[str, Any]
    in_step: bool


WAYS = {
    "fusedopt": Way(fusedopt.GradScaler, {}, True),
    "fusedopt of fused": Way(fusedopt.GradScaler, {"fused": True}, True),
    "torch of fused": Way(torch.amp.GradScaler, {"fused": True}, True),
    "torch": Way(torch.amp.GradScaler, {}, False),
}
each_way = pytest.mark.parametrize("way", **by_id(WAYS))


def new_scaler(scaler_type: Any = fusedopt.GradScaler, **options: Any) -> Any:
    return scaler_type(DEVICE, **{"init_scale": 2.0**10, "growth_interval": 2, **options})


def scale_grads(scaler: Any, optimizer: Any, seed: int, bad: float | None = None) -> None:
    """What backward leaves; `bad` stands in the last element of a grad."""
    params = params_of(optimizer)
    scaler.scale(torch.zeros(()))
    set_grads(params, seed)
    for param in params:
        param.grad *= scaler.get_scale()
    if bad is not None:
        params[4].grad[-1, -1, -1] = bad


def scaled_step(
    scaler: Any, optimizer: Any, seed: int, bad: float | None = None, clip: float | None = None
) -> None:
    """Where a norm is given to clip at, the user unscales and clips."""
    scale_grads(scaler, optimizer, seed, bad)
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params_of(optimizer), clip)
    scaler.step(optimizer)
    scaler.update()
