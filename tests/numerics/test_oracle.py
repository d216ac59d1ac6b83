"""Accuracy: against float64 oracles, with unfused torch as the measure of what is honest."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import oracles
from support.optimizers import Case, each_case, some_cases, step_with
from support.oracles import TOLERANCES, assert_rounded_once
from support.snapshots import results
from support.tensors import dtype_id, each_dtype, some_dtypes, values

STEPS = 12


def errors(optimizer: torch.optim.Optimizer, param: Tensor, oracle: oracles.Oracle) -> dict:
    """Absolute errors of the param and each state, under their names."""
    found, expected = results(optimizer, param), oracle.results()
    keys = found.keys()
    if optimizer.param_groups[0].get("betas", (1,))[0] == 0:
        keys = keys - (
            {"exp_avg"} - expected.keys()
        )  # torch's Adam keeps it, although it is the grad
    assert keys == expected.keys()
    return {name: np.abs(oracles.exact(found[name]) - expected[name]) for name in expected}


def run_three(
    case: Case, start: Tensor, grads: list[Tensor], **more: Any
) -> tuple[dict, dict, oracles.Oracle]:
    """Errors of fusedopt and of unfused torch (on the CPU) after the same steps, and the oracle."""
    ours, theirs, oracle = start.clone(), start.to("cpu", copy=True), case.oracle(start)
    fused, unfused = case.ours([ours], **more), case.theirs([theirs])
    step_with(fused, grads)
    step_with(unfused, [grad.cpu() for grad in grads])
    for grad in grads:
        oracle.step(grad)
    return errors(fused, ours, oracle), errors(unfused, theirs, oracle), oracle


@pytest.mark.unemulated  # it has the bits of the CPU driver: test_sizes of tests/cuda
@each_dtype
@each_case
def test_error_is_at_most_that_of_unfused_torch(case: Case, dtype: torch.dtype) -> None:
    case = case.suited_to(dtype)
    start = values(3, 67, dtype=dtype, seed=1)
    grads = [values(3, 67, dtype=dtype, seed=2 + step) for step in range(STEPS)]
    ours, theirs, oracle = run_three(case, start, grads)
    tolerance = TOLERANCES[dtype]
    for name, expected in oracle.results().items():
        floor = tolerance.floor * np.abs(expected).max()
        assert ours[name].max() <= tolerance.factor * theirs[name].max() + floor, name


@pytest.mark.unemulated
@pytest.mark.unsanitized  # no other accesses than in fewer steps
@some_dtypes(torch.float32, torch.bfloat16, torch.float16)
@some_cases(
    *("sgd-l2", "momentum", "momentum-damped", "nesterov-l2"),
    *("adam", "adam-l2", "adam-decoupled", "adam-amsgrad", "adam-low-betas"),
    *("adamw", "adamw-strong-decay", "adamw-amsgrad"),
    *("rmsprop", "rmsprop-all", "adagrad-l2", "adadelta", "adamax", "nadam", "radam"),
    *("asgd-averaged", "rprop", "lion-decay"),
)
def test_mean_error_over_1000_steps(case: Case, dtype: torch.dtype) -> None:
    # The form decides: b1 m + (1 - b1) g in float32 is 9 % worse than m + (1 - b1) (g - m).
    size = 4096
    torch.set_num_threads(1)  # two take longer for torch's square roots
    case = case.suited_to(dtype)
    drift = 0.1 * values(size, seed=1)
    grads = [(values(size, seed=2 + step) + drift).to(dtype) for step in range(1000)]
    # At a beta2 of 0.7 nothing stands still, and single second moments are nearer to the nearest.
    more = {"stochastic_rounding": False} if case.options.get("betas") == (0.3, 0.7) else {}
    ours, theirs, _ = run_three(case, values(size, dtype=dtype), grads, **more)
    for name in ours:
        assert ours[name].mean() <= 1.05 * theirs[name].mean(), name


@some_cases("adam", "adam-l2", "adamw", "rmsprop", "adagrad-l2", "adadelta", "nadam", "radam")
def test_float16_stays_finite_with_the_default_eps(case: Case) -> None:
    # Computed in float16, as unfused torch does, eps and small second moments are 0: NaN.
    param = values(4096, dtype=torch.float16)
    grads = [1e-3 * values(4096, dtype=torch.float16, seed=1 + step) for step in range(20)]
    step_with(case.ours([param]), grads)
    assert param.isfinite().all()


@each_case
@pytest.mark.parametrize("frozen_steps", [0, 3], ids=["from-the-start", "unfrozen-later"])
def test_each_param_counts_its_own_steps(case: Case, frozen_steps: int) -> None:
    # One step count shared by all was wrong in DeepSpeed (#8471) and TransformerEngine (#1986).
    early, late = values(9, dtype=torch.float64), values(9, dtype=torch.float64, seed=1)
    optimizer, oracle = case.ours([early, late]), case.oracle(late)
    for step in range(6):
        early.grad = values(9, dtype=torch.float64, seed=2 + step)
        late.grad = early.grad if step >= frozen_steps else None
        optimizer.step()
        if late.grad is not None:
            oracle.step(late.grad)
    np.testing.assert_allclose(oracles.exact(late), oracle.param, rtol=1e-13)


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.complex64, torch.complex128),
]


def warm_states(case: Case, param: Tensor, dtype: torch.dtype) -> torch.optim.Optimizer:
    """An optimizer after three steps, with its states loaded in another dtype."""
    trained = case.ours([param], stochastic_rounding=False)
    step_with(trained, [values(*param.shape, dtype=param.dtype, seed=s) for s in (1, 2, 3)])
    saved = trained.state_dict()
    for state in saved["state"].values():
        state.update({k: v.to(dtype) for k, v in state.items() if k != "step"})
    optimizer = case.ours([param], stochastic_rounding=False)
    optimizer.load_state_dict(saved)
    return optimizer


def warm_oracle(case: Case, optimizer: torch.optim.Optimizer, param: Tensor) -> oracles.Oracle:
    """The oracle in the very state that the optimizer is in."""
    oracle = case.oracle(param)
    for name, value in results(optimizer, param).items():
        setattr(oracle, name, oracles.exact(value))
    oracle.steps = 3
    return oracle


@pytest.mark.parametrize(
    ("param_dtype", "state_dtype"), MIXED, ids=lambda dtype: dtype_id(dtype).replace("float", "f")
)
@some_cases(
    *("momentum-l2", "nesterov", "adam-l2", "adam-amsgrad", "adamw", "adam-low-betas"),
    *("rmsprop-all", "adagrad-initial", "adadelta", "adamax", "nadam-l2", "radam-l2"),
    *("asgd-averaged", "rprop", "lion-decay"),
)
def test_mixed_dtypes(case: Case, param_dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    # One step from the same state: nothing but the rounding to each operand's own dtype is left.
    case = case.suited_to(torch.float16)
    param = values(5, 61, dtype=param_dtype)
    optimizer = warm_states(case, param, state_dtype)
    oracle = warm_oracle(case, optimizer, param)
    grad = values(5, 61, dtype=param_dtype, seed=9)
    step_with(optimizer, [grad])
    oracle.step(grad)
    for name, value in results(optimizer, param).items():
        assert value.dtype == (param_dtype if name == "param" else state_dtype)
        assert_rounded_once(value, oracle.results()[name])


@some_dtypes(torch.bfloat16, torch.float16, torch.float64)
@some_cases("sgd", "nesterov-l2", "adam-amsgrad", "adamw", "rmsprop-all", "asgd", "rprop", "lion")
def test_grad_of_another_dtype(case: Case, dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(values(5, 61, dtype=dtype))
    param.grad_dtype = torch.float32
    optimizer, oracle = case.ours([param], stochastic_rounding=False), case.oracle(param)
    grad = values(5, 61, dtype=torch.float32, seed=1)
    step_with(optimizer, [grad])
    oracle.step(grad)
    for name, value in results(optimizer, param).items():
        assert_rounded_once(value, oracle.results()[name])
