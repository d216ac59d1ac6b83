"""Grads: absent, late, slices of a bucket, lazily conjugated or negated; two threads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fusedopt._state import CreatedState
from support.equality import assert_equal, assert_same_math
from support.optimizers import (
    CASES,
    Build,
    Case,
    assert_params_after,
    like_torch,
    main_cases,
    train,
    varied_cases,
)
from support.snapshots import record
from support.tensors import by_id, draw, make_params, set_grads, values
from support.threads import run_in_threads

# Which of the parameters have a grad in each of six steps.
PATTERNS: dict[str, Callable[[int, int], bool]] = {
    "none": lambda step, index: False,  # noqa: ARG005
    "alternating": lambda step, index: step % 2 == index % 2,
    "late": lambda step, index: step >= index,
    "early": lambda step, index: step <= index,
    "one": lambda step, index: index == step,
    "all but one": lambda step, index: index != step,
    "every other step": lambda step, index: step % 2 == 1,  # noqa: ARG005
    "last only at the end": lambda step, index: index < 5 or step == 5,
}


@varied_cases
@pytest.mark.parametrize("has_grad", **by_id(PATTERNS))
@like_torch
def test_grads_come_and_go(build: Build, has_grad: Callable[[int, int], bool]) -> Any:
    """Peers crashed, reset everyone's momentum or shared one step count (bias correction)."""
    params = make_params()
    optimizer = build(params)
    for step in range(6):
        set_grads(params, step)
        for index, param in enumerate(params):
            if not has_grad(step, index):
                param.grad = None
        optimizer.step()
    return record(optimizer)


@varied_cases
@like_torch
def test_unfrozen_late(build: Build) -> Any:
    """requires_grad switched on in the middle: its first step is a first step."""
    layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).double()
    for param in layers.parameters():
        torch.nn.init.constant_(param, 0.3)
    layers[0].requires_grad_(False)
    optimizer = build(layers.parameters())
    for step in range(6):
        layers[0].requires_grad_(2 <= step < 4)
        optimizer.zero_grad()
        layers(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
        optimizer.step()
    for param in layers[0].parameters():
        assert optimizer.state.get(param, {}).get("step", 2.0) == 2.0
    return record(optimizer)


@varied_cases
@pytest.mark.parametrize("padding", [0, 1], ids=["packed", "off by one"])
@pytest.mark.parametrize("lazily", [False, True], ids=["fixed", "new bucket each step"])
def test_grads_in_one_bucket(case: Case, padding: int, lazily: bool) -> None:
    """DDP's gradient_as_bucket_view: every grad is a slice of one buffer, at odd offsets."""
    bucketed = case.ours(make_params())
    params = bucketed.param_groups[0]["params"]
    sizes = [param.numel() + padding for param in params]
    bucket = torch.full((padding + sum(sizes),), float("nan"), dtype=torch.float64)
    for seed in range(3):
        set_grads(params, seed)
        bucket = bucket.clone() if lazily else bucket
        for param, part in zip(params, bucket[padding:].split(sizes), strict=True):
            view = part[: param.numel()].view_as(param)
            param.grad = view.copy_(param.grad)
        before = bucket.clone()
        bucketed.step()
        assert_equal(bucket, before)
    assert_params_after(bucketed, case, 0, 1, 2)


@main_cases
@like_torch
def test_grad_is_the_param_itself(build: Build, case: Case) -> Any:
    """p.grad = p.detach(), the gradient of |p|^2 / 2, is read before it is written."""
    param = Parameter(torch.linspace(-1, 1, 21, dtype=torch.float64))
    optimizer = build([param])
    for _ in range(3):
        param.grad = param.detach() if build == case.ours else param.detach().clone()
        optimizer.step()
    return param.detach()


# Grads whose memory does not hold their values, made from the complex tensor z.
LAZY: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "conj": (torch.complex128, lambda z: z.conj()),
    "conj and transposed": (torch.complex128, lambda z: z.t().conj().resolve_conj().mH),
    "neg of real": (torch.float64, lambda z: z.conj().imag),
    "neg of complex": (torch.complex128, lambda z: torch._neg_view(z)),
    "neg and conj": (torch.complex128, lambda z: torch._neg_view(z.conj())),
}


@varied_cases
@pytest.mark.parametrize(("dtype", "view"), **by_id(LAZY))
def test_lazy_grads(case: Case, dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    """Autograd hands out such views for complex parameters and for z.imag."""
    lazy, plain = (
        case.ours([Parameter(torch.ones(4, 4, dtype=dtype)), Parameter(torch.ones(2, dtype=dtype))])
        for _ in range(2)
    )
    for seed in range(3):
        real, imag = values(2, 4, 4, dtype=torch.float64, seed=seed)
        grad = view(torch.complex(real, imag))
        assert grad.is_conj() or grad.is_neg()
        for optimizer, value in ((lazy, grad), (plain, grad.resolve_conj().resolve_neg().clone())):
            params = optimizer.param_groups[0]["params"]
            params[0].grad = value
            params[1].grad = torch.ones(2, dtype=dtype)
            optimizer.step()
        assert lazy.param_groups[0]["params"][0].grad is grad
        assert grad.is_conj() or grad.is_neg()
    assert_equal(record(lazy), record(plain))


# Parameters of that kind, from a complex tensor.
LAZY_PARAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "conj": lambda z: z.conj(),
    "neg": lambda z: z.conj().imag,
}


@main_cases
@pytest.mark.parametrize("view", **by_id(LAZY_PARAMS))
def test_lazy_param(case: Case, view: Callable[[Tensor], Tensor]) -> None:
    """Its memory holds the conjugate or negative of its values: stepped right, or refused."""
    z = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    lazy = Parameter(view(z.clone()))
    plain = Parameter(view(z).resolve_conj().resolve_neg().clone())
    assert lazy.is_conj() or lazy.is_neg()
    for param in (lazy, plain):
        param.grad = z.flip(0) if plain.is_complex() else z.real
    case.ours([plain]).step()
    try:
        case.ours([lazy]).step()
    except (TypeError, ValueError) as error:
        assert "group 0, index 0" in str(error)  # noqa: PT017
    else:
        assert_same_math(lazy.detach().resolve_conj().resolve_neg(), plain.detach())


@main_cases
@pytest.mark.parametrize("num_threads", [1, 2])
def test_two_optimizers_in_two_threads(case: Case, num_threads: int) -> None:
    alone, *together = (case.ours(draw([100_000] * 3)) for _ in range(3))
    for optimizer in (alone, *together):
        set_grads(optimizer, 0)

    def work(index: int) -> None:
        torch.set_num_threads(num_threads)
        for _ in range(20):
            together[index].step()

    for _ in range(20):
        alone.step()
    assert run_in_threads(work) == []
    for optimizer in together:
        assert_equal(record(optimizer), record(alone))


def test_one_optimizer_in_two_threads() -> None:
    """Either every step that returned has happened, wholly and once, or it raised RuntimeError."""
    param = Parameter(torch.zeros(1 << 20, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    optimizer = CASES["sgd"].ours([param], lr=1.0)
    done = [0, 0]

    def work(index: int) -> None:
        for _ in range(50):
            optimizer.step()
            done[index] += 1

    errors = run_in_threads(work)
    assert all(type(error) is RuntimeError for error in errors), errors
    assert all("another thread" in str(error) for error in errors)
    assert_equal(param.detach(), torch.full_like(param, -float(sum(done))))
    optimizer.step()  # it is not left locked
    assert_equal(param.detach(), torch.full_like(param, -float(sum(done)) - 1))


def test_step_from_inside_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reached through the creation of state: a subclass that steps there must not corrupt it."""
    optimizer = CASES["adamw"].ours(make_params())
    set_grads(optimizer, 0)

    def nested(self: CreatedState, *args: Any) -> None:
        fill(self, *args)
        optimizer.step()

    fill = CreatedState.fill

    with monkeypatch.context() as patch:
        patch.setattr(CreatedState, "fill", nested)
        with pytest.raises(RuntimeError, match="already running"):
            optimizer.step()
    train(optimizer)
    assert_params_after(optimizer, CASES["adamw"], 0, 1, 2)
