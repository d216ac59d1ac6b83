"""step(grad_norm=): who knows the norm of the grads hands it over, and they are not read first."""

import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from support.device import DEVICE, on_host
from support.equality import assert_close, assert_equal
from support.optimizers import Case, main_cases
from support.scalers import new_scaler
from support.snapshots import record, refused
from support.tensors import make_params, params_of, set_grads

LIMIT = 0.01


def stepped(case: Case, norm_of: Any, **options: Any) -> Any:
    """Two steps, for which ``norm_of`` is given the optimizer."""
    optimizer = case.ours(make_params(), max_grad_norm=LIMIT, **options)
    for seed in range(2):
        set_grads(optimizer, seed)
        norm = norm_of(optimizer)
        optimizer.step(grad_norm=norm)
        if norm is not None:
            assert optimizer.nonfinite_grads is None
            assert float(optimizer.grad_norm) == float(norm)
            assert not optimizer.skipped
    return optimizer


def measured(optimizer: Any) -> torch.Tensor:
    """As a step finds it, in a copy."""
    copies = [Parameter(param.detach().clone()) for param in params_of(optimizer)]
    other = fusedopt.SGD(copies, lr=0.0, max_grad_norm=math.inf)
    for param, own in zip(copies, params_of(optimizer), strict=True):
        param.grad = own.grad
    other.step()
    norm = other.grad_norm
    assert norm is not None
    return norm


FORMS = {
    "tensor": measured,
    "number": lambda optimizer: float(measured(optimizer)),
    "on the CPU": lambda optimizer: on_host(float(measured(optimizer)), dtype=torch.float64),
    "one dim": lambda optimizer: measured(optimizer).reshape(1),
}


@pytest.mark.parametrize("form", FORMS)
@main_cases
def test_as_if_measured(case: Case, form: str) -> None:
    expected = stepped(case, lambda _: None)
    assert_equal(record(stepped(case, FORMS[form])), record(expected))


@main_cases
def test_the_given_norm_counts(case: Case) -> None:
    """Not that of the grads, which may be a part of a model's."""
    optimizer = stepped(case, lambda _: 2.0)
    plain = case.ours(make_params())
    for seed in range(2):
        set_grads(plain, seed)
        for param in params_of(plain):
            param.grad *= LIMIT / (2.0 + 1e-6)
        plain.step()
    assert_close(params_of(optimizer), params_of(plain), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@main_cases
def test_not_finite(case: Case, bad: float) -> None:
    optimizer = stepped(case, lambda _: None)
    before = record(optimizer)
    set_grads(optimizer, 5)
    optimizer.step(grad_norm=torch.tensor(bad))
    assert optimizer.skipped
    assert_equal(record(optimizer), before)
    for group in optimizer.param_groups:
        group["error_if_nonfinite"] = True
    with refused(optimizer, RuntimeError, f"norm of the grads is {bad}, so nothing was changed"):
        optimizer.step(grad_norm=bad)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "negative": (-1.0, ValueError, "must not be negative"),
    "text": ("1.0", TypeError, "a real number or a tensor"),
    "bool": (True, TypeError, "a real number or a tensor"),
    "complex number": (1j, TypeError, "a real number or a tensor"),
    "two numbers": (torch.ones(2), ValueError, "one real number"),
    "complex": (torch.tensor(1j), ValueError, "one real number"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_norms(wrong: str) -> None:
    norm, error, match = WRONG[wrong]
    optimizer = fusedopt.AdamW(make_params(), max_grad_norm=1.0)
    set_grads(optimizer, 0)
    with refused(optimizer, error, match):
        optimizer.step(grad_norm=norm)


def test_negative_tensors() -> None:
    """On a GPU nobody waits to see: it counts as NaN there."""
    optimizer = fusedopt.AdamW(make_params(), max_grad_norm=1.0)
    set_grads(optimizer, 0)
    before = [param.detach().clone() for param in params_of(optimizer)]
    if DEVICE == "cpu":
        with refused(optimizer, ValueError, "must not be negative"):
            optimizer.step(grad_norm=torch.tensor(-0.5))
    else:
        optimizer.step(grad_norm=torch.tensor(-0.5))
        assert optimizer.skipped
    assert_equal(params_of(optimizer), before)


def test_no_group_clips() -> None:
    optimizer = fusedopt.AdamW(make_params())
    set_grads(optimizer, 0)
    with refused(optimizer, ValueError, "no param group has a max_grad_norm"):
        optimizer.step(grad_norm=1.0)


@pytest.mark.parametrize("has_hook", [False, True])
@main_cases
def test_scaled_grads(case: Case, has_hook: bool) -> None:
    """Both, grads and their norm, still have the scale of a fusedopt.GradScaler. For a hook, which
    may read grads, it unscales them first.
    """
    expected = stepped(case, lambda _: None)
    optimizer, scaler = case.ours(make_params(), max_grad_norm=LIMIT), new_scaler()
    if has_hook:
        optimizer.register_step_pre_hook(lambda *_: None)
    for seed in range(2):
        set_grads(optimizer, seed)
        scaler.scale(torch.zeros((), device=DEVICE))  # from now on it has a scale
        for param in params_of(optimizer):
            param.grad *= scaler.get_scale()
        scaler.step(optimizer, grad_norm=measured(optimizer))
        scaler.update()
    assert_close(params_of(optimizer), params_of(expected), rtol=1e-12, atol=1e-13)
    before, scale = record(optimizer), scaler.get_scale()
    set_grads(optimizer, 5)
    scaler.step(optimizer, grad_norm=math.inf)
    scaler.update()
    assert_equal(record(optimizer), before)
    assert has_hook or scaler.get_scale() < scale


def test_of_dtensors(mesh: Any) -> None:
    """torch's norm of DTensors is one itself, which is not summed up yet."""
    from torch.distributed.tensor import Shard, distribute_tensor

    weight, grad = torch.arange(12.0).view(4, 3), torch.full((4, 3), 5.0)
    param = Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    param.grad = distribute_tensor(grad, mesh, [Shard(0)])
    optimizer = fusedopt.AdamW([param], max_grad_norm=1.0)
    optimizer.step(grad_norm=torch.nn.utils.get_total_norm([param.grad]))
    assert float(optimizer.grad_norm) == pytest.approx(float(grad.norm()), rel=1e-6)
