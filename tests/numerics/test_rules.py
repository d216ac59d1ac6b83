"""Where single rules have an edge: signs of nothing, variances of nothing, sums without end."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedopt
from support import oracles
from support.equality import assert_equal
from support.optimizers import Case, step_with
from support.snapshots import results
from support.tensors import BFLOAT16, FLOAT32, FLOAT64, by_id, some_dtypes, values

INF, NAN = torch.inf, torch.nan


def run_both(case: Case, start: Tensor, grads: list[Tensor]) -> tuple[Any, Any]:
    """What ours and torch's hold in the end."""
    ours, theirs = start.clone(), start.cpu().clone()
    fused, unfused = case.ours([ours]), case.theirs([theirs])
    step_with(fused, grads)
    step_with(unfused, [grad.cpu() for grad in grads])
    on_host = {name: value.cpu() for name, value in results(fused, ours).items()}
    return on_host, results(unfused, theirs)


def assert_near_oracle(case: Case, steps: int, size: int = 9) -> None:
    """Of float64, after so many random grads."""
    param = values(size, dtype=FLOAT64)
    optimizer, oracle = case.ours([param]), case.oracle(param)
    for seed in range(steps):
        grad = values(size, dtype=FLOAT64, seed=1 + seed % 50)
        step_with(optimizer, [grad])
        oracle.step(grad)
    for name, expected in oracle.results().items():
        found = oracles.exact(results(optimizer, param)[name])
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14, err_msg=name)


# 1e-30 squared is 0 in float32, with and without subnormal numbers.
GRADS = (0.0, -0.0, 1.0, -2.0, 1e-30, -1e-30, INF, -INF, NAN)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@some_dtypes(FLOAT32, FLOAT64)
def test_rprop_of_any_grads_is_torchs(dtype: torch.dtype, steps: int) -> None:
    rows = torch.tensor(list(product(GRADS, GRADS, GRADS)), dtype=dtype)
    grads = [grad.contiguous() for grad in rows.unbind(-1)] + [torch.ones(len(rows), dtype=dtype)]
    case = Case("Rprop", {"lr": 0.1, "etas": (0.25, 1.5), "step_sizes": (0.01, 0.2)})
    assert_equal(*run_both(case, values(len(rows), dtype=dtype), grads[:steps]))


def test_rprop_flushes_what_is_subnormal() -> None:
    """As all that is computed in float32: a product below its normal numbers has no sign."""
    param = torch.zeros(3)
    optimizer = fusedopt.Rprop([param], lr=0.5)
    small = torch.tensor([1e-20, -1e-20, 1e-18])
    step_with(optimizer, [small, small])
    sizes = optimizer.state[param]["step_size"].tolist()
    assert sizes == pytest.approx([0.5, 0.5, 0.6])
    assert param.tolist() == pytest.approx([-1.0, 1.0, -1.1])


@some_dtypes(FLOAT32, BFLOAT16, FLOAT64)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_lion_rests_where_grads_are_zero(dtype: torch.dtype, zero: float) -> None:
    param = values(300, dtype=dtype)
    before, optimizer = param.clone(), fusedopt.Lion([param], lr=0.5)
    step_with(optimizer, [torch.full_like(param, zero)] * 3)
    assert torch.equal(param, before)
    assert not optimizer.state[param]["exp_avg"].any()


@some_dtypes(FLOAT32, BFLOAT16, FLOAT64)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("momentum", [0, 0.5])
def test_a_constant_grad_has_no_negative_variance(
    dtype: torch.dtype, alpha: float, momentum: float
) -> None:
    """Its variance is rounding alone in the end, of either sign: torch's root of it is NaN."""
    param = torch.zeros(300, dtype=dtype)
    options = {"alpha": alpha, "centered": True, "momentum": momentum}
    optimizer = fusedopt.RMSprop([param], lr=1e-10, **options)  # type: ignore[arg-type]
    grad = values(300, dtype=dtype, seed=1).sign() * torch.linspace(0.01, 3, 300).to(dtype)
    for _ in range(4000 if alpha == 0.99 else 400):
        param.grad = grad
        optimizer.step()
    assert all(value.isfinite().all() for value in results(optimizer, param).values())
    assert (param.sign() == -grad.sign()).all()


@some_dtypes(FLOAT32, BFLOAT16)
def test_adagrad_rests_once_its_sum_is_infinite(dtype: torch.dtype) -> None:
    param = values(40, dtype=dtype)
    optimizer = fusedopt.Adagrad([param], lr=0.5)
    before = param.clone()
    for grad in (1e25, 1.0, -1e25, 0.0):
        step_with(optimizer, [torch.full_like(param, grad)])
        assert optimizer.state[param]["sum"].isinf().all()
    assert torch.equal(param, before)


def test_adagrad_of_sums_up_to_the_largest_number() -> None:
    case = Case("Adagrad", {"lr": 0.5})
    grads = [torch.tensor([1e19, 1e18, 1.8e19, -1e19])] * 3  # 1.8e19 squared is 3.24e38
    ours, theirs = run_both(case, torch.ones(4), grads)
    assert ours["sum"].isinf().tolist() == [False, False, True, False]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("t0", [0, 1, 4, -7])
def test_asgd_averages_from_t0_on(t0: int) -> None:
    """The mean of the params behind the steps t0 + 2, t0 + 3, ...; until then, the param."""
    param = values(9, dtype=FLOAT64)
    optimizer = fusedopt.ASGD([param], lr=0.1, lambd=0.5, t0=t0)
    averaged: list[Tensor] = []
    for step in range(1, 12):
        step_with(optimizer, [values(9, dtype=FLOAT64, seed=step)])
        averaged = [*averaged, param.clone()] if step >= max(t0, 0) + 2 else [param.clone()]
        if step == max(t0, 0) + 2:
            averaged = averaged[-1:]
        if t0 >= 0:
            mean = torch.stack(averaged).mean(0)
            torch.testing.assert_close(optimizer.state[param]["ax"], mean, rtol=1e-13, atol=1e-15)


LONG: dict[str, dict[str, Any]] = {
    "default": {},
    "fast momentum": {"momentum_decay": 10.0},
    "no momentum schedule": {"momentum_decay": 0.0},
    "high beta1": {"betas": (0.9999, 0.999)},
    "no beta1": {"betas": (0.0, 0.9)},
}


@pytest.mark.parametrize("options", **by_id(LONG))
def test_nadam_after_thousands_of_steps(options: dict[str, Any]) -> None:
    """The product of all momenta has long become 0; with a high beta1 it is still there."""
    assert_near_oracle(Case("NAdam", {"lr": 1e-3, **options}), steps=2500)


def test_nadam_after_a_million_steps() -> None:
    """From a checkpoint, without a loop over all of them in a step or a state dict."""
    param = torch.ones(3, dtype=FLOAT64)
    optimizer = fusedopt.NAdam([param], lr=0.5)
    step_with(optimizer, [torch.ones_like(param)])
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(1e6, device="cpu")
    optimizer.load_state_dict(saved)
    state = optimizer.state_dict()["state"][0]
    assert state["mu_product"] == 0
    oracle: Any = Case("NAdam", {"lr": 0.5}).oracle(param)
    oracle.exp_avg, oracle.exp_avg_sq = (
        oracles.exact(state[name]) for name in ("exp_avg", "exp_avg_sq")
    )
    oracle.steps = 10**6
    step_with(optimizer, [torch.ones_like(param)])
    oracle.step(torch.ones(3, dtype=FLOAT64))
    np.testing.assert_allclose(oracles.exact(param), oracle.param, rtol=1e-13)


@pytest.mark.parametrize("name", ["Adamax", "NAdam", "RAdam", "Lion"])
def test_no_beta1(name: str) -> None:
    assert_near_oracle(Case(name, {"lr": 0.01, "betas": (0.0, 0.9)}), steps=20)


# The first step that divides by the second moment: at 2 / 3 its length comes up to 5, not above.
SWITCHES = {0.999: 6, 0.99: 6, 0.9: 6, 0.8: 7, 0.75: 8, 0.7: 10, 2 / 3: None, 0.5: None, 0.0: None}


@pytest.mark.parametrize("beta2", SWITCHES)
def test_radam_around_the_switch(beta2: float) -> None:
    """An eps of 1000 shows which steps divide; how, an ordinary one, against torch's."""
    param = torch.zeros(9, dtype=FLOAT64)
    optimizer = fusedopt.RAdam([param], lr=1.0, betas=(0.0, beta2), eps=1000.0)
    divides = []
    for _ in range(16):
        before = param.clone()
        step_with(optimizer, [torch.ones_like(param)])
        divides.append((before - param).max().item() < 0.5)
    first = SWITCHES[beta2]
    assert divides == [first is not None and step >= first for step in range(1, 17)]
    case = Case("RAdam", {"lr": 0.1, "betas": (0.9, beta2)})
    grads = [values(9, dtype=FLOAT64, seed=seed) for seed in range(16)]
    ours, theirs = run_both(case, values(9, dtype=FLOAT64), grads)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
