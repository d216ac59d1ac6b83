"""Options: bad values, contradictions, wrong kinds, wherever they come from.

Bad ones are those that no step makes sense with: test_ranges.py has those that torch refuses for an
optimizer's defaults only.
"""

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import fusedopt
from support.device import on_host
from support.equality import same_bits
from support.optimizers import NAMES, each_name, step_with, train
from support.snapshots import refused, results, snapshot
from support.tensors import by_id, dtype_id, set_grads, some_dtypes, values

NAN, INF = float("nan"), float("inf")
Options = dict[str, Any]

OFF: Options = {
    "state_dtype": None,
    "master_weights": None,
    "stochastic_rounding": None,
    "rounding_seed": 0,
    "max_grad_norm": None,
    "error_if_nonfinite": False,
    "ema_decay": None,
    "ema_bias_correction": False,
    "lr_independent_weight_decay": False,
    "decoupled_weight_decay": False,
}

# Out of range: ValueError with the option's name and, where it is a number, its value.
VALUES: dict[str, tuple[Options, str]] = {
    f"{name}={value}": ({name: value}, f"{name}.*{value}")
    for name, bad in {
        "max_grad_norm": (0.0, -1.0, NAN, -INF, 0),
        "ema_decay": (1.001, -0.1, 1.5, NAN, INF, 2),
        "rounding_seed": (-1, 2**32),
        "master_weights": ("fp32", "float16", "bfloat16", "SPLIT", ""),
        "state_dtype": (torch.float16, torch.float64, torch.int16, torch.complex64),
    }.items()
    for value in bad
}
# Of a wrong kind: TypeError, with what was found.
KINDS: dict[str, tuple[Options, str]] = {
    f"{name}={value!r}": ({name: value}, name)
    for name, bad in {
        "max_grad_norm": ("1.0", [1.0], 1j),
        "ema_decay": ("0.9", [0.9], 1j),
        "rounding_seed": ("0", [0]),
    }.items()
    for value in bad
}
# Either of the two.
ODD: dict[str, tuple[Options, str]] = {
    f"{name}={value!r}": ({name: value}, name)
    for name, bad in {
        "master_weights": (True, 32, torch.float32),
        "state_dtype": ("bfloat16", 16, float),
        "rounding_seed": (NAN, 1.5, 2**64),
    }.items()
    for value in bad
}
DECOUPLED = {"decoupled_weight_decay": True}
INDEPENDENT = {"lr_independent_weight_decay": True}
SPLIT, MASTERS = {"master_weights": "split"}, {"master_weights": "float32"}
STOCHASTIC = {"stochastic_rounding": True}
CONTRADICTIONS: dict[str, tuple[list[str], Options, str]] = {
    "independent L2": (["SGD", "Adam"], INDEPENDENT, "decoupled_weight_decay"),
    "independent L2 of some size": (
        ["SGD", "Adam"],
        {**INDEPENDENT, "weight_decay": 0.1, "decoupled_weight_decay": False},
        "decoupled_weight_decay",
    ),
}

# Optimizer, options, exception and message.
OURS: dict[str, tuple[str, Options, Any, str]] = {
    **{
        f"{name} {key}": (name, options, exception, pattern)
        for table, exception in [
            (VALUES, ValueError),
            (KINDS, TypeError),
            (ODD, (TypeError, ValueError)),
        ]
        for key, (options, pattern) in table.items()
        for name in NAMES
    },
    **{
        f"{name} {key}": (name, options, ValueError, pattern)
        for key, (names, options, pattern) in CONTRADICTIONS.items()
        for name in names
    },
}

# Optimizer, options, the words torch uses for it (and that ours shares), what the message shows.
TORCHS_VALUES: dict[str, tuple[str, Options, str, str]] = {
    f"{name} {option}={value}": (name, {option: value}, words, str(value))
    for name, option, words in [
        ("SGD", "lr", "Invalid learning rate"),
        ("SGD", "momentum", "Invalid momentum value"),
        ("SGD", "weight_decay", "Invalid weight_decay value"),
        ("Adam", "lr", "Invalid learning rate"),
        ("Adam", "eps", "Invalid epsilon value"),
        ("Adam", "weight_decay", "Invalid weight_decay value"),
        ("AdamW", "lr", "Invalid learning rate"),
        ("AdamW", "eps", "Invalid epsilon value"),
        ("AdamW", "weight_decay", "Invalid weight_decay value"),
    ]
    for value in (NAN, INF, -INF)
}
TORCHS_VALUES |= {
    f"SGD dampening={value}": ("SGD", {"dampening": value}, "Invalid dampening value", str(value))
    for value in (NAN, INF, -INF)
}
TORCHS_VALUES |= {
    f"{name} betas[{index}]={value}": (
        name,
        {"betas": (value, 0.9) if index == 0 else (0.9, value)},
        f"Invalid beta parameter at index {index}",
        str(value),
    )
    for name in ("Adam", "AdamW")
    for index, bad in enumerate([(1.0, -1.0, 1.5, NAN, INF, -INF), (1.5, -1.5, NAN, INF, -INF)])
    for value in bad
}
TORCHS_VALUES |= {
    "tensor lr=nan": ("Adam", {"lr": on_host(NAN)}, "Invalid learning rate", "nan"),
    "tensor lr=inf": ("SGD", {"lr": on_host(INF)}, "Invalid learning rate", "inf"),
    "numpy lr=nan": ("SGD", {"lr": np.float32(NAN)}, "Invalid learning rate", "nan"),
    "numpy eps=inf": ("AdamW", {"eps": np.float64(INF)}, "Invalid epsilon value", "inf"),
    "tensor beta=nan": (
        "Adam",
        {"betas": (on_host(0.9), on_host(NAN))},
        "Invalid beta parameter at index 1",
        "nan",
    ),
    "vector lr": ("AdamW", {"lr": on_host([1.0, 1.0])}, "Tensor lr must be 1-element", ""),
    "empty lr": ("AdamW", {"lr": on_host([])}, "Tensor lr must be 1-element", ""),
    "three betas": ("Adam", {"betas": (0.9, 0.99, 0.999)}, "betas must be a pair", ""),
    "one beta": ("AdamW", {"betas": 0.9}, "betas must be a pair", ""),
    "SGD differentiable": ("SGD", {"differentiable": True}, "differentiable=True", ""),
    "Adam differentiable": ("Adam", {"differentiable": True}, "differentiable=True", ""),
    "AdamW differentiable": ("AdamW", {"differentiable": True}, "differentiable=True", ""),
}

# Values of the wrong kind: TypeError with the option's name and what was found.
TORCHS_KINDS: dict[str, tuple[str, Options, str]] = {
    "text lr": ("AdamW", {"lr": "0.1"}, "lr must be a number.*'0.1'"),
    "None lr": ("SGD", {"lr": None}, "lr must be a number.*None"),
    "complex lr": ("SGD", {"lr": 1j}, "lr must be a number.*1j"),
    "list momentum": ("SGD", {"momentum": [0.9]}, r"momentum must be a number.*\[0.9\]"),
    "text beta": ("Adam", {"betas": (0.9, "x")}, r"betas\[1\] must be a number.*'x'"),
    "None eps": ("AdamW", {"eps": None}, "eps must be a number.*None"),
}
TORCHS = {
    **{key: (name, options, ValueError, words + ".*" + re.escape(shown))
       for key, (name, options, words, shown) in TORCHS_VALUES.items()},
    **{key: (name, options, TypeError, words)
       for key, (name, options, words) in TORCHS_KINDS.items()},
}  # fmt: skip
each_bad_option = pytest.mark.parametrize(
    ("name", "options", "exception", "pattern"), **by_id({**OURS, **TORCHS})
)


def params_with_grads(count: int = 2, dtype: torch.dtype = torch.bfloat16) -> list[Parameter]:
    params = [Parameter(torch.full((4,), float(i), dtype=dtype)) for i in range(count)]
    set_grads(params, 0)
    return params


def in_defaults(name: str, options: Options, exception: Any, pattern: str) -> None:
    with pytest.raises(exception, match=pattern):
        getattr(fusedopt, name)(params_with_grads(), **options)


def in_a_group(name: str, options: Options, exception: Any, pattern: str) -> None:
    first, second = params_with_grads()
    with pytest.raises(exception, match=f"{pattern}.*param group 1"):
        getattr(fusedopt, name)([{"params": [first]}, {"params": [second], **options}])


def added(name: str, options: Options, exception: Any, pattern: str) -> None:
    first, second = params_with_grads()
    optimizer = getattr(fusedopt, name)([first])
    with refused(optimizer, exception, f"{pattern}.*param group 1"):
        optimizer.add_param_group({"params": [second], **options})


def two_groups(name: str) -> Any:
    return getattr(fusedopt, name)([{"params": [param]} for param in params_with_grads()])


def edited(name: str, options: Options, exception: Any, pattern: str, steps: int = 0) -> None:
    """The first group, which is fine, is not stepped either."""
    optimizer = two_groups(name)
    train(optimizer, steps)
    optimizer.param_groups[1].update(options)
    for _ in range(2):
        with refused(optimizer, exception, f"{pattern}.*param group 1"):
            optimizer.step()


def in_a_checkpoint(name: str, options: Options, exception: Any, pattern: str) -> None:
    """Of an option that torch lacks the own value is kept."""
    optimizer = two_groups(name)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    ours = {k: v for k, v in options.items() if k in OFF and k != "decoupled_weight_decay"}
    saved["param_groups"][1].update(ours or options)
    if not ours:
        with refused(optimizer, exception, f"{pattern}.*param group 1"):
            optimizer.load_state_dict(saved)
        return
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[1]
    assert {key: group.get(key, OFF[key]) for key in ours} == {key: OFF[key] for key in ours}
    optimizer.step()


PLACES: dict[str, Callable[..., None]] = {
    "in the defaults": in_defaults,
    "in a group": in_a_group,
    "added": added,
    "edited at first": edited,
    "edited later": functools.partial(edited, steps=1),
    "in a checkpoint": in_a_checkpoint,
}


@each_bad_option
@pytest.mark.parametrize("place", **by_id(PLACES))
def test_refused(place: Any, name: str, options: Options, exception: Any, pattern: str) -> None:
    place(name, options, exception, pattern)


# Ends of a schedule of the decay, reached or missed by rounding: what a step takes them for.
DECAYS: dict[str, tuple[Any, float]] = {
    "one": (1.0, 1.0),
    "whole one": (1, 1.0),
    "above one": (1 + 1e-9, 1.0),
    "below zero": (-1e-17, 0.0),
}


@each_name
@pytest.mark.parametrize(("decay", "meant"), **by_id(DECAYS))
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "bias-corrected"])
def test_decay_at_the_ends(name: str, decay: Any, meant: float, corrected: bool) -> None:
    """Refused when the optimizer is made; later the average rests, or is the weight."""
    found = []
    for where in ("defaults", "group", "added", "edited"):
        params, options = [values(40, seed=0), values(40, seed=1)], {"ema_decay": decay}
        make: Any = getattr(fusedopt, name)
        shared = {"lr": 0.1, "ema_decay": 0.5, "ema_bias_correction": corrected}
        if where == "defaults":
            with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\)"):
                make(params, **{**shared, **options})
            continue
        first: Options = {"params": params[:1]}
        second: Options = {"params": params[1:], **({} if where == "edited" else options)}
        optimizer = make([first, *([] if where == "added" else [second])], **shared)
        if where == "added":
            optimizer.add_param_group(second)
        optimizer.param_groups[1].update(options)
        weights = []
        for seed in range(4):
            step_with(optimizer, [values(40, seed=2 + seed)])
            weights.append(params[1].clone())
        found.append(optimizer.state[params[1]]["ema_param"])
        if meant == 0.0:
            expected = weights[-1]
        else:
            expected = torch.stack(weights).double().mean(0).float() if corrected else weights[0]
        torch.testing.assert_close(found[-1], expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(each, found[0]) for each in found)


@each_name
@pytest.mark.parametrize("bad", [{"lr": NAN}, {"weight_decay": INF}], ids=str)
def test_a_bad_group_of_a_checkpoint_changes_nothing(name: str, bad: Options) -> None:
    """Not the params either, which a conversion of masters rewrites."""
    made = []
    for kind, seed in (("float32", 1), ("split", 2)):
        params = params_with_grads()
        groups = [{"params": [param]} for param in params]
        optimizer = getattr(fusedopt, name)(groups, lr=0.1, master_weights=kind)
        set_grads(params, seed)
        optimizer.step()
        made.append(optimizer)
    saved = copy.deepcopy(made[0].state_dict())
    saved["param_groups"][1].update(bad)
    before = snapshot(made[1])
    with pytest.raises(ValueError, match="param group 1"):
        made[1].load_state_dict(saved)
    assert snapshot(made[1]) == before


# What only the params can tell: ValueError of the step, which changes nothing.
BY_PARAMS: dict[str, tuple[Options, torch.dtype]] = {
    **{
        f"split masters of {dtype_id(dtype)}": (SPLIT, dtype)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.complex64)
    },
    "stochastic float16": (STOCHASTIC, torch.float16),
}


@each_name
@pytest.mark.parametrize(("options", "dtype"), **by_id(BY_PARAMS))
@pytest.mark.parametrize("when", ["made with them", "edited at first", "edited later"])
def test_wrong_for_these_params(name: str, options: Options, dtype: torch.dtype, when: str) -> None:
    fine, bad = params_with_grads(1)[0], params_with_grads(1, dtype)[0]
    at_first = options if when == "made with them" else {}
    optimizer = getattr(fusedopt, name)([("fine", fine), ("bad", bad)], **at_first)
    if when == "edited later":
        optimizer.step()
    optimizer.param_groups[0].update(options)
    option = next(iter(options))
    for _ in range(2):
        with refused(optimizer, ValueError, f"{option}.*'bad'|'bad'.*{option}"):
            optimizer.step()
    optimizer.param_groups[0].update({"master_weights": None, "stochastic_rounding": None})
    optimizer.step()


@each_name
@some_dtypes(torch.float32, torch.float64, torch.complex64)
def test_float32_masters_are_for_16_bits(name: str, dtype: torch.dtype) -> None:
    """Wider params are masters themselves: no state, and not a bit of difference."""
    found = []
    for options in ({}, MASTERS):
        param = values(40, dtype=dtype)
        optimizer = getattr(fusedopt, name)([param], lr=0.1, **options)
        step_with(optimizer, [values(40, dtype=dtype, seed=seed) for seed in (1, 2)])
        found.append(results(optimizer, param))
    assert same_bits(*found)


ON: Options = {
    "state_dtype": torch.bfloat16,
    "master_weights": "split",
    "stochastic_rounding": True,
    "rounding_seed": 2**32 - 1,
    "max_grad_norm": 1,
    "error_if_nonfinite": True,
    "ema_decay": 0,
    "ema_bias_correction": True,
    "lr_independent_weight_decay": True,
    "decoupled_weight_decay": True,
}


@each_name
def test_all_at_once(name: str) -> None:
    """Given to all groups, or to one; integers are numbers. AdamW is decoupled as it is."""
    options = {k: v for k, v in ON.items() if name != "AdamW" or k != "decoupled_weight_decay"}
    params = params_with_grads()
    for groups, defaults in [
        (params[:1], options),
        ([{"params": params[1:], **options}], {}),
    ]:
        optimizer = getattr(fusedopt, name)(groups, **defaults)
        assert {k: v for k, v in optimizer.param_groups[0].items() if k in options} == options
        optimizer.step()
        with optimizer.swap_ema():
            pass


@each_name
def test_keyword_only_and_off(name: str) -> None:
    signature = inspect.signature(getattr(fusedopt, name).__init__).parameters
    expected = {key: value for key, value in OFF.items() if key in signature}
    assert expected.keys() == OFF.keys() - (
        {"decoupled_weight_decay"} if name == "AdamW" else set()
    )
    for option, value in expected.items():
        assert signature[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert signature[option].default == value
        optimizer = getattr(fusedopt, name)(params_with_grads(), **{option: value})
        assert optimizer.defaults.get(option, value) == value
        # What is given is there to be read, even if it is off.
        is_there = (name, option) != ("SGD", "decoupled_weight_decay")
        assert (option in optimizer.param_groups[0]) == is_there
    untold = getattr(fusedopt, name)(params_with_grads()).param_groups[0].keys() & expected.keys()
    assert untold == ({"decoupled_weight_decay"} if name == "Adam" else set())
    torchs = inspect.signature(getattr(torch.optim, name).__init__).parameters
    positional = [p.name for p in signature.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [p.name for p in torchs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


@each_name
@pytest.mark.parametrize(
    "option", ["max_norm", "ema", "master_weight", "clip_grad_norm", "statedtype"]
)
def test_unknown_keyword(name: str, option: str) -> None:
    with pytest.raises(TypeError, match=option):
        getattr(fusedopt, name)(params_with_grads(), **{option: None})


def test_adamw_is_always_decoupled() -> None:
    with pytest.raises(TypeError, match="decoupled_weight_decay"):
        fusedopt.AdamW(params_with_grads(), decoupled_weight_decay=False)


# Tensors of one element, on the CPU, in any of the usual shapes and dtypes: numbers to torch.
TENSORS: dict[str, tuple[list[str], Options]] = {
    "lr": (NAMES, {"lr": 0.0625}),
    "weight_decay": (NAMES, {"weight_decay": 0.125}),
    "momentum": (["SGD"], {"momentum": 0.875}),
    "betas": (["Adam", "AdamW"], {"betas": (0.875, 0.96875)}),
    "all of SGD's": (["SGD"], {"lr": 0.0625, "weight_decay": 0.125, "momentum": 0.5}),
    "all of Adam's": (
        ["Adam", "AdamW"],
        {"lr": 0.0625, "weight_decay": 0.125, "betas": (0.5, 0.75), "eps": 2.0**-20},
    ),
}


def as_tensors(options: Options, shape: tuple[int, ...], dtype: torch.dtype) -> Options:
    def wrap(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(wrap(each) for each in value)
        return on_host(value, dtype=dtype).reshape(shape)

    return {name: wrap(value) for name, value in options.items()}


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@some_dtypes(torch.float32, torch.float64)
@pytest.mark.parametrize(
    ("name", "options"),
    **by_id({f"{n} {key}": (n, row[1]) for key, row in TENSORS.items() for n in row[0]}),
)
@pytest.mark.parametrize(
    "more", [{}, {"max_grad_norm": 0.5, "ema_decay": 0.75}], ids=["plain", "clipped and averaged"]
)
def test_tensors(name: str, options: Any, dtype: torch.dtype, shape: Any, more: Any) -> None:
    found = []
    for given in (options, as_tensors(options, shape, dtype)):
        param = values(300)
        optimizer = getattr(fusedopt, name)([param], **given, **more)
        step_with(optimizer, [values(300, seed=seed) for seed in (1, 2, 3)])
        found.append(results(optimizer, param))
    assert same_bits(*found)


@pytest.mark.parametrize("option", ["max_grad_norm", "ema_decay"])
@each_name
def test_other_options_as_tensors(name: str, option: str) -> None:
    """As a number, or refused: never something else."""
    found: list[dict[str, torch.Tensor]] = []
    for value in (0.5, on_host(0.5)):
        param = values(300)
        with contextlib.suppress(TypeError) if found else contextlib.nullcontext():
            optimizer = getattr(fusedopt, name)([param], **{option: value})
            step_with(optimizer, [values(300, seed=seed) for seed in (1, 2, 3)])
            found.append(results(optimizer, param))
    assert same_bits(found[0], found[-1])


@each_name
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_seeds_in_range(name: str, seed: int) -> None:
    params = params_with_grads()
    getattr(fusedopt, name)(params, stochastic_rounding=True, rounding_seed=seed).step()


@each_name
def test_nothing_is_measured_unless_asked_for(name: str) -> None:
    """Options that are off cost nothing, state included."""
    params = params_with_grads(dtype=torch.float32)
    optimizer = getattr(fusedopt, name)(params, lr=0.1)
    optimizer.step()
    assert optimizer.grad_norm is None
    assert optimizer.nonfinite_grads is None
    assert bool(optimizer.skipped) is False
    names = {key for state in optimizer.state.values() for key in state}
    assert names == ({"step", "exp_avg", "exp_avg_sq"} if name != "SGD" else set())


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"], ids=lambda key: f"no {key}")
def test_group_lacks_an_option(key: str) -> None:
    optimizer = fusedopt.AdamW(params_with_grads())
    del optimizer.param_groups[0][key]
    with refused(optimizer, ValueError, f"{key}.*param group 0"):
        optimizer.step()
