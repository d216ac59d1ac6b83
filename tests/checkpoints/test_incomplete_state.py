"""State with a part missing is refused, at load and in the step, by parameter and name.

0.1.0 filled it up with zeros: a checkpoint without `exp_avg_sq` gave a first step of ten times lr
(also pytorch/torchtitan#848, where `step` was lost; pytorch/pytorch#7499 and ultralytics/yolov3#80,
checkpoints of other optimizers). What an option needs that was switched on later is made.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.device import DEVICE, on_host
from support.equality import both_ways
from support.optimizers import each_adam
from support.snapshots import refused


def make(name: str, **options: Any) -> tuple[Any, list[Parameter]]:
    params = [Parameter(torch.full((4,), float(i))) for i in range(3)]
    named = list(zip(("first", "middle", "last"), params, strict=True))
    return getattr(fusedopt, name)(named, lr=0.01, **options), params


def step(optimizer: Any, params: list[Parameter], count: int = 1) -> None:
    for _ in range(count):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def drop(entries: dict[str, Any]) -> None:
        for name in names:
            del entries[name]

    return drop


def only(**entries: Any) -> Callable[[dict[str, Any]], None]:
    def replace(old: dict[str, Any]) -> None:
        old.clear()
        old.update(entries)

    return replace


def none_for(*names: str) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries.update(dict.fromkeys(names))


# How a state comes to lack something, and the name that the message must give.
TORSOS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no step": (without("step"), "step"),
    "no exp_avg": (without("exp_avg"), "exp_avg"),
    "no exp_avg_sq": (without("exp_avg_sq"), "exp_avg_sq"),
    "step alone": (without("exp_avg", "exp_avg_sq"), "exp_avg"),
    "no moment but the second": (without("exp_avg", "step"), "exp_avg"),
    "None for exp_avg_sq": (none_for("exp_avg_sq"), "exp_avg_sq"),
    "None for step": (none_for("step"), "step"),
    "8-bit Adam": (
        only(step=on_host(100.0), state1=torch.ones(4), state2=torch.ones(4)), "exp_avg"
    ),
    "Adamax": (
        only(step=on_host(9.0), exp_avg=torch.ones(4), exp_inf=torch.ones(4)), "exp_avg_sq"
    ),
    "RMSprop": (only(step=on_host(9.0), square_avg=torch.ones(4)), "exp_avg"),
    "Adagrad": (only(step=on_host(9.0), sum=torch.ones(4)), "exp_avg"),
    "SGD": (only(momentum_buffer=torch.ones(4)), "exp_avg"),
    "something of the user's": (only(note="mine"), "exp_avg"),
    "max_exp_avg_sq alone": (only(max_exp_avg_sq=torch.ones(4)), "exp_avg"),
}  # fmt: skip
EVERY_TORSO = pytest.mark.parametrize(
    ("damage", "missing"), list(TORSOS.values()), ids=list(TORSOS)
)


# exp_avg is left out while betas[0] is 0, so the step makes what may have been left out.
@pytest.mark.parametrize(
    ("damage", "missing"),
    [row for key, row in TORSOS.items() if key != "no exp_avg"],
    ids=[key for key in TORSOS if key != "no exp_avg"],
)
@each_adam
def test_step_refuses(name: str, damage: Callable[[dict[str, Any]], None], missing: str) -> None:
    optimizer, params = make(name)
    step(optimizer, params, 3)
    damage(optimizer.state[params[1]])
    for param in params:
        param.grad = torch.ones_like(param)
    with refused(optimizer, ValueError, rf"'middle' \(group 0, index 1\) has no '{missing}'"):
        optimizer.step()
    params[1].grad = None  # a parameter that rests is not looked at
    optimizer.step()


@EVERY_TORSO
@each_adam
def test_load_refuses(name: str, damage: Callable[[dict[str, Any]], None], missing: str) -> None:
    optimizer, params = make(name)
    step(optimizer, params, 3)
    saved = optimizer.state_dict()
    saved["state"] = {key: dict(entries) for key, entries in saved["state"].items()}
    damage(saved["state"][1])
    other, others = make(name)
    step(other, others)
    with refused(other, ValueError, rf"'middle' \(group 0, index 1\) has no '{missing}'"):
        other.load_state_dict(saved)


# Whose states have all that the other's have, and what tells them apart.
LOOK_ALIKE = [
    *((name, "Lion", "exp_avg_sq") for name in ("Adam", "AdamW", "NAdam", "RAdam")),
    ("Adamax", "Lion", "exp_inf"),
    *(("NAdam", name, "mu_product") for name in ("Adam", "AdamW", "RAdam")),
]


@pytest.mark.parametrize("package", [fusedopt, torch.optim], ids=["ours", "torch's"])
@pytest.mark.parametrize(("name", "loads", "foreign"), LOOK_ALIKE)
def test_load_refuses_what_has_more(name: str, loads: str, foreign: str, package: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    theirs = getattr(package, name)(params)
    step(theirs, params)
    other = getattr(fusedopt, loads)(params)
    words = rf"group 0, index 0 has '{foreign}', which {loads.removesuffix('W')} has not: it is"
    with refused(other, ValueError, words):
        other.load_state_dict(theirs.state_dict())


WITHOUT_COUNT = r"'middle' \(group 0, index 1\) has no 'step', but has .*'ema_param'"


def test_average_without_its_count_is_refused() -> None:
    """It would start anew: the first step sets the average to the weight."""
    optimizer, params = make("SGD", ema_decay=0.9)
    step(optimizer, params, 3)
    saved = optimizer.state_dict()
    saved["state"] = {key: dict(entries) for key, entries in saved["state"].items()}
    del saved["state"][1]["step"]
    with pytest.raises(ValueError, match=WITHOUT_COUNT):
        optimizer.load_state_dict(saved)
    step(optimizer, params)
    del optimizer.state[params[1]]["step"]
    with refused(optimizer, ValueError, WITHOUT_COUNT):
        optimizer.step()


# What a state is replaced with in a checkpoint, and how it is refused.
UNUSABLE: dict[str, tuple[Any, type[Exception], str]] = {
    "longer": (torch.ones(5), ValueError, r"shape \(5,\).*\(4,\)"),
    "of one element": (torch.ones(()), ValueError, r"shape \(\).*\(4,\)"),
    "a number": (1.0, TypeError, r"1\.0.*must be a tensor"),
    "a list": ([1.0] * 4, TypeError, "must be a tensor"),
    "of integers": (torch.ones(4, dtype=torch.int32), TypeError, r"int32.*not fit.*float32"),
    "of booleans": (torch.ones(4, dtype=torch.bool), TypeError, r"bool.*not fit.*float32"),
    "complex": (torch.ones(4, dtype=torch.complex64), TypeError, r"complex64.*not fit.*float32"),
    "of 8 bits": (torch.ones(4, dtype=torch.float8_e5m2), TypeError, r"float8.*not fit.*float32"),
    "sparse": (torch.ones(4).to_sparse(), TypeError, r"sparse \(torch.sparse_coo\).*dense"),
    "on meta": (torch.ones(4, device="meta"), TypeError, "meta device.*no values"),
}


@pytest.mark.parametrize(("value", "error", "pattern"), list(UNUSABLE.values()), ids=list(UNUSABLE))
@pytest.mark.parametrize(
    ("name", "options", "key"),
    [("SGD", {"momentum": 0.9}, "momentum_buffer"), ("AdamW", {}, "exp_avg_sq"),
     ("AdamW", {"amsgrad": True}, "max_exp_avg_sq")],
    ids=["SGD", "AdamW", "amsgrad"],
)  # fmt: skip
def test_load_refuses_states_that_do_not_fit(
    name: str, options: dict[str, Any], key: str, value: Any, error: type[Exception], pattern: str
) -> None:
    """As the next step would."""
    optimizer, params = make(name, **options)
    step(optimizer, params, 2)
    saved = optimizer.state_dict()
    saved["state"] = {at: dict(entries) for at, entries in saved["state"].items()}
    saved["state"][1][key] = value
    with refused(optimizer, error, rf"^{key} of parameter 'middle'.*{pattern}"):
        optimizer.load_state_dict(saved)


# What masters, averages, codes and scales are replaced with, of which no numbers can be read.
UNREADABLE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "of longer integers": (lambda entry: entry.long(), r"int64.*must be"),
    "complex": (lambda entry: entry.to(torch.complex64), r"complex64.*must be"),
    "sparse": (lambda entry: entry.float().to_sparse(), r"sparse \(torch.sparse_coo\).*dense"),
    "on meta": (lambda entry: entry.to("meta"), "meta device.*no values"),
}


@pytest.mark.parametrize(("change", "pattern"), list(UNREADABLE.values()), ids=list(UNREADABLE))
@pytest.mark.parametrize(
    ("dtype", "options", "key"),
    [
        (torch.bfloat16, {"master_weights": "float32"}, "master_param"),
        (torch.bfloat16, {"master_weights": "split"}, "param_remainder"),
        (torch.bfloat16, {"master_weights": "split8"}, "param_remainder8"),
        (torch.float32, {"ema_decay": 0.9}, "ema_param"),
        *(
            (torch.float32, {"state_dtype": "q8"}, key)
            for key in ("exp_avg_q8", "exp_avg_scale", "exp_avg_sq_q8", "exp_avg_sq_scale")
        ),
    ],
)
def test_load_refuses_what_has_no_numbers(
    dtype: torch.dtype,
    options: dict[str, Any],
    key: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    pattern: str,
) -> None:
    param = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
    optimizer = fusedopt.AdamW([("weight", param)], **options)
    step(optimizer, [param], 2)
    saved = optimizer.state_dict()
    saved["state"] = {0: {**saved["state"][0], key: change(saved["state"][0][key])}}
    with refused(optimizer, TypeError, rf"^{key} of parameter 'weight'.*{pattern}"):
        optimizer.load_state_dict(saved)


NO_DICT: dict[str, Any] = {"nothing": None, "a number": 5, "a list": [1], "text": "abc"}


@each_adam
@pytest.mark.parametrize("entries", list(NO_DICT.values()), ids=list(NO_DICT))
def test_load_refuses_a_state_that_is_no_dict(name: str, entries: Any) -> None:
    optimizer, params = make(name)
    step(optimizer, params)
    saved = optimizer.state_dict()
    saved["state"] = {**saved["state"], 1: entries}
    with refused(optimizer, TypeError, "state of parameter 'middle'.*must be a dict"):
        optimizer.load_state_dict(saved)


NO_STATE_DICT: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": (None, TypeError, "must be a dict, got NoneType"),
    "a list": ([1], TypeError, "must be a dict, got list"),
    "empty": ({}, ValueError, "it has no 'param_groups'"),
    "no state": ({"param_groups": []}, ValueError, "it has no 'state'"),
    "state": ({"param_groups": [], "state": []}, TypeError, "'state' .* must be a dict, got list"),
    "groups": (
        {"param_groups": 5, "state": {}},
        TypeError,
        "must be a list, got int",
    ),
    "a group": ({"param_groups": [{}], "state": {}}, ValueError, "group 0 .* no list of 'params'"),
    "no group": ({"param_groups": [5], "state": {}}, ValueError, "group 0 .* no list of 'params'"),
}


@pytest.mark.parametrize(
    ("saved", "error", "message"), list(NO_STATE_DICT.values()), ids=list(NO_STATE_DICT)
)
def test_load_refuses_what_is_no_state_dict(
    saved: Any, error: type[Exception], message: str
) -> None:
    optimizer, params = make("AdamW")
    step(optimizer, params)
    with refused(optimizer, error, message):
        optimizer.load_state_dict(saved)


def test_forms_that_state_dicts_may_have() -> None:
    optimizer, params = make("AdamW")
    step(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    (group,) = saved["param_groups"]
    saved["param_groups"] = (OrderedDict(group, params=range(len(params))),)
    optimizer.load_state_dict(OrderedDict(saved))
    optimizer.add_param_group({"params": [("late", Parameter(torch.ones(4)))]})
    step(optimizer, params)


# Lists of numbers and arrays are no tensors, either.
NO_TENSORS: dict[str, Any] = {"text": "x", "a list": [1.0], "a number": 5, "an array": np.ones(4)}


@pytest.mark.parametrize("value", list(NO_TENSORS.values()), ids=list(NO_TENSORS))
@pytest.mark.parametrize("key", ["exp_avg", "ema_param"])
def test_load_refuses_what_is_no_tensor(key: str, value: Any) -> None:
    optimizer, params = make("AdamW", ema_decay=0.9)
    step(optimizer, params)
    saved = optimizer.state_dict()
    saved["state"] = {**saved["state"], 1: {**saved["state"][1], key: value}}
    with refused(optimizer, TypeError, f"^{key} of parameter 'middle'.*must be a tensor"):
        optimizer.load_state_dict(saved)


def test_lazily_negated_states_are_made_real() -> None:
    optimizer, params = make("AdamW")
    step(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    expected = saved["state"][1]["exp_avg"].clone()
    saved["state"][1]["exp_avg"] = torch._neg_view(-expected)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params[1]]["exp_avg"], expected)
    step(optimizer, params)


NO_COUNT: dict[str, Any] = {
    "meta": torch.ones((), device="meta"),
    "sparse": torch.ones(1).to_sparse(),
    "complex": torch.tensor(1j),
    "huge": 10**400,
    "text": "x",
    "an array": np.array([3, 4]),
}


@pytest.mark.parametrize("count", list(NO_COUNT.values()), ids=list(NO_COUNT))
def test_load_refuses_step_counts_by_name(count: Any) -> None:
    optimizer, params = make("AdamW")
    step(optimizer, params)
    saved = optimizer.state_dict()
    saved["state"] = {**saved["state"], 1: {**saved["state"][1], "step": count}}
    with refused(optimizer, TypeError, r"(?s)step of parameter 'middle'.*must be a number"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("wrong", [300.0, -200.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"state_dtype": "q8"}, "exp_avg_q8"),
        ({"state_dtype": "q8"}, "exp_avg_sq_q8"),
        ({"master_weights": "split8"}, "param_remainder8"),
    ],
)
def test_load_refuses_bytes_that_are_none(options: dict[str, Any], key: str, wrong: float) -> None:
    """torch.optim casts integers to the dtype of their parameter: they are whole numbers there."""
    param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = fusedopt.AdamW([("weight", param)], **options)
    step(optimizer, [param], 2)
    saved = optimizer.state_dict()
    numbers = saved["state"][0][key].float()
    saved["state"] = {0: {**saved["state"][0], key: numbers}}
    optimizer.load_state_dict(saved)
    numbers[3, 3] = wrong
    with refused(optimizer, ValueError, f"{key} of parameter 'weight'.*numbers that are not"):
        optimizer.load_state_dict(saved)


def test_loaded_states_of_complex_parameters_are_complex() -> None:
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))
    optimizer = fusedopt.AdamW([param], ema_decay=0.9)
    step(optimizer, [param], 2)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    saved["state"] = {0: {**saved["state"][0], "exp_avg": torch.ones(4)}}
    with refused(optimizer, TypeError, r"exp_avg of .* torch.float32 in .*: torch.complex64"):
        optimizer.load_state_dict(saved)


def test_step_count_of_two_elements_is_refused_by_name() -> None:
    optimizer, params = make("AdamW")
    step(optimizer, params)
    saved = optimizer.state_dict()
    saved["state"] = {at: dict(entries) for at, entries in saved["state"].items()}
    saved["state"][1]["step"] = on_host([1, 2])
    with pytest.raises(ValueError, match=r"^step of parameter 'middle'.*one whole number"):
        optimizer.load_state_dict(saved)


# What the states of others hold: "step" is counted by all but Lion, whose average may be left out
# with nothing else left.
HELD = [
    *(("RMSprop", key) for key in ("step", "square_avg")),
    *(("Adagrad", key) for key in ("step", "sum")),
    *(("Adadelta", key) for key in ("step", "square_avg", "acc_delta")),
    *(("Adamax", key) for key in ("step", "exp_avg", "exp_inf")),
    *(("NAdam", key) for key in ("step", "exp_avg", "exp_avg_sq")),
    *(("RAdam", key) for key in ("step", "exp_avg", "exp_avg_sq")),
    *(("ASGD", key) for key in ("step", "ax")),
    *(("Rprop", key) for key in ("step", "prev", "step_size")),
]


@pytest.mark.parametrize(("name", "key"), HELD)
def test_each_part_is_needed(name: str, key: str) -> None:
    optimizer, params = make(name)
    step(optimizer, params, 3)
    saved = optimizer.state_dict()
    saved["state"] = {at: dict(entries) for at, entries in saved["state"].items()}
    message = rf"'middle' \(group 0, index 1\) has no '{key}'"
    del saved["state"][1][key], optimizer.state[params[1]][key]
    with refused(optimizer, ValueError, message):
        optimizer.step()
    with refused(optimizer, ValueError, message):
        optimizer.load_state_dict(saved)


# Others of torch's whose checkpoint it must not take.
STRANGERS = [
    *(("RMSprop", maker) for maker in ("Adam", "Adadelta", "Adagrad")),
    *(("Adagrad", maker) for maker in ("RMSprop", "Adam")),
    *(("Adadelta", maker) for maker in ("RMSprop", "Adagrad")),
    *(("Adamax", maker) for maker in ("Adam", "NAdam")),
    *(("NAdam", maker) for maker in ("Adam", "Adamax")),
    *(("RAdam", maker) for maker in ("Adamax", "RMSprop")),
    *(("ASGD", maker) for maker in ("SGD", "Rprop")),
    *(("Rprop", maker) for maker in ("SGD", "ASGD")),
    *(("Lion", maker) for maker in ("SGD", "RMSprop")),
    *(
        (name, maker)
        for name in ("Adam", "AdamW")
        for maker in ("Adamax", "RMSprop", "Adagrad", "SGD", "ASGD", "Adadelta")
    ),
]


@pytest.mark.parametrize(("name", "maker"), STRANGERS)
def test_checkpoints_of_other_optimizers(name: str, maker: str) -> None:
    """Their groups may lack options, too; no step is made with what they hold."""
    param = Parameter(torch.ones(4))
    options = {"lr": 0.01, "foreach": False}
    source = getattr(torch.optim, maker)(
        [param], **options, **({"momentum": 0.9} if maker == "SGD" else {})
    )
    param.grad = torch.ones(4)
    with torch.device("cpu"):  # torch puts step counts on the default device
        source.step()
    optimizer = getattr(fusedopt, name)([param], lr=0.01)
    with pytest.raises((ValueError, TypeError)):
        optimizer.load_state_dict(source.state_dict())


@each_adam
@pytest.mark.parametrize("empty", [{}, {"exp_avg": None, "exp_avg_sq": None, "step": None}])
@both_ways
def test_empty_state_is_a_new_parameter(clears: bool, name: str, empty: dict[str, Any]) -> Any:
    optimizer, params = make(name)
    if clears:
        step(optimizer, params, 2)
        for i, param in enumerate(params):
            optimizer.state[param] = dict(empty)
            param.data = torch.full((4,), float(i))
    step(optimizer, params, 2)
    return [params, list(optimizer.state.values())]


# What may be missing, since an option that needs it may have been switched on later: what is made.
LATER: dict[str, tuple[str, dict[str, Any], str, torch.dtype]] = {
    "amsgrad": ("AdamW", {"amsgrad": True}, "max_exp_avg_sq", torch.float32),
    "average": ("AdamW", {"ema_decay": 0.9}, "ema_param", torch.float32),
    "master": ("AdamW", {"master_weights": "float32"}, "master_param", torch.bfloat16),
    "split master": ("AdamW", {"master_weights": "split"}, "param_remainder", torch.bfloat16),
    "momentum": ("SGD", {"momentum": 0.9}, "momentum_buffer", torch.float32),
    "RMSprop's momentum": ("RMSprop", {"momentum": 0.9}, "momentum_buffer", torch.float32),
    "RMSprop's average": ("RMSprop", {"centered": True}, "grad_avg", torch.bfloat16),
    "average of SGD": ("SGD", {"ema_decay": 0.9}, "ema_param", torch.float32),
    "steps of SGD": ("SGD", {"stochastic_rounding": True}, "step", torch.bfloat16),
}


@pytest.mark.parametrize("by", ["edited group", "loaded"])
@pytest.mark.parametrize(
    ("name", "options", "entry", "dtype"), list(LATER.values()), ids=list(LATER)
)
def test_what_a_later_option_needs_is_made(
    name: str, options: dict[str, Any], entry: str, dtype: torch.dtype, by: str
) -> None:
    params = [Parameter(torch.ones(4, dtype=dtype)) for _ in range(2)]
    optimizer = getattr(fusedopt, name)(params, lr=0.01)
    step(optimizer, params, 3)
    kept = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
    if by == "loaded":
        saved = optimizer.state_dict()
        optimizer = getattr(fusedopt, name)(params, lr=0.01, **options)
        for group in saved["param_groups"]:  # torch's options are loaded with the rest
            group.update({key: value for key, value in options.items() if key in group})
        optimizer.load_state_dict(saved)
    else:
        optimizer.param_groups[0].update(options)
    assert entry not in optimizer.state[params[0]]
    step(optimizer, params)
    state = optimizer.state[params[0]]
    assert isinstance(state[entry], Tensor)
    if "step" in kept:
        assert float(state["step"]) == 4
    if "exp_avg" in kept:  # what was there has gone on, from where it was
        expected = 0.9 * kept["exp_avg"].double() + 0.1
        assert torch.allclose(state["exp_avg"].double(), expected, rtol=2e-2)


def test_masters_that_were_loaded_before_the_first_step() -> None:
    """load_fp32_params() leaves a state with a master alone: of a parameter not yet stepped."""
    params = [Parameter(torch.ones(4, dtype=torch.bfloat16))]
    optimizer = fusedopt.AdamW(params, lr=0.01, master_weights="float32")
    optimizer.load_fp32_params([torch.full((4,), 1.001)])
    assert list(optimizer.state[params[0]]) == ["master_param"]
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    step(optimizer, params)
    assert {"step", "exp_avg", "exp_avg_sq", "master_param"} <= set(optimizer.state[params[0]])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("value", [7, 7.0, True], ids=["int", "float", "bool"])
def test_numbers_as_step_are_refused_in_the_step(name: str, value: Any) -> None:
    """As in torch. Replacing it by a tensor would part what workers share."""
    options = {"ema_decay": 0.9} if name == "SGD" else {}
    optimizer, params = make(name, **options)
    step(optimizer, params)
    optimizer.state[params[1]]["step"] = value
    with refused(optimizer, TypeError, r"^step of parameter 'middle'.*load_state_dict\(\)"):
        optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert float(optimizer.state[params[1]]["step"]) == float(value) + 1


# The order in memory of loaded states.


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_loaded_states_lie_as_their_param_does(name: str) -> None:
    """A model that is channels_last now, and was contiguous when it was saved."""
    options = {"momentum": 0.9} if name == "SGD" else {}
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        values = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32, device="cpu").to(DEVICE)
        param = Parameter(values.view(2, 3, 4, 5) / 100)
        optimizer = getattr(fusedopt, name)([param], lr=0.1, **options)
        step(optimizer, [param], 2)
        saved = optimizer.state_dict()
        param = Parameter(param.detach().clone(memory_format=layout))
        optimizer = getattr(fusedopt, name)([param], lr=0.1, **options)
        optimizer.load_state_dict(saved)
        for key, value in optimizer.state[param].items():
            assert key == "step" or value.stride() == param.stride()
        step(optimizer, [param])
        results.append([param.detach(), list(optimizer.state[param].values())])
    torch.testing.assert_close(*results, rtol=0, atol=0)
