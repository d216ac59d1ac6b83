"""DTensor parameters (FSDP2, tensor parallel), on meshes of one process and, with gloo, of two."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import _C
from support.equality import assert_equal, assert_same_math
from support.optimizers import (
    VARIED,
    Build,
    Case,
    like_torch,
    main_cases,
    some_cases,
    train,
    varied_cases,
)
from support.processes import run_ranks
from support.snapshots import DERIVED, refused
from support.tensors import make_params, params_of, set_grads

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor  # noqa: E402


def shard(mesh: Any, tensor: Tensor) -> Any:
    placement = Shard(0) if tensor.dim() else Replicate()
    return distribute_tensor(tensor.detach(), mesh, [placement])


def sharded_params(mesh: Any) -> list[Parameter]:
    return [Parameter(shard(mesh, param)) for param in make_params()]


def set_sharded_grads(mesh: Any, params: list[Parameter], seed: int) -> None:
    plain = make_params()
    set_grads(plain, seed)
    for param, source in zip(params, plain, strict=True):
        param.grad = shard(mesh, source.grad)


def local(tensors: Any) -> list[Any]:
    """Of each, or of those in each, the part of this rank."""
    if isinstance(tensors, dict):
        return [*tensors, *local(tensors.values())]
    if not isinstance(tensors, Tensor):
        return [local(tensor) for tensor in tensors]
    tensors = tensors.detach()
    return tensors.to_local() if isinstance(tensors, DTensor) else tensors


@varied_cases
def test_equals_plain_tensors(case: Case, mesh: Any) -> None:
    params, plain = sharded_params(mesh), case.ours(make_params())
    optimizer = case.ours(params)
    for seed in range(4):
        set_sharded_grads(mesh, params, seed)
        optimizer.step()
    train(plain, steps=4)
    assert_equal(local(params), params_of(plain))
    assert_equal(local(optimizer.state.values()), local(plain.state.values()))


# torch's Rprop selects by a mask, which DTensors refuse.
@some_cases(*(key for key in VARIED if key != "rprop"))
@like_torch
def test_state_is_as_in_torch(build: Build, case: Case, mesh: Any) -> Any:
    params = sharded_params(mesh)
    optimizer = build(params)
    set_sharded_grads(mesh, params, 0)
    optimizer.step()
    described = [
        (key, type(t), t.shape, t.dtype, getattr(t, "placements", None))
        for param in params
        for key, t in sorted(optimizer.state.get(param, {}).items())
        if key not in DERIVED
    ]
    kinds = {entry[1] for entry in described if entry[0] != "step"}
    assert kinds == ({DTensor} if case.state_names else set())
    return described


@main_cases
def test_plain_and_sharded_params_in_one_optimizer(case: Case, mesh: Any) -> None:
    sharded, plain = sharded_params(mesh), make_params()
    optimizer = case.ours([*sharded, *plain])
    for seed in range(3):
        set_sharded_grads(mesh, sharded, seed)
        set_grads(plain, seed)
        optimizer.step()
    assert_equal(local(sharded), plain)


@main_cases
def test_fully_shard(case: Case, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    results = []
    for build, sharded in ((case.ours, True), (case.ours, False), (case.theirs, True)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        model.double()
        if sharded:
            fully_shard(model, mesh=mesh)
        optimizer = build(model.parameters())
        for step in range(4):
            optimizer.zero_grad()
            model(torch.full((2, 3), step + 1.0, dtype=torch.float64)).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        results.append(local(model.parameters()))
    for result in results[1:]:
        assert_same_math(results[0], result)


@main_cases
def test_state_dict(case: Case, mesh: Any) -> None:
    """Saved and loaded in the middle; the copy of the state stays sharded."""
    params = sharded_params(mesh)
    optimizer = case.ours(params)
    set_sharded_grads(mesh, params, 0)
    optimizer.step()
    other_params = [Parameter(param.detach().clone()) for param in params]
    other = case.ours(other_params)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_params in ((optimizer, params), (other, other_params)):
        set_sharded_grads(mesh, its_params, 1)
        each.step()
    states = [t for entries in other.state.values() for k, t in entries.items() if k != "step"]
    assert all(isinstance(state, DTensor) for state in states)
    assert_equal(local(other_params), local(params))


@pytest.mark.parametrize("is_sharded", [True, False])
def test_state_is_sharded_as_its_param(is_sharded: bool, mesh: Any) -> None:
    """A plain one could be the shard or the whole, and would be saved as the whole."""

    def maybe_sharded(tensor: Tensor, is_so: bool) -> Tensor:
        return shard(mesh, tensor) if is_so else tensor

    param = Parameter(maybe_sharded(torch.ones(4, 3), is_sharded))
    optimizer = fusedopt.AdamW([("w", param)])
    param.grad = maybe_sharded(torch.ones(4, 3), is_sharded)
    optimizer.step()
    optimizer.state[param]["exp_avg"] = maybe_sharded(torch.ones(4, 3), not is_sharded)
    before = local([param])[0].clone()
    with pytest.raises(TypeError, match=r"exp_avg of parameter 'w' .* must both be DTensors"):
        optimizer.step()
    assert torch.equal(local([param])[0], before)


@main_cases
def test_versions(case: Case, mesh: Any) -> None:
    """Backward through the values before the step must raise. (Through to_local() torch's does not
    notice either.)
    """
    param = Parameter(shard(mesh, torch.ones(4)))
    optimizer = case.ours([param])
    loss = (param**2).to_local().sum()
    param.grad = shard(mesh, torch.ones(4))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def python_calls(run: Any) -> int:
    """How many functions of Python's, or of C seen from Python, are called."""
    calls = 0

    def count(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("kind", [None, "float32", "split", "split8"])
@pytest.mark.parametrize("is_sharded", [True, False], ids=["sharded", "plain"])
def test_weights_of_the_other_kind_are_refused(is_sharded: bool, kind: Any, mesh: Any) -> None:
    """And the parameters before them are not written, either."""
    params = [torch.ones(4, 4, dtype=torch.bfloat16) for _ in range(2)]
    weights = [torch.full((4, 4), 3.0) for _ in range(2)]
    if is_sharded:
        params = [params[0], shard(mesh, params[1])]
    else:
        weights = [weights[0], shard(mesh, weights[1])]
    optimizer = fusedopt.AdamW([Parameter(param) for param in params], master_weights=kind)
    with refused(optimizer, TypeError, r"tensor 1 \(.*\) and .* must both be DTensors"):
        optimizer.load_fp32_params(weights)
    if kind in (None, "float32"):
        return
    # Masters of a checkpoint, of which parameters of this kind would be made.
    twin = fusedopt.AdamW([Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(2)],
                          master_weights="float32")  # fmt: skip
    train(twin, steps=1)
    saved = twin.state_dict()
    if not is_sharded:
        state = saved["state"][1]
        saved["state"][1] = {**state, "master_param": shard(mesh, state["master_param"])}
    with refused(optimizer, TypeError, "master weight of .*index 1.* must both be DTensors"):
        optimizer.load_state_dict(saved)


# Without fingerprints, versions are counted by torch.
@pytest.mark.skipif(not _C.build_info()["fingerprints"], reason="fingerprints are off")
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"ema_decay": 0.9}], ids=str)
def test_a_step_calls_no_python_for_each_param(options: dict[str, Any], mesh: Any) -> None:
    """Nor for its grad, which FSDP2 makes anew with the layout object of its param."""

    def calls(count: int) -> int:
        params = [Parameter(shard(mesh, torch.ones(4, 3))) for _ in range(count)]
        optimizer = fusedopt.AdamW(params, **options)
        for _ in range(3):
            for param in params:
                spec: Any = param
                param.grad = DTensor(torch.ones(4, 3), spec._spec, requires_grad=False)
            found = python_calls(optimizer.step)
        return found

    assert calls(20) == calls(2)


# Run by two processes. Grads may be placed otherwise than their parameter (sequence parallel leaves
# Partial grads on replicated norm weights); torch.optim redistributes them.
TWO_RANKS = """
import os, sys, torch, torch.distributed as dist, fusedopt
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
PLACED = {
    "shard": (Shard(0), Shard(0)),
    "uneven shard": (Shard(1), Shard(1)),
    "replicate": (Replicate(), Replicate()),
    "partial grad": (Replicate(), Partial()),
    "replicated grad": (Shard(0), Replicate()),
    "other dim": (Shard(0), Shard(1)),
}
full = torch.arange(12.0, dtype=torch.float64).view(4, 3)

def set_grad(param, placement):
    if placement == Partial():
        part = (full - 5) * (3 if rank else -2)
        param.grad = DTensor.from_local(part, mesh, [Partial()])
    else:
        param.grad = distribute_tensor(full - 5, mesh, [placement])

def train(cls, placement, of_grads):
    param = torch.nn.Parameter(distribute_tensor(full.clone(), mesh, [placement]))
    optimizer = cls([("w", param)], lr=0.5)
    for of_grad in of_grads:
        set_grad(param, of_grad)
        before = param.detach().to_local().clone()
        try:
            optimizer.step()
        except (TypeError, ValueError) as error:
            unchanged = torch.equal(param.detach().to_local(), before)
            return "refused" if unchanged and "'w'" in str(error) else "bad error"
    return param.detach().to_local()

LATER = {f"{name} later": ((p, g), [p, p, g, g, p]) for name, (p, g) in PLACED.items()}
AT_ONCE = {name: ((p, g), [g]) for name, (p, g) in PLACED.items()}
for name, ((placement, of_grad), of_grads) in (AT_ONCE | LATER).items():
    ours, theirs = [train(cls, placement, of_grads) for cls in (fusedopt.AdamW, torch.optim.AdamW)]
    if isinstance(ours, str):
        verdict = ours
    else:
        same = torch.allclose(ours, theirs, rtol=1e-13, atol=1e-14)
        verdict = "equal" if same else "wrong"
    print(f"{name}: {verdict}")

# Which grads are summed over both ranks follows the params, as they are in each step.
params = [torch.nn.Parameter(distribute_tensor(full.clone(), mesh, [Shard(0)])) for _ in range(2)]
optimizer = fusedopt.AdamW(params, max_grad_norm=1.0)
wrong = []
for placements in ([Shard(0)] * 2, [Shard(0)] * 2, [Shard(0), Replicate()], [Replicate()] * 2,
                   [Shard(0), None], [None, Replicate()], [Shard(0)] * 2):
    for at, placement in enumerate(placements):
        param = full.clone() if placement is None else distribute_tensor(
            full.clone(), mesh, [placement])
        grad = full - 5 if placement is None else distribute_tensor(full - 5, mesh, [placement])
        optimizer.param_groups[0]["params"][at] = param = torch.nn.Parameter(param)
        param.grad = grad
    optimizer.step()
    if abs(optimizer.grad_norm.item() - 2 ** 0.5 * (full - 5).norm().item()) > 1e-12:
        wrong.append(placements)
print(f"norm follows: {wrong or 'equal'}")

# A param that gets another layout while it rests: its grads are laid out as its next one.
mesh_2d = init_device_mesh("cpu", (2, 1))
def on_2d(tensor, placements):
    return distribute_tensor(tensor, mesh_2d, placements)
first, later = [Shard(0), Replicate()], [Shard(1), Replicate()]
square = torch.arange(16.0, dtype=torch.float64).view(4, 4)  # whose shards are of other shapes
results = []
for cls in (fusedopt.SGD, torch.optim.SGD):
    params = [torch.nn.Parameter(on_2d(square.clone(), first)) for _ in range(2)]
    optimizer = cls([("w", params[0]), ("v", params[1])], lr=0.5)
    for placements, rests in ((first, False), (later, True), (later, False)):
        if placements is later and rests:
            params[0] = torch.nn.Parameter(on_2d(square.clone(), later))
            optimizer.param_groups[0]["params"][0] = params[0]
        params[0].grad = None if rests else on_2d(square - 5, first)
        params[1].grad = on_2d(square - 5, first)
        optimizer.step()
    results.append(params[0].detach().full_tensor())
print(f"rests: {'equal' if torch.equal(*results) else 'wrong'}")
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a process that ends while they do
"""
AT_ONCE = {
    "shard": {"equal"},
    "uneven shard": {"equal"},
    "replicate": {"equal"},
    "partial grad": {"equal", "refused"},
    "replicated grad": {"equal", "refused"},
    "other dim": {"equal", "refused"},
}
LATER = {f"{name} later": verdicts for name, verdicts in AT_ONCE.items()}
VERDICTS = {**AT_ONCE, **LATER, "norm follows": {"equal"}, "rests": {"equal"}}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    outputs = run_ranks(tmp_path_factory.mktemp("gloo"), TWO_RANKS, world=2)
    return [dict(line.split(": ") for line in out.splitlines()) for out in outputs]


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", VERDICTS)
def test_two_ranks(name: str, verdicts: list[dict[str, str]]) -> None:
    assert {rank[name] for rank in verdicts} <= VERDICTS[name]
