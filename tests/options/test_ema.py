"""ema_decay: the average of the weights in the same pass, and swap_ema() to evaluate with it."""

import copy
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

import fusedopt
from support import oracles
from support.device import DEVICE, STEPS_ON_DEVICE
from support.equality import bits, same_bits
from support.optimizers import CASES, Case, most_cases, some_cases, step_with, take_step, train
from support.pairs import in_pairs
from support.sides import SIZES, Results, Side, on_both_drivers, warmed_up
from support.snapshots import COPIES, record, refused
from support.tensors import by_id, draw, dtype_id, params_of, set_grads, some_dtypes, values

some_optimizers = some_cases("sgd", "momentum-l2", "adam-l2", "adamw-amsgrad", "asgd-averaged")

# Param dtypes and options with the average's dtype and how exactly it must follow the weights.
SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any], torch.dtype, float]] = {
    "float32": (torch.float32, {}, torch.float32, 4e-7),
    "float64": (torch.float64, {}, torch.float64, 1e-15),
    "bfloat16": (torch.bfloat16, {}, torch.float32, 4e-7),
    "float16": (torch.float16, {}, torch.float32, 4e-7),
    "complex64": (torch.complex64, {}, torch.complex64, 4e-7),
    "masters": (torch.bfloat16, {"master_weights": "float32"}, torch.float32, 4e-7),
    "float16 masters": (torch.float16, {"master_weights": "float32"}, torch.float32, 4e-7),
    "split masters": (torch.bfloat16, {"master_weights": "split"}, torch.float32, 4e-7),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True}, torch.float32, 4e-7),
    "16-bit states": (torch.float32, {"state_dtype": torch.bfloat16}, torch.float32, 4e-7),
}
each_setting = pytest.mark.parametrize("setting", **by_id(SETTINGS))
# Those whose params do not hold all of the weight, one that does, and float64.
MAIN = ("float32", "float64", "bfloat16", "masters", "split masters")
main_settings = pytest.mark.parametrize("setting", [SETTINGS[key] for key in MAIN], ids=MAIN)


class Average:
    """In float64, from the formulas."""

    def __init__(self, decay: float, corrected: bool) -> None:
        self.decay, self.corrected, self.t = decay, corrected, 0
        self.value: Any = 0.0

    def update(self, weight: Any) -> None:
        self.t += 1
        rate = oracles.ema_rate(self.t, self.decay, self.corrected)
        self.value = self.value + rate * (weight - self.value)


def weights(optimizer: Any) -> list[Any]:
    """In float64, all digits that there are."""
    if any(param.is_complex() for param in params_of(optimizer)):
        return [oracles.exact(param) for param in params_of(optimizer)]
    return [oracles.exact(weight) for weight in optimizer.fp32_params()]


def averages(optimizer: Any) -> list[Tensor]:
    """Of the params that have one."""
    states = [optimizer.state.get(param, {}) for param in params_of(optimizer)]
    return [state["ema_param"] for state in states if "ema_param" in state]


def trained(case: Case, setting: Any, steps: int = 3, sizes: list[int] = SIZES, **more: Any) -> Any:
    dtype, options, *_ = setting
    options = {"ema_decay": 0.75, **options, **more}
    optimizer = case.suited_to(dtype).ours(draw(sizes, dtype=dtype), **options)
    train(optimizer, steps)
    return optimizer


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@most_cases
def test_as_averaged_model(case: Case, decay: float) -> None:
    """Which starts as a copy of the weights, as the average does with the first step's."""
    theirs = nn.ParameterList(values(size, dtype=torch.float64, seed=size).cpu() for size in SIZES)
    ours = [param.detach().to(DEVICE, copy=True) for param in theirs]
    fused, unfused = case.ours(ours, ema_decay=decay), case.theirs(theirs.parameters())
    model = AveragedModel(theirs, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for seed in range(5):
        take_step(fused, seed)
        take_step(unfused, seed)
        model.update_parameters(theirs)
    for average, expected in zip(averages(fused), model.parameters(), strict=True):
        torch.testing.assert_close(average.cpu(), expected.detach(), rtol=1e-12, atol=1e-14)


@in_pairs(
    pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"]),
    each_setting,
    some_optimizers,
)
def test_follows_the_weights(case: Case, setting: Any, corrected: bool) -> None:
    """Of a 16-bit param without masters what it reads, else the float32 weight."""
    optimizer = trained(case, setting, 0, ema_bias_correction=corrected)
    expected = [Average(0.75, corrected) for _ in SIZES]
    for seed in range(6):
        take_step(optimizer, seed)
        for average, weight in zip(expected, weights(optimizer), strict=True):
            average.update(weight)
        for found, average in zip(averages(optimizer), expected, strict=True):
            assert found.dtype == setting[2]
            np.testing.assert_allclose(
                oracles.exact(found), average.value, rtol=setting[3], atol=setting[3]
            )


@some_optimizers
def test_off_is_off(case: Case) -> None:
    with_ema, without = trained(case, SETTINGS["float32"]), trained(case, SETTINGS["float32"], 0)
    without.param_groups[0]["ema_decay"] = None
    train(without, 3)
    assert not any("ema_param" in state for state in without.state.values())
    ours, plain = record(with_ema), record(without)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=dtype_id
)
def test_textbook_figures(dtype: torch.dtype) -> None:
    """V <- 0.7 V + 0.3 theta from 0, over values that lr = 1 and momentum 0 give the weights."""
    param = torch.zeros(3, dtype=dtype)
    optimizer = fusedopt.SGD([param], lr=1.0, ema_decay=0.7, ema_bias_correction=True)
    thetas = [100.0, 114.0, 118.0, 117.0, 120.0, 122.0]
    figures = [30, 55.2, 74.04, 86.928, 96.8496, 104.39472]
    for t, (theta, figure) in enumerate(zip(thetas, figures, strict=True), 1):
        step_with(optimizer, [param - theta])
        assert param.tolist() == [theta] * 3
        found = optimizer.state[param]["ema_param"].tolist()
        assert found == pytest.approx([figure / (1 - 0.7**t)] * 3, rel=1e-6)
        assert optimizer.state[param]["step"] == t


@some_dtypes(torch.bfloat16, torch.float16)
def test_keeps_what_16_bits_lose(dtype: torch.dtype) -> None:
    """From 1 towards 2 in steps of 1e-5: averages of 16 bits would stay where they are."""
    param = torch.ones(40, dtype=dtype)
    optimizer = fusedopt.SGD([param], lr=1.0, ema_decay=1 - 1e-5)
    step_with(optimizer, [torch.zeros_like(param), -torch.ones_like(param)])
    for _ in range(9):
        step_with(optimizer, [torch.zeros_like(param)])
    average = optimizer.state[param]["ema_param"]
    np.testing.assert_allclose(oracles.exact(average) - 1, 1e-4, rtol=1e-2)


@each_setting
@some_optimizers
def test_swap(case: Case, setting: Any) -> None:
    optimizer = trained(case, setting)
    params = params_of(optimizer)
    before = record(optimizer)
    expected = [average.to(setting[0]) for average in averages(optimizer)]
    with optimizer.swap_ema():
        for param, average in zip(params, expected, strict=True):
            assert torch.equal(bits(param), bits(average))
    assert same_bits(record(optimizer), before)
    twin = trained(case, setting)
    for each in (optimizer, twin):
        take_step(each, 9)
    assert same_bits(record(optimizer), record(twin))


@main_settings
@some_optimizers
def test_swap_and_exceptions(case: Case, setting: Any) -> None:
    optimizer = trained(case, setting)
    before = record(optimizer)
    with pytest.raises(KeyError, match="evaluation"), optimizer.swap_ema():
        raise KeyError("evaluation failed")
    assert same_bits(record(optimizer), before)
    with optimizer.swap_ema():  # as if nothing had happened
        pass
    assert same_bits(record(optimizer), before)


CALLS: dict[str, Any] = {
    "swap_ema": lambda optimizer: optimizer.swap_ema().__enter__(),
    "step": lambda optimizer: optimizer.step(),
    "step with a closure": lambda optimizer: optimizer.step(lambda: 1.0),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(SAVED),
    "a copy": lambda optimizer: optimizer.__getstate__(),
    "fp32_params": lambda optimizer: optimizer.fp32_params(),
    "load_fp32_params": lambda optimizer: optimizer.load_fp32_params(
        [torch.zeros(param.shape) for param in params_of(optimizer)]
    ),
}
SAVED: dict[str, Any] = {}


@in_pairs(pytest.mark.parametrize("call", **by_id(CALLS)), main_settings, some_optimizers)
def test_refused_inside(case: Case, setting: Any, call: Any) -> None:
    optimizer = trained(case, setting)
    SAVED.update(copy.deepcopy(optimizer.state_dict()))
    before = record(optimizer)
    with optimizer.swap_ema():
        swapped = record(optimizer)
        with pytest.raises(RuntimeError, match="swap_ema"):
            call(optimizer)
        assert same_bits(record(optimizer), swapped)
    assert same_bits(record(optimizer), before)
    if call is not CALLS["swap_ema"]:
        call(optimizer)


@main_settings
@some_optimizers
def test_swap_without_an_average(case: Case, setting: Any) -> None:
    for options in ({}, {"ema_decay": None}):
        optimizer = trained(case, setting, 0 if not options else 2, **options)
        with refused(optimizer, RuntimeError, "average"), optimizer.swap_ema():
            pass


@main_settings
def test_swap_that_fails_on_entry(setting: Any) -> None:
    """An average that somebody replaced by something else: no param is left swapped."""
    optimizer = trained(CASES["adamw"], setting)
    optimizer.state[params_of(optimizer)[3]]["ema_param"] = torch.zeros(99)
    before = record(optimizer)
    with pytest.raises((RuntimeError, ValueError)), optimizer.swap_ema():
        pass
    assert same_bits(record(optimizer), before)
    optimizer.state_dict()


class InterruptedCopies(TorchFunctionMode):
    """Ctrl-C in the place of some of the calls of ``Tensor.copy_``, which are counted from 0."""

    def __init__(self, at: set[int]) -> None:
        super().__init__()
        self.at, self.calls = at, itertools.count()

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and next(self.calls) in self.at:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("at", range(2 * len(SIZES)))
@main_settings
def test_swap_that_is_interrupted(setting: Any, at: int) -> None:
    """Wherever it is, the params hold their own values afterwards."""
    optimizer = trained(CASES["momentum"], setting)
    before = record(optimizer)
    with InterruptedCopies({at}), pytest.raises(KeyboardInterrupt), optimizer.swap_ema():
        pass
    assert same_bits(record(optimizer), before)
    with optimizer.swap_ema():
        pass
    assert same_bits(record(optimizer), before)


def test_swap_that_cannot_be_ended() -> None:
    """Params that hold averages are not passed off as weights."""
    optimizer = trained(CASES["momentum"], SETTINGS["float32"])
    first = len(SIZES)
    with (
        InterruptedCopies({first, first + 1}),
        pytest.raises(KeyboardInterrupt),
        optimizer.swap_ema(),
    ):
        pass
    with pytest.raises(RuntimeError, match="swap_ema"):
        optimizer.state_dict()


def test_swap_is_known_to_autograd() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([param], lr=0.1, ema_decay=0.5)
    for seed in range(2):
        set_grads([param], seed)
        optimizer.step()
    loss = (param**2).sum()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()
    loss = (param**2).sum()
    with optimizer.swap_ema():
        pass
    assert param.requires_grad
    assert param.is_leaf


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@main_settings
def test_swap_and_inference_mode(setting: Any, outside: bool) -> None:
    """In either order, as evaluation has it."""
    optimizer, before = trained(CASES["momentum"], setting), []
    for seed in (3, 4):
        before.append(record(optimizer))
        modes = [torch.inference_mode(), optimizer.swap_ema()]
        with modes[not outside], modes[outside]:
            inside = [param.clone() for param in params_of(optimizer)]
        for param, average in zip(inside, averages(optimizer), strict=True):
            assert torch.equal(param, average.to(param.dtype))
        assert same_bits(record(optimizer), before[-1])
        take_step(optimizer, seed)


@main_settings
@some_optimizers
def test_frozen_and_late_params(case: Case, setting: Any) -> None:
    """A param without a step has no average and keeps its values; each counts its own steps."""
    dtype, options, _, tolerance = setting
    params = draw([5, 300, 8], dtype=dtype)
    optimizer = case.ours(params, ema_decay=0.75, **options)
    averaged = Average(0.75, False)
    for seed in range(6):
        set_grads(params, seed)
        params[1].grad = params[1].grad if seed > 2 else None
        params[2].grad = None
        optimizer.step()
        if seed > 2:
            averaged.update(weights(optimizer)[1])
    assert "ema_param" not in optimizer.state.get(params[2], {})
    found = oracles.exact(optimizer.state[params[1]]["ema_param"])
    np.testing.assert_allclose(found, averaged.value, rtol=tolerance, atol=tolerance)
    before = params[2].clone()
    with optimizer.swap_ema():
        assert torch.equal(params[2], before)


@main_settings
@some_cases("momentum-l2", "adam-l2", "adamw-amsgrad", "nadam", "rprop")
def test_enabled_late(case: Case, setting: Any) -> None:
    """It starts from the weights; of a group that has none, nothing is swapped."""
    optimizer = trained(case, setting, 4, [40], ema_decay=None)
    optimizer.add_param_group({"params": draw([7], dtype=setting[0])})
    optimizer.param_groups[0]["ema_decay"] = 0.75
    old = weights(optimizer)[0]
    for seed in (4, 5):
        take_step(optimizer, seed)
        average = oracles.exact(averages(optimizer)[0])
        new = weights(optimizer)[0]
        if seed == 4:  # the weights before the step or after it
            starts = [new, old + 0.25 * (new - old)]
            expected = min(starts, key=lambda start: np.abs(start - average).max())
        else:
            expected = expected + 0.25 * (new - expected)
        np.testing.assert_allclose(average, expected, rtol=1e-6, atol=1e-6)
    assert len(averages(optimizer)) == 1
    plain = params_of(optimizer)[1].clone()
    with optimizer.swap_ema():
        assert torch.equal(params_of(optimizer)[1], plain)


@in_pairs(
    pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"]),
    each_setting,
    some_optimizers,
)
def test_resume_gives_the_same_bits(case: Case, setting: Any, way: str) -> None:
    optimizer = trained(case, setting, ema_bias_correction=True)
    if way == "state_dict":
        other = trained(case, setting, 0, ema_bias_correction=True)
        other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        for param, source in zip(params_of(other), params_of(optimizer), strict=True):
            param.copy_(source)
    else:
        other = COPIES[way](optimizer)
    for each in (optimizer, other):
        for seed in (3, 4):
            take_step(each, seed)
    assert same_bits(record(other), record(optimizer))


@some_optimizers
def test_checkpoints_without_an_average_and_back(case: Case) -> None:
    setting = SETTINGS["float32"]
    plain, averaging = trained(case, setting, ema_decay=None), trained(case, setting)
    saved = copy.deepcopy(averaging.state_dict())
    averaging.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert averaging.param_groups[0]["ema_decay"] == 0.75
    take_step(averaging, 3)
    with averaging.swap_ema():
        pass
    plain.load_state_dict(saved)
    assert plain.param_groups[0]["ema_decay"] is None
    assert not averages(plain)
    torchs = case.theirs(params_of(plain))
    torchs.load_state_dict(saved)
    take_step(torchs, 3)


@each_setting
@some_optimizers
def test_skipped_step(case: Case, setting: Any) -> None:
    optimizer = trained(case, setting, max_grad_norm=1.0)
    before = record(optimizer)
    set_grads(optimizer, 3)
    params_of(optimizer)[4].grad[-1] = math.nan
    optimizer.step()
    assert same_bits(record(optimizer), before)
    first = trained(case, setting, 0, max_grad_norm=1.0)
    for seed in range(2):
        set_grads(first, seed)
        params_of(first)[4].grad[-1] = math.nan
        first.step()
    assert STEPS_ON_DEVICE or not first.state
    expected = trained(case, setting, max_grad_norm=1.0)
    train(first, 3)
    assert same_bits(record(first), record(expected))


@in_pairs(
    pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"]),
    pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"]),
    each_setting,
    some_optimizers,
)
@on_both_drivers
def test_on_both_drivers(
    side: Side, case: Case, setting: Any, corrected: bool, captured: bool
) -> Results:
    dtype, options, *_ = setting
    options = {"ema_decay": 0.875, "ema_bias_correction": corrected, **options}
    case = case.suited_to(dtype).but(**options)
    optimizer = warmed_up(side, case, dtype)
    step = side.replayable(optimizer.step) if captured else optimizer.step
    for seed in range(2, 6):
        set_grads(optimizer, seed, in_place=True)
        step()
    with optimizer.swap_ema():
        inside = [param.cpu().clone() for param in params_of(optimizer)]
    return record(optimizer) | {f"inside {i}": value for i, value in enumerate(inside)}


def test_infinite_weights_have_infinite_averages() -> None:
    param = torch.tensor([-torch.inf, 1.0]).to(values(1).device)
    optimizer = fusedopt.SGD([param], lr=0.5, ema_decay=0.9)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["ema_param"], param)
