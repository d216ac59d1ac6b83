"""Weights and their averages outside of steps: masters and swaps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _C
from ._tensors import (
    is_dtensor,
    local,
    on_cpu,
    why_unreadable,
    why_unwritable,
    without_wrapper,
)
from ._types import State


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 weights that bfloat16 params and their int16 or int8 remainders are.

    Computed on the CPU, by the text that steps compute with; it takes copies of tensors elsewhere.
    """
    weight = torch.empty_like(without_wrapper(param), dtype=torch.float32, requires_grad=False)
    joined = torch.empty(local(weight).shape, dtype=torch.float32, device="cpu")
    _C.join_weights(on_cpu(param), on_cpu(remainder), joined)
    local(weight).copy_(joined)
    return weight


def split(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The bfloat16 params, nearest with ties away from zero, and remainders of float32 weights.

    The remainders are int16, or int8 for the nearest weights of 24 bits.
    """
    dtypes = (torch.bfloat16, dtype)
    parts = [torch.empty_like(weight, dtype=dtype, requires_grad=False) for dtype in dtypes]
    shape = local(weight).shape
    param, remainder = (torch.empty(shape, dtype=dtype, device="cpu") for dtype in dtypes)
    _C.split_weights(on_cpu(weight), param, remainder)
    local(parts[0]).copy_(param)
    local(parts[1]).copy_(remainder)
    return parts[0], parts[1]


# The 16 bits of a remainder are no number. Steps read them as integers. State dicts have them as
# bfloat16: neither gloo nor NCCL sends an int16, and what casts states to their parameter's dtype,
# as torch.optim does, then leaves them alone. Those of 8 bits are int8 everywhere, which can be
# sent; a cast to bfloat16 keeps them as numbers, exactly.
STEPPED, SAVED = torch.int16, torch.bfloat16
OF_8_BITS = torch.int8
# The kinds of master weights in a state; those that are remainders, with their dtypes.
REMAINDERS = {"remainder": STEPPED, "remainder8": OF_8_BITS}
MASTERS = ("master", *REMAINDERS)


def with_remainder_as(dtype: torch.dtype, entries: State) -> State:
    """The entries of a state, the remainder's bits seen as ``STEPPED`` or ``SAVED``: not copied."""
    name = _C.WEIGHTS_IN_STATE["remainder"]
    remainder = entries.get(name) if isinstance(entries, Mapping) else None
    if not isinstance(remainder, Tensor) or {remainder.dtype, dtype} != {STEPPED, SAVED}:
        return entries
    if remainder.layout != torch.strided:
        return entries  # refused where it is of use
    return {**entries, name: remainder.view(dtype)}


def master_in(state: State, spec: _C.StateSpec) -> tuple[str, Tensor] | None:
    """The kind of master weight and the tensor that holds it, if the state has it."""
    for name, kind, _ in spec.entries:
        if kind in MASTERS and state.get(name) is not None:
            return kind, with_remainder_as(STEPPED, state)[name]
    return None


def read_weight(param: Tensor, state: State, spec: _C.StateSpec) -> Tensor:
    """A copy of a parameter's weights, in float32 if the parameter is narrower."""
    param = without_wrapper(param.detach())
    master = master_in(state, spec)
    if master is None:
        return param.to(spec.weight_dtype, copy=True)
    if master[0] in REMAINDERS:
        return join(param, master[1])
    return weight_of(param, master[1])


def weight_of(param: Tensor, master: Tensor) -> Tensor:
    """The master weight where the parameter is what it rounds to, else the parameter, as a copy.

    There somebody has written to the parameter since the last step: a model was loaded, say.
    """
    weight = torch.empty_like(master)
    own, mine = local(param), local(master)
    local(weight).copy_(torch.where(own == mine.to(own.dtype), mine, own.to(mine.dtype)))
    return weight


def overwrite(state: Tensor, value: Tensor) -> None:
    """Set a tensor of the state in its memory, uncounted by autograd, as a step does."""
    local(state).data.copy_(local(value))


def are_rewritten(pairs: list[tuple[Tensor, Tensor]]) -> list[bool]:
    """Of each (param, master weight): whether the parameter is not what the master rounds to.

    Waits once for each GPU.
    """
    found = [
        (local(param.detach()) != local(master).to(param.dtype)).any() for param, master in pairs
    ]
    flags: dict[int, bool] = {}
    for device in {each.device for each in found}:
        at = [index for index, each in enumerate(found) if each.device == device]
        flags |= zip(at, torch.stack([found[index] for index in at]).tolist(), strict=True)
    return [flags[index] for index in range(len(pairs))]


def check_weight(weight: Any, param: Tensor, what: str) -> None:
    """Raise where a parameter cannot be set to this; ``what`` says in the text what it is."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{what} is {weight!r}, but must be a tensor")
    if (why := why_unreadable(weight)) is not None:
        raise TypeError(f"{what} is {why}")
    if is_dtensor(type(weight)) != is_dtensor(type(param)):
        raise TypeError(f"{what} and the parameter must both be DTensors, or neither of them")
    if weight.is_complex() != param.is_complex():
        raise ValueError(f"{what} is {weight.dtype}, but the parameter {param.dtype}")
    if weight.shape != param.shape:
        raise ValueError(
            f"{what} is of shape {tuple(weight.shape)}, but the parameter of shape "
            f"{tuple(param.shape)}"
        )


def check_written(param: Tensor, state: State, spec: _C.StateSpec, place: str) -> list[Tensor]:
    """What ``write_weight`` writes to: a parameter, and the master in its state; or raise."""
    targets = [(place, param)]
    for name, kind, dtype in spec.entries:
        entry = with_remainder_as(STEPPED, state).get(name) if kind in MASTERS else None
        if entry is None:
            continue
        what = f"{name} of {place}"
        if not isinstance(entry, Tensor):
            raise TypeError(f"{what} is {entry!r}, but must be a tensor")
        if entry.shape != param.shape or entry.dtype != dtype:
            raise ValueError(
                f"{what} is {entry.dtype} of shape {tuple(entry.shape)}, but must be {dtype} of "
                f"{tuple(param.shape)}"
            )
        targets.append((what, entry))
    for what, tensor in targets:
        if (why := why_unwritable(tensor)) is not None:
            raise ValueError(f"{what} is {why}")
    return [tensor for _, tensor in targets]


def write_weight(param: Tensor, weight: Tensor, state: State, spec: _C.StateSpec) -> None:
    """Make a parameter, and its master weight if the state has one, hold these weights."""
    master = master_in(state, spec)
    weight = weight.to(param.device, spec.weight_dtype)
    if master is not None and master[0] in REMAINDERS:
        rounded, remainder = split(weight, REMAINDERS[master[0]])
        param.copy_(rounded)
        master[1].copy_(remainder)
        return
    if master is not None:
        master[1].copy_(weight)
    param.copy_(weight)


class Swap:
    """Params that are to hold the values of their partners for a while, and then their own."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._pairs = pairs
        self._kept = [(param, param.detach().clone()) for param, _ in pairs]

    @torch.no_grad()
    def put_in(self) -> None:
        for param, average in self._pairs:
            param.copy_(average)

    @torch.no_grad()
    def put_back(self) -> None:
        """Exactly what they held before; may be called again where it was interrupted."""
        for param, own in self._kept:
            param.copy_(own)
