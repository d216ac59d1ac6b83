"""An eps above 0 keeps the denominator from 0, whether the caller flushes subnormals or not.

With the bias correction folded in, eps sqrt(1 - beta2^t) may be subnormal although eps is not.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from support.optimizers import each_adam
from support.tensors import BFLOAT16, FLOAT32, FLOAT64, by_id, some_dtypes, values

EPS: dict[str, float] = {
    "float32's smallest normal": 2.0**-126,
    "float32's smallest": 2.0**-149,
    "below float32's": 1e-60,
    "float64's smallest normal": 2.0**-1022,
    "float64's smallest": 5e-324,
    "small": 1e-30,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {},
    "amsgrad": {"amsgrad": True},
    "low betas": {"betas": (0.3, 0.5)},
    "bfloat16 states": {"state_dtype": BFLOAT16},
    "float32 states": {"state_dtype": FLOAT32},
}
each_dtype = some_dtypes(FLOAT32, BFLOAT16, FLOAT64)
each_mode = pytest.mark.parametrize("flushes", [False, True], ids=["subnormals kept", "flushed"])


def train(
    name: str, params: list[Tensor], grads: list[list[Tensor]], flushes: bool, **options: Any
) -> None:
    """A step for each list of grads."""
    optimizer = getattr(fusedopt, name)(params, lr=0.125, weight_decay=0, **options)
    if flushes and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad
        optimizer.step()
    torch.set_flush_denormal(False)


@each_dtype
@each_mode
@each_adam
@pytest.mark.parametrize("options", **by_id(OPTIONS))
def test_zero_grads_change_nothing(
    name: str, options: dict[str, Any], dtype: torch.dtype, flushes: bool
) -> None:
    for eps, maximize in itertools.product(EPS.values(), (False, True)):
        params = [values(size, dtype=dtype) for size in (1, 37, 300)]
        before = [param.clone() for param in params]
        grads = [[torch.zeros_like(param) * sign for param in params] for sign in (1, -1)] * 3
        train(name, params, grads, flushes, eps=eps, maximize=maximize, **options)
        assert all(map(torch.equal, params, before)), (eps, maximize)


@each_dtype
@each_mode
@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam"])
@pytest.mark.parametrize(
    "options", **by_id({"its states": {}, "bfloat16": {"state_dtype": BFLOAT16}})
)
def test_of_others(name: str, options: dict[str, Any], dtype: torch.dtype, flushes: bool) -> None:
    """Six steps: the last of RAdam's divides by the second moment."""
    for eps in EPS.values():
        param = values(300, dtype=dtype)
        before = param.clone()
        grads = [[torch.zeros_like(param)], [-torch.zeros_like(param)]] * 3
        train(name, [param], grads, flushes, eps=eps, **options)
        assert torch.equal(param, before), eps


@each_dtype
@each_mode
@pytest.mark.parametrize("eps", **by_id(EPS))
def test_zeros_beside_ordinary_grads(eps: float, dtype: torch.dtype, flushes: bool) -> None:
    """The others move as unfused torch has it in float64, to the dtype's accuracy."""
    start = values(300, dtype=dtype)
    grads = [values(300, dtype=dtype, seed=seed) for seed in (1, 2, 3)]
    for grad in grads:
        grad[::3] = 0
    ours = start.clone()
    train("Adam", [ours], [[grad] for grad in grads], flushes, eps=eps)
    theirs = start.to("cpu", FLOAT64)
    optimizer = torch.optim.Adam([theirs], lr=0.125, eps=eps, foreach=False)
    for grad in grads:
        theirs.grad = grad.to("cpu", FLOAT64)
        optimizer.step()
    assert torch.equal(ours[::3], start[::3])
    tolerance = {FLOAT64: 1e-13, FLOAT32: 1e-5, BFLOAT16: 0.05}[dtype]
    torch.testing.assert_close(ours.to("cpu", FLOAT64), theirs, rtol=tolerance, atol=tolerance)
