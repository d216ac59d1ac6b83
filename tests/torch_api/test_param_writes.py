"""Params that are written to between steps while they have master weights, and how these follow."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import fusedopt
from fusedopt._state import CreatedState
from support.device import DEVICE
from support.equality import bits
from support.optimizers import step_with
from support.processes import run_ranks
from support.snapshots import refused
from support.tensors import BFLOAT16, FLOAT16, FLOAT32, by_id, values

SIZE = 1000
KINDS = {
    "float32-of-bfloat16": ("float32", BFLOAT16),
    "float32-of-float16": ("float32", FLOAT16),
    "split": ("split", BFLOAT16),
}
each_kind = pytest.mark.parametrize(("kind", "dtype"), **by_id(KINDS))


def load(param: Parameter, new: Tensor) -> None:
    module = nn.Module()
    module.weight = param
    module.load_state_dict({"weight": new})


def fill_in(param: Parameter, new: Tensor) -> None:
    with torch.no_grad():
        param.copy_(new)


def replace(param: Parameter, new: Tensor) -> None:
    param.data = new.clone()


WRITES: dict[str, Callable[[Parameter, Tensor], None]] = {
    "copy_": fill_in,
    "load_state_dict": load,
    "other-memory": replace,
}
each_write = pytest.mark.parametrize("write", **by_id(WRITES))


def trained(
    kind: str | None, dtype: torch.dtype, steps: int = 3, **more: Any
) -> tuple[Any, Parameter]:
    param = Parameter(values(SIZE, dtype=dtype))
    optimizer = fusedopt.AdamW([param], lr=1e-3, weight_decay=0.0, master_weights=kind, **more)
    for seed in range(steps):
        step_with(optimizer, [values(SIZE, dtype=dtype, seed=100 + seed)])
    return optimizer, param


def rest(optimizer: Any, param: Parameter) -> None:
    """A step that changes no weight."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step_with(optimizer, [torch.ones_like(param)])
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@each_write
@each_kind
def test_what_is_written_is_the_weight(
    kind: str, dtype: torch.dtype, write: Callable[[Parameter, Tensor], None]
) -> None:
    """From the next step on, and for those who ask for the weights before it."""
    optimizer, param = trained(kind, dtype)
    new = values(SIZE, dtype=dtype, seed=7)
    is_changed = param.detach() != new
    write(param, new)
    (weight,) = optimizer.fp32_params()
    assert torch.equal(weight.to(dtype), new)
    rest(optimizer, param)
    assert torch.equal(param.detach(), new)
    if kind == "float32":
        master = optimizer.state[param]["master_param"]
        assert torch.equal(master[is_changed], new[is_changed].to(FLOAT32))
    step_with(optimizer, [values(SIZE, dtype=dtype, seed=200)])
    moved = (param.detach() - new).abs().max()
    assert 0 < moved <= 4e-3 + 2**-7 * new.abs().max()  # by a step, not back to where it was


def every_number(dtype: torch.dtype) -> Tensor:
    """All finite numbers of 16 bits but those that are subnormal, or near it: these count as 0."""
    patterns = torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.int16)
    numbers = patterns.view(dtype)
    normal = numbers.abs().float() > torch.finfo(dtype).tiny
    return numbers[numbers.isfinite() & (normal | (numbers == 0))].to(DEVICE)


@each_write
@pytest.mark.parametrize(("kind", "dtype"), **by_id({**KINDS, "split8": ("split8", BFLOAT16)}))
def test_every_number_can_be_written(
    kind: str, dtype: torch.dtype, write: Callable[[Parameter, Tensor], None]
) -> None:
    """Beside whatever is left of the weights of before: a 0 is a 0 then, and no number is NaN."""
    new = every_number(dtype)
    for seed in range(3):
        param = Parameter(values(len(new), dtype=dtype, seed=seed))
        optimizer = fusedopt.AdamW([param], lr=1e-3, weight_decay=0.0, master_weights=kind)
        step_with(optimizer, [values(len(new), dtype=dtype, seed=9 + seed)] * 2)
        write(param, new)
        (weight,) = optimizer.fp32_params()
        assert weight.isfinite().all()
        assert (weight[new == 0].abs() < torch.finfo(FLOAT32).tiny).all()
        rest(optimizer, param)
        assert torch.equal(param.detach(), new)


@each_kind
def test_what_is_not_written_to_keeps_its_lower_bits(kind: str, dtype: torch.dtype) -> None:
    optimizer, param = trained(kind, dtype)
    (before,) = optimizer.fp32_params()
    assert (before.to(dtype) != before).any()
    with torch.no_grad():
        param.clamp_(-0.5, 0.5)
    rest(optimizer, param)
    (after,) = optimizer.fp32_params()
    inside = before.to(dtype).abs() < 0.5
    assert inside.any()
    assert not inside.all()
    assert torch.equal(bits(after[inside]), bits(before[inside]))
    assert torch.equal(after[~inside].to(dtype), param.detach()[~inside])
    assert (param.detach().abs() <= 0.5).all()


def test_master_is_written_to_only_where_the_param_was() -> None:
    """Not after swap_ema(), which puts the params back; and it stays in its memory always."""
    optimizer, param = trained("float32", BFLOAT16, ema_decay=0.5)
    master = optimizer.state[param]["master_param"]
    untouched = master.clone()
    with optimizer.swap_ema():
        pass
    with torch.no_grad():
        param.mul_(1.0)
    rest(optimizer, param)
    assert torch.equal(bits(master), bits(untouched))
    with torch.no_grad():
        param.add_(1.0)
    rest(optimizer, param)
    assert not torch.equal(master, untouched)
    assert optimizer.state[param]["master_param"] is master


@pytest.mark.cpu_only
def test_nothing_is_created_in_ordinary_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, _ = trained("float32", BFLOAT16)

    def fail(*args: Any) -> None:
        raise AssertionError(args)

    monkeypatch.setattr(CreatedState, "fill", fail)
    step_with(optimizer, [values(SIZE, dtype=BFLOAT16)])


def test_a_step_that_fails_leaves_the_master_as_it_was() -> None:
    optimizer, param = trained("float32", BFLOAT16)
    state = optimizer.state[param]
    fill_in(param, values(SIZE, dtype=BFLOAT16, seed=7))
    param.grad = torch.full_like(param, float("nan"))
    optimizer.param_groups[0] |= {"max_grad_norm": 1.0, "error_if_nonfinite": True}
    with refused(optimizer, RuntimeError, "norm"):
        optimizer.step()
    assert optimizer.state[param] is state
    optimizer.param_groups[0] |= {"max_grad_norm": None, "error_if_nonfinite": False}
    rest(optimizer, param)
    assert torch.equal(param.detach(), values(SIZE, dtype=BFLOAT16, seed=7))


@pytest.mark.parametrize("write", [fill_in, replace])
def test_a_write_is_not_forgotten_in_a_step_that_is_skipped(
    write: Callable[[Parameter, Tensor], None],
) -> None:
    optimizer, param = trained("float32", BFLOAT16, max_grad_norm=1.0)
    new = values(SIZE, dtype=BFLOAT16, seed=7)
    write(param, new)
    for _ in range(2):
        step_with(optimizer, [torch.full_like(param, float("inf"))])
        assert optimizer.skipped
    rest(optimizer, param)
    assert torch.equal(param.detach(), new)


def test_a_master_follows_where_other_state_is_missing() -> None:
    """A new average, say, which begins with what was written."""
    optimizer, param = trained("float32", BFLOAT16)
    new = values(SIZE, dtype=BFLOAT16, seed=7)
    fill_in(param, new)
    optimizer.param_groups[0]["ema_decay"] = 0.5
    rest(optimizer, param)
    assert torch.equal(param.detach(), new)
    assert torch.equal(optimizer.state[param]["ema_param"], optimizer.fp32_params()[0])


@each_kind
def test_average_of_a_param_that_was_written_to(kind: str, dtype: torch.dtype) -> None:
    """It goes on from where it was, towards what was written; a new one begins there."""
    optimizer, param = trained(kind, dtype, ema_decay=0.5)
    before = optimizer.state[param]["ema_param"].clone()
    new = values(SIZE, dtype=dtype, seed=7)
    fill_in(param, new)
    rest(optimizer, param)
    middle = (before + optimizer.fp32_params()[0]) / 2
    torch.testing.assert_close(optimizer.state[param]["ema_param"], middle)
    optimizer.reset_ema()
    assert "ema_param" not in optimizer.state[param]
    rest(optimizer, param)
    assert torch.equal(optimizer.state[param]["ema_param"], optimizer.fp32_params()[0])


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@each_kind
def test_resume_keeps_all_bits(kind: str, dtype: torch.dtype, order: str) -> None:
    """A checkpoint's params are what its masters round to."""
    optimizer, param = trained(kind, dtype)
    saved, weights = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    other, there = trained(kind, dtype, steps=1)
    loads = [lambda: fill_in(there, weights), lambda: other.load_state_dict(saved)]
    for each in loads if order == "model first" else reversed(loads):
        each()
    for each in (optimizer, other):
        step_with(each, [values(SIZE, dtype=dtype, seed=300)])
    assert torch.equal(bits(optimizer.fp32_params()[0]), bits(other.fp32_params()[0]))


def test_checkpoint_of_a_model_that_was_written_to() -> None:
    """Saved before the next step could notice: the first step after the load does."""
    optimizer, param = trained("float32", BFLOAT16)
    best = values(SIZE, dtype=BFLOAT16, seed=7)
    fill_in(param, best)
    saved = copy.deepcopy(optimizer.state_dict())
    other, there = trained("float32", BFLOAT16, steps=0)
    fill_in(there, best)
    other.load_state_dict(saved)
    rest(other, there)
    assert torch.equal(there.detach(), best)


@pytest.mark.parametrize("other", ["split", "split8"])
def test_a_conversion_of_masters_keeps_what_was_written(other: str) -> None:
    """And the lower bits of what was not; a parameter of another model counts as written, too."""
    optimizer, param = trained("float32", BFLOAT16)
    (before,) = optimizer.fp32_params()
    with torch.no_grad():
        param.clamp_(-0.5, 0.5)
    inside = param.detach() == before.to(BFLOAT16)
    assert inside.any()
    assert not inside.all()
    saved, clamped = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    optimizer.param_groups[0]["master_weights"] = other
    optimizer.load_state_dict(saved)
    (after,) = optimizer.fp32_params()
    assert torch.equal(after[~inside].to(BFLOAT16), clamped[~inside])
    off = 0.0 if other == "split" else 2.0**-16
    torch.testing.assert_close(after[inside], before[inside], rtol=off, atol=0.0)
    assert (param.detach().abs() <= 0.5).all()

    another = Parameter(values(SIZE, dtype=BFLOAT16, seed=7))
    loaded = fusedopt.AdamW([another], master_weights=other)
    loaded.load_state_dict(saved)
    assert torch.equal(another.detach(), values(SIZE, dtype=BFLOAT16, seed=7))


@each_kind
def test_unnoticed_writes_are_taken_over_on_request(kind: str, dtype: torch.dtype) -> None:
    optimizer, param = trained(kind, dtype)
    new = values(SIZE, dtype=dtype, seed=7)
    param.data.copy_(new)
    optimizer.reset_masters()
    rest(optimizer, param)
    assert torch.equal(param.detach(), new)
    assert torch.equal(optimizer.fp32_params()[0], new.to(FLOAT32))
    with refused(optimizer, RuntimeError, "no average"), optimizer.swap_ema():
        pass


@pytest.mark.parametrize("reset", ["reset_masters", "reset_ema"])
def test_nothing_is_reset_inside_swap_ema(reset: str) -> None:
    optimizer, _ = trained("float32", BFLOAT16, ema_decay=0.5)
    with optimizer.swap_ema(), refused(optimizer, RuntimeError, "inside swap_ema"):
        getattr(optimizer, reset)()


@pytest.mark.cpu_only
def test_inference_tensors() -> None:
    """torch counts no writes to them: they are stepped as before."""
    with torch.inference_mode():
        param = torch.ones(8, dtype=BFLOAT16, device=DEVICE)
        param.grad = torch.ones_like(param)
        optimizer = fusedopt.SGD([param], lr=0.25, master_weights="float32")
        for _ in range(3):
            optimizer.step()
        assert param.tolist() == [0.25] * 8


DTENSORS = """
import os, sys, torch, torch.distributed as dist, fusedopt
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, world = int(sys.argv[1]), int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
writes = {
    "whole": lambda param, new: param.copy_(new),
    "shard": lambda param, new: param.to_local().copy_(new.to_local()),
    "no write": lambda param, new: None,
}
for placement in (Shard(0), Replicate()):
    def spread(value):
        return distribute_tensor(torch.full((7,), value, dtype=torch.bfloat16), mesh, [placement])
    for name, write in writes.items():
        param = torch.nn.Parameter(spread(1.0))
        optimizer = fusedopt.SGD([param], lr=2.0**-12, master_weights="float32")
        for value in (3.0, 3.0, 0.0):
            param.grad = spread(value)
            optimizer.step()
            if value == 3.0:
                with torch.no_grad():
                    write(param, spread(5.0))
        weight = optimizer.fp32_params()[0].full_tensor()
        # The last of the writes is what the weight rounds to.
        want = 1.0 - 6 * 2.0**-12 if name == "no write" else 5.0 - 3 * 2.0**-12
        is_right = weight.tolist() == [want] * 7 and param.grad is not None
        print(f"{placement} {name}: {'right' if is_right else weight}")
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a process that ends while they do
"""


@pytest.mark.cpu_only
def test_dtensors(tmp_path: Path) -> None:
    """Written to as a whole, or each process its shard."""
    for out in run_ranks(tmp_path, DTENSORS, world=2):
        assert [line.rsplit(": ")[1] for line in out.splitlines()] == ["right"] * 6, out
