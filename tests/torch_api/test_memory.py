"""Memory: bookkeeping per tensor, no copies, the step writes in place and bumps versions."""

import gc
import resource
import weakref
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from support.device import DEVICE, STEPS_ON_DEVICE
from support.optimizers import CASES, Case, main_cases, take_step, train, varied_cases
from support.processes import run_fork
from support.tensors import make_params, set_grads


@pytest.mark.cpu_only
@main_cases
@pytest.mark.parametrize("count", [100, 1000])
@pytest.mark.parametrize("groups", ["one group", "a group per tensor"])
def test_bookkeeping(case: Case, count: int, groups: str) -> None:
    """At most 224 bytes per tensor, whatever was stepped before."""
    params = [Parameter(torch.ones(3)) for _ in range(count)]
    given: Any = params if groups == "one group" else [{"params": [param]} for param in params]
    optimizer = case.ours(given)
    for param in params:
        param.grad = torch.ones(3)
    for _ in range(3):
        optimizer.step()
        assert 0 < optimizer._plan().bookkeeping_bytes() <= 224 * count


@pytest.mark.cpu_only
def test_bookkeeping_of_a_large_tensor() -> None:
    """Chunks of a large tensor are not counted one by one in ever more memory."""
    param = Parameter(torch.ones(1 << 24))
    param.grad = torch.ones_like(param)
    optimizer = fusedopt.SGD([param])
    optimizer.step()
    state_bytes = param.numel() * param.element_size()
    assert optimizer._plan().bookkeeping_bytes() < state_bytes / 1000


# Run alone: what a process has used at most says nothing once other tests have run in it.
PEAK = """
import resource, torch, fusedopt
name, options = {name!r}, {options!r}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = torch.nn.Parameter(torch.ones(8))
small.grad = torch.ones(8)
getattr(fusedopt, name)([small], **options).step()
param = torch.nn.Parameter({tensor})
param.grad = torch.ones_like(param)
optimizer = getattr(fusedopt, name)([param], **options)
optimizer.step()
before = peak()
states = [t for t in optimizer.state[param].values() if t.dim()]
pointers = [t.data_ptr() for t in (param, param.grad, *states)]
optimizer.step()
assert pointers == [t.data_ptr() for t in (param, param.grad, *states)]
print(len(states), before, peak())
"""


LARGE = {
    "momentum-l2": "torch.ones(16 << 20)",
    "adam": "torch.ones(16, 1 << 10, 32, 32).to(memory_format=torch.channels_last)",
    "adamw": "torch.ones(4 << 10, 4 << 10).t()",
}


@pytest.mark.cpu_only
@pytest.mark.unsanitized  # a sanitizer keeps freed memory
@pytest.mark.parametrize("name", LARGE)
def test_no_copies(name: str) -> None:
    """A step over a 64 MiB tensor must not raise the peak of memory by a quarter of one tensor."""
    case = CASES[name]
    code = PEAK.format(name=case.optimizer, options=case.options, tensor=LARGE[name])
    states, before, after = (int(number) for number in run_fork(code).split())
    assert states == len(case.state_names - {"step"})
    assert before > (2 + states) * 64 << 10  # the measure sees tensors of this size
    assert after - before < 16 << 10


@pytest.mark.cpu_only
@pytest.mark.unsanitized
def test_steps_leak_nothing() -> None:
    """Peak memory of 3000 steps with fresh grads and moved params stays where 300 left it."""
    params = [Parameter(torch.ones(64, 64)) for _ in range(8)]
    optimizer = fusedopt.AdamW(params)

    def run(steps: int) -> int:
        for _ in range(steps):
            for param in params:
                param.grad = torch.ones(64, 64)
            params[0].data = params[0].data.clone()
            optimizer.step()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    first = run(300)
    assert run(3000) - first < 8 << 10  # one leaked grad a step would be 48 MiB


@main_cases
def test_nothing_is_kept_alive(case: Case) -> None:
    """Dropped grads are freed at once, and params with their optimizer."""
    params = make_params()
    optimizer = case.ours(params)
    train(optimizer, steps=2)
    grads = [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    assert [grad() for grad in grads] == [None] * len(grads)
    refs = [weakref.ref(param) for param in params]
    del params, optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


@main_cases
def test_grads_are_released_after_an_error(case: Case) -> None:
    params = make_params()
    optimizer = case.ours(params)
    take_step(optimizer, 0)
    set_grads(params, 1)
    params[-1].data = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not fit"):
        optimizer.step()
    grads = [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    assert [grad() for grad in grads] == [None] * len(grads)


@varied_cases
def test_versions(case: Case) -> None:
    """Params that are written to get a new version; grads and other params keep theirs."""
    params = make_params()
    optimizer = case.ours(params)
    take_step(optimizer, 0)
    idle = params[2]
    idle.grad = None
    before = [param._version for param in params]
    grads = [param.grad._version for param in params if param.grad is not None]
    optimizer.step()
    bumps = [param._version - version for param, version in zip(params, before, strict=True)]
    assert bumps == [0 if param is idle else 1 for param in params]
    assert [param.grad._version for param in params if param.grad is not None] == grads


@main_cases
def test_backward_through_a_changed_param_raises(case: Case) -> None:
    """Else autograd would silently use the new values for the old graph."""
    param, other = (Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = case.ours([param, other])
    loss = (param**2).sum()
    fine = (other**2).sum()
    param.grad = torch.ones_like(param)
    optimizer.step()
    fine.backward()  # `other` had no grad: its version is the old one
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(STEPS_ON_DEVICE, reason="the host does not know that the step is skipped")
@main_cases
def test_version_stays_on_a_skipped_step(case: Case) -> None:
    param = Parameter(torch.ones(3))
    optimizer = case.ours([param])
    loss = (param**2).sum()
    param.grad = torch.ones_like(param)
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    loss.backward()
    assert param._version == 0


@main_cases
def test_views_see_the_step(case: Case) -> None:
    """A slice shares version and memory with its base, which is written only where it is sliced."""
    base = torch.ones(4, 6)
    param = Parameter(base[1:3, ::2])
    optimizer = case.ours([param])
    param.grad = torch.ones(2, 3)
    optimizer.step()
    touched = torch.zeros(4, 6, dtype=torch.bool)
    touched[1:3, ::2] = True
    assert torch.equal(base != 1, touched)


def test_bytes_by_kind() -> None:
    """Of a group or of all: 10 bytes a weight with split masters, and what averages add."""
    sizes, bf16 = (300, 50), torch.bfloat16
    params = [Parameter(torch.ones(size, dtype=bf16, device=DEVICE)) for size in sizes]
    split = {"master_weights": "split", "state_dtype": bf16}
    groups = [{"params": params[:1], **split}, {"params": params[1:], "ema_decay": 0.9}]
    optimizer = fusedopt.AdamW(groups)
    nothing = dict.fromkeys(("grads", "states", "scales", "masters", "averages"), 0)
    assert optimizer.memory() == {"params": 700, **nothing, "total": 700}
    train(optimizer, 1)
    steps = sum(state["step"].nbytes for state in optimizer.state.values())
    assert optimizer.memory(0) == {
        **{"params": 600, "grads": 600, "states": 1200 + steps // 2, "masters": 600, "averages": 0},
        "scales": 0,
        "total": 3000 + steps // 2,
    }
    assert optimizer.memory(1) == {
        **{"params": 100, "grads": 100, "states": 200 + steps // 2, "masters": 0, "averages": 200},
        "scales": 0,
        "total": 600 + steps // 2,
    }
    whole = optimizer.memory()
    assert whole["total"] == 3600 + steps
    optimizer.zero_grad()
    assert optimizer.memory() == {**whole, "grads": 0, "total": whole["total"] - 700}
    with pytest.raises(IndexError):
        optimizer.memory(2)


def test_bytes_of_sparse_grads() -> None:
    embedding = torch.nn.Embedding(100, 8, sparse=True, device=DEVICE)
    optimizer = fusedopt.SparseAdam(embedding.parameters())
    embedding(torch.tensor([3, 7], device=DEVICE)).sum().backward()
    assert optimizer.memory()["grads"] == 2 * 8 * 4 + 2 * 8


def test_bytes_of_parameters_that_are_not_there_yet() -> None:
    module = torch.nn.LazyLinear(4, device=DEVICE)
    optimizer = fusedopt.AdamW(module.parameters())
    assert set(optimizer.memory().values()) == {0}
    module(torch.ones(2, 3, device=DEVICE)).sum().backward()
    optimizer.step()
    found = optimizer.memory()
    assert found["params"] == found["grads"] == 4 * (3 + 1) * 4
