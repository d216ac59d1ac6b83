"""Steps that are interrupted or fail half-way: wholly or not at all, and no memory of it."""

import sys
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt._state import CreatedState
from support.interrupts import interrupted_at
from support.processes import run_fork

INTERRUPTED = """
import signal, torch, fusedopt
params = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(3000)]
for p in params: p.grad = torch.ones(1000)
torch.set_num_threads(2)
optimizer = fusedopt.SGD(params, lr=1.0, momentum=0.5)
optimizer.step()
def interrupt(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
seen = 0
for delay in [i * 1e-4 for i in range(1, 60, 4)]:
    before = [p.detach().clone() for p in params]
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        optimizer.step()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        seen += 1
    changed = {not torch.equal(p, q) for p, q in zip(params, before)}
    assert len(changed) == 1, "half a step"
assert seen > 0
"""


@pytest.mark.cpu_only
def test_interrupt() -> None:
    """Ctrl-C arrives between the walk and the work, where Python code runs; it must not abort."""
    run_fork(INTERRUPTED)


def test_state_that_was_gone_in_a_failed_step() -> None:
    a, b = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = fusedopt.Adam([a, b])
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    optimizer.step()
    state = optimizer.state.pop(a)
    good = optimizer.state[b]["exp_avg"]
    optimizer.state[b]["exp_avg"] = torch.ones(2)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.step()
    optimizer.state[b]["exp_avg"] = good
    optimizer.state[a] = state
    optimizer.step()
    assert torch.equal(a, b)


def test_failed_first_step_stays_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else dampening would apply to the first grad."""
    param = Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    optimizer = fusedopt.SGD([param], lr=1.0, momentum=0.9, dampening=0.5)

    def fill_too_little(self: CreatedState, *args: Any) -> None:
        fill(self, *args)
        del optimizer.state[param]["momentum_buffer"]

    fill = CreatedState.fill
    monkeypatch.setattr(CreatedState, "fill", fill_too_little)
    with pytest.raises(RuntimeError, match="not there"):
        optimizer.step()
    assert not optimizer.state
    monkeypatch.undo()
    optimizer.step()
    assert param.tolist() == [-1.0, -1.0]


@pytest.mark.cpu_only
def test_first_step_that_is_interrupted_anywhere() -> None:
    number = 1
    came = True
    while came:
        param = Parameter(torch.zeros(2))
        param.grad = torch.ones(2)
        optimizer = fusedopt.SGD([param], lr=1.0, momentum=0.9, dampening=0.5)
        came = interrupted_at(number, optimizer.step)
        if not param.any():
            assert not optimizer.state, number
            optimizer.step()
        assert param.tolist() == [-1.0, -1.0], number
        number += 1
    assert number > 60


def test_layouts_that_move_between_params() -> None:
    buffer = torch.zeros(16)
    dense, strided = buffer[0:4], buffer[4:12:2]
    a, b = Parameter(dense), Parameter(strided)
    a.grad, b.grad = torch.ones(4), torch.ones(4)
    optimizer = fusedopt.SGD([a, b], lr=1.0)
    optimizer.step()
    a.data, b.data = buffer[0:8:2], buffer[4:8]
    before = buffer.clone()
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert torch.equal(buffer, before)


def test_load_of_a_bad_step_changes_nothing() -> None:
    param = Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = fusedopt.Adam([param], lr=0.5)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 5.0
    saved["state"] = {0: {**saved["state"][0], "step": "x"}}
    with pytest.raises(TypeError, match="step"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.state[param]["step"] == 1


@pytest.mark.parametrize("name", ["lr", "dampening"])
def test_integer_that_no_float_holds(name: str) -> None:
    options = {"lr": 1.0, "momentum": 0.1, name: 10**400}
    with pytest.raises(ValueError, match=f"{name} is too large"):
        fusedopt.SGD([Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    "intruder", [None, 1.0, "weight", object()], ids=["none", "number", "text", "object"]
)
def test_param_that_is_no_tensor(intruder: object) -> None:
    """The walk looks behind tensors' heads before it reads them."""
    param = Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = fusedopt.SGD([param], lr=1.0)
    optimizer.param_groups[0]["params"].append(intruder)
    with pytest.raises(TypeError, match=r"index 1.* must be a tensor"):
        optimizer.step()
    assert param.tolist() == [1.0, 1.0]


@pytest.mark.cpu_only
def test_a_step_that_was_interrupted_leaves_no_lock() -> None:
    """Even if the traceback lives on, with all its frames, as in a notebook."""
    param = Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = fusedopt.AdamW([param])

    def interrupt(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name in wanted:
            wanted.clear()
            raise KeyboardInterrupt

    for name in ("_create_and_run", "fill", "place_steps", "new_entry"):
        wanted = {name}
        sys.settrace(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt) as kept:
                optimizer.step()
        finally:
            sys.settrace(None)
        assert not optimizer.state
        assert kept.tb is not None
    optimizer.step()
    assert param._version == 1


def test_state_that_was_replaced_before_a_failed_step() -> None:
    """A step that fails after it has seen that state is another must not pass it off as known."""

    class Key(str):
        __slots__ = ()
        __hash__ = str.__hash__
        fails = False

        def __eq__(self, other: object) -> bool:
            if Key.fails:
                raise ZeroDivisionError
            return str.__eq__(self, other)

    param = Parameter(torch.zeros(8))
    param.grad = torch.ones(8)
    optimizer = fusedopt.SGD([param], lr=1.0, momentum=0.5)
    optimizer.step()
    state = optimizer.state[param]
    state[Key("master_param")] = "of somebody else's"
    state["momentum_buffer"] = torch.full((8,), 100.0)
    Key.fails = True
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    Key.fails = False
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.full((8,), 51.0))
    assert torch.equal(param.detach(), torch.full((8,), -52.0))
