"""Saved state made fit for the settings that it is loaded into: dtypes, codes, masters."""

import warnings
from typing import Any

import torch
from torch import Tensor

from . import _C
from ._codes import Codes, decode, encode, shape_of_scales
from ._tensors import local, why_unreadable
from ._types import State
from ._weights import MASTERS, OF_8_BITS, REMAINDERS, join, split, weight_of


def convert(entries: State, param: Tensor, spec: _C.StateSpec, place: str) -> Tensor | None:
    """Make saved state fit the settings of the group that it is loaded into.

    States take on the group's ``state_dtype`` if that is set, codes included. A master weight of
    another kind is converted; one that was cast to another dtype (by ``torch.optim``) is dropped,
    as is all that the settings have no use for. Returns the values that the parameter is to have
    then, or None if it stays.

    Raises ValueError, with ``place``, for masters and averages of another shape than the parameter,
    and as ``_take_codes``.
    """
    codes = _take_codes(entries, param, spec, place)
    values = _convert_numbers(entries, param, spec, place)
    _put_states(entries, codes, param, spec)
    return values


def _convert_numbers(
    entries: State, param: Tensor, spec: _C.StateSpec, place: str
) -> Tensor | None:
    saved = {kind: entries.pop(name, None) for kind, name in _C.WEIGHTS_IN_STATE.items()}
    if spec.state_dtype is None and not any(isinstance(entry, Tensor) for entry in saved.values()):
        return None
    for kind, entry in saved.items():
        if isinstance(entry, Tensor) and REMAINDERS.get(kind) == OF_8_BITS:  # torch.optim casts it
            what = f"{_C.WEIGHTS_IN_STATE[kind]} of {place}"
            saved[kind] = _whole(entry, OF_8_BITS, what)
        if isinstance(entry, Tensor) and entry.shape != param.shape:
            raise ValueError(
                f"{_C.WEIGHTS_IN_STATE[kind]} of {place} is of shape {tuple(entry.shape)} in the "
                f"loaded state dict, but the parameter of shape {tuple(param.shape)}"
            )
    for name, entry in entries.items():
        is_state = spec.state_dtype is not None and name != "step" and isinstance(entry, Tensor)
        if is_state and entry.is_floating_point():
            entries[name] = entry.to(spec.state_dtype)
    # Where several kinds are there, one is what torch.distributed.checkpoint has found in this
    # optimizer and filled up with: that which settings do not ask for comes from the checkpoint.
    wanted = [kind for _, kind, _ in spec.entries if kind in MASTERS]
    others = {kind: entry for kind, entry in saved.items() if kind not in wanted}
    weight = _saved_weight(others, param, place) if wanted else None
    values = None
    for name, kind, dtype in spec.entries:
        if kind == "average" and isinstance(saved["average"], Tensor):
            entries[name] = saved["average"].to(dtype)
        elif kind == "master" and weight is not None:
            entries[name] = values = weight
        elif kind in REMAINDERS and weight is not None:
            values, entries[name] = split(weight, dtype)
        elif kind in MASTERS and (kept := _if_of_dtype(saved[kind], dtype)) is not None:
            entries[name] = kept
    return values


def _saved_weight(saved: dict[str, Any], param: Tensor, place: str) -> Tensor | None:
    """The float32 weights that a saved master weight stands for, if there is one of these kinds.

    A float32 master counts only where the parameter is what it rounds to, as in steps.
    """
    weight = _if_of_dtype(saved.get("master"), torch.float32)
    if weight is not None:
        is_apart = local(param).shape != local(weight).shape  # refused where they meet
        if is_apart or why_unreadable(param) is not None:
            return weight
        return weight_of(param.detach(), weight)
    if param.dtype == torch.bfloat16:
        for kind, dtype in REMAINDERS.items():
            remainder = _if_of_dtype(saved.get(kind), dtype)
            if remainder is not None:
                if (why := why_unreadable(param)) is not None:
                    raise ValueError(f"{place} is {why}")
                return join(param.detach(), remainder)
    return None


def _whole(entry: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """The integers that were cast to a floating-point dtype; ValueError if these are others."""
    numbers = entry.to(dtype)
    own = local(entry)  # another process may have nothing to compare with
    if not own.is_floating_point() or own.is_meta:
        return numbers
    if not torch.equal(local(numbers).to(own.dtype), own):
        raise ValueError(
            f"{what} is {entry.dtype} in the loaded state dict with numbers that are not those of "
            f"{dtype}"
        )
    return numbers


def _if_of_dtype(entry: Any, dtype: torch.dtype) -> Tensor | None:
    return entry if isinstance(entry, Tensor) and entry.dtype == dtype else None


def _take_codes(entries: State, param: Tensor, spec: _C.StateSpec, place: str) -> dict[str, Codes]:
    """Take all codes out of saved entries, by the names of their states.

    Raises ValueError or TypeError for what is not codes and scales of such a parameter.
    """
    found = {}
    for name, (code_name, dtype, scale_name) in spec.codes.items():
        plain = entries.get(name)
        is_half = isinstance(plain, Tensor) and plain.dtype == torch.float16
        if spec.wants_codes and dtype == torch.uint8 and is_half:
            warnings.warn(
                f"{name} of {place} was saved in float16, in which squares of small grads are 0, "
                "and updates by them far too large",
                stacklevel=5,
            )
        codes, scales = (entries.pop(each, None) for each in (code_name, scale_name))
        if codes is None or scales is None:
            continue  # both: a state with one of them has been refused
        count = -(-param.numel() // _C.GROUP_OF_CODES)
        if codes.shape != param.shape or scales.numel() != count:
            raise ValueError(
                f"{code_name} and {scale_name} of {place} are of shapes {tuple(codes.shape)} and "
                f"{tuple(scales.shape)} in the loaded state dict, which does not fit the parameter "
                f"of shape {tuple(param.shape)}, with a scale for {_C.GROUP_OF_CODES} elements"
            )
        # torch.optim may have cast both to the parameter's dtype, of which codes are whole numbers.
        if scales.dtype == torch.float16:
            raise ValueError(
                f"{scale_name} of {place} was cast to float16, in which small scales are 0; "
                "float32_states() of fusedopt.compat makes a state dict that others can take"
            )
        found[name] = _whole(codes, dtype, f"{code_name} of {place}"), scales.float()
        is_open = spec.state_dtype is None and isinstance(plain, Tensor)
        if is_open and any(each == name for each, *_ in spec.entries):
            raise ValueError(
                f"the state of {place} has both {name} and {code_name} in the loaded state dict; "
                "set state_dtype to say which it is to be"
            )
    return found


def _put_states(entries: State, saved: dict[str, Codes], param: Tensor, spec: _C.StateSpec) -> None:
    """Enter what ``_take_codes`` has taken out, as codes or numbers, and make codes of numbers.

    As the settings have it; without ``state_dtype``, as it was saved, if the parameter can have it.
    Where both are there, one is what torch.distributed.checkpoint has found in this optimizer and
    filled up with: that which settings do not ask for comes from the checkpoint.
    """
    shape = shape_of_scales(param)
    in_use = [name for name, kind, _ in spec.entries if kind == "state"]
    for name, (code_name, dtype, scale_name) in spec.codes.items():
        plain = entries.get(name)
        if name not in in_use:
            if name in saved:  # until an option needs it
                entries[code_name], entries[scale_name] = saved[name]
            continue
        keeps = name in saved and spec.state_dtype is None
        if shape is not None and (spec.wants_codes or keeps):
            if isinstance(plain, Tensor):
                found = encode(plain, dtype, shape)
            elif name in saved:
                codes, scales = saved[name]
                found = codes.contiguous(), scales.reshape(shape).contiguous()
            else:
                continue
            entries.pop(name, None)
            entries[code_name], entries[scale_name] = found
        elif name in saved:
            entries[name] = decode(*saved[name]).to(spec.state_dtype or torch.float32)
