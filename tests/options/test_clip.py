"""max_grad_norm: what clip_grad_norm_ before the step does, without writing to the grads."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedopt
from support import oracles
from support.device import DEVICE
from support.equality import bits, same_bits, tensor_bytes
from support.layouts import GRADS, Layout, each_grad, each_layout
from support.optimizers import Case, most_cases, some_cases, take_step
from support.oracles import TOLERANCES
from support.pairs import in_pairs
from support.sides import SIZES, Results, Side, on_both_drivers, warmed_up, without_waiting
from support.snapshots import record, results
from support.tensors import by_id, draw, misaligned, params_of, set_grads, some_dtypes, values

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
each_dtype = some_dtypes(*DTYPES)
some_optimizers = some_cases("sgd-l2", "nesterov", "adam-l2", "adamw-amsgrad", "rmsprop-all")


def wide(grad: Tensor) -> Tensor:
    return grad.detach().cpu().to(torch.complex128 if grad.is_complex() else torch.float64)


def norm_of(grads: list[Tensor]) -> float:
    """By numpy, in float64."""
    return float(np.linalg.norm(np.concatenate([oracles.exact(g).ravel() for g in grads] or [[]])))


def new_grads(params: list[Tensor], seed: int) -> list[Tensor]:
    return [values(*p.shape, dtype=p.dtype, seed=100 * seed + i) for i, p in enumerate(params)]


def step_on(optimizer: Any, grads: list[Tensor]) -> float:
    for param, grad in zip(params_of(optimizer), grads, strict=True):
        param.grad = grad
    optimizer.step()
    norm = optimizer.grad_norm
    assert (norm.dtype, norm.shape, norm.device.type) == (torch.float64, (), DEVICE)
    return float(norm)


def clip_with_torch(params: list[Tensor], grads: list[Tensor], limit: float) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(params, limit)


@pytest.mark.parametrize("limit", [0.5, 1e3], ids=["above", "below"])
@most_cases
def test_as_torch(case: Case, limit: float) -> None:
    ours = [values(size, dtype=torch.float64, seed=size) for size in SIZES]
    theirs = [param.cpu().clone() for param in ours]
    fused, unfused = case.ours(ours, max_grad_norm=limit), case.theirs(theirs)
    for seed in range(3):
        grads = new_grads(ours, seed)
        before = [tensor_bytes(grad) for grad in grads]
        norm = step_on(fused, grads)
        assert [tensor_bytes(grad) for grad in grads] == before
        assert norm == pytest.approx(norm_of(grads), rel=1e-12)
        assert (norm > limit) is (limit < 1)
        clip_with_torch(theirs, [grad.cpu() for grad in grads], limit)
        unfused.step()
    for param, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(param.cpu(), expected, rtol=1e-12, atol=1e-14)


@in_pairs(
    pytest.mark.parametrize("limit", [0.7, 1e3], ids=["above", "below"]),
    some_dtypes(torch.float32, torch.bfloat16, torch.float16),
    most_cases,
)
def test_error_is_at_most_that_of_torch(case: Case, dtype: torch.dtype, limit: float) -> None:
    case = case.suited_to(dtype)
    ours = values(3, 67, dtype=dtype, seed=1)
    theirs, oracle, tolerance = ours.cpu().clone(), case.oracle(ours), TOLERANCES[dtype]
    exact = torch.zeros(3, 67, dtype=torch.float64, device="cpu")
    fused, unfused = case.ours([ours], max_grad_norm=limit), case.theirs([theirs])
    for seed in range(6):
        grad = values(3, 67, dtype=dtype, seed=2 + seed)
        assert step_on(fused, [grad]) == pytest.approx(norm_of([grad]), rel=1e-6)
        clip_with_torch([theirs], [grad.cpu()], limit)
        unfused.step()
        clip_with_torch([exact], [wide(grad)], limit)
        oracle.step(exact.grad)
    for name, expected in oracle.results().items():
        honest = np.abs(oracles.exact(results(unfused, theirs)[name]) - expected).max()
        error = np.abs(oracles.exact(results(fused, ours)[name]) - expected).max()
        assert error <= tolerance.factor * honest + tolerance.floor * np.abs(expected).max(), name


LIMITS: list[float | None] = [0.3, None, 1e3, math.inf, 2.0]


@pytest.mark.parametrize("missing", [(), (0,), (1, 4)], ids=str)
@some_optimizers
def test_groups(case: Case, missing: tuple[int, ...]) -> None:
    """One norm over all of them; None is not clipped, and counts."""
    params = [values(40, dtype=torch.float64, seed=seed) for seed in range(len(LIMITS))]
    theirs = [param.cpu().clone() for param in params]
    groups = [{"params": [p], "max_grad_norm": x} for p, x in zip(params, LIMITS, strict=True)]
    fused, unfused = case.ours(groups), case.theirs(theirs)
    for seed in range(3):
        grads = new_grads(params, seed)
        present = [grad for index, grad in enumerate(grads) if index not in missing]
        norm = norm_of(present)
        for index, (param, twin, grad) in enumerate(zip(params, theirs, grads, strict=True)):
            limit = LIMITS[index]
            factor = 1 if limit is None else min(1, limit / (norm + 1e-6))
            param.grad = None if index in missing else grad
            twin.grad = None if index in missing else grad.cpu() * factor
        fused.step()
        unfused.step()
        assert float(fused.grad_norm) == pytest.approx(norm, rel=1e-12)
    for param, expected in zip(params, theirs, strict=True):
        torch.testing.assert_close(param.cpu(), expected, rtol=1e-12, atol=1e-14)


@some_optimizers
def test_no_grads_at_all(case: Case) -> None:
    optimizer = case.ours([values(3), values(0)], max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm is None or float(optimizer.grad_norm) == 0
    optimizer = case.ours([values(0)], max_grad_norm=1.0)
    assert step_on(optimizer, [values(0)]) == 0
    assert step_on(case.ours([values(3)], max_grad_norm=1.0), [torch.zeros(3)]) == 0


@each_grad
@each_dtype
@some_cases("momentum-l2", "adamw")
def test_grad_layouts(case: Case, dtype: torch.dtype, grad_layout: str) -> None:
    starts = [values(6, 10, dtype=dtype), values(33, dtype=dtype), values(70, 130, dtype=dtype)]
    make = GRADS[grad_layout]
    grads = [make(tuple(s.shape), dtype, seed) for seed, s in enumerate(starts)]
    found = []
    for each in (grads, [grad.contiguous() for grad in grads]):
        params = [start.clone() for start in starts]
        optimizer = case.ours(params, max_grad_norm=1.0)
        norm = step_on(optimizer, each)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        assert norm == pytest.approx(norm_of(grads), rel=tolerance)
        found.append(params)
    torch.testing.assert_close(*found)


@each_layout
@some_dtypes(torch.float32, torch.complex64)
@some_cases("momentum-l2", "adamw")
def test_param_layouts(case: Case, dtype: torch.dtype, layout: Layout) -> None:
    strided = layout.view(layout.storage(dtype))
    dense = strided.clone(memory_format=torch.contiguous_format)
    for seed in (1, 2):
        grad = values(*layout.shape, dtype=dtype, seed=seed)
        for param in (strided, dense):
            norm = step_on(case.ours([param], max_grad_norm=0.1), [grad])
            assert norm == pytest.approx(norm_of([grad]), rel=1e-6)
    torch.testing.assert_close(strided, dense)


@some_cases("sgd", "adam")
def test_mixed_dtypes(case: Case) -> None:
    """Each grad counts with the values that it holds, whatever its dtype or its param's."""
    params = [values(50, dtype=dtype) for dtype in DTYPES[:4]] + [values(50), values(50)]
    for param in params:
        param.grad_dtype = None
    grads = new_grads(params, 1)
    grads[4], grads[5] = grads[4].to(torch.bfloat16), grads[5].to(torch.float64)
    optimizer = case.ours(params, max_grad_norm=1.0)
    assert step_on(optimizer, grads) == pytest.approx(norm_of(grads), rel=1e-6)


SHAPES: dict[str, list[int]] = {
    **{str(n): [n] for n in (1, 2, 15, 8191, 8192, 8193, 65537, 3 * 8192 - 1, 40 * 8192 + 5)},
    "thousands": [1 + index % 7 for index in range(1100)],
    "large and tiny": [1, 50000, 0, 3, 16385, 8192, 1, 1],
}
each_sizes = pytest.mark.parametrize("sizes", **by_id(SHAPES))
each_real = some_dtypes(*DTYPES[:4])


@each_sizes
@each_real
def test_norm(sizes: list[int], dtype: torch.dtype) -> None:
    grads = draw(sizes, dtype=dtype, seed=3)
    optimizer = fusedopt.SGD([torch.zeros_like(g) for g in grads], lr=1.0, max_grad_norm=math.inf)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert step_on(optimizer, grads) == pytest.approx(norm_of(grads), rel=tolerance)


@pytest.mark.parametrize("scale", [1e-17, 1e17])
def test_range(scale: float) -> None:
    grad = values(1000) * scale
    optimizer = fusedopt.SGD([torch.zeros(1000)], lr=1.0, max_grad_norm=math.inf)
    assert step_on(optimizer, [grad]) == pytest.approx(norm_of([grad]), rel=1e-6, abs=0)


@each_real
def test_squares_beyond_the_dtype(dtype: torch.dtype) -> None:
    """The squares of the largest grads overflow, and those of the smallest underflow; no norm does.

    torch's norm in float32 is infinite or 0 there.
    """
    limits = torch.finfo(dtype)
    for size in (limits.max / 2**12, limits.smallest_normal * 2**10):
        param = torch.ones(1000, dtype=dtype)
        optimizer = fusedopt.SGD([param], lr=0.5, max_grad_norm=1.0)
        assert step_on(optimizer, [torch.full_like(param, size)]) == pytest.approx(
            size * math.sqrt(1000), rel=1e-6, abs=0
        )
        assert not optimizer.skipped
        assert optimizer.nonfinite_grads == 0
        moved = 0.5 * min(size, 1 / math.sqrt(1000))
        torch.testing.assert_close(param, torch.full_like(param, 1 - moved))


def test_what_changes_between_steps() -> None:
    """Grads that come and go, and params that grow, shrink and change places."""
    params = [values(size) for size in (9, 20000, 300)]
    optimizer = fusedopt.SGD(params, lr=0.01, max_grad_norm=1.0)
    for seed in range(12):
        if seed in (4, 8):
            params[0].data, params[1].data = values(30000), values(seed)
        for index, param in enumerate(params):
            param.grad = None
            param.grad = values(*param.shape, seed=seed) if seed % (index + 2) else None
        present = [param.grad for param in params if param.grad is not None]
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(norm_of(present), rel=1e-6)


def clip_some(sizes: list[int], dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> Results:
    device = torch.device(DEVICE)
    params = [place(p) for p in draw(sizes, device, dtype, seed=1)]
    optimizer = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5)
    found: Results = {}
    for seed in range(2):
        step_on(optimizer, [place(grad) for grad in draw(sizes, device, dtype, seed=10 + seed)])
        found[f"norm {seed}"] = optimizer.grad_norm
    return found | record(optimizer)


@each_sizes
@each_real
def test_misaligned(sizes: list[int], dtype: torch.dtype) -> None:
    aligned = clip_some(sizes, dtype, lambda tensor: tensor)
    assert same_bits(clip_some(sizes, dtype, misaligned), aligned)


@pytest.mark.cpu_only
@each_sizes
@each_real
def test_threads_and_instruction_sets(
    sizes: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for threads, isa in [(1, "baseline"), (2, "avx2"), (1, "avx512"), (2, "avx512"), (3, "avx2")]:
        if isa in fusedopt._C.build_info()["isas"]:
            monkeypatch.setenv("FUSEDOPT_ISA", isa)
            torch.set_num_threads(threads)
            found.append(clip_some(sizes, dtype, lambda tensor: tensor))
    assert all(same_bits(each, found[0]) for each in found[1:])


@each_dtype
@most_cases
def test_infinite_limit_only_measures(case: Case, dtype: torch.dtype) -> None:
    found = []
    for more in ({}, {"max_grad_norm": math.inf}, {"max_grad_norm": 1e30}):
        params = draw(SIZES, dtype=dtype)
        optimizer = case.ours(params, **more)
        for seed in range(3):
            take_step(optimizer, seed)
            assert (optimizer.grad_norm is None) is (not more)
            assert optimizer.skipped.dtype == torch.bool
            assert not optimizer.skipped
        assert (optimizer.nonfinite_grads is None) is (not more)
        found.append(record(optimizer))
    steps = {name for name in found[0] if name.startswith("step")}  # may lie elsewhere
    for other in found[1:]:
        for name in found[0].keys() - steps:
            assert torch.equal(bits(other[name]), bits(found[0][name])), name


@in_pairs(
    pytest.mark.parametrize("skipped", [(), (0,), (2,), (0, 1, 3)], ids=str),
    each_dtype,
    some_cases(
        *("sgd", "momentum-damped", "nesterov-l2"),
        *("adam-amsgrad-l2", "adamw", "adagrad", "nadam"),
    ),
)
@on_both_drivers
def test_on_both_drivers(side: Side, case: Case, dtype: torch.dtype, skipped: Any) -> Results:
    params = draw([*SIZES, 20000], side.device, dtype)
    groups = [{"params": params[:4], "max_grad_norm": 0.7}, {"params": params[4:]}]
    optimizer, seen = case.ours(groups), {}
    for seed in range(5):
        set_grads(params, seed)
        if seed in skipped:
            params[-1].grad[seed] = math.inf
        with without_waiting():
            optimizer.step()
        for name in ("grad_norm", "nonfinite_grads", "skipped"):
            seen[f"{name} {seed}"] = getattr(optimizer, name).cpu().clone()
    return record(optimizer) | seen


@some_dtypes(torch.float32, torch.bfloat16, torch.float64)
@some_cases("sgd", "momentum-damped", "adam-amsgrad", "adamw", "rmsprop-all")
@on_both_drivers
def test_replays(side: Side, case: Case, dtype: torch.dtype) -> Results:
    clipping = case.but(max_grad_norm=0.7)
    optimizer = warmed_up(side, clipping, dtype)
    replay = side.replayable(optimizer.step)
    for seed in range(2, 8):
        set_grads(optimizer, seed, in_place=True)
        if seed in (3, 4):
            params_of(optimizer)[3].grad[7] = math.nan
        replay()
    return record(optimizer) | {"norm": optimizer.grad_norm, "skipped": optimizer.skipped}
