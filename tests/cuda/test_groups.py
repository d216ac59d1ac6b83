"""The CUDA driver with many param groups, and with optimizers that change from step to step."""

import random
from typing import Any

import pytest
import torch

import fusedopt
from support.device import needs_driver
from support.optimizers import Case, some_cases, take_step
from support.sides import Results, Side, on_both_drivers
from support.snapshots import record
from support.tensors import draw, params_of, set_grads

pytestmark = needs_driver

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


# One that shares its kernel with others, too.
some_names = pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam"])


def group_options(name: str, g: int) -> dict[str, Any]:
    """No two groups alike; neighbours are computed in different ways."""
    options = {"lr": 0.01 + g / 1000, "weight_decay": 0.1 * (g % 2), "maximize": g % 5 == 4}
    if name == "SGD":
        momentum, dampening, nesterov = [(0, 0, False), (0.9, 0.2, False), (0.5, 0, True)][g % 3]
        return {**options, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    options |= {"betas": (0.9 - g / 500, 0.99), "eps": 1e-8 * (1 + g)}
    if name != "NAdam":
        options["amsgrad"] = g % 3 == 1
    return options if name == "AdamW" else {**options, "decoupled_weight_decay": g % 4 > 1}


def make_grouped(side: Side, name: str, count: int, sizes: list[int]) -> torch.optim.Optimizer:
    """Neighbouring groups differ in dtype, too. The last is in double, where scalars take most room
    and the first that is one too many shows."""
    groups = [
        {
            "params": draw(sizes, side.device, DTYPES[(count - 1 - g) % 4 % 3], seed=g),
            **group_options(name, g),
        }
        for g in range(count)
    ]
    return getattr(fusedopt, name)(groups)


# The scalars of 32 groups of Adam and of 76 of SGD fit in a kernel's arguments in double.
@some_names
@pytest.mark.parametrize("count", [1, 2, 32, 33, 64, 65, 76, 77, 153, 154])
@on_both_drivers
def test_many_groups(side: Side, name: str, count: int) -> Results:
    optimizer = make_grouped(side, name, count, [3, 130])
    for step in range(3):
        set_grads(optimizer, step)
        for g, group in enumerate(optimizer.param_groups):
            group["lr"] *= 1.5 + g / 10
        optimizer.step()
    return record(optimizer)


@some_names
@on_both_drivers
def test_late_unfrozen_params(side: Side, name: str) -> Results:
    """One more parameter takes part in every step, so that no two are at the same step."""
    optimizer = make_grouped(side, name, 3, [5] * 30)
    params = params_of(optimizer)
    for step in range(50):
        set_grads(params, step)
        for param in params[: len(params) - 2 * step]:
            param.grad = None
        optimizer.step()
    return record(optimizer)


@on_both_drivers
def test_params_that_drift_apart(side: Side) -> Results:
    """First all params are at the same step, in the end no two of a group: 40 scalars, then 160."""
    optimizer = make_grouped(side, "Adam", 40, [5] * 4)
    for step in range(6):
        set_grads(optimizer, step)
        for group in optimizer.param_groups:
            for param in group["params"][step:] if step > 0 else []:
                param.grad = None
        optimizer.step()
    return record(optimizer)


@some_names
@on_both_drivers
def test_params_without_grad(side: Side, name: str) -> Results:
    rng = random.Random(0)
    optimizer = make_grouped(side, name, 7, [300, 2, 0, 700])
    params = params_of(optimizer)
    for step in range(12):
        set_grads(params, step)
        for param in rng.sample(params, rng.choice([0, 3, 20, len(params)])):
            param.grad = None
        optimizer.step()
    return record(optimizer)


@some_cases("momentum", "adamw")
@on_both_drivers
def test_all_grads_none(side: Side, case: Case) -> Results:
    params = draw([5, 300], side.device)
    optimizer = case.ours(params)
    optimizer.step()
    assert not optimizer.state
    take_step(optimizer, 0)
    optimizer.zero_grad()
    optimizer.step()
    return record(optimizer)


@some_cases("sgd", "adam")
@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0]], ids=["no param", "empty", "three empty"])
@on_both_drivers
def test_nothing_to_do(side: Side, case: Case, sizes: list[int]) -> Results:
    params = draw(sizes, side.device)
    optimizer = case.ours([{"params": []}, {"params": params}])
    set_grads(params, 0)
    optimizer.step()
    optimizer.step()
    return record(optimizer)


@some_cases("nesterov", "adamw")
@on_both_drivers
def test_ten_thousand_tensors(side: Side, case: Case) -> Results:
    params = draw([1 + i % 70 for i in range(10000)], side.device)
    optimizer = case.ours([{"params": params[:6000]}, {"params": params[6000:], "lr": 0.5}])
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    found = {"params": torch.cat(params)}
    for name in optimizer.state[params[0]].keys() - {"step"}:
        found[name] = torch.cat([optimizer.state[param][name] for param in params])
    return found
