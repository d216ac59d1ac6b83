"""Norms and settings that must not depend on what was before: resumed runs repeat their bits."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt import _C, _norms
from support.device import DEVICE
from support.optimizers import take_step
from support.processes import run_fork
from support.tensors import draw, params_of, set_grads, values


@pytest.mark.parametrize("seed", range(12))
def test_params_that_had_grads_once_do_not_move_the_sum(seed: int) -> None:
    used, fresh = (
        fusedopt.SGD(draw(range(5, 75), dtype=torch.float64), max_grad_norm=1.0) for _ in range(2)
    )
    take_step(used, seed)
    for optimizer in (used, fresh):
        set_grads(optimizer, 50 + seed)
        for frozen in (3, 40):
            params_of(optimizer)[frozen].grad = None
        optimizer.step()
    assert used.grad_norm == fresh.grad_norm


def test_a_skipped_step_does_not_hide_a_change_of_settings() -> None:
    param = values(9)
    optimizer = fusedopt.SGD([param], ema_decay=0.5, max_grad_norm=1.0)
    param.grad = values(9, seed=1)
    optimizer.step()
    optimizer.param_groups[0]["ema_decay"] = None
    param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    assert optimizer.skipped
    param.grad = values(9, seed=2)
    optimizer.step()
    assert "ema_param" not in optimizer.state[param]
    assert "step" not in optimizer.state[param]


FAKE_MESH = """
import sys, torch, torch.distributed as dist, fusedopt
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

if sys.argv[1] == "emulated":
    fusedopt._C.emulation.use(True)
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)

def all_reduce(total, op=dist.ReduceOp.SUM, group=None):
    if op == dist.ReduceOp.SUM:  # the smallest of equal numbers is what they are
        total.mul_(2)

dist.all_reduce = all_reduce
mesh = init_device_mesh("cpu", (2,))
param = torch.nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Shard(0)], run_check=False))
param.grad = DTensor.from_local(torch.ones(4), mesh, [Shard(0)], run_check=False)
optimizer = fusedopt.SGD([param], lr=1.0, max_grad_norm=1.0)
optimizer.step()
assert optimizer.grad_norm == 8**0.5, optimizer.grad_norm
optimizer.step()
assert optimizer.grad_norm == 8**0.5, optimizer.grad_norm
"""


@pytest.mark.unsanitized
@pytest.mark.skipif(DEVICE == "cuda", reason="the mesh is of CPUs")
def test_shards_on_either_driver() -> None:
    """Of a second process that is not there, whose shard would have equal grads."""
    driver = "emulated" if _C.build_info()["cuda_archs"] == "emulated" else "cpu"
    run_fork(FAKE_MESH, driver)


def test_sharded_grads_are_summed_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the classes and the sums that two processes with equal shards would have."""
    reduced = []

    def all_reduce(total: Tensor, group: str) -> None:
        reduced.append(group)
        total.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    whole, shard = torch.tensor([9, 0, 16]), torch.tensor([2, 1, 0])
    reductions: list[list[Any]] = [[], ["the other process"]]
    combined = _norms.combine_sums([torch.cat([whole, shard])], reductions, [], param=None)
    assert reduced == ["the other process"]
    assert torch.equal(combined[0], whole + 2 * shard)
