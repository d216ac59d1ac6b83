"""max_grad_norm and what is around it: non-finite grads, groups, checkpoints, DTensors."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from support.device import DEVICE, STEPS_ON_DEVICE
from support.equality import assert_equal, assert_same_math, bits, same_bits
from support.optimizers import Case, assert_params_after, main_cases, some_cases, take_step, train
from support.processes import run_ranks
from support.scalers import each_bad
from support.sides import SIZES
from support.snapshots import COPIES, copy_params, record, snapshot
from support.tensors import by_id, draw, make_params, params_of, set_grads, some_dtypes, values

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
each_real = some_dtypes(*DTYPES[:4])
some_optimizers = some_cases("sgd-l2", "nesterov", "adam-l2", "adamw-amsgrad", "rmsprop-all")


@each_bad
@each_real
@pytest.mark.parametrize("warm", [False, True], ids=["first step", "later step"])
@some_optimizers
def test_nonfinite_step_is_skipped(case: Case, dtype: torch.dtype, bad: float, warm: bool) -> None:
    """And the next one is as if it had not been."""
    device = torch.device(DEVICE)
    found = []
    for skips in (True, False):
        optimizer = case.ours(draw(SIZES, device, dtype), max_grad_norm=1.0)
        params = params_of(optimizer)
        if warm:
            take_step(optimizer, 0)
        if skips:
            set_grads(params, 1)
            params[3].grad[100] = params[4].grad[-1] = bad
            before = snapshot(optimizer, values_only=STEPS_ON_DEVICE)
            optimizer.step()
            norm = float(optimizer.grad_norm)
            after = snapshot(optimizer, values_only=STEPS_ON_DEVICE)
            if STEPS_ON_DEVICE and not warm:  # state is there, and zero
                assert not any(e.any() for s in optimizer.state.values() for e in s.values())
                after = {k: v for k, v in after.items() if k in before} | {"number of states": 0}
            assert after == before
            assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
            assert optimizer.skipped
            assert optimizer.nonfinite_grads.dtype == torch.int64
            assert optimizer.nonfinite_grads == 2
        for seed in (2, 3):
            take_step(optimizer, seed)
            assert not optimizer.skipped
            assert optimizer.nonfinite_grads == 0
        found.append(record(optimizer))
    assert same_bits(*found)


@some_dtypes(*DTYPES)
@each_bad
def test_nonfinite_anywhere(dtype: torch.dtype, bad: float) -> None:
    """At every place of a vector's body and tail, around blocks, in each of many tensors."""
    places = [(n, at) for n in range(1, 36) for at in {0, n // 2, n - 1}]
    places += [(n, at) for n in (8191, 8193, 65537) for at in (0, 4095, n - 2, n - 1)]
    places += [(70, at) for at in range(70)]
    params = [values(n, dtype=dtype, seed=n) for n in (5, 1, 64, *{n for n, _ in places}, 9)]
    by_size = {param.numel(): param for param in params}
    optimizer = fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0)
    before = [param.clone() for param in params]
    set_grads(params, 0)
    for size, at in places:
        grad = by_size[size].grad
        kept, grad[at] = grad[at].clone(), bad
        optimizer.step()
        assert optimizer.skipped, (size, at)
        assert optimizer.nonfinite_grads == 1 or dtype.is_complex, (size, at)
        grad[at] = kept
    assert all(torch.equal(bits(b), bits(p)) for b, p in zip(before, params, strict=True))
    optimizer.step()
    assert not optimizer.skipped


@each_bad
def test_every_grad_nonfinite(bad: float) -> None:
    params = [torch.zeros(size) for size in (1, 7, 20000)]
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0)
    for param in params:
        param.grad = torch.full_like(param, bad)
    optimizer.step()
    assert optimizer.nonfinite_grads == 20008


@each_bad
@pytest.mark.parametrize("group", [0, 1], ids=["in the clipped group", "in the other"])
@pytest.mark.parametrize("warm", [False, True], ids=["first step", "later step"])
@some_optimizers
def test_error_if_nonfinite(case: Case, bad: float, group: int, warm: bool) -> None:
    params = [values(30), values(30)]
    groups = [{"params": [params[0]], "max_grad_norm": 1.0}, {"params": [params[1]]}]
    optimizer = case.ours(groups, error_if_nonfinite=True)
    set_grads(params, 0)
    if warm:
        optimizer.step()
    params[group].grad[-1] = bad
    before = snapshot(optimizer, values_only=STEPS_ON_DEVICE)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"non-?finite"):
            optimizer.step()
        if warm or not STEPS_ON_DEVICE:
            assert snapshot(optimizer, values_only=STEPS_ON_DEVICE) == before
    set_grads(params, 1)
    optimizer.step()
    assert not optimizer.skipped


# The limit of each step of a loop: options may change at any time, as lr does.
CHANGES: dict[str, list[float | None]] = {
    "set later": [None, None, 0.5, 0.5],
    "taken away": [0.5, 0.5, None, None],
    "on and off": [0.5, None, math.inf, 0.1],
    "ramped": [2.0, 1.0, 0.5, 0.25],
}


def clip_and_step(optimizer: Any, limit: float | None) -> None:
    """torch's way."""
    if limit is not None:
        params = params_of(optimizer)
        torch.nn.utils.clip_grad_norm_(params, limit)
    optimizer.step()


@main_cases
@pytest.mark.parametrize("limits", **by_id(CHANGES))
def test_limit_changes(case: Case, limits: list[float | None]) -> None:
    ours, theirs = case.ours(make_params()), case.theirs(make_params())
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (ours, theirs)]
    for seed, limit in enumerate(limits):
        ours.param_groups[0]["max_grad_norm"] = limit
        for each, scheduler in zip((ours, theirs), schedulers, strict=True):
            set_grads(each, seed)
            clip_and_step(each, limit if each is theirs else None)
            scheduler.step()
        assert (ours.grad_norm is None) is (limit is None)
        assert (ours.nonfinite_grads is None) is (limit is None)
    assert_same_math(params_of(ours), params_of(theirs))


@main_cases
@pytest.mark.parametrize("own", [{}, {"max_grad_norm": 0.2}], ids=["default", "own"])
def test_add_param_group(case: Case, own: dict[str, float]) -> None:
    """A late group counts in the norm of all."""
    first, second = make_params(), make_params(seed=1)
    optimizer = case.ours(first, max_grad_norm=1.5)
    train(optimizer)
    optimizer.add_param_group({"params": second, **own})
    assert optimizer.param_groups[1]["max_grad_norm"] == own.get("max_grad_norm", 1.5)
    train(optimizer, first=3)
    twins = make_params(), make_params(seed=1)
    torchs = case.theirs(twins[0])
    for seed in range(6):
        if seed == 3:
            torchs.add_param_group({"params": twins[1]})
        params = params_of(torchs)
        set_grads(params, seed)
        norm = torch.nn.utils.clip_grad_norm_(params, math.inf)
        for group, limits in zip(torchs.param_groups, ({}, own), strict=False):
            for param in group["params"]:
                param.grad *= min(1, limits.get("max_grad_norm", 1.5) / (norm + 1e-6))
        torchs.step()
    assert_same_math(params_of(optimizer), params_of(torchs))


@main_cases
def test_closure(case: Case) -> None:
    """Its grads are the ones that are measured; the loss is returned of a skipped step, too."""
    optimizer = case.ours(make_params(), max_grad_norm=0.5)
    for seed in range(3):

        def closure(seed: int = seed) -> float:
            set_grads(optimizer, seed)
            return 2.5

        assert optimizer.step(closure) == 2.5
    assert_params_after(optimizer, case, 0, 1, 2, max_grad_norm=0.5)
    params_of(optimizer)[0].grad[0] = math.nan
    assert optimizer.step(lambda: 3.5) == 3.5
    assert optimizer.skipped


@main_cases
def test_hooks(case: Case) -> None:
    """What a pre-hook does to the grads counts; a post-hook sees the norm."""
    optimizer, seen = case.ours(make_params(), max_grad_norm=0.5), []
    params = optimizer.param_groups[0]["params"]
    optimizer.register_step_pre_hook(lambda *_: [p.grad.mul_(3) for p in params] and None)
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(float(opt.grad_norm)))
    set_grads(params, 0)
    norm = float(torch.nn.utils.get_total_norm([param.grad for param in params]))
    optimizer.step()
    assert seen == [pytest.approx(3 * norm, rel=1e-12)]


@main_cases
def test_before_the_first_step(case: Case) -> None:
    assert case.ours(make_params()).grad_norm is None
    assert case.ours(make_params(), max_grad_norm=1.0).grad_norm is None


@main_cases
def test_what_happened_is_kept(case: Case) -> None:
    """A tensor that was read stays what it was, as a log of norms needs it."""
    optimizer, norms = case.ours(make_params(), max_grad_norm=0.5), []
    params = optimizer.param_groups[0]["params"]
    for seed in range(3):
        set_grads(params, seed)
        optimizer.step()
        norms.append((optimizer.grad_norm, torch.nn.utils.get_total_norm([p.grad for p in params])))
    for found, expected in norms:
        assert float(found) == pytest.approx(float(expected), rel=1e-12)


@main_cases
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_copies_go_on_alike(case: Case, way: str) -> None:
    optimizer = case.ours(make_params(), max_grad_norm=0.5)
    train(optimizer)
    if way == "state_dict":
        params = copy_params(optimizer)
        other = case.ours(params, max_grad_norm=0.5)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        other = COPIES[way](optimizer)
    for each in (optimizer, other):
        train(each, first=3)
    assert other.grad_norm == optimizer.grad_norm
    assert_equal(params_of(other), params_of(optimizer))
    assert_equal(list(other.state.values()), list(optimizer.state.values()))


@main_cases
def test_checkpoints_of_torch(case: Case) -> None:
    """There and back; the limit is the optimizer's own, for torch's groups know of none."""
    torchs = case.theirs(make_params())
    train(torchs)
    ours = case.ours(copy_params(torchs), max_grad_norm=0.5)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert ours.param_groups[0]["max_grad_norm"] == 0.5
    back = case.theirs(copy_params(torchs))
    for seed in (3, 4):
        for each in (ours, torchs):
            set_grads(each, seed)
            clip_and_step(each, 0.5 if each is torchs else None)
    assert_same_math(params_of(ours), params_of(torchs))
    with torch.no_grad():
        for param, value in zip(back.param_groups[0]["params"], params_of(ours), strict=True):
            param.copy_(value)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(back, first=5)
    train(torchs, first=5)
    assert_same_math(params_of(back), params_of(torchs))


@main_cases
@pytest.mark.parametrize(("saved", "own"), [(0.5, 2.0), (None, 2.0), (0.5, None)], ids=str)
def test_loading_keeps_the_own_limit(case: Case, saved: Any, own: Any) -> None:
    optimizer = case.ours(make_params(), max_grad_norm=saved, error_if_nonfinite=True)
    train(optimizer)
    other = case.ours(make_params(), max_grad_norm=own)
    other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert group["max_grad_norm"] == own
    assert not group.get("error_if_nonfinite", False)
    train(other)


# Run by one process and by two. The norm is that of the full grads on every rank.
SHARDED = """
import os, sys, torch, torch.distributed as dist, fusedopt
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, world = int(sys.argv[1]), int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
PLACED = {
    "shard": [Shard(0)] * 3,
    "other dim": [Shard(1)] * 3,
    "replicate": [Replicate()] * 3,
    "mixed": [Shard(0), Replicate(), Shard(1)],
}
generator = torch.Generator().manual_seed(0)
full = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(4, 3)] * 6]
for name, placements in PLACED.items():
    results = []
    for cls in (fusedopt.SGD, torch.optim.SGD):
        ours = cls is fusedopt.SGD
        params = [torch.nn.Parameter(distribute_tensor(p.clone(), mesh, [x]))
                  for p, x in zip(full, placements)]
        more = {"max_grad_norm": 0.7, "ema_decay": 0.75} if ours else {}
        optimizer, averages = cls(params, lr=0.5, momentum=0.9, **more), []
        for step in range(2):
            for param, grad, x in zip(params, full[3:], placements):
                param.grad = distribute_tensor(grad.clone(), mesh, [x])
            if not ours:
                norm = torch.nn.utils.clip_grad_norm_(params, 0.7).full_tensor()
            try:
                optimizer.step()
            except (TypeError, ValueError, RuntimeError) as error:
                results.append(repr(error))
                break
            now = [param.detach().to_local().clone() for param in params]
            averages = [a + 0.25 * (p - a) for a, p in zip(averages, now)] if step else now
        else:
            if ours:
                with optimizer.swap_ema():
                    averages = [param.detach().to_local().clone() for param in params]
            results.append([optimizer.grad_norm if ours else norm, *now, *averages])
    if isinstance(results[0], str):
        print(f"{name}: refused")
        continue
    same = all(torch.allclose(*pair, rtol=1e-12, atol=1e-14) for pair in zip(*results))
    print(f"{name}:", "equal" if same else f"norm {results[0][0]} instead of {results[1][0]}")
    if rank == world - 1 or name == "replicate":  # whose parts are the same on all ranks
        params[-1].grad.to_local().view(-1)[-1:].fill_(torch.nan)
    bad = fusedopt.SGD(params, max_grad_norm=0.7)
    bad.step()
    kept = all(torch.equal(p.detach().to_local(), p_now) for p, p_now in zip(params, now))
    print(f"nan in {name}:", "equal" if kept and bad.skipped else f"norm {bad.grad_norm}")
    optimizer, scaler = fusedopt.SGD(params), fusedopt.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    skipped = optimizer.skipped and scaler.get_scale() == 2
    print(f"nan in scaled {name}:", "equal" if skipped else f"scale {scaler.get_scale()}")
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a process that ends while they do
"""


@pytest.mark.cpu_only
@pytest.mark.parametrize("world", [1, 2], ids=["one process", "two processes"])
def test_dtensors(world: int, tmp_path: Path) -> None:
    """Or the step is refused; a norm of one rank's part alone is wrong."""
    pytest.importorskip("torch.distributed.tensor")
    for out in run_ranks(tmp_path, SHARDED, world):
        verdicts = dict(line.split(": ", 1) for line in out.splitlines())
        assert verdicts.keys() >= {"shard", "nan in shard"}
        assert len(verdicts) == 12
        assert set(verdicts.values()) <= ({"equal"} if world == 1 else {"equal", "refused"}), out


# One process has state to create in a step in which the other has none.
LATE_GRAD = """
import os, sys, torch, torch.distributed as dist, fusedopt
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
rank, world = int(sys.argv[1]), int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
params = [distribute_tensor(torch.ones(8), mesh, [Shard(0)]) for _ in range(2)]
optimizer = fusedopt.AdamW(params, max_grad_norm=1.0)
all_reduce, calls = dist.all_reduce, []
dist.all_reduce = lambda *args, **kwargs: calls.append(1) or all_reduce(*args, **kwargs)
for step in range(3):
    for index, param in enumerate(params):
        grad = DTensor.from_local(torch.full((4,), 1.0 + step), mesh, [Shard(0)])
        param.grad = None if (index, rank, step) == (1, 0, 0) else grad
    calls.clear()
    optimizer.step()
    print(len(calls), round(float(optimizer.grad_norm) ** 2))
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a process that ends while they do
"""


@pytest.mark.cpu_only
def test_processes_measure_once_whether_or_not_they_create_state(tmp_path: Path) -> None:
    """Else their collectives are out of step for good."""
    for out in run_ranks(tmp_path, LATE_GRAD, world=2):
        # The first step also compares their settings, in two more.
        assert out.splitlines() == ["3 12", "1 64", "1 144"]
