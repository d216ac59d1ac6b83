"""Who unscales under a GradScaler, and that no step obeys a scaler that is gone.

`_step_supports_amp_scaling` is torch's private word for "step() unscales and skips by itself". What
stands between scaler and optimizer (wrappers, trainers) often knows the usual way only, so it is
said of optimizers made with fused=True alone, as in torch.
"""

import contextlib
import copy
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedopt
from support.device import STEPS_ON_DEVICE
from support.equality import assert_equal
from support.optimizers import (
    Build,
    Case,
    each_of_all_names,
    like_torch,
    main_cases,
    take_step,
    train,
)
from support.pairs import in_pairs, together
from support.scalers import each_scaler, new_scaler, scale_grads, scaled_step
from support.sides import Results, Side, on_both_drivers
from support.snapshots import COPIES, record
from support.tensors import by_id, draw, make_params, params_of, set_grads

FUSED: dict[str, dict[str, Any]] = {"default": {}, "fused": {"fused": True}}
each_fused = pytest.mark.parametrize("options", **by_id(FUSED))
each_outcome = pytest.mark.parametrize("overflows", [False, True], ids=["finite", "overflow"])
SCALE = 2.0**10


def after_a_load(optimizer: Any, fused: bool) -> Any:
    """Of a checkpoint whose groups say otherwise: how the optimizer was made is what counts."""
    saved = optimizer.state_dict()
    saved["param_groups"][0]["fused"] = fused
    optimizer.load_state_dict(saved)
    return optimizer


def after_a_scaled_step(optimizer: Any) -> Any:
    scaler = new_scaler()
    scale_grads(scaler, optimizer, 0)
    scaler.step(optimizer)
    return optimizer


BECOME: dict[str, Callable[[Any], Any]] = {
    "itself": lambda optimizer: optimizer,
    "pickled": COPIES["pickle"],
    "saved": COPIES["torch.save"],
    "deep copy": copy.deepcopy,
    "loaded fused": lambda optimizer: after_a_load(optimizer, True),
    "loaded unfused": lambda optimizer: after_a_load(optimizer, False),
    "stepped by our scaler": after_a_scaled_step,
}


def claims_support(optimizer: Any) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)


TWINS = ["SGD", "Adam", "AdamW"]
if claims_support(torch.optim.Adagrad([torch.ones(1)], fused=True)):  # not in torch 2.11
    TWINS.append("Adagrad")


def twin_of(name: str) -> str:
    """That of torch which can be fused, with scalers: most cannot."""
    return name if name in TWINS else "AdamW"


@each_of_all_names
@pytest.mark.parametrize("become", **by_id(BECOME))
@pytest.mark.parametrize("fused", [None, False, True])
def test_who_claims_support(name: str, become: Any, fused: bool | None) -> None:
    optimizer = become(getattr(fusedopt, name)(make_params(), fused=fused))
    assert claims_support(optimizer) is bool(fused)
    twin = getattr(torch.optim, twin_of(name))(make_params(), fused=fused)
    assert claims_support(twin) is bool(fused)


@each_of_all_names
def test_fused_with_foreach(name: str) -> None:
    messages = []
    for make in (getattr(fusedopt, name), getattr(torch.optim, twin_of(name))):
        with pytest.raises(RuntimeError) as caught:
            make(make_params(), fused=True, foreach=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@main_cases
@each_fused
def test_our_scaler_borrows_the_claim(case: Case, options: dict[str, Any]) -> None:
    """For its own steps, unless hooks look at the grads before."""
    optimizer, scaler, seen = case.ours(make_params(), **options), new_scaler(), []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o._step_supports_amp_scaling))
    for has_pre_hook in (False, True):
        if has_pre_hook:
            optimizer.register_step_pre_hook(lambda *_: None)
        scaled_step(scaler, optimizer, 0)
        take_step(optimizer, 1)
    claims = bool(options)
    assert seen == [True, claims, claims, claims]


class Wrapper:
    """Passes on what it does not know, as optimizers of trainers do."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.step(*args, **kwargs)


@main_cases
@each_scaler
@like_torch
def test_wrapped(build: Build, case: Case, scaler_type: Any) -> Any:
    """A scaler that set attributes on the wrapper would leave the step with scaled grads."""
    optimizer = build(make_params())
    scaler = new_scaler(scaler_type if build == case.ours else torch.amp.GradScaler)
    for seed in range(5):
        scale_grads(scaler, optimizer, seed, math.inf if seed in (0, 3) else None)
        scaler.step(Wrapper(optimizer))
        scaler.update()
    assert all(param.isfinite().all() for param in params_of(optimizer))
    return params_of(optimizer), scaler.get_scale()


@main_cases
@pytest.mark.parametrize("overflows", [(), (0,), (2, 3), (4,)], ids=str)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@like_torch
def test_skipped_steps_are_noticed(build: Build, overflows: tuple[int, ...]) -> Any:
    """As Accelerate does it: a step was skipped if the scaler has not called the method."""
    optimizer, scaler = build(make_params()), new_scaler(torch.amp.GradScaler)
    schedule, log = ExponentialLR(optimizer, 0.5), []
    called, step = [], optimizer.step
    optimizer.step = lambda *args, **kwargs: [called.append(True), step(*args, **kwargs)][1]
    for seed in range(5):
        called.clear()
        scaled_step(scaler, optimizer, seed, math.inf if seed in overflows else None)
        if called:
            schedule.step()
        log.append((not called, optimizer.param_groups[0]["lr"], scaler.get_scale()))
    assert [seed for seed, (skipped, *_) in enumerate(log) if skipped] == list(overflows)
    return log


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def hooked(register: Callable[[Any], Any]) -> Any:
    handle = register(interrupt)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def broken_state(optimizer: Any) -> Any:
    """ValueError of the step itself, before it writes."""
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    name = next(name for name in state if name != "step")
    good, state[name] = state[name], torch.ones(2, dtype=torch.float64)
    try:
        yield
    finally:
        state[name] = good


@contextlib.contextmanager
def interrupted_walk(optimizer: Any) -> Any:
    """Ctrl-C while the extension calls Python."""
    optimizer._plan_, plan = InterruptedPlan(), optimizer._plan_
    try:
        yield
    finally:
        optimizer._plan_ = plan


class InterruptedPlan:
    grad_status = None

    def step(self, *_: Any) -> None:
        raise KeyboardInterrupt


# Where the exception comes from, and whether the step is done by then.
ENDS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "pre-hook": (lambda optimizer: hooked(optimizer.register_step_pre_hook), False),
    "global pre-hook": (lambda _: hooked(register_optimizer_step_pre_hook), False),
    "error": (broken_state, False),
    "interrupt": (interrupted_walk, False),
    "post-hook": (lambda optimizer: hooked(optimizer.register_step_post_hook), True),
    "global post-hook": (lambda _: hooked(register_optimizer_step_post_hook), True),
}


@in_pairs(
    main_cases,
    pytest.mark.parametrize("goes_on", ["without a scaler", "with it"]),
    together(
        each_scaler,
        each_fused,
        each_outcome,
        pytest.mark.parametrize(("ending", "is_done"), **by_id(ENDS)),
    ),
)
def test_exception_in_a_scaled_step(
    case: Case,
    scaler_type: Any,
    options: dict[str, Any],
    overflows: bool,
    ending: Any,
    is_done: bool,
    goes_on: str,
) -> None:
    """Nothing of the scaler stays on the optimizer: the next step is as if there had been none."""
    optimizer, scaler = case.ours(make_params(), **options), new_scaler(scaler_type)
    take_step(optimizer, 0)
    scale_grads(scaler, optimizer, 1, math.inf if overflows else None)
    raised = False
    with ending(optimizer):
        try:
            scaler.step(optimizer)
        except (KeyboardInterrupt, ValueError):
            raised = True
    is_pre_hook = ending in (ENDS["pre-hook"][0], ENDS["global pre-hook"][0])
    ours_takes_over = scaler_type is fusedopt.GradScaler and not is_pre_hook
    is_called = bool(options) or ours_takes_over or not overflows
    reads_found_inf_first = ending in (broken_state, interrupted_walk) and (
        bool(options) and scaler_type is torch.amp.GradScaler and overflows and not STEPS_ON_DEVICE
    )
    assert raised is (is_called and not reads_found_inf_first)
    assert not {"grad_scale", "found_inf"} & optimizer.__dict__.keys()
    assert optimizer._step_supports_amp_scaling is bool(options)
    assert not optimizer._checks_grads
    if goes_on == "with it":
        scaler.update()
        scale_grads(scaler, optimizer, 2)
        scaler.step(optimizer)
    else:
        take_step(optimizer, 2)
    plain = case.ours(make_params())
    for seed in (0, 1, 2) if is_done and not overflows else (0, 2):
        take_step(plain, seed)
    look = params_of if STEPS_ON_DEVICE else record  # `step` may have moved
    assert_equal(look(optimizer), look(plain))


@main_cases
@each_outcome
def test_exception_in_a_closure(case: Case, overflows: bool) -> None:
    optimizer, plain = case.ours(make_params()), case.ours(make_params())
    optimizer.grad_scale = torch.tensor(SCALE)
    optimizer.found_inf = torch.tensor(float(overflows))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupt)
    for each in (optimizer, plain):
        train(each, steps=2)
    assert_equal(record(optimizer), record(plain))


# Code of the user's that runs in a step and reads the grads there.


def clip(optimizer: Any, *_: Any) -> None:
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)


def with_hook(optimizer: Any) -> Callable[[], None]:
    return optimizer.register_step_pre_hook(clip).remove


def with_global_hook(optimizer: Any) -> Callable[[], None]:
    def clip_this(other: Any, *_: Any) -> None:
        if other is optimizer:
            clip(other)

    return register_optimizer_step_pre_hook(clip_this).remove


def with_subclass(optimizer: Any) -> Callable[[], None]:
    class Clipping(type(optimizer)):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            clip(self)
            return super().step(closure)

    optimizer.__class__ = Clipping
    return lambda: None


def with_method(optimizer: Any) -> Callable[[], None]:
    original = optimizer.step

    def step(self: Any, closure: Any = None) -> Any:
        clip(self)
        return original(closure)

    optimizer.step = types.MethodType(step, optimizer)
    return lambda: None


def with_function(optimizer: Any) -> Callable[[], None]:
    with_method(optimizer)
    optimizer.step = functools.partial(optimizer.step)
    return lambda: None


READERS: dict[str, Callable[[Any], Callable[[], None]]] = {
    "hook": with_hook,
    "global hook": with_global_hook,
    "subclass": with_subclass,
    "method of the instance": with_method,
    "function of the instance": with_function,
}


@main_cases
@each_scaler
@pytest.mark.parametrize("overflows", [(), (1,)], ids=["finite", "overflow"])
@pytest.mark.parametrize("add_reader", **by_id(READERS))
@like_torch
def test_code_in_a_step_sees_unscaled_grads(
    build: Build, case: Case, scaler_type: Any, overflows: tuple[int, ...], add_reader: Any
) -> Any:
    """Grads that still have the scale would be clipped to nothing."""
    optimizer = build(make_params())
    scaler = new_scaler(scaler_type if build == case.ours else torch.amp.GradScaler)
    remove = add_reader(optimizer)
    try:
        for seed in range(3):
            scaled_step(scaler, optimizer, seed, math.inf if seed in overflows else None)
    finally:
        remove()
    return params_of(optimizer), scaler.get_scale()


def test_a_scheduler_leaves_the_unscaling_to_the_step() -> None:
    """It sets a step of its own on the instance, which reads no grads."""
    optimizer, seen = fusedopt.SGD(make_params(), lr=0.1), []
    ExponentialLR(optimizer, 0.5)
    assert "step" in vars(optimizer)
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o._step_supports_amp_scaling))
    scaled_step(new_scaler(), optimizer, 0)
    assert seen == [True]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": torch.inf}])
@on_both_drivers
def test_a_scale_that_the_host_knows(side: Side, options: dict[str, Any]) -> Results:
    """As of a scaler on the CPU, whatever computes the scalars of the step, and the norm."""
    params = draw([30, 500], side.device)
    optimizer = fusedopt.AdamW(params, lr=0.1, capturable=side.is_gpu, **options)
    norms = []
    for seed, scale in enumerate((1.0, 8.0, 0.25)):
        set_grads(params, seed)
        for param in params:
            assert param.grad is not None
            param.grad *= scale
        optimizer._step_with(scale, None, None)
        norm = optimizer.grad_norm
        if norm is not None:
            norms.append(norm.clone())
            grads = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
            assert float(norm) == pytest.approx(float(grads.norm()) / scale, rel=1e-5)
    return {**record(optimizer), **{f"norm {i}": norm for i, norm in enumerate(norms)}}
