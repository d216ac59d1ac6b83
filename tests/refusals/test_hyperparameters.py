"""Bad hyper-parameters, parameters given twice or sharing memory, a torch that is too old.

Bad ones are those that no step makes sense with, wherever they come from: test_ranges.py has those
that torch refuses for an optimizer's defaults only.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import _version
from support.device import on_host
from support.optimizers import each_name, main_cases, train
from support.snapshots import refused
from support.tensors import by_id, set_grads

NAN, INF = float("nan"), float("inf")

# Optimizer, options, the words torch uses for it (and that ours shares), what the message shows.
VALUES: dict[str, tuple[str, dict[str, Any], str, str]] = {
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
VALUES |= {
    f"SGD dampening={value}": ("SGD", {"dampening": value}, "Invalid dampening value", str(value))
    for value in (NAN, INF, -INF)
}
VALUES |= {
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
VALUES |= {
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
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "text lr": ("AdamW", {"lr": "0.1"}, "lr must be a number.*'0.1'"),
    "None lr": ("SGD", {"lr": None}, "lr must be a number.*None"),
    "complex lr": ("SGD", {"lr": 1j}, "lr must be a number.*1j"),
    "list momentum": ("SGD", {"momentum": [0.9]}, r"momentum must be a number.*\[0.9\]"),
    "text beta": ("Adam", {"betas": (0.9, "x")}, r"betas\[1\] must be a number.*'x'"),
    "None eps": ("AdamW", {"eps": None}, "eps must be a number.*None"),
}
ALL = {
    **{key: (name, options, ValueError, words + ".*" + re.escape(shown))
       for key, (name, options, words, shown) in VALUES.items()},
    **{key: (name, options, TypeError, words) for key, (name, options, words) in KINDS.items()},
}  # fmt: skip
BAD_OPTION = pytest.mark.parametrize(("name", "options", "exception", "pattern"), **by_id(ALL))


def params_with_grads(count: int = 2) -> list[Parameter]:
    params = [Parameter(torch.full((4,), float(i))) for i in range(count)]
    set_grads(params, 0)
    return params


@BAD_OPTION
def test_at_construction(
    name: str, options: dict[str, Any], exception: type[Exception], pattern: str
) -> None:
    with pytest.raises(exception, match=pattern):
        getattr(fusedopt, name)(params_with_grads(), **options)


@BAD_OPTION
def test_in_a_group_at_construction(
    name: str, options: dict[str, Any], exception: type[Exception], pattern: str
) -> None:
    first, second = params_with_grads()
    groups = [{"params": [first]}, {"params": [second], **options}]
    with pytest.raises(exception, match=f"{pattern}.*param group 1"):
        getattr(fusedopt, name)(groups)


@BAD_OPTION
def test_in_add_param_group(
    name: str, options: dict[str, Any], exception: type[Exception], pattern: str
) -> None:
    first, second = params_with_grads()
    optimizer = getattr(fusedopt, name)([first])
    with refused(optimizer, exception, f"{pattern}.*param group 1"):
        optimizer.add_param_group({"params": [second], **options})
    assert len(optimizer.param_groups) == 1


@BAD_OPTION
def test_in_an_edited_group(
    name: str, options: dict[str, Any], exception: type[Exception], pattern: str
) -> None:
    """The second group is bad; the first one, which is fine, is not stepped either."""
    first, second = params_with_grads()
    optimizer = getattr(fusedopt, name)([{"params": [first]}, {"params": [second]}])
    optimizer.step()
    set_grads([first, second], 1)
    optimizer.param_groups[1].update(options)
    with refused(optimizer, exception, f"{pattern}.*param group 1"):
        optimizer.step()


@BAD_OPTION
def test_in_a_checkpoint(
    name: str, options: dict[str, Any], exception: type[Exception], pattern: str
) -> None:
    first, second = params_with_grads()
    optimizer = getattr(fusedopt, name)([{"params": [first]}, {"params": [second]}])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1].update(options)
    with refused(optimizer, exception, f"{pattern}.*param group 1"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"], ids=lambda key: f"no {key}")
def test_group_lacks_an_option(key: str) -> None:
    optimizer = fusedopt.AdamW(params_with_grads())
    del optimizer.param_groups[0][key]
    with refused(optimizer, ValueError, f"{key}.*param group 0"):
        optimizer.step()


@each_name
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_twice_in_one_group(name: str, named: bool) -> None:
    first, second = params_with_grads()
    params = [first, second, first]
    entries: Any = list(zip("abc", params, strict=True)) if named else params
    pattern = "parameter 'c' is in" if named else "a parameter is in"
    with pytest.raises(ValueError, match=f"{pattern} param group 0 twice, at index 0 and 2"):
        getattr(fusedopt, name)(entries)


@each_name
def test_in_two_groups(name: str) -> None:
    first, second = params_with_grads()
    with pytest.raises(ValueError, match="more than one parameter group"):
        getattr(fusedopt, name)([{"params": [first, second]}, {"params": [first]}])


def test_twice_by_editing_the_group() -> None:
    """Nobody checks what is appended to a group's list; the step does, before it writes."""
    optimizer = fusedopt.AdamW([("a", params_with_grads()[0])])
    group = optimizer.param_groups[0]
    group["params"].append(group["params"][0])
    with refused(optimizer, ValueError, r"parameter 'a'.*share memory"):
        optimizer.step()


def overlapping(storage: Tensor) -> tuple[Tensor, Tensor]:
    return storage[:12], storage[11:]


# How two parameters are cut from one buffer of 24 elements.
SHARED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "same memory": lambda buffer: (buffer, buffer),
    "one element": overlapping,
    "inside": lambda buffer: (buffer, buffer[5:7]),
    "inside, given first": lambda buffer: (buffer[5:7], buffer),
    "row and column": lambda buffer: (buffer.view(4, 6)[1], buffer.view(4, 6)[:, 3]),
    "columns of two widths": lambda buffer: (buffer.view(4, 6)[:, :3], buffer.view(4, 6)[:, 2:]),
    "transposed": lambda buffer: (buffer.view(4, 6), buffer.view(4, 6).t()),
    "other dtype": lambda buffer: (buffer, buffer.view(torch.float64)[3:]),
}


@main_cases
@pytest.mark.parametrize("cut", **by_id(SHARED))
@pytest.mark.parametrize("two_groups", [False, True], ids=["one group", "two groups"])
def test_params_that_share_memory(case: Any, cut: Any, two_groups: bool) -> None:
    first, second = (Parameter(part) for part in cut(torch.ones(24)))
    fine = Parameter(torch.ones(3))
    entries = [("fine", fine), ("a", first), ("b", second)]
    groups = [{"params": entries[:2]}, {"params": entries[2:]}] if two_groups else entries
    optimizer = case.ours(groups)
    set_grads([fine, first, second], 0)
    with refused(optimizer, ValueError, r"parameter '[ab]'.*parameter '[ab]'.*share memory"):
        optimizer.step()


# Cuts without a common element, however close: these must step.
INTERLEAVED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "neighbours": lambda buffer: (buffer[:12], buffer[12:]),
    "even and odd": lambda buffer: (buffer[::2], buffer[1::2]),
    "columns": lambda buffer: (buffer.view(4, 6)[:, :3], buffer.view(4, 6)[:, 3:]),
    "empty inside": lambda buffer: (buffer, buffer[5:5]),
}


@main_cases
@pytest.mark.parametrize("cut", **by_id(INTERLEAVED))
def test_params_beside_each_other(case: Any, cut: Any) -> None:
    results = []
    for build in (case.ours, case.theirs):
        buffer = torch.arange(24.0, dtype=torch.float64)
        train(build([Parameter(part) for part in cut(buffer)]))
        results.append(buffer)
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-14)


def test_params_begin_to_share_memory() -> None:
    """Found in the step after the swap, not only in an optimizer's first."""
    first, second = params_with_grads()
    optimizer = fusedopt.AdamW([("a", first), ("b", second)])
    optimizer.step()
    second.data = first.data
    with refused(optimizer, ValueError, r"'a'.*'b'.*share memory"):
        optimizer.step()
    second.data = torch.ones(4)
    optimizer.step()


def test_param_and_state_share_memory_when_a_state_is_missing() -> None:
    """A state that lacks what an option has come to need is checked like a whole one."""
    (param,) = params_with_grads(1)
    optimizer = fusedopt.AdamW([("a", param)], amsgrad=True)
    there = {"exp_avg": param.detach(), "exp_avg_sq": torch.zeros(4)}
    optimizer.state[param] = {"step": on_host(1.0), **there}
    with refused(optimizer, ValueError, r"'a'.*share memory"):
        optimizer.step()


@pytest.mark.parametrize("version", ["2.9.1", "2.9.0+cu128", "1.13.1", "2.1.0a0+git1234", "2"])
def test_torch_that_is_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"torch >= 2\.10.*{re.escape(version)}.*pip install"):
        _version.check_torch()


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234", "2.13.1+cu130", "3.0", "10.1"])
def test_torch_that_is_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    _version.check_torch()
