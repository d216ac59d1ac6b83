"""torch.amp.GradScaler: step() of an optimizer made with fused=True unscales and skips by itself.

It says so with `_step_supports_amp_scaling`; for all others, as in torch, the scaler does both.
"""

import copy
from typing import Any

import pytest
import torch

from support.device import DEVICE, STEPS_ON_DEVICE
from support.equality import assert_equal, assert_same_math
from support.optimizers import (
    Build,
    Case,
    assert_params_after,
    like_torch,
    main_cases,
    take_step,
    train,
    varied_cases,
)
from support.pairs import in_pairs
from support.scalers import each_bad, new_scaler, scaled_step
from support.snapshots import photograph, snapshot
from support.tensors import by_id, make_params, params_of, set_grads

WAYS: dict[str, dict[str, Any]] = {"in the step": {"fused": True}, "before it": {}}
EACH_WAY = pytest.mark.parametrize("options", **by_id(WAYS))


@varied_cases
@EACH_WAY
@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "unscaled and clipped by the user"])
@like_torch
def test_scaled_training(build: Build, case: Case, options: Any, clip: float | None) -> Any:
    """With an overflow in the middle, which shrinks the scale; torch's twin is unfused."""
    optimizer = build(make_params(), **(options if build == case.ours else {}))
    scaler = new_scaler(torch.amp.GradScaler)
    for seed in range(6):
        scaled_step(scaler, optimizer, seed, float("inf") if seed == 3 else None, clip)
    return params_of(optimizer), scaler.get_scale(), scaler.state_dict()


@in_pairs(
    varied_cases,
    EACH_WAY,
    each_bad,
    pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"]),
)
def test_overflow_on_the_first_step(
    case: Case, options: dict[str, Any], bad: float, clip: float | None
) -> None:
    """A peer left its momentum uninitialised when the first step was skipped."""
    optimizer, scaler = case.ours(make_params(), **options), new_scaler(torch.amp.GradScaler)
    params = optimizer.param_groups[0]["params"]
    before = [photograph(param, values_only=STEPS_ON_DEVICE) for param in params]
    scaled_step(scaler, optimizer, 0, bad=bad, clip=clip)
    assert [photograph(param, values_only=STEPS_ON_DEVICE) for param in params] == before
    started = {"sum", "step_size"}  # these begin with a number of the options
    entries = [
        entry
        for state in optimizer.state.values()
        for name, entry in state.items()
        if name not in started
    ]
    assert not any(entry.any() for entry in entries) if STEPS_ON_DEVICE else not optimizer.state
    for seed in range(1, 4):
        scaled_step(scaler, optimizer, seed)
    assert_params_after(optimizer, case, 1, 2, 3)  # powers of two: unscaling is exact


@in_pairs(varied_cases, EACH_WAY, each_bad)
def test_overflow_on_a_later_step(case: Case, options: dict[str, Any], bad: float) -> None:
    optimizer, scaler = case.ours(make_params(), **options), new_scaler(torch.amp.GradScaler)
    for seed in range(2):
        scaled_step(scaler, optimizer, seed)
    before = without_grads(optimizer)
    scaled_step(scaler, optimizer, 2, bad=bad)
    assert without_grads(optimizer) == before
    scaled_step(scaler, optimizer, 3)
    assert_params_after(optimizer, case, 0, 1, 3)


def without_grads(optimizer: Any) -> dict[str, Any]:
    photo = snapshot(optimizer, values_only=STEPS_ON_DEVICE)
    return {k: v for k, v in photo.items() if not k.startswith("grad")}


@main_cases
@pytest.mark.parametrize("found_inf", [1.0, 2.0, 8.0, 0.5])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
def test_any_positive_found_inf_skips(case: Case, found_inf: float, shape: Any) -> None:
    """It is a sum over devices and processes; a peer compared it with exactly 1."""
    optimizer = case.ours(make_params())
    take_step(optimizer, 0)
    set_grads(optimizer, 1)
    optimizer.found_inf = torch.full(shape, found_inf)
    optimizer.grad_scale = torch.full(shape, 4.0)
    before = snapshot(optimizer, values_only=STEPS_ON_DEVICE)
    assert optimizer.step() is None
    assert snapshot(optimizer, values_only=STEPS_ON_DEVICE) == before


@main_cases
def test_skipped_step_returns_the_loss(case: Case) -> None:
    optimizer = case.ours(make_params())
    optimizer.found_inf = torch.ones(1)
    assert optimizer.step(lambda: 3.5) == 3.5


@varied_cases
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float64, 2.0**16),
        (torch.float32, 2.0**16),
        (torch.bfloat16, 2.0**16),
        (torch.float16, 0.25),
        (torch.float64, 3.0),  # no power of two: compared up to roundings
    ],
    ids=str,
)
def test_grad_scale_divides_the_grads(case: Case, dtype: torch.dtype, scale: float) -> None:
    exact = scale != 3.0
    optimizer, plain = case.ours(make_params(dtype)), case.ours(make_params(dtype))
    train(plain)
    for seed in range(3):
        params = optimizer.param_groups[0]["params"]
        set_grads(params, seed)
        grads = [param.grad.clone() for param in params]
        for param in params:
            param.grad *= scale
        scaled = [param.grad.clone() for param in params]
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        assert_equal([param.grad for param in params], scaled)  # read only
        assert_equal([grad * scale for grad in grads], scaled)
    (assert_equal if exact else assert_same_math)(params_of(optimizer), params_of(plain))


@main_cases
@EACH_WAY
def test_scaler_leaves_no_attributes_behind(case: Case, options: dict[str, Any]) -> None:
    optimizer, scaler = case.ours(make_params(), **options), new_scaler(torch.amp.GradScaler)
    scaled_step(scaler, optimizer, 0)
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    take_step(optimizer, 1)
    assert_params_after(optimizer, case, 0, 1)


@main_cases
@EACH_WAY
def test_amp_training_end_to_end(case: Case, options: dict[str, Any]) -> None:
    """Autocast, backward, scaler; float16 grads overflow in the first step by the scale alone."""
    torch.manual_seed(0)
    with torch.device("cpu"):  # the same numbers on every device
        first = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        inputs, targets = torch.randn(16, 4), torch.randn(16, 1)
    first, inputs, targets = first.to(DEVICE), inputs.to(DEVICE), targets.to(DEVICE)
    results = []
    for build, more in ((case.ours, options), (case.theirs, {})):
        model = copy.deepcopy(first)
        optimizer = build(model.parameters(), **more)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**24)
        scales = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype=torch.float16):
                loss = torch.nn.functional.mse_loss(model(inputs).float(), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales[0] < 2.0**24
        assert scales[-1] == scales[-2]
        results.append((loss.item(), scales))
    assert results[0][1] == results[1][1]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)  # float16 forward passes
    assert results[0][0] < 5
