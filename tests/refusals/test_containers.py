"""What users put in place of an optimizer's lists and dicts, and of step counts."""

import collections
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter, ParameterList

import fusedopt
from support.device import STEPS_ON_DEVICE
from support.equality import assert_equal, assert_same_math
from support.optimizers import Case, each_adam, main_cases, take_step, train, varied_cases
from support.pairs import in_pairs
from support.snapshots import copy_params, refused, snapshot
from support.tensors import by_id, make_params, params_of, set_grads

when = pytest.mark.parametrize("steps", [0, 1, 3], ids=["no state yet", "one step", "three steps"])


class Lazy(dict[str, Any]):
    """Values are made when they are asked for, as wrappers that offload them do."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value() if callable(value) and not isinstance(value, Tensor) else value


class Doubling(dict[str, Any]):
    """A mapping whose [] gives something else than its memory holds."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return 2 * value if key == "lr" else value


class Iterated:
    """A sequence by protocol only."""

    def __init__(self, params: list[Any]) -> None:
        self.params = params

    def __iter__(self) -> Iterator[Any]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)

    def __getitem__(self, index: int) -> Any:
        return self.params[index]


def each_group(wrap: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        optimizer.param_groups[:] = [wrap(group) for group in optimizer.param_groups]

    return change


def params_in(kind: Callable[[list[Any]], Any]) -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["params"] = kind(group["params"])

    return change


def groups_in(kind: Callable[[list[Any]], Any]) -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        optimizer.param_groups = kind(optimizer.param_groups)

    return change


def state_in(kind: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        optimizer.state = kind(optimizer.state)

    return change


def entries_in(kind: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        for param in params_of(optimizer):
            if param in optimizer.state:
                optimizer.state[param] = kind(optimizer.state[param])
            else:
                optimizer.state[param] = kind({})

    return change


def lazily(entries: dict[str, Any]) -> Lazy:
    return Lazy({key: (lambda value=value: value) for key, value in dict(entries).items()})


def default_dict(entries: dict[str, Any]) -> Any:
    return collections.defaultdict(lambda: None, entries)


CONTAINERS: dict[str, Callable[[Any], None]] = {
    "params tuple": params_in(tuple),
    "params ParameterList": params_in(ParameterList),
    "params deque": params_in(collections.deque),
    "params UserList": params_in(collections.UserList),
    "params dict": params_in(dict.fromkeys),
    "params by protocol": params_in(Iterated),
    "groups tuple": groups_in(tuple),
    "groups UserList": groups_in(collections.UserList),
    "groups deque": groups_in(collections.deque),
    "group UserDict": each_group(collections.UserDict),
    "group OrderedDict": each_group(collections.OrderedDict),
    "group ChainMap": each_group(collections.ChainMap),
    "group whose [] computes": each_group(Doubling),
    "state dict": state_in(dict),
    "state UserDict": state_in(lambda state: collections.UserDict(state)),
    "state OrderedDict": state_in(collections.OrderedDict),
    "state ChainMap": state_in(collections.ChainMap),
    "entries UserDict": entries_in(collections.UserDict),
    "entries OrderedDict": entries_in(collections.OrderedDict),
    "entries defaultdict": entries_in(default_dict),
    "entries ChainMap": entries_in(collections.ChainMap),
    "entries made lazily": entries_in(lazily),
}
# The same with all that may be wrapped at once.
AT_ONCE = ("entries UserDict", "state UserDict", "params deque", "group UserDict", "groups tuple")
CONTAINERS["all at once"] = lambda optimizer: [CONTAINERS[key](optimizer) for key in AT_ONCE]


@in_pairs(varied_cases, when, pytest.mark.parametrize("change", **by_id(CONTAINERS)))
def test_containers(case: Case, change: Callable[[Any], None], steps: int) -> None:
    """Steps before and after, some parameters resting; torch's twin may have nothing changed."""
    wraps_torch = steps > 0 and change is not CONTAINERS["entries made lazily"]
    made = [case.ours(make_params()), case.theirs(make_params())]
    for optimizer in made:
        train(optimizer, steps=steps)
    change(made[0])
    if wraps_torch or change is CONTAINERS["group whose [] computes"]:
        change(made[1])
    for optimizer in made:
        for seed in range(steps, steps + 4):
            set_grads(optimizer, seed)
            if seed == steps + 2:
                params_of(optimizer)[0].grad = params_of(optimizer)[3].grad = None
            optimizer.step()
    ours, theirs = made
    assert_same_math(params_of(ours), params_of(theirs))
    for param, twin in zip(*map(params_of, made), strict=True):
        for name in case.state_names:
            assert_same_math(ours.state[param][name], theirs.state[twin][name])


@main_cases
@pytest.mark.parametrize("change", **by_id(CONTAINERS))
def test_refusals_change_nothing(case: Case, change: Callable[[Any], None]) -> None:
    """A first step that fails takes back what it put there."""
    optimizer = case.ours(make_params())
    take_step(optimizer, 0)
    change(optimizer)
    params = params_of(optimizer)
    set_grads(params, 1)
    state = optimizer.state[params[2]]
    name = next(iter(case.state_names - {"step"}))
    good = state[name]
    state[name] = torch.ones(2, 2, dtype=torch.float64)
    with refused(optimizer, ValueError, name):
        optimizer.step()
    state[name] = good
    optimizer.step()
    plain = case.ours(make_params())
    train(plain, steps=2)
    if change is not CONTAINERS["group whose [] computes"]:
        assert_equal(params_of(optimizer), params_of(plain))


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "params a tensor": (params_in(lambda params: params[0]), "params of param group 0"),
    "params a number": (params_in(len), "params of param group 0"),
    "groups a number": (groups_in(len), "'int' object is not iterable"),
    "group a list": (each_group(list), "group"),
    "group a number": (each_group(len), "group"),
    "state a list": (state_in(list), "state"),
    "state None": (state_in(lambda _: None), "state"),
    "entries a list": (entries_in(list), "state"),
    "entries a number": (entries_in(len), "state"),
}


@main_cases
@pytest.mark.parametrize(("change", "words"), **by_id(WRONG))
def test_what_is_no_container(case: Case, change: Callable[[Any], None], words: str) -> None:
    optimizer = case.ours(make_params())
    take_step(optimizer, 0)
    params, before = params_of(optimizer), copy_params(optimizer)
    change(optimizer)
    with pytest.raises(TypeError, match=words) as caught:
        optimizer.step()
    assert "incompatible function arguments" not in str(caught.value)
    assert_equal(params, before)


# Step counts of other libraries: what load_state_dict makes float32 tensors of.
COUNTS: dict[str, Callable[[int], Any]] = {
    "int": int,
    "float": float,
    "bool-like": lambda step: step,
    "numpy int64": np.int64,
    "numpy int32": np.int32,
    "numpy float32": np.float32,
    "numpy float64": np.float64,
    "numpy 0-dim": np.array,
    "float32 tensor": lambda step: torch.tensor(float(step), device="cpu"),
    "float64 tensor": lambda step: torch.tensor(step, dtype=torch.float64, device="cpu"),
    "int64 tensor": lambda step: torch.tensor(step, device="cpu"),
    "int32 tensor": lambda step: torch.tensor(step, dtype=torch.int32, device="cpu"),
    "bfloat16 tensor": lambda step: torch.tensor(step, dtype=torch.bfloat16, device="cpu"),
    "1-dim tensor": lambda step: torch.tensor([float(step)], device="cpu"),
    "1-dim int64 tensor": lambda step: torch.tensor([step], device="cpu"),
}
BAD_COUNTS: dict[str, tuple[Any, str]] = {
    "fraction": (torch.tensor(3.5, device="cpu"), "whole number that is not negative; round it"),
    "double fraction": (
        torch.tensor(3.5, dtype=torch.float64, device="cpu"),
        "whole number that is not negative; round it",
    ),
    "negative": (torch.tensor(-1.0, device="cpu"), "whole number that is not negative"),
    "negative int64": (torch.tensor(-1, device="cpu"), "whole number that is not negative"),
    "nan": (torch.tensor(torch.nan, device="cpu"), "whole number that is not negative"),
    "inf": (torch.tensor(torch.inf, device="cpu"), "whole number that is not negative"),
    "huge": (torch.tensor(1e30, device="cpu"), "whole number that is not negative"),
}
BAD_NUMBERS: dict[str, Any] = {"3.5": 3.5, "-1": -1, "nan": float("nan"), "numpy": np.float32(2.5)}


def trained(name: str, library: Any = fusedopt, steps: int = 2) -> Any:
    more = {} if library is fusedopt else {"foreach": False}
    optimizer = getattr(library, name)(make_params(), lr=0.01, **more)
    train(optimizer, steps=steps)
    return optimizer


def with_counts(optimizer: Any, step: Any) -> dict[str, Any]:
    saved = copy.deepcopy(optimizer.state_dict())
    for entries in saved["state"].values():
        entries["step"] = step
    return saved


@each_adam
@pytest.mark.parametrize("count", **by_id(COUNTS))
def test_loaded_counts(name: str, count: Callable[[int], Any]) -> None:
    """Each parameter gets one of its own, and the next step is the 101st."""
    ours, theirs = trained(name), trained(name, torch.optim)
    given = [count(100) for _ in params_of(ours)]
    saved = copy.deepcopy(ours.state_dict())
    for entries, step in zip(saved["state"].values(), given, strict=True):
        entries["step"] = step
    ours.load_state_dict(saved)
    theirs.load_state_dict(with_counts(theirs, torch.tensor(100.0, device="cpu")))
    for optimizer in (ours, theirs):
        for state in optimizer.state.values():
            state["step"] = state["step"].clone()
        train(optimizer, steps=2, first=2)
    assert all(state["step"].item() == 102 for state in ours.state.values())
    assert all(state["step"].dtype.is_floating_point for state in ours.state.values())
    assert_same_math(params_of(ours), params_of(theirs))


@each_adam
@pytest.mark.parametrize(("step", "words"), **by_id(BAD_COUNTS))
def test_bad_counts_get_the_same_answer(name: str, step: Tensor, words: str) -> None:
    """At load and at step."""
    optimizer = trained(name)
    saved, before = with_counts(optimizer, step.clone()), snapshot(optimizer)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before
    if STEPS_ON_DEVICE:
        return
    for state in list(optimizer.state.values())[1:3]:
        state["step"] = step.clone()
    with refused(optimizer, ValueError, rf"step of .*group 0, index 1.*{words}"):
        optimizer.step()


@each_adam
@pytest.mark.parametrize("step", **by_id(BAD_NUMBERS))
def test_bad_numbers_are_refused_at_load(name: str, step: Any) -> None:
    optimizer = trained(name)
    saved, before = with_counts(optimizer, step), snapshot(optimizer)
    with pytest.raises(ValueError, match=r"step of .*group 0, index 0.*whole number"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


@each_adam
@pytest.mark.parametrize(
    "step", [3, 3.0, np.float32(3), np.int64(3)], ids=["int", "float", "f4", "i8"]
)
def test_numbers_in_a_state(name: str, step: Any) -> None:
    """A step cannot count in a number; the message says who makes a tensor of it."""
    optimizer = trained(name)
    optimizer.state[params_of(optimizer)[1]]["step"] = step
    with refused(optimizer, TypeError, r"step of .*index 1.*load_state_dict\(\)"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[params_of(optimizer)[1]]["step"].item() == 4


@pytest.mark.parametrize("step", ["100", b"1", [1], None, {}], ids=str)
@each_adam
def test_no_numbers_at_all(name: str, step: Any) -> None:
    optimizer = trained(name)
    saved, before = with_counts(optimizer, step), snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match="step"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


@pytest.mark.skipif(STEPS_ON_DEVICE, reason="a GPU counts in floating-point numbers")
@each_adam
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_int64_counts_step_in_place(name: str, shape: tuple[int, ...]) -> None:
    ours, theirs = trained(name), trained(name, torch.optim)
    counts = []
    for state in ours.state.values():
        state["step"] = torch.full(shape, int(state["step"]), dtype=torch.int64)
        counts.append(state["step"])
    for optimizer in (ours, theirs):
        train(optimizer, steps=3, first=2)
    for state, count in zip(ours.state.values(), counts, strict=True):
        assert state["step"] is count
        assert count.dtype == torch.int64
        assert count.item() == 5
    assert_same_math(params_of(ours), params_of(theirs))


@each_adam
@pytest.mark.parametrize(
    "step",
    [
        torch.tensor(2, dtype=torch.int32, device="cpu"),
        torch.tensor(2.0, dtype=torch.bfloat16, device="cpu"),
        torch.tensor([2.0, 2.0], device="cpu"),
        torch.tensor([], device="cpu"),
        torch.tensor(2.0 + 0j, device="cpu"),
        torch.tensor(True, device="cpu"),
    ],
    ids=["int32", "bfloat16", "two", "none", "complex", "bool"],
)
def test_counts_that_no_step_can_write_to(name: str, step: Tensor) -> None:
    optimizer = trained(name)
    optimizer.state[params_of(optimizer)[1]]["step"] = step.clone()
    with refused(optimizer, ValueError, r"step of .*index 1.*load_state_dict\(\)"):
        optimizer.step()


@each_adam
def test_loaded_states_of_any_mapping(name: str) -> None:
    ours, plain = trained(name), trained(name)
    saved = copy.deepcopy(ours.state_dict())
    wraps = [collections.UserDict, lazily, collections.ChainMap, collections.OrderedDict]
    saved["state"] = {
        key: wraps[key % len(wraps)](entries) for key, entries in saved["state"].items()
    }
    ours.load_state_dict(saved)
    for optimizer in (ours, plain):
        train(optimizer, first=2)
    assert_equal(params_of(ours), params_of(plain))


def test_groups_given_as_other_mappings() -> None:
    """At construction; torch refuses what is no dict, and so do we."""
    for library in (fusedopt, torch.optim):
        with pytest.raises(TypeError, match="must be a dict"):
            library.SGD([{"params": [Parameter(torch.ones(2))]}], lr=0.1).add_param_group(
                collections.UserDict({"params": [Parameter(torch.ones(2))]})
            )
