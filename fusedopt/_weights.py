"""Weights and their averages outside of steps: masters, conversions, swaps."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _C
from ._tensors import local
from ._types import ParamGroup, State

MASTERS = {"float32": "master_param", "split": "param_remainder"}
EXTRAS = (*MASTERS.values(), "ema_param")


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 weights that bfloat16 params and their int16 remainders are.

    Computed on the CPU, by the text that steps compute with; it takes copies of tensors elsewhere.
    """
    weight = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
    joined = torch.empty(local(weight).shape, dtype=torch.float32, device="cpu")
    _C.join_weights(_on_cpu(param), _on_cpu(remainder), joined)
    local(weight).copy_(joined)
    return weight


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 params, nearest with ties away from zero, and int16 remainders of weights."""
    dtypes = (torch.bfloat16, torch.int16)
    parts = [torch.empty_like(weight, dtype=dtype, requires_grad=False) for dtype in dtypes]
    shape = local(weight).shape
    param, remainder = (torch.empty(shape, dtype=dtype, device="cpu") for dtype in dtypes)
    _C.split_weights(_on_cpu(weight), param, remainder)
    local(parts[0]).copy_(param)
    local(parts[1]).copy_(remainder)
    return parts[0], parts[1]


def _on_cpu(tensor: Tensor) -> Tensor:
    return local(tensor.detach()).cpu().resolve_neg().contiguous()


def is_narrow(param: Tensor) -> bool:
    return param.is_floating_point() and param.element_size() == 2


def master_name(param: Tensor, group: ParamGroup) -> str | None:
    """Name of the master weight in the state of this parameter, or None if it has none.

    Raises ValueError for a parameter that cannot have the kind that the group asks for.
    """
    kind = group.get("master_weights")
    if kind is None or (kind == "float32" and not is_narrow(param)):
        return None
    if kind == "split" and param.dtype != torch.bfloat16:
        raise ValueError(f"master_weights='split' is for torch.bfloat16, not for {param.dtype}")
    return MASTERS[kind]


def unused_entries(param: Tensor, state: State, group: ParamGroup) -> list[str]:
    """Names of masters and averages that a state holds although the settings do not use them."""
    used = {master_name(param, group), "ema_param" if group.get("ema_decay") is not None else None}
    return [name for name in EXTRAS if name in state and name not in used]


def ema_dtype(param: Tensor) -> torch.dtype:
    return torch.float32 if is_narrow(param) else param.dtype


def read_weight(param: Tensor, state: State, group: ParamGroup) -> Tensor:
    """A copy of a parameter's weights, in float32 if the parameter is narrower."""
    param = param.detach()
    name = master_name(param, group)
    if name is not None and name in state:
        master: Tensor = state[name]
        return join(param, master) if name == "param_remainder" else master.clone()
    return param.to(ema_dtype(param), copy=True)


def write_weight(param: Tensor, weight: Tensor, state: State, group: ParamGroup) -> None:
    """Make a parameter, and its master weight if the state has one, hold these weights."""
    name = master_name(param, group)
    weight = weight.to(param.device, ema_dtype(param))
    if name == "param_remainder" and name in state:
        rounded, remainder = split(weight)
        param.copy_(rounded)
        state[name].copy_(remainder)
        return
    if name is not None and name in state:
        state[name].copy_(weight)
    param.copy_(weight)


def new_entry(name: str, param: Tensor, state: State, group: ParamGroup) -> Tensor:
    """State that is not there yet."""
    kwargs: dict[str, Any] = {"memory_format": torch.preserve_format}
    if name == "param_remainder":
        return torch.zeros_like(param, dtype=torch.int16, **kwargs)
    if name in ("master_param", "ema_param"):
        # In the params' layout: to() would keep it only where it is dense.
        entry = torch.empty_like(param, dtype=ema_dtype(param), **kwargs)
        return entry.copy_(read_weight(param, state, group) if name == "ema_param" else param)
    dtype = group.get("state_dtype") or param.dtype
    if param.is_complex() and not dtype.is_complex:
        raise ValueError(f"state_dtype {dtype} is for real parameters, not for {param.dtype}")
    return torch.zeros_like(param, dtype=dtype, **kwargs)


@contextmanager
def swapped(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Params hold the values of their partners inside, and afterwards exactly their own again."""
    pairs = list(pairs)
    kept = [(param, param.detach().clone()) for param, _ in pairs]
    try:
        with torch.no_grad():
            for param, average in pairs:
                param.copy_(average)
        yield
    finally:
        with torch.no_grad():
            for param, own in kept:
                param.copy_(own)


def convert(entries: State, param: Tensor, group: ParamGroup, place: str) -> Tensor | None:
    """Make saved state fit the settings of the group that it is loaded into.

    States take on ``state_dtype`` if that is set. A master weight of the other kind is converted;
    one that was cast to another dtype (by ``torch.optim``) is dropped, as is all that the settings
    have no use for. Returns the values that the parameter is to have then, or None if it stays.

    Raises ValueError, with ``place``, for masters and averages of another shape than the parameter.
    """
    saved = {name: entries.pop(name, None) for name in EXTRAS}
    for name, entry in saved.items():
        if isinstance(entry, Tensor) and entry.shape != param.shape:
            raise ValueError(
                f"{name} of {place} is of shape {tuple(entry.shape)} in the loaded state dict, but "
                f"the parameter of shape {tuple(param.shape)}"
            )
    dtype = group.get("state_dtype")
    for name, entry in entries.items():
        is_state = dtype is not None and name != "step" and isinstance(entry, Tensor)
        if is_state and entry.is_floating_point():
            entries[name] = entry.to(dtype)
    average = saved["ema_param"]
    if group.get("ema_decay") is not None and isinstance(average, Tensor):
        entries["ema_param"] = average.to(ema_dtype(param))
    wanted = master_name(param, group)
    if wanted is None:
        return None
    if _is_of(saved[wanted], wanted):
        entries[wanted] = saved[wanted]
        return None
    if wanted == "param_remainder" and _is_of(saved["master_param"], "master_param"):
        rounded, entries[wanted] = split(saved["master_param"])
        return rounded
    remainder = saved["param_remainder"]
    if param.dtype == torch.bfloat16 and _is_of(remainder, "param_remainder"):
        entries[wanted] = weight = join(param.detach(), remainder)
        return weight
    return None


def _is_of(entry: Any, name: str) -> bool:
    dtype = torch.int16 if name == "param_remainder" else torch.float32
    return isinstance(entry, Tensor) and entry.dtype == dtype
