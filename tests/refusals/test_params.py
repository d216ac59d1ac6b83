"""Parameters that are given twice, or share memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.device import on_host
from support.optimizers import each_name, main_cases, train
from support.snapshots import refused
from support.tensors import by_id, params_with_grads, set_grads


@each_name
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_twice_in_one_group(name: str, named: bool) -> None:
    first, second = params_with_grads(dtype=torch.float32)
    params = [first, second, first]
    entries: Any = list(zip("abc", params, strict=True)) if named else params
    pattern = "parameter 'c' is in" if named else "a parameter is in"
    with pytest.raises(ValueError, match=f"{pattern} param group 0 twice, at index 0 and 2"):
        getattr(fusedopt, name)(entries)


@each_name
def test_in_two_groups(name: str) -> None:
    first, second = params_with_grads(dtype=torch.float32)
    with pytest.raises(ValueError, match="more than one parameter group"):
        getattr(fusedopt, name)([{"params": [first, second]}, {"params": [first]}])


def test_twice_by_editing_the_group() -> None:
    """Nobody checks what is appended to a group's list; the step does, before it writes."""
    optimizer = fusedopt.AdamW([("a", params_with_grads(dtype=torch.float32)[0])])
    group = optimizer.param_groups[0]
    group["params"].append(group["params"][0])
    with refused(optimizer, ValueError, r"parameter 'a'.*share memory"):
        optimizer.step()


def overlapping(storage: Tensor) -> tuple[Tensor, Tensor]:
    return storage[:12], storage[11:]


# How two parameters are cut from one buffer of 24 elements.
SHARED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "same memory": lambda buffer: (buffer, buffer),
    "one element": overlapping,
    "inside": lambda buffer: (buffer, buffer[5:7]),
    "inside, given first": lambda buffer: (buffer[5:7], buffer),
    "row and column": lambda buffer: (buffer.view(4, 6)[1], buffer.view(4, 6)[:, 3]),
    "columns of two widths": lambda buffer: (buffer.view(4, 6)[:, :3], buffer.view(4, 6)[:, 2:]),
    "transposed": lambda buffer: (buffer.view(4, 6), buffer.view(4, 6).t()),
    "other dtype": lambda buffer: (buffer, buffer.view(torch.float64)[3:]),
}


@main_cases
@pytest.mark.parametrize("cut", **by_id(SHARED))
@pytest.mark.parametrize("two_groups", [False, True], ids=["one group", "two groups"])
def test_params_that_share_memory(case: Any, cut: Any, two_groups: bool) -> None:
    first, second = (Parameter(part) for part in cut(torch.ones(24)))
    fine = Parameter(torch.ones(3))
    entries = [("fine", fine), ("a", first), ("b", second)]
    groups = [{"params": entries[:2]}, {"params": entries[2:]}] if two_groups else entries
    optimizer = case.ours(groups)
    set_grads([fine, first, second], 0)
    with refused(optimizer, ValueError, r"parameter '[ab]'.*parameter '[ab]'.*share memory"):
        optimizer.step()


# Cuts without a common element, however close: these must step.
INTERLEAVED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "neighbours": lambda buffer: (buffer[:12], buffer[12:]),
    "even and odd": lambda buffer: (buffer[::2], buffer[1::2]),
    "columns": lambda buffer: (buffer.view(4, 6)[:, :3], buffer.view(4, 6)[:, 3:]),
    "empty inside": lambda buffer: (buffer, buffer[5:5]),
}


@main_cases
@pytest.mark.parametrize("cut", **by_id(INTERLEAVED))
def test_params_beside_each_other(case: Any, cut: Any) -> None:
    results = []
    for build in (case.ours, case.theirs):
        buffer = torch.arange(24.0, dtype=torch.float64)
        train(build([Parameter(part) for part in cut(buffer)]))
        results.append(buffer)
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-14)


def test_params_begin_to_share_memory() -> None:
    """Found in the step after the swap, not only in an optimizer's first."""
    first, second = params_with_grads(dtype=torch.float32)
    optimizer = fusedopt.AdamW([("a", first), ("b", second)])
    optimizer.step()
    second.data = first.data
    with refused(optimizer, ValueError, r"'a'.*'b'.*share memory"):
        optimizer.step()
    second.data = torch.ones(4)
    optimizer.step()


def test_param_and_state_share_memory_when_a_state_is_missing() -> None:
    """A state that lacks what an option has come to need is checked like a whole one."""
    (param,) = params_with_grads(1, torch.float32)
    optimizer = fusedopt.AdamW([("a", param)], amsgrad=True)
    there = {"exp_avg": param.detach(), "exp_avg_sq": torch.zeros(4)}
    optimizer.state[param] = {"step": on_host(1.0), **there}
    with refused(optimizer, ValueError, r"'a'.*share memory"):
        optimizer.step()
