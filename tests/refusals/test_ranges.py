"""torch's ranges of hyper-parameters hold when an optimizer is made; schedules may leave them.

Later, and in single groups, torch checks nothing, and here only what no step makes sense with is
refused (test_options.py has those rows). The rest must step as unfused torch does.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ConstantLR, LinearLR, SequentialLR

import fusedopt
from support.device import DEVICE, on_host
from support.equality import assert_equal, assert_same_math
from support.optimizers import each_name, each_of_few_names, torch_reference
from support.pairs import in_pairs
from support.snapshots import record, refused
from support.tensors import by_id, params_of, set_grads

Options = dict[str, Any]

NESTEROV = "Nesterov momentum requires a momentum and zero dampening"
DECAY, EPS = {"weight_decay": "Invalid weight_decay value"}, {"eps": "Invalid epsilon value"}
# Of the others, beside lr and betas, what may be below 0 later, and the words for it.
OTHERS: dict[str, dict[str, str]] = {
    "RMSprop": {
        **{**DECAY, **EPS, "momentum": "Invalid momentum value", "alpha": "Invalid alpha value"}
    },
    "Adagrad": {**DECAY, **EPS, "lr_decay": "Invalid lr_decay value"},
    "Adadelta": {**DECAY, **EPS, "rho": "Invalid rho value"},
    "Adamax": {**DECAY, **EPS},
    "NAdam": {**DECAY, **EPS},
    "RAdam": {**DECAY, **EPS},
    "ASGD": {**DECAY, "lambd": "Invalid lambd value", "alpha": "Invalid alpha value"},
    "Rprop": {},
}
FIRST_BETAS = (((-0.125, 0.99), 0), ((0.9, -0.125), 1))
ALL_BETAS = (*FIRST_BETAS, ((-0.75, 0.99), 0), ((-1e-17, 0.99), 0), ((0.9, 1.0), 1))
BETAS = {
    **dict.fromkeys(("Adam", "AdamW"), ALL_BETAS),
    **dict.fromkeys(("Adamax", "NAdam", "RAdam"), FIRST_BETAS),
}
# Optimizer, options, the words with which both libraries refuse them at construction.
AT_FIRST: dict[str, tuple[str, Options, str]] = {
    **{
        f"{name} {option}={value}": (name, {option: value}, f"{words}: {re.escape(str(value))}")
        for name, option, words in [
            ("SGD", "lr", "Invalid learning rate"),
            ("SGD", "momentum", "Invalid momentum value"),
            ("SGD", "weight_decay", "Invalid weight_decay value"),
            *(
                (name, *row)
                for name in ("Adam", "AdamW")
                for row in [
                    ("lr", "Invalid learning rate"),
                    ("eps", "Invalid epsilon value"),
                    ("weight_decay", "Invalid weight_decay value"),
                ]
            ),
        ]
        for value in (-1.0, -0.125, -1e-18)
    },
    **{
        f"{name} {option}=-0.125": (name, {option: -0.125}, f"{words}: -0.125")
        for name, options in OTHERS.items()
        for option, words in [*options.items(), ("lr", "Invalid learning rate")]
    },
    **{
        f"{name} betas={betas}": (name, {"betas": betas}, f"Invalid beta parameter at index {at}")
        for name, rows in BETAS.items()
        for betas, at in rows
    },
    "tensor lr=-1": ("SGD", {"lr": on_host(-1.0)}, "Invalid learning rate"),
    "tensor of one lr=-0.1": (
        "AdamW",
        {"lr": on_host([-0.1], dtype=torch.float64)},
        "Invalid learning rate",
    ),
    "numpy lr": ("SGD", {"lr": np.float32(-0.25)}, "Invalid learning rate"),
    "numpy 0-dim lr": ("Adam", {"lr": np.array(-0.25)}, "Invalid learning rate"),
    "numpy beta": ("Adam", {"betas": (0.9, np.float64(1.0))}, "Invalid beta parameter at index 1"),
    "nesterov without momentum": ("SGD", {"nesterov": True}, NESTEROV),
    "nesterov with negative momentum": ("SGD", {"nesterov": True, "momentum": -0.5}, "momentum"),
    "nesterov with dampening": (
        "SGD",
        {"nesterov": True, "momentum": 0.9, "dampening": 0.25},
        NESTEROV,
    ),
    "nesterov with dampening -1e-17": (
        "SGD",
        {"nesterov": True, "momentum": 0.9, "dampening": -1e-17},
        NESTEROV,
    ),
}
each_row = pytest.mark.parametrize(("name", "options", "words"), **by_id(AT_FIRST))
LIBRARIES: dict[str, Any] = {"ours": fusedopt, "theirs": torch.optim}


def two_params() -> list[Parameter]:
    return [Parameter(torch.linspace(-2, 2, 9, dtype=torch.float64, device=DEVICE)) for _ in "ab"]


def make(library: Any, name: str, groups: Any, **options: Any) -> Any:
    if library is fusedopt:
        return getattr(fusedopt, name)(groups, **{"lr": 0.1, **options})
    return torch_reference(name, groups, **{"lr": 0.1, **options})


def step(optimizer: Any, seed: int) -> None:
    set_grads(params_of(optimizer), seed)
    optimizer.step()


@each_row
@pytest.mark.parametrize("library", **by_id(LIBRARIES))
def test_refused_at_construction(library: Any, name: str, options: Options, words: str) -> None:
    is_new = name == "ASGD" and options.keys() & {"lambd", "alpha"}
    if is_new and library is torch.optim and torch.__version__ < "2.15":
        pytest.skip("torch refuses it from 2.15 on")
    with pytest.raises(ValueError, match=words):
        make(library, name, two_params(), **options)


def in_a_group(library: Any, name: str, options: Options) -> Any:
    first, second = two_params()
    return make(library, name, [{"params": [first]}, {"params": [second], **options}])


def added(library: Any, name: str, options: Options) -> Any:
    first, second = two_params()
    optimizer = make(library, name, [first])
    step(optimizer, 0)
    optimizer.add_param_group({"params": [second], **options})
    return optimizer


def edited(library: Any, name: str, options: Options) -> Any:
    optimizer = in_a_group(library, name, {})
    step(optimizer, 0)
    optimizer.param_groups[1].update(options)
    return optimizer


def loaded(library: Any, name: str, options: Options) -> Any:
    """From a run that ended with these options."""
    ended = edited(library, name, options)
    optimizer = in_a_group(library, name, {})
    with torch.no_grad():
        for group, old in zip(optimizer.param_groups, ended.param_groups, strict=True):
            group["params"][0].copy_(old["params"][0])
    optimizer.load_state_dict(copy.deepcopy(ended.state_dict()))
    return optimizer


PLACES: dict[str, Callable[[Any, str, Options], Any]] = {
    "in a group": in_a_group,
    "added": added,
    "edited": edited,
    "loaded": loaded,
}
each_place = pytest.mark.parametrize("place", **by_id(PLACES))


@each_row
@each_place
def test_taken_later(place: Any, name: str, options: Options, words: str) -> None:
    del words
    ours, theirs = (place(library, name, options) for library in LIBRARIES.values())
    for seed in range(1, 5):
        for optimizer in (ours, theirs):
            step(optimizer, seed)
    if place in (in_a_group, added) and options.get("betas", (0, 0))[1] == 1:
        # There is no second moment and never will be: 0 / 0 in torch, a param at rest here.
        assert all(param.isfinite().all() for param in params_of(ours))
        assert not all(param.isfinite().all() for param in params_of(theirs))
        return
    assert_same_math_or_nan(params_and_moments(ours), params_and_moments(theirs))


def assert_same_math_or_nan(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14, equal_nan=True)


def params_and_moments(optimizer: Any) -> dict[str, Any]:
    return {name: t for name, t in record(optimizer).items() if not name.startswith("step")}


# Options that change during a run, one entry for each step; torch takes all of them.
CHANGES: dict[str, tuple[str, Options, list[Options]]] = {
    "ascent for a while": ("SGD", {}, [{"lr": 0.1}, {"lr": -0.1}, {"lr": -0.1}, {"lr": 0.1}]),
    "ascent of AdamW": ("AdamW", {}, [{"lr": 0.1}, {"lr": -0.1}, {"lr": -0.1}, {"lr": 0.1}]),
    "nesterov's momentum warmed up": (
        "SGD",
        {"momentum": 0.9, "nesterov": True},
        [{"momentum": 0.0}, {"momentum": 0.0}, {"momentum": 0.5}, {"momentum": 0.9}],
    ),
    "nesterov's momentum put to 0": (
        "SGD",
        {"momentum": 0.9, "nesterov": True},
        [{}, {"momentum": 0.0}, {}, {"momentum": 0.9}],
    ),
    "nesterov's dampening": (
        "SGD",
        {"momentum": 0.9, "nesterov": True},
        [{}, {"dampening": 0.1}, {"dampening": 1.0}, {"dampening": 0.0}],
    ),
    "nesterov switched on": ("SGD", {}, [{}, {"nesterov": True}, {"momentum": 0.5}, {}]),
    "second moment frozen": ("Adam", {}, [{}, {"betas": (0.9, 1.0)}, {}, {"betas": (0.9, 0.99)}]),
    "betas as a list": ("AdamW", {}, [{}, {"betas": [0.5, 0.75]}, {}, {"betas": (0.9, 0.99)}]),
    "eps of 0": ("Adam", {}, [{}, {"eps": 0.0}, {"eps": 0}, {}]),
    "decay below 0 by rounding": (
        "AdamW",
        {},
        [{"weight_decay": 0.1 - 0.1 / 3 * i} for i in range(5)],
    ),
    "growth": ("Adam", {}, [{"weight_decay": -0.1}] * 3),
    "numpy": (
        "AdamW",
        {},
        [{"lr": np.float64(0.5)}, {"lr": np.float64(-1e-20)}, {"lr": np.array(0.1)}],
    ),
    "numpy float32": (
        "SGD",
        {},
        [{"lr": np.float32(0.5)}, {"lr": np.float32(-1e-20)}, {"lr": np.float32(-0.1)}],
    ),
    "tensors": (
        "SGD",
        {},
        [{"lr": on_host(0.5)}, {"lr": on_host(-1e-20)}, {"lr": on_host([-0.1])}],
    ),
    "ascent of RMSprop": ("RMSprop", {}, [{}, {"lr": -0.1}, {"alpha": 1.0}, {"alpha": 0.0}]),
    "Adagrad without decay": ("Adagrad", {"lr_decay": 0.5}, [{}, {"lr_decay": 0.0}, {"lr": -0.1}]),
    "Adadelta's rho": ("Adadelta", {}, [{}, {"rho": 0.0}, {"rho": 1.0}, {"rho": 0.5}]),
    "Adamax without decay of the norm": ("Adamax", {}, [{}, {"betas": (0.9, 1.0)}, {}, {}]),
    "ascent of RAdam": ("RAdam", {}, [{}, {"lr": -0.1}, {}, {"weight_decay": -0.1}, {}, {}, {}]),
    "ASGD's decay put to 0": ("ASGD", {"lambd": 0.5}, [{}, {"lambd": 0.0}, {"alpha": 0.0}, {}]),
    "ASGD's lambd below 0": ("ASGD", {}, [{"lambd": -0.5}, {"lambd": -0.25}, {}, {}]),
    "ASGD's growing rate": ("ASGD", {"lambd": 0.5, "t0": -3.5}, [{"alpha": -1.0}, {}, {}]),
    "Rprop's lr": ("Rprop", {}, [{}, {"lr": -1.0}, {}, {"step_sizes": (0.0, 0.05)}, {}]),
    "parameter": ("Adam", {}, [{"lr": Parameter(on_host(0.05, dtype=torch.float64))}, {"lr": 0.0}]),
}


@pytest.mark.parametrize(("name", "options", "changes"), **by_id(CHANGES))
def test_changed_on_the_way(name: str, options: Options, changes: list[Options]) -> None:
    made = [make(library, name, two_params(), **options) for library in LIBRARIES.values()]
    for seed, change in enumerate(changes):
        for optimizer in made:
            optimizer.param_groups[0].update(change)
            step(optimizer, seed)
    ours, theirs = made
    assert_same_math(params_and_moments(ours), params_and_moments(theirs))


STARTS = [1.0, 0.7, 0.5, 1 / 3, 0.3, 0.1]
SCHEDULES: dict[str, Callable[[Any, float, int], Any]] = {
    "LinearLR": lambda optimizer, start, length: LinearLR(optimizer, start, 0.0, length),
    "SequentialLR": lambda optimizer, start, length: SequentialLR(
        optimizer, [ConstantLR(optimizer, 1.0, 2), LinearLR(optimizer, start, 0.0, length)], [2]
    ),
}


@pytest.mark.unemulated
@pytest.mark.unsanitized  # no other accesses than in fewer steps
@in_pairs(
    each_of_few_names,
    pytest.mark.parametrize("start", STARTS, ids=lambda start: f"{start:.3g}"),
    pytest.mark.parametrize("schedule", **by_id(SCHEDULES)),
)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_linear_decay_to_zero(name: str, start: float, schedule: Any) -> None:
    """Ends at an lr of about -1e-20 for many lengths; the loop and a resumed one step on."""
    negative = 0
    for length in [*range(2, 26), 39, 100]:
        made = []
        for library in LIBRARIES.values():
            optimizer = make(library, name, two_params(), lr=1e-3)
            scheduler = schedule(optimizer, start, length)
            set_grads(optimizer, 0)
            for _ in range(length + 4):
                optimizer.step()
                scheduler.step()
            negative += optimizer.param_groups[0]["lr"] < 0
            resumed = make(library, name, two_params(), lr=1e-3)
            resumed.load_state_dict(optimizer.state_dict())
            assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
            step(resumed, 1)
            made.append(params_of(optimizer) + params_of(resumed))
        assert_same_math(*made)
    assert negative or start in (0.5, 1.0)


@each_name
@pytest.mark.parametrize("length", [3, 7, 10, 11, 30])
def test_lr_taken_down_by_hand(name: str, length: int) -> None:
    made = [make(library, name, two_params(), lr=1e-3) for library in LIBRARIES.values()]
    for seed in range(length + 1):
        for optimizer in made:
            step(optimizer, seed)
            optimizer.param_groups[0]["lr"] -= 1e-3 / length
    assert_same_math(*(params_of(optimizer) for optimizer in made))


# What no place takes: how groups contradict themselves, and what has no meaning in any step.
CONFLICTS: dict[str, tuple[str, Options, str]] = {
    "differentiable": ("Adam", {"differentiable": True}, "differentiable"),
    "independent L2": ("SGD", {"lr_independent_weight_decay": True}, "decoupled_weight_decay"),
    "cautious L2": ("SGD", {"cautious_weight_decay": True}, "decoupled_weight_decay"),
    "unknown masters": ("AdamW", {"master_weights": "fp32"}, "master_weights"),
    "state dtype": ("SGD", {"state_dtype": torch.float16}, "state_dtype"),
    "beta1 of 1": ("Adam", {"betas": (1.0, 0.99)}, "index 0"),
    "beta1 of -1": ("Adam", {"betas": (-1.0, 0.99)}, "index 0"),
    "beta2 above 1": ("Adam", {"betas": (0.9, 1 + 1e-15)}, "index 1"),
    "beta2 below -1": ("Adam", {"betas": (0.9, -1 - 1e-15)}, "index 1"),
    "beta2 of 1, of RAdam": ("RAdam", {"betas": (0.9, 1.0)}, "index 1"),  # torch divides by 0
    "alpha above 1": ("RMSprop", {"alpha": 1.01}, "Invalid alpha value: 1.01"),
    "alpha below -1": ("RMSprop", {"alpha": -1.01}, "Invalid alpha value: -1.01"),
    "rho above 1": ("Adadelta", {"rho": 1.01}, "Invalid rho value: 1.01"),
    "start below 0": (
        "Adagrad",
        {"initial_accumulator_value": -0.5},
        "Invalid initial_accumulator_value value: -0.5",
    ),
    "growth of momentum": (
        "NAdam",
        {"momentum_decay": -0.5},
        "Invalid momentum_decay value: -0.5",
    ),
    **{  # with some of these, torch takes signs for factors
        f"etas={etas}": ("Rprop", {"etas": etas}, f"Invalid eta values: {etas[0]}, {etas[1]}")
        for etas in [(0.0, 1.2), (1.0, 1.2), (0.5, 1.0), (1.2, 0.5), (-0.5, 1.2)]
    },
    "step size below 0": ("Rprop", {"step_sizes": (-0.1, 1.0)}, "Invalid step sizes: -0.1, 1.0"),
    "step sizes the wrong way": (
        "Rprop",
        {"step_sizes": (2.0, 1.0)},
        "Invalid step sizes: 2.0, 1.0",
    ),
}
OWN = {"lr_independent_weight_decay", "cautious_weight_decay", "master_weights", "state_dtype"}


@pytest.mark.parametrize(("name", "options", "words"), **by_id(CONFLICTS))
@each_place
def test_refused_everywhere(place: Any, name: str, options: Options, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(fusedopt, name, two_params(), **options)
    if place is not edited:
        if place is loaded and not options.keys() & OWN:
            optimizer = in_a_group(fusedopt, name, {})
            saved = optimizer.state_dict()
            saved["param_groups"][1].update(options)
            with refused(optimizer, ValueError, words):
                optimizer.load_state_dict(saved)
        elif place is not loaded:  # torch lacks the others, and they are not loaded
            with pytest.raises(ValueError, match=words):
                place(fusedopt, name, options)
        return
    optimizer = edited(fusedopt, name, options)
    with refused(optimizer, ValueError, words):
        optimizer.step()


@each_name
def test_nothing_is_added_if_a_group_is_refused(name: str) -> None:
    first, second = two_params()
    optimizer = make(fusedopt, name, [first])
    step(optimizer, 0)
    with refused(optimizer, ValueError, "param group 1"):
        optimizer.add_param_group({"params": [second], "lr": float("nan")})
    optimizer.add_param_group({"params": [second], "lr": -0.5})
    twin = make(fusedopt, name, [{"params": [Parameter(second.detach().clone())], "lr": -0.5}])
    for each in (optimizer, twin):
        set_grads([each.param_groups[-1]["params"][0]], 1)
        each.step()
    assert_equal(optimizer.param_groups[-1]["params"][0], twin.param_groups[-1]["params"][0])


@pytest.mark.parametrize("kind", ["tuple", "list", "numpy", "tensor", "tensors"])
def test_betas_of_any_sequence(kind: str) -> None:
    betas: Any = {
        "tuple": (0.8, 0.9),
        "list": [0.8, 0.9],
        "numpy": np.array([0.8, 0.9]),
        "tensor": torch.tensor([0.8, 0.9], dtype=torch.float64, device="cpu"),
        "tensors": (torch.tensor(0.8, device="cpu", dtype=torch.float64), 0.9),
    }[kind]
    results = []
    for given in (betas, (0.8, 0.9)):
        param = Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = fusedopt.Adam([param], lr=0.1)
        for _ in range(3):
            optimizer.param_groups[0]["betas"] = given
            param.grad = torch.ones_like(param)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=0, atol=0)
