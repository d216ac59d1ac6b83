"""Loading of state dicts: torch's behaviour, in linear time and without casts of the state."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ._steps import to_step
from ._weights import convert


def load_state_dict(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    check_group: Callable[[dict[str, Any], int], None],
    counts_steps: Callable[[dict[str, Any]], bool],
    own_options: Iterable[str],
) -> None:
    """What ``FusedOptimizer.load_state_dict`` documents.

    ``check_group`` raises for bad groups, ``counts_steps`` tells whether states have ``step``;
    ``own_options`` are not loaded.
    """
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        result = pre_hook(optimizer, state_dict)
        if result is not None:
            state_dict = result

    groups = optimizer.param_groups
    saved_groups = deepcopy(state_dict["param_groups"])
    _check_groups(groups, saved_groups)
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
            state[params[key]] = _move(entries, params[key])
            if isinstance(entries, dict) and "step" in entries:
                state[params[key]]["step"] = to_step(entries["step"], torch.device("cpu"))
        else:  # of no parameter: kept as it is, as torch does
            state[key] = entries
    new_values: list[tuple[Tensor, Tensor]] = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        saved["params"] = group["params"]
        for key in ("param_names", "capturable", "decoupled_weight_decay"):  # torch saves not all
            if key in group:
                saved.setdefault(key, group[key])
        for key in own_options:
            saved.pop(key, None)
            if key in group:
                saved[key] = group[key]
        check_group(saved, index)
        for at, param in enumerate(group["params"]):
            entries = state.get(param)
            if isinstance(entries, dict):
                values = convert(entries, param, saved, _place(saved, index, at))
                if values is not None:
                    new_values.append((param, values))
                if not counts_steps(saved):
                    entries.pop("step", None)
    with torch.no_grad():
        for param, values in new_values:
            param.copy_(values)
    optimizer.__setstate__({"state": state, "param_groups": saved_groups})

    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _place(group: dict[str, Any], group_index: int, index: int) -> str:
    """As messages of a step have it."""
    names = group.get("param_names")
    where = f"group {group_index}, index {index}"
    return f"parameter {names[index]!r} ({where})" if names else f"the parameter at {where}"


def _check_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
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
    """Puts state on the param's device; ``step`` is dealt with by ``__setstate__``."""
    if isinstance(value, Tensor):
        return value if key == "step" else value.to(device=param.device)
    if isinstance(value, dict):
        return {name: _move(entry, param, name) for name, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return type(value)(_move(entry, param) for entry in value)  # type: ignore[call-arg]
    return value
