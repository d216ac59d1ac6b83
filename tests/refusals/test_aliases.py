"""Grads that lie in memory which the step writes, and how often memory is compared.

torch refuses a grad that overlaps its param in part; with one pass over memory its elements would
be overwritten before they are read, in an order that depends on threads and vectors.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.device import STEPS_ON_DEVICE
from support.equality import assert_equal, assert_same_math, both_ways
from support.optimizers import Case, main_cases
from support.snapshots import refused
from support.tensors import by_id, params_of

SIZE = 1000


def ramp(size: int = SIZE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64).div(size).to(dtype)


def first_state(optimizer: Any, param: Parameter) -> str:
    return next(name for name in optimizer.state[param] if name != "step")


def cut(size: int, param_from: int, grad_from: int) -> Callable[[Any, Parameter], None]:
    """Param and grad from one buffer of that size."""

    def overlap(_: Any, param: Parameter) -> None:
        buffer = ramp(size)
        param.data = buffer[param_from : param_from + SIZE]
        param.grad = buffer[grad_from : grad_from + SIZE]

    return overlap


def transposed(optimizer: Any, param: Parameter) -> None:
    buffer = ramp(SIZE)
    param.data, param.grad = buffer.view(20, 50), buffer.view(50, 20).t()
    for key, value in optimizer.state[param].items():
        if value.numel() == SIZE:
            optimizer.state[param][key] = value.view(20, 50)


def of_half_the_width(optimizer: Any, param: Parameter) -> None:  # noqa: ARG001
    buffer = ramp(SIZE)
    param.data = buffer
    param.grad_dtype = None
    param.grad = buffer.view(torch.float32)[:SIZE]


def behind_a_state(optimizer: Any, param: Parameter) -> None:
    buffer = ramp(SIZE + 1)
    optimizer.state[param][first_state(optimizer, param)] = buffer[:-1]
    param.grad = buffer[1:]


# What is done to an optimizer that has been stepped, so that a grad overlaps what is written.
OVERLAPS: dict[str, Callable[[Any, Parameter], None]] = {
    "behind the param": cut(SIZE + 1, 1, 0),
    "before the param": cut(SIZE + 1, 0, 1),
    "one element in common": cut(2 * SIZE - 1, 0, SIZE - 1),
    "the param transposed": transposed,
    "of half the width": of_half_the_width,
    "behind a state": behind_a_state,
}


def make(case: Case, **more: Any) -> tuple[Any, list[Parameter]]:
    params = [Parameter(ramp()) for _ in range(3)]
    optimizer = case.ours(zip(("first", "middle", "last"), params, strict=True), **more)
    for _ in range(2):
        for param in params:
            param.grad = ramp()
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
@main_cases
@pytest.mark.parametrize("overlap", **by_id(OVERLAPS))
def test_overlap_is_refused(overlap: Any, case: Case, options: Any) -> None:
    optimizer, params = make(case, **options)
    overlap(optimizer, params[1])
    for _ in range(2):  # the answer stands
        with refused(optimizer, ValueError, r"^grad of parameter 'middle'.* share memory.*clone"):
            optimizer.step()
    params[1].grad = ramp().reshape(params[1].shape)
    optimizer.step()


@main_cases
def test_kept_grad_that_a_param_moves_into(case: Case) -> None:
    """The grad is where it was; what is written has come to it."""
    optimizer, params = make(case)
    buffer = ramp(SIZE + 1)
    params[1].grad = buffer[:-1]
    optimizer.step()
    params[1].data = buffer[1:]
    with pytest.raises(ValueError, match=r"^grad of parameter 'middle'"):
        optimizer.step()


@main_cases
@both_ways
def test_grad_that_is_a_param_or_state_of_its_own(shared: bool, case: Case) -> Any:
    """Element by element: each is read before it is written."""
    params = [Parameter(ramp()) for _ in range(3)]
    optimizer = case.ours(params)
    for step in range(4):
        for param in params:
            param.grad = ramp()
        if step > 0:
            state = optimizer.state[params[1]][first_state(optimizer, params[1])]
            params[0].grad = params[0].detach() if shared else params[0].detach().clone()
            params[1].grad = state if shared else state.clone()
        optimizer.step()
    return params


@pytest.mark.skipif(STEPS_ON_DEVICE, reason="a GPU has no order of parameters to keep")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["reader first", "writer first"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [SIZE, 1_000_000])
def test_grad_that_is_another_param(order: tuple[int, int], threads: int, size: int) -> None:
    """Parameters are stepped in their order, as in torch, however many threads there are."""
    results = []
    torch.set_num_threads(threads)
    for module in (fusedopt, torch.optim):
        params = [Parameter(ramp(size)), Parameter(ramp(size) + 1)]
        optimizer = module.SGD([params[i] for i in order], lr=0.5)
        for _ in range(3):
            params[0].grad, params[1].grad = params[1].detach(), ramp(size)
            optimizer.step()
        results.append(params)
    assert_same_math(*results)


@pytest.mark.skipif(not STEPS_ON_DEVICE, reason="the CPU keeps the order of the parameters")
@main_cases
def test_grad_that_is_another_param_is_refused_on_a_gpu(case: Case) -> None:
    optimizer, params = make(case)
    params[1].grad = params[2].detach()
    with refused(optimizer, ValueError, r"^grad of parameter 'middle'.*'last'.* share memory"):
        optimizer.step()


@main_cases
@both_ways
def test_grads_may_overlap_each_other(shared: bool, case: Case) -> Any:
    buffer = ramp(SIZE + 1)
    params = [Parameter(ramp()) for _ in range(3)]
    optimizer = case.ours(params)
    for _ in range(2):
        grads = [buffer[:-1], buffer[1:], buffer[:1].expand(SIZE)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad if shared else grad.clone()
        optimizer.step()
    return params


@main_cases
@both_ways
def test_grads_between_the_columns_of_params(shared: bool, case: Case) -> Any:
    """Extents overlap, elements do not."""
    whole = ramp(40 * 60).view(40, 60)
    params = [Parameter(whole[:, i : i + 10]) for i in (0, 20, 40)]
    optimizer = case.ours(params)
    for _ in range(3):
        for i, param in enumerate(params):
            grad = whole[:, 20 * i + 10 : 20 * i + 20]
            param.grad = grad if shared else grad.clone()
        optimizer.step()
    return params


@pytest.mark.cpu_only
def test_strided_grads_that_are_kept_are_compared_once() -> None:
    """The exact comparison visits every element: 50 ms for 1.5 million in each step."""

    def halves(param_of: Tensor, grad_of: Tensor) -> Any:
        param = Parameter(param_of[:, :500])
        param.grad = grad_of[:, 500:]
        return fusedopt.SGD([param], lr=0.1)

    def seconds(step: Any) -> float:
        start = time.thread_time()
        step()
        return time.thread_time() - start

    whole, others = torch.zeros(2000, 1000), torch.zeros(2, 2000, 1000)
    made = halves(whole, whole), halves(*others)
    for optimizer in made:
        optimizer.step()
    torch.set_num_threads(1)
    times = [[seconds(optimizer.step) for optimizer in made] for _ in range(9)]
    shared, apart = (sorted(each)[4] for each in zip(*times, strict=True))
    assert shared < 3 * apart  # more than five times if they are compared


# How often memory is compared: exactly, which takes long for slices, only when it has changed.


def columns(count: int = 6, rows: int = 30) -> list[Parameter]:
    whole = ramp(rows * count * 5).view(rows, count * 5)
    return [Parameter(whole[:, 5 * i : 5 * i + 5]) for i in range(count)]


def step_without(optimizer: Any, params: list[Parameter], resting: set[int]) -> None:
    for i, param in enumerate(params):
        param.grad = None if i in resting else torch.ones_like(param)
    optimizer.step()


@pytest.mark.parametrize("make_params", [columns, lambda: [Parameter(ramp()) for _ in range(6)]],
                         ids=["columns", "plain"])  # fmt: skip
@main_cases
def test_params_that_rest_in_turns_are_compared_once(case: Case, make_params: Any) -> None:
    params = make_params()
    optimizer = case.ours(params)
    step_without(optimizer, params, set())
    step_without(optimizer, params, set())
    checks = optimizer._plan().overlap_checks()
    for resting in ({0}, {1, 2}, {5}, {0, 1, 2, 3, 4}, set(), {3}):
        step_without(optimizer, params, resting)
    assert optimizer._plan().overlap_checks() == checks


@main_cases
def test_params_that_join_one_by_one_are_compared_with_those_before(case: Case) -> None:
    whole = ramp(300).view(10, 30)
    params = [Parameter(whole[:, :10]), Parameter(whole[:, 10:20]), Parameter(whole[:, 19:29])]
    optimizer = case.ours([("a", params[0]), ("b", params[1]), ("c", params[2])])
    step_without(optimizer, params, {1, 2})
    step_without(optimizer, params, {2})
    step_without(optimizer, params, {1})
    step_without(optimizer, params, {0, 1})
    for param in params:
        param.grad = torch.ones_like(param)
    with refused(optimizer, ValueError, r"'b'.*'c'.*share memory"):
        optimizer.step()
    step_without(optimizer, params, {2})


@main_cases
@both_ways
def test_memory_of_a_resting_param_may_become_that_of_others(reuses: bool, case: Case) -> Any:
    """What was known of it is no reason to refuse a step that does not touch it."""
    old = ramp()
    params = [Parameter(ramp()) for _ in range(3)]
    params[0].data = old
    optimizer = case.ours(params)
    step_without(optimizer, params, set())
    params[0].data = ramp()
    params[1].data = old.copy_(ramp()) if reuses else ramp()
    for resting in ({0}, {0}, set(), {0}):
        step_without(optimizer, params, resting)
    return params


@main_cases
def test_grad_in_the_old_memory_of_a_resting_param(case: Case) -> None:
    old = ramp()
    params = [Parameter(ramp()), Parameter(ramp())]
    params[0].data = old
    optimizer = case.ours(params)
    step_without(optimizer, params, set())
    params[0].data = ramp()
    for _ in range(2):
        params[0].grad, params[1].grad = None, old[:]
        optimizer.step()  # nothing is written there
    params[0].grad = torch.ones(SIZE, dtype=torch.float64)
    optimizer.step()


@main_cases
def test_optimizer_goes_on_after_a_walk_that_ended_early(case: Case) -> None:
    """Strided works before the one that raised have been entered, those behind it not."""
    params = columns()
    optimizer, twin = case.ours(params), case.ours(columns())
    twins = params_of(twin)
    for now in (optimizer, twin):
        step_without(now, params if now is optimizer else twins, set())
    grad = params[3].grad
    params[3].grad_dtype = None
    params[3].grad = torch.ones(params[3].shape, dtype=torch.int64)
    with pytest.raises(TypeError, match="int64"):
        optimizer.step()
    params[3].grad = grad
    for now in (optimizer, twin):
        step_without(now, params if now is optimizer else twins, {1})
        step_without(now, params if now is optimizer else twins, set())
    assert_equal(params, twins)
