"""fusedopt.GradScaler, whose inf check is step()'s own, and torch's, beside each other.

torch's leaves unscaling and skipping to optimizers made with fused=True. For all others it writes
to the grads and does not call step() after an overflow.
"""

import contextlib
import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from support.device import DEVICE, STEPS_ON_DEVICE
from support.equality import assert_equal, assert_same_math
from support.optimizers import CASES, Case, assert_params_after, main_cases, take_step
from support.pairs import in_pairs, together
from support.scalers import (
    SCALERS,
    WAYS,
    Way,
    each_bad,
    each_way,
    new_scaler,
    scale_grads,
    scaled_step,
)
from support.sides import SIZES, Results, Side, on_both_drivers, without_waiting
from support.snapshots import record, snapshot
from support.tensors import by_id, draw, make_params, params_of, set_grads, some_dtypes, values

# Which of eight steps overflow; the scale grows after two good steps.
OVERFLOWS = {
    "never": (),
    "first": (0,),
    "first two": (0, 1),
    "later": (3,),
    "in turn": (0, 2, 4, 6),
    "all": tuple(range(8)),
}
each_pattern = pytest.mark.parametrize("overflows", **by_id(OVERFLOWS))
UNSCALED: dict[str, bool] = {"unscaled by step": False, "unscale_ first": True}


def is_overflow(seed: int, overflows: tuple[int, ...], bad: float) -> float | None:
    return bad if seed in overflows else None


@in_pairs(each_bad, main_cases, together(each_way, each_pattern))
def test_training(case: Case, way: Way, overflows: tuple[int, ...], bad: float) -> None:
    """Scales as torch's with torch's optimizer, and in the end the same weights."""
    ours, theirs = case.ours(make_params(), **way.options), case.theirs(make_params())
    scalers = new_scaler(way.scaler_type), new_scaler(torch.amp.GradScaler)
    for seed in range(8):
        for optimizer, scaler in zip((ours, theirs), scalers, strict=True):
            scaled_step(scaler, optimizer, seed, is_overflow(seed, overflows, bad))
        assert bool(ours.skipped) is (way.in_step and seed in overflows)
        if way.scaler_type is fusedopt.GradScaler:
            assert ours.nonfinite_grads == (seed in overflows)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert_same_math(params_of(ours), params_of(theirs))
    for param, twin in zip(*(o.param_groups[0]["params"] for o in (ours, theirs)), strict=True):
        counts = [o.state[p].get("step", 0) for o, p in ((ours, param), (theirs, twin)) if o.state]
        assert len({float(count) for count in counts}) <= 1


@in_pairs(
    each_bad,
    each_way,
    main_cases,
    together(
        pytest.mark.parametrize("warm", [False, True], ids=["first step", "later step"]),
        pytest.mark.parametrize("unscale", **by_id(UNSCALED)),
    ),
)
def test_overflow_changes_nothing(
    case: Case, way: Way, bad: float, warm: bool, unscale: bool
) -> None:
    optimizer = case.ours(make_params(), **way.options)
    scaler = new_scaler(way.scaler_type)

    def look() -> dict[str, Any]:
        photo = snapshot(optimizer, values_only=STEPS_ON_DEVICE)
        return {k: v for k, v in photo.items() if way.in_step or not k.startswith("grad")}

    if warm:
        scaled_step(scaler, optimizer, 0)
    scale_grads(scaler, optimizer, 1, bad)
    if unscale:
        scaler.unscale_(optimizer)
    before = look()
    assert scaler.step(optimizer) is None
    after = look()
    if STEPS_ON_DEVICE and not warm:
        assert not any(e.any() for state in optimizer.state.values() for e in state.values())
        after = {k: v for k, v in after.items() if k in before} | {"number of states": 0}
    assert after == before
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")


@each_way
@main_cases
@pytest.mark.parametrize("unscale", **by_id(UNSCALED))
def test_clipping(case: Case, way: Way, unscale: bool) -> None:
    """The norm is that of the unscaled grads; a step that unscales writes to none of them."""
    ours = case.ours(make_params(), max_grad_norm=0.5, **way.options)
    theirs = case.theirs(make_params())
    scaler, twin = new_scaler(way.scaler_type), new_scaler(torch.amp.GradScaler)
    for seed in range(6):
        for optimizer, each in ((ours, scaler), (theirs, twin)):
            scale_grads(each, optimizer, seed, is_overflow(seed, (0, 3), math.inf))
        twin.unscale_(theirs)
        norm = torch.nn.utils.clip_grad_norm_(theirs.param_groups[0]["params"], 0.5)
        if unscale:
            scaler.unscale_(ours)
        grads = [param.grad.clone() for param in ours.param_groups[0]["params"]]
        for optimizer, each in ((ours, scaler), (theirs, twin)):
            each.step(optimizer)
            each.update()
        if way.in_step or unscale:
            assert_equal([param.grad for param in ours.param_groups[0]["params"]], grads)
        assert bool(ours.skipped) is (way.in_step and seed in (0, 3))
        if seed not in (0, 3):
            assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-12)
        assert scaler.get_scale() == twin.get_scale()
    assert_same_math(params_of(ours), params_of(theirs))


@main_cases
@some_dtypes(torch.float32, torch.float16, torch.bfloat16)
def test_as_without_a_scaler(case: Case, dtype: torch.dtype) -> None:
    """A power of two as scale changes no bit, of float16 grads neither."""
    case = case.suited_to(torch.float16)
    for more in ({}, {"max_grad_norm": 0.5}, {"ema_decay": 0.9}):
        optimizer = case.ours(make_params(dtype), **more)
        scaler = new_scaler(init_scale=8.0, growth_interval=100)
        for seed in range(4):
            scaled_step(scaler, optimizer, seed)
            assert scaler.get_scale() == 8.0
        assert_params_after(optimizer, case, 0, 1, 2, 3, **more)


SECOND = ["SGD", "Adam", "AdamW", "Adamax", "torch.SGD", "torch.AdamW"]


def two_optimizers(first: str, second: str, options: dict[str, Any]) -> list[Any]:
    """One of fusedopt and one of either, as for a generator and a discriminator."""
    made = [getattr(fusedopt, first)(make_params(), lr=0.1, **options)]
    if second.startswith("torch."):
        other, options = getattr(torch.optim, second.removeprefix("torch.")), {}
    else:
        other = getattr(fusedopt, second)
    return [*made, other(make_params(seed=1), lr=0.1, **options)]


@in_pairs(
    pytest.mark.parametrize("overflowing", [0, 1], ids=["ours overflows", "the other does"]),
    pytest.mark.parametrize("second", SECOND),
    together(each_way, each_pattern),
)
def test_several_optimizers(second: str, way: Way, overflows: Any, overflowing: int) -> None:
    """Only the one with the overflow is skipped; the scale is that of both."""
    pairs = (
        two_optimizers("AdamW", second, way.options),
        [
            type_(make_params(seed=index), lr=0.1, foreach=False)
            for index, type_ in enumerate(
                (torch.optim.AdamW, getattr(torch.optim, second.removeprefix("torch.")))
            )
        ],
    )
    scalers = new_scaler(way.scaler_type), new_scaler(torch.amp.GradScaler)
    for seed in range(8):
        for optimizers, scaler in zip(pairs, scalers, strict=True):
            for index, optimizer in enumerate(optimizers):
                bad = is_overflow(seed, overflows, math.nan) if index == overflowing else None
                scale_grads(scaler, optimizer, seed, bad)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    for ours, theirs in zip(*pairs, strict=True):
        assert_same_math(params_of(ours), params_of(theirs))


@main_cases
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0, 8.0, 0.5])
@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
def test_found_inf_is_a_sum(case: Case, found_inf: float, clip: float | None) -> None:
    """Over devices and processes; whoever computed it, it skips a step that is clipped, too."""
    optimizer = case.ours(make_params(), max_grad_norm=clip)
    take_step(optimizer, 0)
    set_grads(optimizer, 1)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(found_inf), torch.tensor(1.0)
    before = snapshot(optimizer, values_only=STEPS_ON_DEVICE)
    optimizer.step()
    assert bool(optimizer.skipped) is (found_inf > 0)
    if found_inf > 0:
        assert snapshot(optimizer, values_only=STEPS_ON_DEVICE) == before
    else:
        assert_params_after(optimizer, case, 0, 1, max_grad_norm=clip)


@main_cases
@each_way
def test_disabled(case: Case, way: Way) -> None:
    optimizer = case.ours(make_params(), **way.options)
    scaler = new_scaler(way.scaler_type, enabled=False)
    for seed in range(3):
        set_grads(optimizer, seed)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert_params_after(optimizer, case, 0, 1, 2)
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict() == {}
    assert optimizer.nonfinite_grads is None
    assert scaler.step(optimizer, lambda: 2.5) == 2.5


@main_cases
@pytest.mark.parametrize("directions", [(0, 1), (1, 0)], ids=["to torch's", "from torch's"])
def test_state_dict(case: Case, directions: tuple[int, int]) -> None:
    first, second = (list(SCALERS.values())[index] for index in directions)
    optimizer, scaler = case.ours(make_params()), new_scaler(first)
    other = new_scaler(second, init_scale=1.0)
    for seed in range(3):
        scaled_step(scaler, optimizer, seed, is_overflow(seed, (1,), math.inf))
    other.load_state_dict(copy.deepcopy(scaler.state_dict()))
    assert other.state_dict() == scaler.state_dict()
    unpickled = pickle.loads(pickle.dumps(scaler))
    for each in (scaler, other, unpickled):
        scaled_step(each, optimizer, 3)
        assert each.get_scale() == scaler.get_scale()
    assert isinstance(fusedopt.GradScaler(DEVICE), torch.amp.GradScaler)


MISUSES: dict[str, Callable[[Any, Any], Any]] = {
    "step twice": lambda scaler, optimizer: [scaler.step(optimizer) for _ in range(2)],
    "unscale_ twice": lambda scaler, optimizer: [scaler.unscale_(optimizer) for _ in range(2)],
    "unscale_ after step": lambda s, optimizer: [s.step(optimizer), s.unscale_(optimizer)],
    "update first": lambda scaler, _: scaler.update(),
    "closure": lambda scaler, optimizer: scaler.step(optimizer, closure=lambda: 1.0),
}


@pytest.mark.parametrize("misuse", **by_id(MISUSES))
def test_misuse_is_refused_as_by_torch(misuse: Callable[[Any, Any], Any]) -> None:
    messages = []
    for way in WAYS.values():
        optimizer = fusedopt.SGD(make_params(), **way.options)
        scaler = new_scaler(way.scaler_type)
        scale_grads(scaler, optimizer, 0)
        with pytest.raises((RuntimeError, AssertionError)) as caught:
            misuse(scaler, optimizer)
        messages.append((caught.type, str(caught.value)))
    assert messages == messages[:1] * len(WAYS)


@each_way
def test_step_before_scale(way: Way) -> None:
    optimizer = fusedopt.SGD(make_params(), **way.options)
    set_grads(optimizer, 0)
    with pytest.raises(AssertionError, match="scale"):
        new_scaler(way.scaler_type).step(optimizer)


@main_cases
def test_update_with_a_new_scale(case: Case) -> None:
    optimizer, scaler = case.ours(make_params()), new_scaler()
    for seed, scale in enumerate((3.0, torch.tensor(7.0))):
        scale_grads(scaler, optimizer, seed)
        scaler.step(optimizer)
        scaler.update(scale)
        assert scaler.get_scale() == float(scale)


@each_way
@main_cases
def test_params_without_grads(case: Case, way: Way) -> None:
    optimizer, plain = case.ours(make_params(), **way.options), case.ours(make_params())
    scaler = new_scaler(way.scaler_type)
    for each in (optimizer, plain):
        scale_grads(scaler, each, 0)
        each.param_groups[0]["params"][1].grad = None
    scaler.step(optimizer)
    scaler.update()
    for param in plain.param_groups[0]["params"]:
        param.grad = None if param.grad is None else param.grad / 2.0**10
    plain.step()
    assert_equal(params_of(optimizer), params_of(plain))
    optimizer.zero_grad()
    no_checks = pytest.raises(AssertionError, match="No inf checks")
    with contextlib.nullcontext() if way.in_step else no_checks:  # as of any optimizer of torch
        scaler.step(optimizer)
    assert not optimizer.skipped
    assert_equal(params_of(optimizer), params_of(plain))


@each_bad
@main_cases
@each_way
def test_error_if_nonfinite(case: Case, way: Way, bad: float) -> None:
    """Whether a scaled step raises or is skipped, the loop goes on with a smaller scale."""
    clip = {"max_grad_norm": 0.5}
    optimizer = case.ours(make_params(), **clip, error_if_nonfinite=True, **way.options)
    scaler = new_scaler(way.scaler_type, growth_interval=100)
    for seed in range(4):
        scale_grads(scaler, optimizer, seed, is_overflow(seed, (0, 2), bad))
        before = scaler.get_scale()
        with contextlib.suppress(RuntimeError) if seed in (0, 2) else contextlib.nullcontext():
            scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        scaler.update()
        assert scaler.get_scale() == (before / 2 if seed in (0, 2) else before)
    assert_params_after(optimizer, case, 1, 3, **clip)


ROWS = {
    name: CASES[name].but(**more)
    for name, more in {
        "sgd": {},
        "momentum-damped": {"max_grad_norm": 0.5},
        "nesterov-l2": {"ema_decay": 0.9},
        "adam-amsgrad": {"max_grad_norm": 2.0, "ema_decay": 0.9, "ema_bias_correction": True},
        "adamw": {},
        "adam": {"max_grad_norm": math.inf},
    }.items()
}


@in_pairs(
    pytest.mark.parametrize("bad", [(), (0,), (0, 1), (2,), (0, 1, 2, 3, 4), (1, 3)], ids=str),
    some_dtypes(torch.float32, torch.float16, torch.bfloat16),
    pytest.mark.parametrize("row", **by_id(ROWS)),
)
@on_both_drivers
def test_on_both_drivers(side: Side, row: Case, dtype: torch.dtype, bad: Any) -> Results:
    params: list[Tensor] = draw(SIZES, side.device, dtype)
    optimizer = row.suited_to(dtype).ours(params)
    scaler = fusedopt.GradScaler(side.device.type, init_scale=2.0**6, growth_interval=2)
    scaler.scale(torch.zeros((), device=side.device))
    seen: Results = {}
    for seed in range(6):
        set_grads(params, seed)
        for param in params:
            param.grad *= 48
        if seed in bad:
            params[3].grad[200] = math.inf
        with without_waiting():
            scaler.step(optimizer)
            scaler.update()
            for name in ("nonfinite_grads", "skipped"):
                seen[f"{name} {seed}"] = getattr(optimizer, name).clone()
    norm = optimizer.grad_norm
    seen |= {"scale": torch.tensor(scaler.get_scale(), device="cpu")}
    return record(optimizer) | seen | ({} if norm is None else {"norm": norm})


def test_flags_of_two_optimizers_stay_apart() -> None:
    # torch's update() adds one optimizer's flag to the other's, in place.
    params = [values(4), values(4, seed=1)]
    optimizers = [fusedopt.SGD([param]) for param in params]
    scaler = fusedopt.GradScaler(DEVICE, init_scale=2.0)
    scaler.scale(torch.zeros((), device=params[0].device))
    params[0].grad = values(4, seed=2)
    params[1].grad = torch.full_like(params[1], torch.inf)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert [bool(optimizer.skipped) for optimizer in optimizers] == [False, True]
    assert scaler.get_scale() == 1.0
