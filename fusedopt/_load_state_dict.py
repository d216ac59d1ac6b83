"""State dicts: torch's, loaded in linear time and without casts of the state."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C
from ._convert import convert
from ._state import Specs, place_of
from ._steps import to_step, whole_count
from ._tensors import is_dtensor, why_unreadable, why_unwritable
from ._types import ParamGroup
from ._weights import REMAINDERS, STEPPED, with_remainder_as

if TYPE_CHECKING:
    from ._optimizer import FusedOptimizer

# What states can be without a conversion.
REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128, torch.complex32)


@torch.inference_mode(False)  # which state outlives
def load_state_dict(optimizer: "FusedOptimizer", state_dict: dict[str, Any]) -> None:
    """What ``FusedOptimizer.load_state_dict`` documents."""
    _check_mapping(state_dict)
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        result = pre_hook(optimizer, state_dict)
        if result is not None:
            state_dict = result

    _check_form(state_dict)
    groups = optimizer.param_groups
    saved_groups = deepcopy(list(state_dict["param_groups"]))
    check_groups(groups, saved_groups)
    params = dict(
        zip(
            chain.from_iterable(group["params"] for group in saved_groups),
            chain.from_iterable(group["params"] for group in groups),
            strict=True,
        )
    )
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, entries in state_dict["state"].items():
        if key in params:
            state[params[key]] = _move(with_remainder_as(STEPPED, entries), params[key])
        else:  # of no parameter: kept as it is, as torch does
            state[key] = entries
    new_values: list[tuple[Tensor, Tensor]] = []
    specs = Specs(optimizer)
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        _keep_own_options(optimizer, group, saved)
        completed = optimizer._with_defaults(saved)
        _C.check_group(optimizer._row, completed, index)
        for at, param in enumerate(group["params"]):
            if param in state:
                entries, place = state[param], place_of(saved, index, at)
                if not isinstance(entries, dict):
                    raise TypeError(
                        f"the state of {place} is {entries!r} in the loaded state dict, but must "
                        "be a dict"
                    )
                _C.check_state(optimizer._row, entries, completed, index, at)
                values = _fit(entries, param, specs.of(param, completed), place)
                if values is not None:
                    new_values.append((param, values))
    with torch.no_grad():
        for param, values in new_values:
            param.copy_(values)
    optimizer.__setstate__({"state": state, "param_groups": saved_groups})
    initial = optimizer._shared.initial_averages
    if initial is not None:
        initial.recognise(optimizer)

    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _check_mapping(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise TypeError(f"the state dict of an optimizer must be a dict, got {kind}")


def _check_form(state_dict: Any) -> None:
    _check_mapping(state_dict)
    for key in ("param_groups", "state"):
        if key not in state_dict:
            raise ValueError(f"not the state dict of an optimizer: it has no {key!r}")
    saved_groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise TypeError(f"'state' of the loaded state dict must be a dict, got {kind}")
    if not isinstance(saved_groups, (list, tuple)):
        kind = type(saved_groups).__name__
        raise TypeError(f"'param_groups' of the loaded state dict must be a list, got {kind}")
    for index, group in enumerate(saved_groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), Collection):
            raise ValueError(
                f"param group {index} of the loaded state dict has no list of 'params'"
            )


def _keep_own_options(optimizer: "FusedOptimizer", group: ParamGroup, saved: ParamGroup) -> None:
    """Give a saved group the params, and what torch does not save or has no name for."""
    saved["params"] = group["params"]
    for key in ("param_names", "capturable", "decoupled_weight_decay"):  # torch may lack them
        if key in group:
            saved.setdefault(key, group[key])
    for key in optimizer._own_options:
        saved.pop(key, None)
        if key in group:
            saved[key] = group[key]


def _fit(entries: dict[str, Any], param: Tensor, spec: _C.StateSpec, place: str) -> Tensor | None:
    """Make the entries of a state what steps of a parameter need, or raise.

    Returns the values that the parameter is to have then, or None if it stays.
    """
    _check_entries(entries, spec, param, place)
    values = convert(entries, param, spec, place)
    for name in spec.unused:
        entries.pop(name, None)
    if entries.get("step") is not None:
        whole_count(entries["step"], f"step of {place} in the loaded state dict")
        entries["step"] = to_step(entries["step"], torch.device("cpu"))
    if values is not None:
        if is_dtensor(type(values)) != is_dtensor(type(param)):
            raise TypeError(
                f"the loaded master weight of {place} and the parameter must both be DTensors, or "
                "neither of them"
            )
        if (why := why_unwritable(param)) is not None:
            raise ValueError(f"{place} is {why}")
    return values


def _laid_out_as(param: Tensor, value: Tensor) -> Tensor:
    """The value with its param's strides (channels_last, say), with which steps are fastest."""
    if type(value) is not Tensor or value.layout != torch.strided or value.shape != param.shape:
        return value
    if type(param) not in (Tensor, torch.nn.Parameter) or value.stride() == param.stride():
        return value
    entry = torch.empty_like(param, dtype=value.dtype, requires_grad=False)
    return value if entry.stride() == value.stride() else entry.copy_(value)


def _check_entries(entries: dict[str, Any], spec: _C.StateSpec, param: Tensor, place: str) -> None:
    """Raise for what no step of this parameter can use, and nothing can be converted from."""
    for name, kind, _ in spec.entries:
        entry = entries.get(name)
        if kind == "state" and entry is not None:
            if not isinstance(entry, Tensor):
                raise TypeError(
                    f"{name} of {place} is {entry!r} in the loaded state dict, but must be a tensor"
                )
            _check_dense(name, entry, param, place)
            _check_state(name, entry, spec, param, place)
    for kind, name in _C.WEIGHTS_IN_STATE.items():
        # TransformerEngine's optimizer has its remainder under the name of a master, too.
        dtype = STEPPED if kind == "master" else REMAINDERS.get(kind)
        _check_numbers(name, entries.get(name), dtype, param, place)
    for code_name, dtype, scale_name in spec.codes.values():
        _check_numbers(code_name, entries.get(code_name), dtype, param, place)
        _check_numbers(scale_name, entries.get(scale_name), None, param, place)


def _check_dense(name: str, entry: Tensor, param: Tensor, place: str) -> None:
    if not param.is_meta and (why := why_unreadable(entry)) is not None:
        raise TypeError(f"{name} of {place} is, in the loaded state dict, {why}")


def _check_state(name: str, entry: Tensor, spec: _C.StateSpec, param: Tensor, place: str) -> None:
    if entry.shape != param.shape:
        raise ValueError(
            f"{name} of {place} is of shape {tuple(entry.shape)} in the loaded state dict, but "
            f"the parameter of shape {tuple(param.shape)}"
        )
    is_converted = spec.state_dtype is not None and entry.is_floating_point()
    if not (is_converted or entry.dtype in (COMPLEX if param.is_complex() else REAL)):
        raise TypeError(
            f"{name} of {place} is {entry.dtype} in the loaded state dict, which does not fit the "
            f"parameter: {param.dtype}"
        )


def _check_numbers(
    name: str, entry: Any, dtype: torch.dtype | None, param: Tensor, place: str
) -> None:
    """What is of this dtype, or was cast to another one by torch.optim, has numbers to read."""
    if entry is None:
        return
    if not isinstance(entry, Tensor):
        raise TypeError(
            f"{name} of {place} is {entry!r} in the loaded state dict, but must be a tensor"
        )
    _check_dense(name, entry, param, place)
    is_cast = entry.is_floating_point() or (param.is_complex() and entry.is_complex())
    if entry.dtype != dtype and not is_cast:
        expected = "of floating point" if dtype is None else str(dtype)
        raise TypeError(
            f"{name} of {place} is {entry.dtype} in the loaded state dict, but must be {expected}"
        )


def check_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    if len(groups) != len(saved):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved)}, "
            f"but the optimizer has {len(groups)}"
        )
    for index, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(saved_group["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group: group {index} has {len(saved_group['params'])} parameters, "
                f"but the optimizer's has {len(group['params'])}"
            )


def _move(value: Any, param: Tensor, key: Any = None) -> Any:
    """Puts state on the param's device, and in the param's order in memory if that differs.

    ``step`` is dealt with by ``__setstate__``.
    """
    if key == "step":
        return value
    if isinstance(value, Tensor):
        if why_unreadable(value) is not None:
            return value  # refused where it is of use
        return _laid_out_as(param, value.to(device=param.device).resolve_conj().resolve_neg())
    if isinstance(value, (dict, Mapping)):  # a dict is found out faster than other mappings
        return {name: _move(value[name], param, name) for name in value}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(_move(entry, param) for entry in value)
    return value
