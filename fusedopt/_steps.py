"""Step counts and where they are kept: on the CPU, or where only the GPU can tell, on the GPU."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from . import _C
from ._types import ParamGroup, State


def step_device(param: Tensor, group: ParamGroup) -> torch.device:
    """Where a param's step count belongs when nothing but its group is known."""
    on_gpu = group.get("capturable", False) and _C.is_on_gpu(param)
    return param.device if on_gpu else torch.device("cpu")


def to_step(step: Any, device: torch.device) -> Tensor:
    """A step count as torch keeps it: a floating-point tensor of one element.

    Takes numbers (numpy's as well) and tensors of any dtype and device, as old checkpoints hold
    them. Raises TypeError for anything else.
    """
    if isinstance(step, Tensor) and step.dtype in (torch.float32, torch.float64):
        return step.to(device)
    if isinstance(step, str) or not hasattr(type(step), "__float__"):
        raise TypeError(f"step in the optimizer's state must be a number or a tensor, got {step!r}")
    is_double = torch.get_default_dtype() == torch.float64
    dtype = torch.float64 if is_double else torch.float32
    return torch.tensor(float(step), dtype=dtype, device=device)


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
