"""Options: bad values, contradictions, wrong kinds, wherever they come from.

Bad ones are those that no step makes sense with: test_ranges.py has those that torch refuses for an
optimizer's defaults only.
"""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch

import fusedopt
from support.device import on_host
from support.optimizers import FEW_NAMES, each_of_all_names, train
from support.settings import OFF
from support.snapshots import refused, snapshot
from support.tensors import by_id, dtype_id, params_with_grads, set_grads

NAN, INF = float("nan"), float("inf")
Options = dict[str, Any]


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
        "stochastic_rounding": ("no", b"1"),
        "error_if_nonfinite": ("False",),
        "ema_bias_correction": ("",),
    }.items()
    for value in bad
}
# Either of the two.
ODD: dict[str, tuple[Options, str]] = {
    f"{name}={value!r}": ({name: value}, name)
    for name, bad in {
        "master_weights": (True, 32, torch.float32),
        "state_dtype": ("float16", "torch.float32", "BFLOAT16", "", 16, float),
        "rounding_seed": (NAN, 1.5, 2**64),
    }.items()
    for value in bad
}
DECOUPLED = {"decoupled_weight_decay": True}
INDEPENDENT = {"lr_independent_weight_decay": True}
CAUTIOUS = {"cautious_weight_decay": True}
SPLIT, MASTERS = {"master_weights": "split"}, {"master_weights": "float32"}
STOCHASTIC = {"stochastic_rounding": True}
L2_OR_NOT = ["SGD", "Adam", "NAdam", "RAdam"]
CONTRADICTIONS: dict[str, tuple[list[str], Options, str]] = {
    "independent L2": (L2_OR_NOT, INDEPENDENT, "decoupled_weight_decay"),
    "cautious L2": (L2_OR_NOT, CAUTIOUS, "cautious_weight_decay needs decoupled_weight_decay"),
    "cautious L2 of some size": (
        L2_OR_NOT,
        {**CAUTIOUS, "weight_decay": 0.1, "decoupled_weight_decay": False},
        "cautious_weight_decay needs decoupled_weight_decay",
    ),
    "independent L2 of some size": (
        L2_OR_NOT,
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
        for name in FEW_NAMES
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
# Of others, beside lr and betas.
WORDS: dict[str, dict[str, str]] = {
    "RMSprop": {"momentum": "momentum value", "alpha": "alpha value", "eps": "epsilon value"},
    "Adagrad": {
        "lr_decay": "lr_decay value",
        "initial_accumulator_value": "initial_accumulator_value value",
    },
    "Adadelta": {"rho": "rho value", "eps": "epsilon value"},
    "Adamax": {"eps": "epsilon value", "weight_decay": "weight_decay value"},
    "NAdam": {"momentum_decay": "momentum_decay value"},
    "ASGD": {"lambd": "lambd value", "alpha": "alpha value", "t0": "t0 value"},
}
TORCHS_VALUES |= {
    f"{name} {option}={value}": (name, {option: value}, f"Invalid {words}", str(value))
    for name, options in WORDS.items()
    for option, words in options.items()
    for value in (NAN, INF)
}
TORCHS_VALUES |= {
    f"{name} lr=nan": (name, {"lr": NAN}, "Invalid learning rate", "nan")
    for name in (*WORDS, "RAdam", "Rprop", "Lion")
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
    "RMSprop differentiable": ("RMSprop", {"differentiable": True}, "differentiable=True", ""),
    "beta of NAdam": ("NAdam", {"betas": (0.9, NAN)}, "Invalid beta parameter at index 1", "nan"),
    "beta of RAdam": ("RAdam", {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0", "1.0"),
    "beta of Lion": ("Lion", {"betas": (0.9, INF)}, "Invalid beta parameter at index 1", "inf"),
    "eta of nan": ("Rprop", {"etas": (NAN, 1.2)}, "Invalid eta values", "nan, 1.2"),
    "eta of inf": ("Rprop", {"etas": (0.5, INF)}, "Invalid eta values", "0.5, inf"),
    "step size of nan": ("Rprop", {"step_sizes": (1e-6, NAN)}, "Invalid step sizes", "1e-06, nan"),
    "step size of inf": ("Rprop", {"step_sizes": (1e-6, INF)}, "Invalid step sizes", "1e-06, inf"),
    "three etas": ("Rprop", {"etas": (0.5, 1.2, 2.0)}, "etas must be a pair", ""),
    "one step size": ("Rprop", {"step_sizes": 0.1}, "step_sizes must be a pair", ""),
}

# Values of the wrong kind: TypeError with the option's name and what was found.
TORCHS_KINDS: dict[str, tuple[str, Options, str]] = {
    "text lr": ("AdamW", {"lr": "0.1"}, "lr must be a number.*'0.1'"),
    "None lr": ("SGD", {"lr": None}, "lr must be a number.*None"),
    "complex lr": ("SGD", {"lr": 1j}, "lr must be a number.*1j"),
    "list momentum": ("SGD", {"momentum": [0.9]}, r"momentum must be a number.*\[0.9\]"),
    "text beta": ("Adam", {"betas": (0.9, "x")}, r"betas\[1\] must be a number.*'x'"),
    "None eps": ("AdamW", {"eps": None}, "eps must be a number.*None"),
    "None alpha": ("RMSprop", {"alpha": None}, "alpha must be a number.*None"),
    "text rho": ("Adadelta", {"rho": "0.9"}, "rho must be a number.*'0.9'"),
    "None lr_decay": ("Adagrad", {"lr_decay": None}, "lr_decay must be a number.*None"),
    "None momentum_decay": ("NAdam", {"momentum_decay": None}, "momentum_decay must be a .*None"),
    "list t0": ("ASGD", {"t0": [1]}, r"t0 must be a number.*\[1\]"),
    "text eta": ("Rprop", {"etas": (0.5, "x")}, r"etas\[1\] must be a number.*'x'"),
    "two maximize": ("SGD", {"maximize": torch.ones(2)}, "maximize must be True or False.*tensor"),
    "text maximize": ("SGD", {"maximize": "False"}, "maximize must be True or False.*'False'"),
    "text nesterov": ("SGD", {"momentum": 0.9, "nesterov": b"1"}, "nesterov must be .*b'1'"),
    "text capturable": ("Adam", {"capturable": "False"}, "capturable must be .*'False'"),
    "two amsgrad": ("AdamW", {"amsgrad": torch.ones(2)}, "amsgrad must be True or False.*tensor"),
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


def edited_later(name: str, options: Options, exception: Any, pattern: str) -> None:
    edited(name, options, exception, pattern, steps=1)


PLACES = (in_defaults, in_a_group, added, edited, edited_later, in_a_checkpoint)


@each_bad_option
def test_refused(name: str, options: Options, exception: Any, pattern: str) -> None:
    for place in PLACES:
        place(name, options, exception, pattern)


@each_of_all_names
@pytest.mark.parametrize("bad", [{"lr": NAN}, {"lr": INF}], ids=str)
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


@each_of_all_names
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


@pytest.mark.parametrize(("name", "kwargs"), [("AdamW", {}), ("SGD", {"momentum": 0.9})])
def test_narrow_states_are_for_real_parameters(name: str, kwargs: Options) -> None:
    fine, bad = params_with_grads(1)[0], params_with_grads(1, torch.complex64)[0]
    make = getattr(fusedopt, name)
    optimizer = make([("fine", fine), ("bad", bad)], state_dtype=torch.bfloat16, **kwargs)
    with refused(optimizer, ValueError, "state_dtype=torch.bfloat16 is for real .*'bad'"):
        optimizer.step()
    fusedopt.SGD([bad], state_dtype=torch.bfloat16).step()  # that has no state


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("AdamW", key) for key in ("lr", "betas", "eps", "weight_decay")),
        *(("RMSprop", key) for key in ("alpha", "eps", "momentum")),
        *(("ASGD", key) for key in ("lambd", "alpha", "t0", "weight_decay")),
        *(("Rprop", key) for key in ("lr", "etas", "step_sizes")),
        *(("Adadelta", "rho"), ("Adagrad", "lr_decay"), ("NAdam", "momentum_decay")),
    ],
    ids=lambda key: key,
)
def test_group_lacks_an_option(name: str, key: str) -> None:
    optimizer = getattr(fusedopt, name)(params_with_grads())
    del optimizer.param_groups[0][key]
    with refused(optimizer, ValueError, f"{key}.*param group 0"):
        optimizer.step()
