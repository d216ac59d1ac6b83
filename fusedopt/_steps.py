"""Step counts and where they are kept: on the CPU, or where only the GPU can tell, on the GPU."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from . import _C
from ._tensors import why_unreadable
from ._types import ParamGroup, State


def step_device(param: Tensor, group: ParamGroup) -> torch.device:
    """Where a param's step count belongs when nothing but its group is known."""
    on_gpu = group.get("capturable", False) and _C.is_on_gpu(param)
    return param.device if on_gpu else torch.device("cpu")


def whole_count(step: Any, what: str) -> int:
    """A number of steps, from a number or a tensor of one element.

    Raises TypeError or ValueError, whose text begins with ``what``, for what no step could use.
    """

    def wrong() -> str:
        return f"{what} is {step!r}, but must be"

    is_tensor = isinstance(step, Tensor)
    is_number = hasattr(type(step), "__float__") and not (is_tensor and why_unreadable(step))
    try:
        count = float(step) if is_number and not (is_tensor and step.numel() != 1) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        is_number = False
    if not is_number:
        raise TypeError(f"{wrong()} a number")
    if not 0 <= count < _C.TOO_MANY_STEPS or count % 1 != 0:
        advice = "; round it" if count > 0 and count % 1 > 0 else ""
        raise ValueError(f"{wrong()} one whole number that is not negative{advice}")
    return int(count)


def number_dtype() -> torch.dtype:
    """The dtype in which torch.optim keeps numbers in its state."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def to_step(step: Any, device: torch.device) -> Tensor:
    """A step count as torch keeps it: a floating-point tensor of one element.

    Takes numbers (numpy's as well) and tensors of any dtype and device, as old checkpoints hold
    them. Raises TypeError for anything else.
    """
    if isinstance(step, Tensor) and step.dtype in (torch.float32, torch.float64):
        return step.to(device)
    if isinstance(step, str) or not hasattr(type(step), "__float__"):
        raise TypeError(f"step in the optimizer's state must be a number or a tensor, got {step!r}")
    return torch.tensor(float(step), dtype=number_dtype(), device=device)


def place_steps(states: list[tuple[Tensor, State, State]], on_gpu: bool) -> None:
    """Enter into the new state of each (param, state, new state) a ``step`` where it belongs.

    That is the CPU, or the GPU of the param if ``on_gpu``. One that is there stays. Those of a GPU
    become views of one tensor, so that it takes one copy that does not wait, however many they are.
    """
    by_gpu = defaultdict(list)
    for param, state, new in states:
        step = state.get("step")
        wanted = param.device if on_gpu else torch.device("cpu")
        if isinstance(step, Tensor) and step.device == wanted:
            continue
        if wanted.type == "cpu":
            new["step"] = to_step(0.0 if step is None else step, wanted)
        else:
            by_gpu[wanted].append((0.0 if step is None else step, new))
    for gpu, entries in by_gpu.items():
        steps = [to_step(step, torch.device("cpu")).reshape(()) for step, _ in entries]
        moved = torch.stack(steps).pin_memory().to(gpu, non_blocking=True)
        for (_, new), step in zip(entries, moved.unbind(), strict=True):
            new["step"] = step
