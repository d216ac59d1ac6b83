"""Other threads that change an optimizer while it steps: a watchdog that rolls back, a loader of
checkpoints. A step gives up the GIL; what it touches is held until it ends.

A thread waits until the first parameter has changed, acts, and looks whether the last element of
the last parameter has not: then the step was running when it acted.
"""

import copy
import gc
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.device import DEVICE, EMULATES, on_host
from support.equality import assert_equal
from support.optimizers import CASES, VARIED, Case
from support.snapshots import record
from support.tensors import by_id, draw
from support.threads import run_in_threads

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a step returns before the GPU is done")

# Where other programs keep the cores busy, a step may end before the other thread acts: so the next
# one takes longer.
SIZES = [1 << bits for bits in (range(14, 21) if EMULATES else range(18, 25)) for _ in "ab"]


@pytest.fixture(autouse=True)
def _one_thread_for_each_step() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Row:
    """What the other thread does to an optimizer that has made a step, or to its state dict."""

    act: Callable[[Any, Any], Any]
    case: Case = CASES["adamw"]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def last(optimizer: Any) -> Any:
    """The last parameter, which takes nearly all of a step."""
    return optimizer.param_groups[0]["params"][-1]


def entries(optimizer: Any) -> Any:
    return optimizer.state[last(optimizer)]


def drop_everything(optimizer: Any, _: Any) -> None:
    del last(optimizer).grad
    optimizer.state.clear()
    optimizer.param_groups[0].clear()
    optimizer.param_groups.clear()


def set_grad(optimizer: Any, grad: Tensor | None) -> None:
    last(optimizer).grad = grad


SPLIT = {"master_weights": "split"}
FLOAT32 = {"master_weights": "float32"}
EMA = {"ema_decay": 0.9}
CLIPPED = {"max_grad_norm": 1.0}
TENSORS = {"lr": torch.tensor(0.01), "capturable": True}  # the emulated driver reads lr in the step

ROWS = {
    "exp_avg replaced": Row(lambda o, _: entries(o).update(exp_avg=torch.zeros(3))),
    "exp_avg_sq deleted": Row(lambda o, _: entries(o).pop("exp_avg_sq")),
    "momentum_buffer replaced": Row(
        lambda o, _: entries(o).update(momentum_buffer=torch.zeros(3)), CASES["momentum-l2"]
    ),
    "step replaced": Row(lambda o, _: entries(o).update(step=on_host(7.0))),
    "master replaced": Row(
        lambda o, _: entries(o).update(master_param=torch.zeros(3)),
        options=FLOAT32,
        dtype=torch.bfloat16,
    ),
    "remainder deleted": Row(
        lambda o, _: entries(o).pop("param_remainder"), options=SPLIT, dtype=torch.bfloat16
    ),
    "average deleted": Row(lambda o, _: entries(o).pop("ema_param"), options=EMA),
    "state of a parameter cleared": Row(lambda o, _: entries(o).clear()),
    "state of a parameter replaced": Row(lambda o, _: o.state.update({last(o): {}})),
    "state of a parameter deleted": Row(lambda o, _: o.state.pop(last(o))),
    "state cleared": Row(lambda o, _: o.state.clear()),
    "state replaced": Row(lambda o, _: setattr(o, "state", defaultdict(dict))),
    "state dict loaded": Row(lambda o, saved: o.load_state_dict(saved)),
    "grad = None": Row(lambda o, _: set_grad(o, None)),
    "grad = None, clipped": Row(lambda o, _: set_grad(o, None), options=CLIPPED),
    "grad replaced": Row(lambda o, _: set_grad(o, torch.zeros_like(last(o)))),
    "grads cleared": Row(lambda o, _: o.zero_grad()),
    "params replaced": Row(lambda o, _: o.param_groups[0].update(params=[])),
    "params cleared": Row(lambda o, _: o.param_groups[0]["params"].clear()),
    "param_groups cleared": Row(lambda o, _: o.param_groups.clear()),
    "param_groups replaced": Row(lambda o, _: setattr(o, "param_groups", [])),
    "lr replaced": Row(lambda o, _: o.param_groups[0].update(lr=0.5), options=TENSORS),
    "everything dropped": Row(drop_everything),
    "everything dropped, clipped": Row(drop_everything, options=CLIPPED | EMA),
}


def build(row: Row, size: int) -> Any:
    """An optimizer after a step. Nothing else refers to what it works on."""
    options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in row.options.items()}
    first, last = draw([1024, 1024], dtype=row.dtype)
    params = [Parameter(first), Parameter(last.repeat(size // 1024))]
    optimizer = row.case.ours(params, **options)
    for param in params:
        param.grad = param.detach() * 0.1 + 0.01
    optimizer.step()
    return optimizer


def tensors_of(optimizer: Any) -> dict[str, "weakref.ref[Tensor]"]:
    """All that a step of the last parameter touches."""
    found = {f"state {name}": tensor for name, tensor in entries(optimizer).items()}
    found |= {"param": last(optimizer), "grad": last(optimizer).grad}
    found |= {k: v for k, v in optimizer.param_groups[0].items() if isinstance(v, Tensor)}
    return {name: weakref.ref(tensor) for name, tensor in found.items()}


def memory_of(optimizer: Any) -> list[Tensor]:
    """The parameters' memory, without a reference to the parameters."""
    return [param.detach() for param in optimizer.param_groups[0]["params"]]


def step_disturbed(
    optimizer: Any, act: Callable[[], Any], rehearse: Callable[[], Any]
) -> list[str] | None:
    """Makes a step during which another thread acts. What was then gone of what the step touches.

    None if the step had ended by then. `rehearse` is called before, for what takes time only once.
    """
    memory, touched = memory_of(optimizer), tensors_of(optimizer)
    first, end = (values[-1].item() for values in memory)
    gone: list[str] = []
    acted_in_time = False
    is_ready = threading.Event()

    def other() -> None:
        nonlocal gone, acted_in_time
        try:
            rehearse()
        finally:
            is_ready.set()
        while memory[0][-1].item() == first:
            time.sleep(0)
        act()
        gone = [name for name, tensor in touched.items() if tensor() is None]
        acted_in_time = memory[1][-1].item() == end

    thread = threading.Thread(target=other)
    thread.start()
    is_ready.wait()
    optimizer.step()
    thread.join()
    return gone if acted_in_time else None


@pytest.mark.parametrize("row", **by_id(ROWS))
def test_what_a_step_touches_is_held_until_it_ends(row: Row) -> None:
    for size in 3 * SIZES:  # on a machine that does other work too, a thread may come late
        undisturbed, optimizer = build(row, size), build(row, size)
        saved, small = copy.deepcopy(undisturbed.state_dict()), build(row, 1024)
        undisturbed.step()
        memory, touched = memory_of(optimizer), tensors_of(optimizer)
        gone = step_disturbed(
            optimizer,
            lambda: row.act(optimizer, saved),  # noqa: B023
            lambda: row.act(small, copy.deepcopy(small.state_dict())),  # noqa: B023
        )
        assert_equal(memory, memory_of(undisturbed))
        if gone is not None:
            assert gone == []
            del optimizer
            gc.collect()
            assert all(tensor() is None for tensor in touched.values())
            return
    pytest.fail("in no attempt did the other thread act before the step had ended")


def test_first_steps_of_one_optimizer_in_two_threads() -> None:
    """They share one plan, whose flag is what refuses one of them."""
    for _ in range(50):
        param = Parameter(torch.zeros(1 << 14, dtype=torch.float64))
        param.grad = torch.ones_like(param)
        optimizer = fusedopt.SGD([param], lr=1.0)
        errors = run_in_threads(lambda _, optimizer=optimizer: optimizer.step(), count=3)
        assert all("another thread" in str(error) for error in errors), errors
        assert_equal(param.detach(), torch.full_like(param, len(errors) - 3.0))


def test_verdict_and_state_dict_are_read_while_another_thread_steps() -> None:
    param = Parameter(torch.ones(1 << 16))
    optimizer = fusedopt.AdamW([param], max_grad_norm=1.0)
    norms = {256.0 * scale for scale in (1, 2)}
    param.grad = torch.ones_like(param)
    optimizer.step()
    steps, done = 100, threading.Event()

    def work(index: int) -> None:
        if index == 0:
            try:
                for step in range(steps):
                    param.grad = torch.full_like(param, 1.0 + step % 2)
                    optimizer.step()
            finally:
                done.set()
        while not done.is_set():
            norm = optimizer.grad_norm
            assert norm is None or norm.item() in norms
            nonfinite = optimizer.nonfinite_grads
            assert nonfinite is None or nonfinite.item() == 0
            assert not optimizer.skipped
            state = optimizer.state_dict()["state"][0]
            assert 1 <= state["step"].item() <= steps + 1

    assert run_in_threads(work) == []
    assert optimizer.state[param]["step"].item() == steps + 1


def test_optimizers_that_share_a_parameters_grads_in_threads() -> None:
    """Several drivers read the same grads at once."""

    def make() -> Any:
        return [CASES[key].ours([Parameter(torch.ones(70_000))]) for key in VARIED]

    together, alone = make(), make()
    grads = torch.randn(70_000, generator=torch.Generator().manual_seed(1))
    for optimizer in together + alone:
        last(optimizer).grad = grads

    def make_steps(i: int) -> None:
        for _ in range(5):
            together[i].step()

    assert run_in_threads(make_steps, len(together)) == []
    for optimizer in alone:
        for _ in range(5):
            optimizer.step()
    assert_equal([record(o) for o in together], [record(o) for o in alone])
