"""Bad input: the right exception, with the parameter's name, and nothing has changed.

Every row of the tables breaks one thing in an optimizer that is otherwise fine and has been stepped
before; `step()` must then refuse the whole step.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from support.device import on_host
from support.optimizers import CASES, Case, some_cases, take_step, train
from support.snapshots import refused, snapshot
from support.tensors import Wrapper, by_id, params_of, set_grads

NAMES = ["first", "broken", "last"]
two_cases = some_cases("momentum-l2", "adamw")


def put(tensor: Tensor, **what: Any) -> None:
    """Sets attributes: ``grad_dtype=None`` before a grad of another dtype than the parameter's."""
    for name, value in what.items():
        setattr(tensor, name, value)


def put_grad(grad: Tensor) -> Callable[[Parameter], None]:
    return lambda param: put(param, grad_dtype=None, grad=grad)


def put_data(data: Tensor) -> Callable[[Parameter], None]:
    return lambda param: put(param, data=data)


# How one parameter or grad goes wrong, the exception, and what the message must say of it.
TENSORS: dict[str, tuple[Callable[[Parameter], None], type[Exception], str]] = {
    "sparse grad": (put_grad(torch.ones(4).to_sparse()), TypeError, "grad of .*sparse"),
    "integer grad": (
        put_grad(torch.ones(4, dtype=torch.int64)),
        TypeError,
        "grad of .*torch.int64.*float32",
    ),
    "bool grad": (put_grad(torch.ones(4, dtype=torch.bool)), TypeError, "grad of .*torch.bool"),
    "complex grad": (
        put_grad(torch.ones(4, dtype=torch.complex64)),
        TypeError,
        "grad of .*torch.complex64.*torch.float32",
    ),
    "real grad": (
        put_data(torch.ones(4, dtype=torch.complex64)),
        TypeError,
        "grad of .*torch.float32.*torch.complex64",
    ),
    "longer param": (put_data(torch.ones(5)), ValueError, r"grad of .*\[4\].*\[5\]"),
    "other rank": (put_data(torch.ones(1, 4)), ValueError, r"grad of .*\[4\].*\[1, 4\]"),
    "scalar param": (put_data(torch.ones(())), ValueError, r"grad of .*\[4\].*\[\]"),
    "expanded param": (put_data(torch.ones(1).expand(4)), ValueError, "expanded"),
}


def make_optimizer(case: Case, named: bool, replace: Parameter | None = None) -> Any:
    """Three parameters in two groups, the middle one to be broken; the first and the last are fine.

    Before the middle one and behind it: neither what is walked before nor behind may be written to.
    """
    params = [Parameter(torch.full((4,), float(i))) for i in range(3)]
    if replace is not None:
        params[1] = replace
    entries: list[Any] = list(zip(NAMES, params, strict=True)) if named else list(params)
    return case.ours([{"params": entries[:1]}, {"params": entries[1:]}])


def assert_refused(
    optimizer: Any, exception: type[Exception], pattern: str, named: bool | None = None
) -> None:
    """step() raises as said and changes nothing; `named` tells how it must name the parameter."""
    before = snapshot(optimizer)
    with pytest.raises(exception) as raised:
        optimizer.step()
    message = str(raised.value)
    assert re.search(pattern, message), message
    if named is not None:
        assert ("'broken'" in message) == named, message
        assert "group 1, index 0" in message, message
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@two_cases
@pytest.mark.parametrize(("damage", "exception", "pattern"), **by_id(TENSORS))
@pytest.mark.parametrize("stepped", [False, True], ids=["first step", "later step"])
def test_bad_tensor(
    damage: Callable[[Parameter], None],
    exception: type[Exception],
    pattern: str,
    case: Case,
    named: bool,
    stepped: bool,
) -> None:
    optimizer = make_optimizer(case, named)
    params = params_of(optimizer)
    if stepped:
        take_step(optimizer, 0)
    set_grads(params, 7)
    damage(params[1])
    assert_refused(optimizer, exception, pattern, named)


@two_cases
def test_optimizer_goes_on_after_an_error(case: Case) -> None:
    """The refused step has left no trace: the next one is what it would have been without it."""
    results = []
    for refuse in (False, True):
        optimizer = make_optimizer(case, named=True)
        params = params_of(optimizer)
        take_step(optimizer, 0)
        if refuse:
            TENSORS["sparse grad"][0](params[1])
            assert_refused(optimizer, TypeError, "sparse")
        train(optimizer, steps=2, first=1)
        results.append(params)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


# Parameters that no step can work on, whatever the grad.
PARAMS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.ones(4, device="meta"), "meta device"),
    "int32": (lambda: torch.ones(4, dtype=torch.int32), "torch.int32"),
    "float8": (lambda: torch.ones(4).to(torch.float8_e5m2), "torch.float8_e5m2"),
    "wrapper subclass": (lambda: Wrapper(torch.ones(4)), "Wrapper"),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@two_cases
@pytest.mark.parametrize(("make", "pattern"), **by_id(PARAMS))
def test_bad_param(make: Callable[[], Tensor], pattern: str, case: Case, named: bool) -> None:
    param = Parameter(make(), requires_grad=False)
    optimizer = make_optimizer(case, named, replace=param)
    train_grads = [optimizer.param_groups[0]["params"][0], optimizer.param_groups[1]["params"][1]]
    set_grads(train_grads, 1)
    param.grad = make()
    assert_refused(optimizer, TypeError, pattern, named)


# Entries of the state of an AdamW parameter of shape (4,), the exception and the message.
STATES: dict[str, tuple[str, Any, type[Exception], str]] = {
    "shape": ("exp_avg", torch.zeros(5), ValueError, r"exp_avg of .*\[5\].*\[4\]"),
    "second state": ("exp_avg_sq", torch.zeros(2, 2), ValueError, r"exp_avg_sq of .*\[2, 2\]"),
    "integers": ("exp_avg", torch.zeros(4, dtype=torch.int8), TypeError, "exp_avg of .*int8"),
    "complex": ("exp_avg", torch.zeros(4, dtype=torch.complex64), TypeError, "exp_avg of"),
    "meta": ("exp_avg", torch.zeros(4, device="meta"), TypeError, "exp_avg of .*meta"),
    "sparse": ("exp_avg", torch.zeros(4).to_sparse(), TypeError, "exp_avg of .*sparse"),
    "expanded": ("exp_avg", torch.zeros(1).expand(4), ValueError, "exp_avg of .*expanded"),
    "no tensor": ("exp_avg", 3.5, TypeError, "exp_avg of .*3.5"),
    "negative step": ("step", on_host(-1.0), ValueError, "step of .*-1.*negative"),
    "NaN step": ("step", on_host(float("nan")), ValueError, "step of .*nan"),
    "vector step": ("step", on_host([1.0, 1.0]), ValueError, r"step of .*\[2\]"),
    "complex step": ("step", on_host(1j), ValueError, "step of .*complex64"),
    "meta step": ("step", torch.tensor(1.0, device="meta"), ValueError, "step of .*meta"),
    "half step": ("step", on_host(1.0).half(), ValueError, "step of .*float16"),
    "text step": ("step", "three", TypeError, "step of .*'three'"),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize(("key", "value", "exception", "pattern"), **by_id(STATES))
def test_bad_state(key: str, value: Any, exception: Any, pattern: str, named: bool) -> None:
    optimizer = make_optimizer(CASES["adamw"], named)
    train(optimizer, steps=2)
    optimizer.state[optimizer.param_groups[1]["params"][0]][key] = value
    assert_refused(optimizer, exception, pattern, named)


# Changes of a state tensor that leave object and address what they were in the step before.
IN_PLACE: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "narrowed": (lambda state: put(state, data=state[:2]), ValueError, r"\[2\].*\[4\]"),
    "shrunk": (lambda state: state.resize_(3), ValueError, r"\[3\].*\[4\]"),
    "reshaped": (lambda state: put(state, data=state.view(2, 2)), ValueError, r"\[2, 2\].*\[4\]"),
    "expanded": (lambda state: put(state, data=state[:1].expand(4)), ValueError, "expanded"),
    "as integers": (lambda state: put(state, data=state.view(torch.int32)), TypeError, "int32"),
    "as half": (lambda state: put(state, data=state.view(torch.float16)), ValueError, r"\[8\]"),
}


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(("damage", "exception", "pattern"), **by_id(IN_PLACE))
def test_state_that_went_bad_in_place(damage: Any, exception: Any, pattern: str, key: str) -> None:
    """What the plan remembers of a state must not stand in for a look at it."""
    optimizer = make_optimizer(CASES["adamw"], named=True)
    train(optimizer, steps=3)
    damage(optimizer.state[optimizer.param_groups[1]["params"][0]][key])
    assert_refused(optimizer, exception, f"{key} of .*{pattern}", named=True)


def test_param_that_went_bad_in_place() -> None:
    """Param and grad reshaped together no longer fit the state, though nothing has moved."""
    optimizer = make_optimizer(CASES["adamw"], named=True)
    train(optimizer, steps=3)
    param = optimizer.param_groups[1]["params"][0]
    param.data = param.data.view(2, 2)
    param.grad = torch.ones(2, 2)
    assert_refused(optimizer, ValueError, r"exp_avg of .*\[4\].*\[2, 2\]", named=True)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_state_shared_by_two_params(key: str) -> None:
    optimizer = make_optimizer(CASES["adamw"], named=True)
    take_step(optimizer, 0)
    first, second = (group["params"][0] for group in optimizer.param_groups)
    optimizer.state[second][key] = optimizer.state[first][key]
    assert_refused(optimizer, ValueError, f"(?s){key} of .*'first'.*{key} of .*'broken'.*share")


def test_closure_that_raises() -> None:
    optimizer = make_optimizer(CASES["adamw"], named=True)
    take_step(optimizer, 0)
    before = snapshot(optimizer)

    def closure() -> float:
        raise ZeroDivisionError("in the closure")

    with pytest.raises(ZeroDivisionError, match="in the closure"):
        optimizer.step(closure)
    assert snapshot(optimizer) == before


def test_state_is_not_created_when_it_cannot_be_used() -> None:
    """A default device must not send ``step`` to where no step is read."""
    optimizer = make_optimizer(CASES["adamw"], named=True)
    params = params_of(optimizer)
    set_grads(params, 1)
    with torch.device("meta"):
        optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [1.0] * 3


def test_what_is_known_without_a_device_is_on_none_but_the_cpu() -> None:
    """Whatever the default device: there would be nothing to read, or a GPU to wait for."""
    optimizer = make_optimizer(CASES["adamw"], named=True)
    take_step(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.ones(2, device="cpu")
    with torch.device("meta"):
        assert not optimizer.skipped
        with refused(optimizer, ValueError, "must be one whole number"):
            optimizer.load_state_dict(saved)
