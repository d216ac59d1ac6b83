"""torch.amp.GradScaler: the device decides what happens, the host never waits for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.device import needs_driver, needs_gpu
from support.equality import tensor_bytes
from support.optimizers import Case, each_case, some_cases
from support.pairs import in_pairs
from support.sides import GPU, SIZES, Results, Side, on_both_drivers, without_waiting
from support.snapshots import record
from support.tensors import by_id, draw, params_of, set_grads, some_dtypes

pytestmark = needs_driver

# Which of five steps overflow. The last does not: before a parameter's first real step the GPU has
# state of zeros where the CPU driver has none yet.
OVERFLOWS = {
    "none": (),
    "the first": (0,),
    "the first two": (0, 1),
    "a later one": (2,),
    "all but the last": (0, 1, 2, 3),
    "every second": (1, 3),
}
each_pattern = pytest.mark.parametrize("skipped", **by_id(OVERFLOWS))


def scaled_step(side: Side, optimizer: Any, found_inf: float, scale: float = 1.0) -> None:
    """What GradScaler.step does with an optimizer that supports it."""
    optimizer.found_inf, optimizer.grad_scale = side.tensor(found_inf), side.tensor(scale)
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale


def train_scaled(
    side: Side, case: Case, dtype: torch.dtype, skipped: tuple[int, ...], **more: Any
) -> Results:
    """Scales are no powers of two, so that a grad scaled at another place would round otherwise."""
    optimizer = case.ours(draw(SIZES, side.device, dtype), **more)
    for step in range(5):
        params = params_of(optimizer)
        set_grads(params, step)
        before = [tensor_bytes(param.grad) for param in params]
        scaled_step(side, optimizer, float(step in skipped), 3.0 + step)
        assert [tensor_bytes(param.grad) for param in params] == before
    return record(optimizer)


@in_pairs(each_pattern, some_dtypes(torch.float32, torch.float16), each_case)
@on_both_drivers
def test_skipped_steps(side: Side, case: Case, dtype: torch.dtype, skipped: Any) -> Results:
    return train_scaled(side, case, dtype, skipped)


@each_pattern
@some_cases("momentum-damped", "adamw")
@on_both_drivers
def test_skipped_capturable_steps(side: Side, case: Case, skipped: tuple[int, ...]) -> Results:
    return train_scaled(side, case, torch.float32, skipped, capturable=side.is_gpu)


@some_cases("momentum-damped", "adamw")
def test_skipped_step_changes_nothing(case: Case) -> None:
    """The counts included, which are on the GPU by then."""
    optimizer = case.ours(draw(SIZES, GPU.device))
    set_grads(optimizer, 0)
    scaled_step(GPU, optimizer, 0.0)
    before = record(optimizer)
    for found_inf in (1.0, 0.25, 8.0, torch.inf):
        scaled_step(GPU, optimizer, found_inf)
    assert all(torch.equal(before[name], found) for name, found in record(optimizer).items())


@pytest.mark.parametrize("skipped", [(), (0,), (2, 5), (0, 1, 3, 5, 6)], ids=str)
@some_cases("sgd", "momentum-damped", "nesterov", "adam-amsgrad", "adamw")
@on_both_drivers
def test_params_of_other_ages(side: Side, case: Case, skipped: tuple[int, ...]) -> Results:
    """Params that join late, have no grad in between, and steps without a scaler."""
    params = draw([5, 300, 64, 1], side.device)
    optimizer = case.ours([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}])
    for step in range(9):
        set_grads(params, step)
        params[1].grad = params[1].grad if step > 1 else None
        params[2].grad = params[2].grad if step % 3 else None
        params[3].grad = params[3].grad if step > 4 else None
        if step in (4, 7):
            optimizer.step()
        else:
            scaled_step(side, optimizer, float(step in skipped), 5.0)
    return record(optimizer)


@some_cases("momentum", "adamw")
@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
@on_both_drivers
def test_one_of_the_two(side: Side, case: Case, name: str) -> Results:
    optimizer = case.ours(draw(SIZES, side.device))
    for step in range(3):
        set_grads(optimizer, step)
        value = float(step == 1) if name == "found_inf" else 7.0
        setattr(optimizer, name, side.tensor([value], torch.float64))
        optimizer.step()
    return record(optimizer)


@some_cases("sgd", "momentum-damped", "adam", "adamw")
@on_both_drivers
def test_grad_scaler(side: Side, case: Case) -> Results:
    """torch's own, with an overflow; on a GPU nothing may wait from the first step on."""
    params = draw(SIZES, side.device)
    optimizer = case.ours(params, fused=True)  # else the scaler reads its verdict
    scaler = torch.amp.GradScaler(side.device.type, init_scale=2.0**10, growth_interval=2)
    grads = []
    for step in range(6):
        set_grads(params, step)
        grads.append([param.grad * 2.0**10 for param in params])
    grads[2][3][200] = torch.inf
    loss = torch.zeros((), device=side.device)
    with without_waiting():
        for step_grads in grads:
            scaler.scale(loss)
            for param, grad in zip(params, step_grads, strict=True):
                param.grad = grad
            scaler.step(optimizer)
            scaler.update()
    return record(optimizer) | {"scale": torch.tensor(scaler.get_scale(), device="cpu")}


# The ways to step, each from an optimizer's first step on.
KINDS: dict[str, Callable[[Any], None]] = {
    "plain": lambda optimizer: optimizer.step(),
    "capturable": lambda optimizer: optimizer.step(),
    "scaler": lambda optimizer: scaled_step(GPU, optimizer, 0.0),
}


@pytest.mark.parametrize("kind", KINDS)
@each_case
def test_torch_does_not_wait(case: Case, kind: str) -> None:
    """None of the host's synchronisations that torch knows of, and it knows of its own only."""
    optimizer = case.ours(draw(SIZES, GPU.device), capturable=kind == "capturable")
    scaling = GPU.tensor(0.0), GPU.tensor(2.0)
    set_grads(optimizer, 0)
    if kind == "scaler":
        optimizer.found_inf, optimizer.grad_scale = scaling
    with without_waiting():
        for _ in range(4):
            optimizer.step()


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moving", [False, True], ids=["static grads", "new grads"])
@some_cases("momentum-damped", "adamw")
def test_steps_return_while_the_gpu_is_busy(case: Case, moving: bool, kind: str) -> None:
    """From the first step on, once the code is on the GPU and torch has memory to give."""
    for rehearsal in (True, False):
        optimizer = case.ours(draw(SIZES, GPU.device), capturable=kind == "capturable")
        params = params_of(optimizer)
        grads = []
        for seed in range(5):
            set_grads(params, seed if moving else 0)
            grads.append([param.grad for param in params] if moving or not grads else grads[0])
        scaling = GPU.tensor(0.0), GPU.tensor(2.0)
        if kind == "scaler":
            optimizer.found_inf, optimizer.grad_scale = scaling
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # half a second and more
        is_over = torch.cuda.Event()
        is_over.record()
        for step_grads in grads:
            for param, grad in zip(params, step_grads, strict=True):
                param.grad = grad
            optimizer.step()
        assert rehearsal or not is_over.query()
        torch.cuda.synchronize()
