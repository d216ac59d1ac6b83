"""Arguments that torch lacks: how they may be given, and what they mean at their ends."""

import contextlib
import inspect
from typing import Any

import pytest
import torch

import fusedopt
from support.device import on_host
from support.equality import same_bits
from support.optimizers import (
    ALL_NAMES,
    Case,
    each_of_all_names,
    each_of_few_names,
    step_with,
)
from support.pairs import in_pairs
from support.settings import OFF
from support.snapshots import results
from support.tensors import by_id, params_with_grads, some_dtypes, values

Options = dict[str, Any]
MASTERS = {"master_weights": "float32"}


# Ends of a schedule of the decay, reached or missed by rounding: what a step takes them for.
DECAYS: dict[str, tuple[Any, float]] = {
    "one": (1.0, 1.0),
    "whole one": (1, 1.0),
    "above one": (1 + 1e-9, 1.0),
    "below zero": (-1e-17, 0.0),
}


@each_of_few_names
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


@each_of_all_names
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
    "cautious_update": True,
    "cautious_weight_decay": True,
    "decoupled_weight_decay": True,
}


# What has no decay that is decoupled, or no other.
DECOUPLED = {
    *("decoupled_weight_decay", "lr_independent_weight_decay"),
    *("cautious_update", "cautious_weight_decay"),
}
LACK = {
    **dict.fromkeys(("RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop"), DECOUPLED),
    **{name: {"decoupled_weight_decay"} for name in ("AdamW", "Lion")},
}


@each_of_all_names
def test_all_at_once(name: str) -> None:
    """Given to all groups, or to one; integers are numbers."""
    options = {k: v for k, v in ON.items() if Case(name).takes(k)}
    params = params_with_grads()
    for groups, defaults in [(params[:1], options), ([{"params": params[1:], **options}], {})]:
        optimizer = getattr(fusedopt, name)(groups, **defaults)
        held = {k: v for k, v in optimizer.param_groups[0].items() if k in options}
        assert held == {**options, "state_dtype": "bfloat16"}
        optimizer.step()
        with optimizer.swap_ema():
            pass


@each_of_all_names
def test_keyword_only_and_off(name: str) -> None:
    signature = inspect.signature(getattr(fusedopt, name).__init__).parameters
    expected = {key: value for key, value in OFF.items() if key in signature}
    assert expected.keys() == OFF.keys() - LACK.get(name, set())
    torchs = getattr(torch.optim, name, None)
    is_torchs = inspect.signature(torchs.__init__).parameters if torchs else {}
    for option, value in expected.items():
        assert option in is_torchs or signature[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert signature[option].default == value
        optimizer = getattr(fusedopt, name)(params_with_grads(), **{option: value})
        assert optimizer.defaults.get(option, value) == value
        # What is given is there to be read, even if it is off.
        is_there = (name, option) != ("SGD", "decoupled_weight_decay")
        assert (option in optimizer.param_groups[0]) == is_there
    untold = getattr(fusedopt, name)(params_with_grads()).param_groups[0].keys() & expected.keys()
    assert untold == expected.keys() & is_torchs.keys()
    positional = [p.name for p in signature.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if torchs:
        theirs = is_torchs.values()
        assert positional == [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]


@each_of_all_names
@pytest.mark.parametrize(
    "option", ["max_norm", "ema", "master_weight", "clip_grad_norm", "statedtype"]
)
def test_unknown_keyword(name: str, option: str) -> None:
    with pytest.raises(TypeError, match=option):
        getattr(fusedopt, name)(params_with_grads(), **{option: None})


@pytest.mark.parametrize("name", LACK)
def test_always_decoupled_or_never(name: str) -> None:
    with pytest.raises(TypeError, match="decoupled_weight_decay"):
        getattr(fusedopt, name)(params_with_grads(), decoupled_weight_decay=False)


# Tensors of one element, on the CPU, in any of the usual shapes and dtypes: numbers to torch.
TENSORS: dict[str, tuple[list[str], Options]] = {
    "lr": (ALL_NAMES, {"lr": 0.0625}),
    "weight_decay": (["SGD", "Adam", "AdamW", "ASGD"], {"weight_decay": 0.125}),
    "momentum": (["SGD", "RMSprop"], {"momentum": 0.875}),
    "betas": (["Adam", "AdamW", "Lion"], {"betas": (0.875, 0.96875)}),
    "more": (["Adagrad", "RMSprop", "Adadelta"], {"eps": 2.0**-20, "weight_decay": 0.125}),
    "most": (["Adamax", "NAdam", "RAdam"], {"betas": (0.5, 0.75), "eps": 2.0**-20}),
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


@in_pairs(
    pytest.mark.parametrize("shape", [(), (1,)], ids=str),
    some_dtypes(torch.float32, torch.float64),
    pytest.mark.parametrize(
        ("name", "options"),
        **by_id({f"{n} {key}": (n, row[1]) for key, row in TENSORS.items() for n in row[0]}),
    ),
    pytest.mark.parametrize(
        "more",
        [{}, {"max_grad_norm": 0.5, "ema_decay": 0.75}],
        ids=["plain", "clipped and averaged"],
    ),
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
@each_of_all_names
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


@each_of_all_names
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_seeds_in_range(name: str, seed: int) -> None:
    params = params_with_grads()
    getattr(fusedopt, name)(params, stochastic_rounding=True, rounding_seed=seed).step()


@each_of_all_names
def test_nothing_is_measured_unless_asked_for(name: str) -> None:
    """Options that are off cost nothing, state included."""
    params = params_with_grads(dtype=torch.float32)
    optimizer = getattr(fusedopt, name)(params, lr=0.1)
    optimizer.step()
    assert optimizer.grad_norm is None
    assert optimizer.nonfinite_grads is None
    assert bool(optimizer.skipped) is False
    names = {key for state in optimizer.state.values() for key in state}
    assert names == Case(name, {"lr": 0.1}).state_names
