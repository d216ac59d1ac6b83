"""The CUDA driver when tensors move, are replaced, freed or reordered between its steps."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.device import needs_driver
from support.optimizers import Case, some_cases, take_step
from support.sides import Results, Side, on_both_drivers
from support.snapshots import record
from support.tensors import draw, misaligned, params_of, set_grads, values

pytestmark = needs_driver


def move_params(optimizer: Any, _: random.Random) -> None:
    for param in params_of(optimizer):
        param.data = param.data.clone()


def misalign_params(optimizer: Any, rng: random.Random) -> None:
    for param in params_of(optimizer):
        param.data = misaligned(param.data, rng.randint(1, 5))


def transpose_params(optimizer: Any, _: random.Random) -> None:
    """The same numbers in column-major order, grads and states as they were."""
    for param in params_of(optimizer):
        if param.dim() == 2:
            param.data = param.data.t().contiguous().t()


def narrow_params(optimizer: Any, rng: random.Random) -> None:
    for param in rng.sample(params_of(optimizer), 2):
        param.data = param.data.to(rng.choice([torch.bfloat16, torch.float32]))
        param.grad = None


def widen_grads(optimizer: Any, _: random.Random) -> None:
    for param in params_of(optimizer):
        if param.grad is not None:
            grad = param.grad.double()
            param.grad_dtype = None
            param.grad = grad


def misalign_grads(optimizer: Any, rng: random.Random) -> None:
    for param in params_of(optimizer):
        if param.grad is not None:
            param.grad = misaligned(param.grad, rng.randint(1, 5))


def lose_grads(optimizer: Any, rng: random.Random) -> None:
    for param in rng.sample(params_of(optimizer), 4):
        param.grad = None


def change_options(optimizer: Any, rng: random.Random) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rng.uniform(0.001, 0.1)
        group["weight_decay"] = rng.choice([0.0, 0.1])
        group["maximize"] = rng.random() < 0.3


def replace_states(optimizer: Any, rng: random.Random) -> None:
    for param in rng.sample(params_of(optimizer), 3):
        for name, entry in list(optimizer.state.get(param, {}).items()):
            optimizer.state[param][name] = entry.clone()


def lose_states(optimizer: Any, rng: random.Random) -> None:
    for param in rng.sample(params_of(optimizer), 2):
        optimizer.state.pop(param, None)


def reload_states(optimizer: Any, _: random.Random) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def reorder_params(optimizer: Any, rng: random.Random) -> None:
    for group in optimizer.param_groups:
        rng.shuffle(group["params"])


def device_of(optimizer: Any) -> torch.device:
    return params_of(optimizer)[0].device


def add_group(optimizer: Any, rng: random.Random) -> None:
    params = draw([rng.choice([1, 40, 513]), 9], device_of(optimizer), seed=rng.randint(0, 99))
    optimizer.add_param_group({"params": params, "lr": rng.uniform(0.001, 0.1)})


def exchange_params(optimizer: Any, rng: random.Random) -> None:
    """Another number of elements in the same place."""
    group = rng.choice(optimizer.param_groups)
    old = group["params"][0]
    optimizer.state.pop(old, None)
    group["params"][0] = draw([rng.choice([0, 2, 300, 1000])], old.device, old.dtype)[0]


Event = Callable[[Any, random.Random], None]
EVENTS: dict[str, Event] = {
    event.__name__: event
    for event in (
        move_params, misalign_params, transpose_params, narrow_params, exchange_params,
        widen_grads, misalign_grads, lose_grads, change_options,
        replace_states, lose_states, reload_states, reorder_params, add_group,
    )
}  # fmt: skip


def make_varied(side: Side, case: Case) -> torch.optim.Optimizer:
    params = draw([3, 257, 0, 1000, 64], side.device)
    params += draw([5, 520], side.device, torch.bfloat16)
    params += [values(31, 17).to(side.device), values(8, 9, dtype=torch.float64).to(side.device)]
    return case.ours([{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.0}])


def train_through(side: Side, case: Case, events: list[Event], seed: int, steps: int) -> Results:
    """Steps with something happening before each; the same on both sides, by the seed."""
    rng = random.Random(seed)
    optimizer = make_varied(side, case)
    for step in range(steps):
        set_grads(optimizer, step)
        if step > 0:
            rng.choice(events)(optimizer, rng)
        optimizer.step()
    return record(optimizer)


@pytest.mark.parametrize("event", EVENTS)
@some_cases("momentum-damped", "adamw")
@on_both_drivers
def test_between_steps(side: Side, case: Case, event: str) -> Results:
    return train_through(side, case, [EVENTS[event]], 0, 4)


@pytest.mark.parametrize("seed", range(6))
@some_cases("sgd-l2", "momentum-damped", "adam-amsgrad-l2", "adamw")
@on_both_drivers
def test_whatever_happens(side: Side, case: Case, seed: int) -> Results:
    events = list(EVENTS.values())
    return train_through(side, case, events, seed, 15)


@some_cases("sgd", "momentum-damped", "adam", "adamw-amsgrad")
@on_both_drivers
def test_static_grads(side: Side, case: Case) -> Results:
    """Nothing moves, so nothing is sent; grads are written in place."""
    params = draw([5, 2000, 33], side.device)
    optimizer = case.ours(params)
    set_grads(params, 0)
    grads: list[Tensor] = [param.grad for param in params]
    for seed in range(5):
        for grad in grads:
            grad.copy_(values(*grad.shape, seed=seed))
        optimizer.step()
    return record(optimizer)


@some_cases("momentum", "adamw")
@on_both_drivers
def test_memory_is_free_again_after_the_step(side: Side, case: Case) -> Results:
    """What a step reads is freed and written to as soon as step() has returned."""
    params = draw([5, 70000, 33, 4097], side.device)
    optimizer = case.ours(params)
    for seed in range(8):
        take_step(optimizer, seed)
        for param in params:
            param.grad = None
        junk = [torch.full_like(param, torch.nan) for param in params]
        del junk
    return record(optimizer)


@pytest.mark.parametrize("default", ["cpu", "meta"])
@some_cases("momentum", "adam", "adamw")
@on_both_drivers
def test_default_device_is_another(side: Side, case: Case, default: str) -> Results:
    """What the driver allocates belongs to the params' device."""
    params = draw([5, 700], side.device)
    with torch.device(default):
        optimizer = case.ours(params, capturable=side.is_gpu)
        for _ in range(3):
            for param in params:
                param.grad = param * 0.5
            optimizer.step()
    return record(optimizer)


@some_cases("momentum", "adamw")
@on_both_drivers
def test_more_layouts_in_every_step(side: Side, case: Case) -> Results:
    """More and more strided grads; mixed formats, so that a strided one needs no other kernel."""
    params = [values(3, 4, 5, seed=i).to(side.device, torch.bfloat16) for i in range(40)]
    optimizer = case.ours(params)
    for step in range(6):
        for index, param in enumerate(params):
            grad = values(5, 4, 3, seed=40 * step + index).to(side.device)
            param.grad_dtype = None
            permuted = grad.permute(2, 1, 0)
            param.grad = permuted if index < 8 * step else permuted.contiguous()
        optimizer.step()
    return record(optimizer)
