"""States in 8 bits: which parameters have them, and conversions from and to numbers.

How codes and scales mean numbers is said in csrc/core/codes.h. A scale is that of 64 elements in a
row, so that shards of rows have whole groups; where rows are no multiple of 64, of 64 elements of
the flat tensor.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from . import _C
from ._tensors import is_dtensor, local, on_cpu
from ._types import State

# Smaller tensors, and vectors, have float32 states: they take no memory that matters, and norms and
# biases are where small errors would.
MIN_ELEMENTS = 4096

Codes = tuple[Tensor, Tensor]  # and their scales


def shape_of_scales(param: Tensor) -> tuple[int, ...] | None:
    """The shape that scales of a parameter's states have, or None if its states cannot be codes.

    That depends on shapes and on how a DTensor lies over devices, but not on how many have a part.
    """
    is_wide = param.is_complex() or param.dtype == torch.float64
    if is_wide or param.dim() < 2 or param.numel() < MIN_ELEMENTS:
        return None
    group = _C.GROUP_OF_CODES
    row = param.numel() // param.shape[0]
    if row % (group * _parts_of_row(param)) == 0:
        return param.shape[0], row // group
    return None if is_dtensor(type(param)) else (-(-param.numel() // group),)


def _parts_of_row(param: Any) -> int:
    """In how many parts rows are cut by sharding; more than they can have if that cuts groups."""
    if not is_dtensor(type(param)):
        return 1
    parts = 1
    for at, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None or (dim > 0 and param.dim() > 2):
            return int(param.numel()) + 1
        parts *= param.device_mesh.size(at) if dim > 0 else 1
    return parts


def new_codes(param: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Codes:
    """Codes of zeros and their scales."""
    codes = torch.zeros_like(
        param, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False
    )
    own = torch.zeros(_local_shape(codes, shape), dtype=torch.float32, device=local(codes).device)
    return codes, like_scales(codes, own)


def like_scales(codes: Any, scales: Tensor) -> Tensor:
    """This process's scales as a tensor that lies over devices as their codes do."""
    if not is_dtensor(type(codes)):
        return scales
    from torch.distributed.tensor import DTensor

    shape = torch.Size((codes.shape[0], codes.numel() // codes.shape[0] // _C.GROUP_OF_CODES))
    return DTensor.from_local(
        scales, codes.device_mesh, codes.placements, run_check=False, shape=shape,
        stride=(shape[1], 1),
    )  # fmt: skip


def _local_shape(codes: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    own = local(codes)
    if own is codes:
        return shape
    return own.shape[0], prod(own.shape[1:]) // _C.GROUP_OF_CODES


def encode(values: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Codes:
    """The nearest codes of a state, computed on the CPU by the text that steps compute with."""
    codes, scales = new_codes(values, dtype, shape)
    parts = [torch.empty_like(local(each), device="cpu") for each in (codes, scales)]
    _C.encode(on_cpu(values).float(), parts[0], parts[1])
    for to, part in zip((codes, scales), parts, strict=True):
        local(to).copy_(part)
    return codes, scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 numbers that codes stand for."""
    values = torch.empty_like(codes, dtype=torch.float32)
    own = torch.empty(local(codes).shape, dtype=torch.float32, device="cpu")
    _C.decode(on_cpu(codes), on_cpu(scales), own)
    local(values).copy_(own)
    return values


def has_state(name: str, state: State, spec: _C.StateSpec) -> bool:
    """Whether a state has what is called so, in numbers or in codes."""
    return any(state.get(each) is not None for each in (name, *spec.codes.get(name, ())[::2]))


def float32_states(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with float32 states in place of codes, under the names that torch.optim has.

    Args:
        state_dict: of an optimizer whose states may be codes of 8 bits (``state_dtype="q8"``), as
            ``state_dict()`` or ``torch.load`` returned it, or as ``get_optimizer_state_dict`` of
            torch.distributed.checkpoint did, flattened or not. It is not changed.

    Returns:
        A new state dict; what is no code is in it as it was.

    Raises:
        ValueError: it is no state dict of an optimizer, or there are codes without scales, or codes
            that were cast to another dtype.
    """
    if "state" in state_dict:
        states = {key: _with_numbers(entries) for key, entries in state_dict["state"].items()}
        return {**state_dict, "state": states}
    if any(key.startswith("state.") for key in state_dict):
        flat: dict[str, Any] = _with_numbers(state_dict)
        return flat
    raise ValueError(
        "not the state dict of an optimizer: it has neither 'state' nor keys that begin with "
        f"'state.', but {', '.join(map(repr, list(state_dict)[:5]))}"
    )


def _with_numbers(entries: Any) -> Any:
    if not isinstance(entries, dict):
        return entries
    found = {}
    for name, entry in entries.items():
        state = name.removesuffix(_C.CODES_SUFFIX)
        if state != name:
            scales = entries.get(state + _C.SCALES_SUFFIX)
            if scales is None:
                raise ValueError(f"the state dict has {name}, but no {state + _C.SCALES_SUFFIX}")
            if entry.dtype not in (torch.int8, torch.uint8):
                raise ValueError(f"{name} is {entry.dtype}: codes of 8 bits have been cast")
            found[state] = decode(entry, scales)
        elif name.removesuffix(_C.SCALES_SUFFIX) + _C.CODES_SUFFIX not in entries:
            found[name] = entry
    return found
