"""``norm_group``: the norm of grads over processes whose optimizers see parts of a model."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt._norms import NormProcesses
from support.device import DEVICE
from support.optimizers import each_of_all_names
from support.processes import run_ranks
from support.snapshots import refused
from support.tensors import by_id, params_with_grads

# Each process has a part of the model, as plain tensors: a partition, a stage, or FSDP1's shards.
RANKS = """
import os, sys, warnings, torch, torch.distributed as dist, fusedopt
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, ShardingStrategy
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.optim import ZeroRedundancyOptimizer
rank, world = int(sys.argv[1]), int(sys.argv[3])
warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=world)
CLIP = 0.3

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))

def backward(model, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, generator=generator)
    (model(x).square().mean() * 10 * scale).backward()

def report(name, model_params, expected_params, norm, expected_norm):
    pairs = zip(model_params, expected_params)
    apart = max([(a - b).abs().max().item() for a, b in pairs] + [0.0])
    is_right = apart < 1e-6 and abs(norm - expected_norm) < 1e-5 * expected_norm
    print(f"{name}: {'right' if is_right else (apart, norm, expected_norm)}")

def refuse(name, optimizer, step):
    # A step over FSDP1's shards has to be refused before it makes any state.
    try:
        step()
        print(f"{name} refused: no")
    except ValueError as error:
        is_right = "FSDP1" in str(error) and not optimizer.state
        print(f"{name} refused: {'right' if is_right else error}")

def of_torch(steps=3):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        backward(model, step)
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step(); optimizer.zero_grad()
    return [p.detach() for p in model.parameters()], float(norm)

expected, expected_norm = of_torch()
both = [dist.group.WORLD, [dist.group.WORLD], "world"]

for at, group in enumerate(both):
    model = build()  # a stage of a pipeline, each with an optimizer of its own
    mine = list(model.parameters())[: 2] if rank == 0 else list(model.parameters())[2:]
    optimizer = fusedopt.AdamW(mine, lr=1e-2, max_grad_norm=CLIP, norm_group=group)
    for step in range(3):
        backward(model, step)
        optimizer.step(); model.zero_grad()
        for p in model.parameters():
            source = 0 if any(p is q for q in list(model.parameters())[:2]) else 1
            dist.broadcast(p.detach(), source)
    report(f"stages {at}", [p.detach() for p in model.parameters()], expected,
           float(optimizer.grad_norm), expected_norm)

model = build()
optimizer = ZeroRedundancyOptimizer(model.parameters(), fusedopt.AdamW, lr=1e-2, max_grad_norm=CLIP,
                                    norm_group="world")
for step in range(3):
    backward(model, step)
    optimizer.step(); optimizer.zero_grad()
report("zero", [p.detach() for p in model.parameters()], expected,
       float(optimizer.optim.grad_norm), expected_norm)

for use_orig in (False, True):
    model = FSDP(build(), use_orig_params=use_orig, device_id=torch.device("cpu"))
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, max_grad_norm=CLIP)
    backward(model, 0)
    refuse(f"fsdp1 {use_orig}", optimizer, optimizer.step)
    model.zero_grad()
    scaler = fusedopt.GradScaler("cpu", init_scale=2.0)
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2)
    backward(model, 0)
    scaler.scale(torch.zeros(()))
    refuse(f"scaled fsdp1 {use_orig}", optimizer, lambda: scaler.step(optimizer))
    model.zero_grad()
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, max_grad_norm=CLIP,
                               norm_group=dist.group.WORLD)
    for step in range(3):
        backward(model, step)
        optimizer.step(); optimizer.zero_grad()
    with FSDP.summon_full_params(model):
        found = [p.detach().reshape(-1).clone() for p in model.parameters()]
    want = [p.reshape(-1) for p in expected]
    if not use_orig:
        want, found = [torch.cat(want)], [torch.cat(found)[: sum(p.numel() for p in want)]]
    report(f"fsdp1 {use_orig}", found, want, float(optimizer.grad_norm), expected_norm)

for checks in (False, True):  # made before the model is wrapped, whose parameters stay the same
    model = build()
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, max_grad_norm=None if checks else CLIP)
    model = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    scaler = fusedopt.GradScaler("cpu", init_scale=2.0, enabled=checks)
    backward(model, 0)
    scaler.scale(torch.zeros(()))
    refuse(f"wrapped later {checks}", optimizer, lambda: scaler.step(optimizer))

for use_orig in (False, True):
    model = FSDP(build(), use_orig_params=use_orig, device_id=torch.device("cpu"),
                 sharding_strategy=ShardingStrategy.NO_SHARD)
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, max_grad_norm=CLIP)
    for step in range(3):
        backward(model, step)
        optimizer.step(); optimizer.zero_grad()
    report(f"whole fsdp1 {use_orig}", [], [], float(optimizer.grad_norm), expected_norm)

# What is not finite on one process skips the step on all.
param = nn.Parameter(torch.ones(4))
optimizer = fusedopt.SGD([param], lr=1.0, norm_group="world")
scaler = fusedopt.GradScaler("cpu", init_scale=2.0)
param.grad = torch.full((4,), float("inf") if rank == 0 else 1.0)
scaler.scale(torch.zeros(()))
scaler.step(optimizer)
scaler.update()
skips = bool(optimizer.skipped) and scaler.get_scale() == 1.0 and param.tolist() == [1.0] * 4
print(f"skipped on all: {'right' if skips else 'no'}")

for options in ({"norm_group": [dist.group.WORLD] * 2}, {"norm_group": "world"}):
    try:
        shard = DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (world,)), [Shard(0)])
        shard.grad = DTensor.from_local(torch.ones(4), shard.device_mesh, [Shard(0)])
        fusedopt.SGD([shard], max_grad_norm=1.0, **options).step()
        print(f"twice {options}: no")
    except ValueError as error:
        print(f"twice {options}:", "right" if "twice" in str(error) else error)

outside = dist.new_group([0])
if rank == 1:
    try:
        fusedopt.SGD([param], norm_group=outside)
    except ValueError as error:
        print("outside:", "right" if "not in" in str(error) else error)
else:
    print("outside: right")
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a process that ends while they do
"""


@pytest.mark.cpu_only
def test_norm_over_processes(tmp_path: Path) -> None:
    for out in run_ranks(tmp_path, RANKS, world=2):
        verdicts = dict(line.rsplit(": ", 1) for line in out.splitlines())
        assert len(verdicts) == 18, out
        assert set(verdicts.values()) == {"right"}, out


@each_of_all_names
def test_one_process_is_the_world(name: str) -> None:
    """A program that has begun no processes runs as it would with several."""
    found = []
    for options in ({}, {"norm_group": "world"}):
        params = params_with_grads(dtype=torch.float32)
        optimizer = getattr(fusedopt, name)(params, lr=0.1, max_grad_norm=0.5, **options)
        optimizer.step()
        found.append((params[0].tolist(), float(optimizer.grad_norm)))
        assert "norm_group" not in optimizer.param_groups[0]
        assert "norm_group" not in optimizer.state_dict()["param_groups"][0]
    assert found[0] == found[1]


@pytest.mark.parametrize("given", ["all", 3, [None], []], ids=repr)
@pytest.mark.cpu_only
def test_no_process_group(given: Any) -> None:
    with pytest.raises(ValueError, match="norm_group must be 'world' or process groups"):
        fusedopt.AdamW([Parameter(torch.ones(2))], norm_group=given)


@pytest.mark.cpu_only
def test_it_is_not_a_param_groups() -> None:
    params = params_with_grads()
    with pytest.raises(ValueError, match="for the whole optimizer"):
        fusedopt.AdamW([{"params": params, "norm_group": "world"}])
    optimizer = fusedopt.AdamW(params[:1])
    group = {"params": params[1:], "norm_group": "world"}
    with refused(optimizer, ValueError, "for the whole optimizer"):
        optimizer.add_param_group(group)
    assert group["norm_group"] == "world"
    # As ZeroRedundancyOptimizer passes it on.
    optimizer = fusedopt.AdamW([{"params": params, "norm_group": "world"}], norm_group="world")
    assert "norm_group" not in optimizer.param_groups[0]


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o))}


@pytest.mark.parametrize("copied", **by_id(COPIES))
def test_copies_have_it(copied: Any) -> None:
    optimizer = fusedopt.AdamW(params_with_grads(), norm_group="world")
    assert copied(optimizer)._norm_processes == optimizer._norm_processes
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._norm_processes == NormProcesses("world")


def test_devices_are_added_up_before_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice over, here: the sum of squares, and the count of what is not finite."""
    monkeypatch.setattr(NormProcesses, "groups", lambda _: ["one", "other"])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, **_: sums.mul_(2))
    param = Parameter(torch.zeros(4, device=DEVICE))
    optimizer = fusedopt.SGD([param], lr=1.0, max_grad_norm=1.0, norm_group="world")
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.grad_norm == 4.0
    torch.testing.assert_close(param.detach(), torch.full_like(param, -0.25))
    param.grad[0] = float("inf")
    optimizer.step()
    assert optimizer.skipped
    assert optimizer.nonfinite_grads == 4
