"""Infinities, NaN and overflow: finite where unfused torch is finite, inf and NaN where it is."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from support.optimizers import Case, each_case, some_cases, step_with
from support.snapshots import results
from support.tensors import some_dtypes, values

SPECIAL = (0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.nan)
REAL_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def kinds(tensor: Tensor) -> list[str]:
    """finite, inf, -inf or nan for each element."""
    wide = tensor.detach().to("cpu", torch.float64)
    return ["finite" if math.isfinite(x) else str(x) for x in wide.tolist()]


# Complex tensors are left out: torch multiplies them by complex scalars, so that inf becomes NaN.
@some_dtypes(*REAL_DTYPES)
@each_case
def test_inf_and_nan_as_in_torch(case: Case, dtype: torch.dtype) -> None:
    """After each of three steps."""
    case = case.suited_to(dtype)
    names = case.state_names | {"param"}  # without beta1, exp_avg is the grad, and not kept here
    rows = list(product(SPECIAL, SPECIAL, SPECIAL))
    start, first, second = torch.tensor(rows, dtype=torch.float64).to(dtype).unbind(-1)
    ours, theirs = start.clone(), start.to("cpu", copy=True)
    fused, unfused = case.ours([ours]), case.theirs([theirs])
    for step, grad in enumerate([first, second, torch.ones_like(start)], 1):
        step_with(fused, [grad])
        step_with(unfused, [grad.cpu()])
        found = results(fused, ours)
        for name, expected in results(unfused, theirs).items():
            if name not in names:
                continue
            different = [
                (row, a, b)
                for row, a, b in zip(rows, kinds(found[name]), kinds(expected), strict=True)
                if a != b
            ]
            assert not different, (name, step)


@some_dtypes(*REAL_DTYPES)
@some_cases(
    *("adamw", "adamw-strong-decay", "adamw-amsgrad", "adam-decoupled"),
    *("nadam-decoupled", "radam-decoupled", "asgd", "lion-decay"),
)
def test_decay_keeps_an_infinite_param_infinite(case: Case, dtype: torch.dtype) -> None:
    # keep * p with 1 - keep on the side would be -inf + inf.
    case = case.suited_to(dtype)
    param = torch.tensor([-torch.inf, torch.inf, 1.0], dtype=dtype)
    step_with(case.ours([param]), [torch.zeros(3, dtype=dtype)] * 5)
    assert kinds(param) == ["-inf", "inf", "finite"]


@some_dtypes(torch.float32, torch.bfloat16)
@some_cases("adam", "adam-amsgrad", "adamw")
def test_an_overflowed_second_moment_stops_the_param(case: Case, dtype: torch.dtype) -> None:
    # v = inf makes the step m / inf = 0; v + (1 - b2) (g^2 - v) would turn it into NaN.
    param = values(40, dtype=dtype)
    optimizer = case.ours([param])
    step_with(optimizer, [torch.full_like(param, 1e30)])
    assert optimizer.state[param]["exp_avg_sq"].isinf().all()
    after_one = param.clone()
    step_with(optimizer, [torch.full_like(param, grad) for grad in (1.0, 1e30, -1e30, 0.0)])
    assert optimizer.state[param]["exp_avg_sq"].isinf().all()
    assert param.isfinite().all()
    if case.optimizer == "Adam":
        assert torch.equal(param, after_one)


@some_dtypes(*REAL_DTYPES)
@some_cases(
    *("sgd", "momentum", "nesterov", "adam", "adam-amsgrad"),
    *("rmsprop", "adagrad", "adadelta", "adamax", "nadam", "radam", "rprop", "lion"),
)
def test_no_decay_reads_no_param(case: Case, dtype: torch.dtype) -> None:
    # 0 * inf is NaN: a term that torch skips must not be computed with a factor of 0.
    param = torch.full((40,), torch.inf, dtype=dtype)
    optimizer = case.ours([param])
    step_with(optimizer, [values(40, dtype=dtype, seed=seed) for seed in (1, 2)])
    for name, value in results(optimizer, param).items():
        assert value.isinf().all() if name == "param" else value.isfinite().all(), name


@some_dtypes(torch.bfloat16, torch.float16)
@pytest.mark.parametrize("pattern", [0x7FFFFFFF, -1, 0x7F800001], ids=["ones", "negative", "low"])
def test_nan_stays_nan_in_16_bits(dtype: torch.dtype, pattern: int) -> None:
    # A float32 NaN whose bits are rounded like a number's carries into the sign: -0.0, or it loses
    # its only bit: inf. It gets into a 16-bit param through a float32 state.
    param = torch.ones(40, dtype=dtype)
    optimizer = Case("SGD", {"lr": 0.1, "momentum": 0.9}).ours([param])
    step_with(optimizer, [param.clone()])
    nan = torch.full((40,), pattern, dtype=torch.int32).view(torch.float32)
    optimizer.state[param]["momentum_buffer"] = nan
    step_with(optimizer, [torch.ones_like(param)])
    assert param.isnan().all()


@pytest.mark.parametrize("place", ["param", "grad", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("pattern", [0x7FFF, -1, 0x7F81], ids=["ones", "negative", "low"])
def test_nan_of_bfloat16_stays_nan_where_all_is_bfloat16(pattern: int, place: str) -> None:
    # Such steps round without a look for NaNs: what lies below their 16 bits must be 0.
    nan = torch.full((70,), pattern, dtype=torch.int16).view(torch.bfloat16)
    param, grad = (torch.ones(70, dtype=torch.bfloat16) for _ in range(2))
    optimizer = Case("AdamW", {"lr": 0.1, "stochastic_rounding": False}).ours([param])
    step_with(optimizer, [grad])
    tensors = {"param": param, "grad": grad, **optimizer.state[param]}
    tensors[place].copy_(nan)
    step_with(optimizer, [grad])
    assert param.isnan().all()
    if place in ("grad", "exp_avg_sq"):
        assert optimizer.state[param]["exp_avg_sq"].isnan().all()
