"""What users do to an optimizer between steps: memory swapped, tensors replaced, groups edited.

The plan keeps pointers between steps, so each of these could leave it with an old one. The twin in
torch.optim, which looks everything up anew, gets the same treatment.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from support.device import on_host
from support.equality import assert_equal
from support.optimizers import (
    CASES,
    VARIED,
    Build,
    Case,
    like_torch,
    main_cases,
    some_cases,
    take_step,
    train,
    varied_cases,
)
from support.snapshots import record
from support.tensors import by_id, make_params, params_of

stateful_cases = some_cases(*(key for key in VARIED if CASES[key].state_names))


Change = Callable[[Any, list[Parameter]], None]


def stepped_and_changed(build: Build, change: Change) -> Any:
    """Steps, changes, steps, changes, steps."""
    params = make_params()
    optimizer = build(params)
    train(optimizer, steps=2)
    for first in (2, 4):
        change(optimizer, params)
        train(optimizer, steps=2, first=first)
    return record(optimizer)


def move_params(_: Any, params: list[Parameter]) -> None:
    for param in params:
        param.data = param.data.clone() + 1
    for param in params:  # the old memory is free now, and taken by others
        torch.full((param.numel(),), float("nan"), dtype=torch.float64)


def move_to_view(_: Any, params: list[Parameter]) -> None:
    """From dense to strided memory."""
    wide = torch.full((4, 10), 7.0, dtype=torch.float64)
    wide[:, ::2] = params[1].data
    params[1].data = wide[:, ::2]


def swap_two_params(_: Any, params: list[Parameter]) -> None:
    params[1].data, params[4].data = params[4].data, params[1].data
    params[1].data = params[1].data.reshape(-1)[:20].reshape(4, 5).clone()
    params[4].data = torch.ones(2, 3, 4, dtype=torch.float64)


def replace_states(optimizer: Any, params: list[Parameter]) -> None:
    for param in params:
        for key, value in optimizer.state[param].items():
            optimizer.state[param][key] = value.clone() * 0.5 if value.dim() else value.clone()


def swap_state_data(optimizer: Any, params: list[Parameter]) -> None:
    for param in params:
        for value in optimizer.state[param].values():
            value.data = value.data.clone()


def set_step(optimizer: Any, params: list[Parameter]) -> None:
    if "step" in optimizer.state[params[0]]:
        optimizer.state[params[0]]["step"] += 10
        optimizer.state[params[1]]["step"] = on_host(3.0)


def transpose_state(optimizer: Any, params: list[Parameter]) -> None:
    """Same values, other strides than the parameter's."""
    for key, value in optimizer.state[params[1]].items():
        if value.dim() == 2:
            optimizer.state[params[1]][key] = value.t().contiguous().t()


def reorder_in_place(optimizer: Any, params: list[Parameter]) -> None:
    """Other strides at the same address, in the same tensor objects."""
    for value in optimizer.state[params[6]].values():
        if value.dim() == 2:
            value.data = value.data.t()


def reorder_state(optimizer: Any, params: list[Parameter]) -> None:
    """The plan follows the order of the state's dict where it can."""
    for param in [params[3], params[0]]:
        if param in optimizer.state:
            optimizer.state[param] = optimizer.state.pop(param)


def state_of_strangers(optimizer: Any, _: list[Parameter]) -> None:
    """Entries that belong to no parameter, among those that do."""
    old = dict(optimizer.state)
    optimizer.state.clear()
    optimizer.state["a string"] = 3
    for param, entries in old.items():
        optimizer.state[param] = entries
        optimizer.state.setdefault(Parameter(torch.ones(1, dtype=torch.float64)), {})
    assert len(optimizer.state) > len(old)


def edit_in_place(optimizer: Any, params: list[Parameter]) -> None:
    with torch.no_grad():
        params[0].mul_(0.5)
        for value in optimizer.state[params[0]].values():
            value.mul_(2)


def remove_a_param(optimizer: Any, params: list[Parameter]) -> None:
    if len(optimizer.param_groups[0]["params"]) == len(params):
        del optimizer.param_groups[0]["params"][1]


def split_group(optimizer: Any, _: list[Parameter]) -> None:
    first = optimizer.param_groups[0]
    if len(first["params"]) > 2:
        moved = first["params"].pop()
        optimizer.param_groups.insert(0, {**first, "params": [moved], "lr": 0.02})


def params_list(optimizer: Any) -> list[Any]:
    found: list[Any] = optimizer.param_groups[0]["params"]
    return found


CHANGES: dict[str, Change] = {
    **{
        change.__name__: change
        for change in [
            move_params, move_to_view, swap_two_params, replace_states, swap_state_data, set_step,
            transpose_state, reorder_in_place, reorder_state, state_of_strangers, edit_in_place,
            remove_a_param, split_group,
        ]
    },
    "move_to_same_memory": lambda _, p: setattr(p[1], "data", p[1].data.view(20).view(4, 5)),
    "reorder_params_in_place": lambda _, p: setattr(p[6], "data", p[6].data.t()),
    "clear_one_state": lambda o, p: o.state.pop(p[1], None),
    "clear_all_state": lambda o, _: o.state.clear(),
    "append_a_param": lambda o, _: params_list(o).append(Parameter(torch.ones(7).double())),
    "reverse_params": lambda o, _: params_list(o).reverse(),
    "new_params_list": lambda o, p: o.param_groups[0].update(params=[p[1], p[0], *p[2:]]),
}  # fmt: skip


@varied_cases
@pytest.mark.parametrize("change", **by_id(CHANGES))
@like_torch
def test_change_between_steps(build: Build, change: Change) -> Any:
    return stepped_and_changed(build, change)


@main_cases
def test_step_writes_to_the_new_memory_only(case: Case) -> None:
    param = Parameter(torch.ones(8))
    optimizer = case.ours([param])
    train(optimizer, steps=2)
    old, kept = param.data, param.data.clone()
    param.data = torch.zeros(8)
    take_step(optimizer, 0)
    assert_equal(old, kept)
    assert bool((param != 0).all())


@stateful_cases
@like_torch
def test_new_shape(build: Build) -> Any:
    """A parameter grows between two steps; its state was reset with it."""

    def grow(optimizer: Any, params: list[Parameter]) -> None:
        params[1].data = torch.ones(params[1].shape[0] + 3, 2, dtype=torch.float64)
        params[0].data = torch.ones((), dtype=torch.float64)
        for param in params[:2]:
            optimizer.state.pop(param)

    return stepped_and_changed(build, grow)


@varied_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_new_dtype(case: Case, dtype: torch.dtype) -> None:
    """model.to(dtype) swaps the data of every parameter."""
    results = []
    for build in (case.ours, case.theirs):
        model = torch.nn.Linear(3, 5)
        with torch.no_grad():
            model.weight.fill_(1)
            model.bias.fill_(0.5)
        optimizer = build(model.parameters())
        train(optimizer, steps=2)
        model.to(dtype)
        optimizer.state.clear()
        take_step(optimizer, 0)
        results.append(params_of(optimizer))
    assert results[0][0].dtype == dtype
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(*results, rtol=tolerance, atol=0)
