"""torch.amp.GradScaler: step() of an optimizer made with fused=True unscales and skips by itself.

It says so with `_step_supports_amp_scaling`; for all others, as in torch, the scaler does both.
"""

import copy
from typing import Any

import pytest
import torch

from support.device import DEVICE, STEPS_ON_DEVICE
from support.optimizers import Case, main_cases, take_step, train, varied_cases
from support.snapshots import photograph, snapshot
from support.tensors import assert_equal, assert_same_math, by_id, make_params, params_of, set_grads

WAYS: dict[str, dict[str, Any]] = {"in the step": {"fused": True}, "before it": {}}
EACH_WAY = pytest.mark.parametrize("options", **by_id(WAYS))
OVERFLOWS = pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])


def new_scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=2, **options)


def scaled_step(
    scaler: torch.amp.GradScaler,
    optimizer: Any,
    seed: int,
    overflow: float | None = None,
    clip: float | None = None,
) -> None:
    """One training step under the scaler; `overflow` stands in one element of one grad."""
    params = optimizer.param_groups[0]["params"]
    loss = scaler.scale(torch.zeros((), dtype=torch.float64))
    assert loss == 0
    set_grads(params, seed)
    for param in params:
        param.grad *= scaler.get_scale()
    if overflow is not None:
        params[1].grad[2, 3] = overflow
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, clip)
    scaler.step(optimizer)
    scaler.update()


@varied_cases
@EACH_WAY
@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "unscaled and clipped by the user"])
def test_scaled_training(case: Case, options: dict[str, Any], clip: float | None) -> None:
    """With an overflow in the middle, which shrinks the scale; torch's twin is unfused."""
    results = []
    for build, more in ((case.ours, options), (case.theirs, {})):
        optimizer, scaler = build(make_params(), **more), new_scaler()
        for seed in range(6):
            scaled_step(scaler, optimizer, seed, float("inf") if seed == 3 else None, clip)
        results.append((params_of(optimizer), scaler.get_scale(), scaler.state_dict()))
    assert_same_math(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


@varied_cases
@EACH_WAY
@OVERFLOWS
@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
def test_overflow_on_the_first_step(
    case: Case, options: dict[str, Any], value: float, clip: float | None
) -> None:
    """A peer left its momentum uninitialised when the first step was skipped."""
    optimizer, scaler = case.ours(make_params(), **options), new_scaler()
    params = optimizer.param_groups[0]["params"]
    before = [photograph(param, values_only=STEPS_ON_DEVICE) for param in params]
    scaled_step(scaler, optimizer, 0, overflow=value, clip=clip)
    assert [photograph(param, values_only=STEPS_ON_DEVICE) for param in params] == before
    entries = [entry for state in optimizer.state.values() for entry in state.values()]
    assert not any(entry.any() for entry in entries) if STEPS_ON_DEVICE else not optimizer.state
    for seed in range(1, 4):
        scaled_step(scaler, optimizer, seed)
    plain = case.ours(make_params())
    train(plain, first=1)
    assert_equal(params_of(optimizer), params_of(plain))  # powers of two: unscaling is exact


@varied_cases
@EACH_WAY
@OVERFLOWS
def test_overflow_on_a_later_step(case: Case, options: dict[str, Any], value: float) -> None:
    optimizer, scaler = case.ours(make_params(), **options), new_scaler()
    for seed in range(2):
        scaled_step(scaler, optimizer, seed)
    before = without_grads(optimizer)
    scaled_step(scaler, optimizer, 2, overflow=value)
    assert without_grads(optimizer) == before
    scaled_step(scaler, optimizer, 3)
    plain = case.ours(make_params())
    train(plain, steps=2)
    take_step(plain, 3)
    assert_equal(params_of(optimizer), params_of(plain))


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
    optimizer, scaler = case.ours(make_params(), **options), new_scaler()
    scaled_step(scaler, optimizer, 0)
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    take_step(optimizer, 1)
    plain = case.ours(make_params())
    train(plain, steps=2)
    assert_equal(params_of(optimizer), params_of(plain))


@main_cases
@EACH_WAY
def test_disabled_scaler(case: Case, options: dict[str, Any]) -> None:
    optimizer, plain = case.ours(make_params(), **options), case.ours(make_params())
    scaler = new_scaler(enabled=False)
    for seed in range(3):
        set_grads(optimizer, seed)
        scaler.step(optimizer)
        scaler.update()
    train(plain)
    assert_equal(params_of(optimizer), params_of(plain))


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
