"""Weights of 24 bits: a bfloat16 param and a remainder of one byte, rounded stochastically."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.device import DEVICE
from support.equality import bits
from support.optimizers import Case, some_cases, step_with
from support.settings import OF_24_BITS, nearest_of_24_bits
from support.tensors import BFLOAT16, FLOAT32, params_of, values

SPLIT8: dict[str, Any] = {"master_weights": "split8"}


def param_of(weight: Tensor) -> Parameter:
    return Parameter(weight.to(BFLOAT16))


def test_weights_are_loaded_as_the_nearest() -> None:
    weights = values(4096)
    tie = torch.tensor([0x3F800080, 0x3F800180, 0x3F80FF80], dtype=torch.int32).view(FLOAT32)
    weights[:3] = tie
    optimizer = fusedopt.SGD([param_of(weights)], **SPLIT8)
    optimizer.load_fp32_params([weights])
    (found,) = optimizer.fp32_params()
    assert torch.equal(bits(found), bits(nearest_of_24_bits(weights)))
    assert ((found - weights).abs() <= OF_24_BITS / 2 * weights.abs()).all()
    (entry,) = [optimizer.state[param]["param_remainder8"] for param in params_of(optimizer)]
    assert entry.dtype == torch.int8


STEPS = 2000
# What 24 bits can tell from 1 is 3e-5, half of which is what nearest rounding needs.
MOVES = (1e-4, 3e-5, 1e-5, 1e-6, 1e-7)


@pytest.mark.unsanitized  # no other accesses than in fewer steps
@pytest.mark.parametrize("move", MOVES)
def test_small_updates_arrive(move: float) -> None:
    # In the mean, and as far as in float32 itself, of which 1e-7 is less than a unit.
    start = 1 + torch.arange(1024) / 1024
    kept, full = param_of(start), Parameter(start.to(BFLOAT16).float())
    ours = fusedopt.SGD([kept], lr=move, **SPLIT8)
    theirs = fusedopt.SGD([full], lr=move)
    before = full.detach().clone()
    for _ in range(STEPS):
        kept.grad, full.grad = -torch.ones_like(kept), -torch.ones_like(full)
        ours.step()
        theirs.step()
    (weight,) = ours.fp32_params()
    arrived = float((weight - before).mean() / (full.detach() - before).mean())
    assert arrived == pytest.approx(1, abs=0.05)
    if move >= 1e-6:
        assert float((weight - before).mean()) == pytest.approx(STEPS * move, rel=0.06)


def test_to_nearest_small_updates_are_lost() -> None:
    # So 8 bits are not enough without draws.
    param = param_of(torch.ones(64))
    optimizer = fusedopt.SGD([param], lr=1e-5, stochastic_rounding=False, **SPLIT8)
    step_with(optimizer, [-torch.ones_like(param)] * 100)
    assert torch.equal(optimizer.fp32_params()[0], torch.ones(64))


@some_cases("sgd", "momentum", "adamw", "lion-decay")
def test_a_resumed_run_repeats_the_draws(case: Case) -> None:
    start, grads = values(300), list(values(6, 300, dtype=BFLOAT16, seed=1))
    runs = []
    for stops in (False, True):
        param = param_of(start)
        optimizer: Any = case.ours([param], **SPLIT8)
        step_with(optimizer, grads[:3])
        if stops:
            resumed = Parameter(param.detach().clone())
            later: Any = case.ours([resumed], **SPLIT8)
            later.load_state_dict(optimizer.state_dict())
            optimizer = later
        step_with(optimizer, grads[3:])
        runs.append(optimizer.fp32_params()[0])
    assert torch.equal(bits(runs[0]), bits(runs[1]))


def test_a_cast_by_torch_keeps_the_remainder() -> None:
    param = param_of(values(64))
    ours = fusedopt.AdamW([param], **SPLIT8)
    step_with(ours, [torch.ones_like(param)] * 3)
    before = ours.fp32_params()[0]
    theirs = torch.optim.AdamW([Parameter(param.detach().clone())])
    theirs.load_state_dict(ours.state_dict())
    assert theirs.state_dict()["state"][0]["param_remainder8"].dtype == BFLOAT16
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(bits(ours.fp32_params()[0]), bits(before))


@pytest.mark.parametrize(("kind", "other"), [("split", "split8"), ("split8", "split")])
def test_a_group_that_changes_its_kind(kind: str, other: str) -> None:
    # load_state_dict() converts, through torch and its casts, too; a step begins with the param.
    param = Parameter(values(64, dtype=BFLOAT16))
    optimizer: Any = fusedopt.AdamW([param], master_weights=kind)  # type: ignore[arg-type]
    step_with(optimizer, [torch.ones_like(param)] * 3)
    before, unconverted = optimizer.fp32_params()[0], deepcopy(optimizer)
    for each in (optimizer, unconverted):
        each.param_groups[0]["master_weights"] = other
    theirs = torch.optim.AdamW([Parameter(param.detach().clone())])
    theirs.load_state_dict(optimizer.state_dict())
    for saved in (optimizer, theirs):
        optimizer.load_state_dict(saved.state_dict())
        after = optimizer.fp32_params()[0].cpu()
        expected = nearest_of_24_bits(before.cpu()) if other == "split8" else before.cpu()
        assert torch.equal(bits(after), bits(expected))
    (copied,) = params_of(unconverted)
    start = copied.detach().float()
    unconverted.param_groups[0]["lr"] = 0.0
    step_with(unconverted, [torch.ones_like(copied)])
    assert torch.equal(unconverted.fp32_params()[0], start)


def test_nan_stays_nan() -> None:
    numbers = [0x7F800001, 0x7F8000FF, 0xFF800080 - 2**32, 0x7FC00000, 0x7FFFFFFF, 0x7F800000]
    weights = torch.tensor(numbers, dtype=torch.int32).view(FLOAT32).to(DEVICE)
    optimizer = fusedopt.SGD([param_of(weights)], **SPLIT8)
    optimizer.load_fp32_params([weights])
    (found,) = optimizer.fp32_params()
    assert found.isnan().tolist() == [True] * 5 + [False]


@pytest.mark.parametrize(("kind", "other"), [("split", "split8"), ("split8", "split")])
def test_files_of_the_other_kind(kind: str, other: str, tmp_path: Path) -> None:
    # torch.distributed.checkpoint loads in place, by name: nothing may be taken for another.
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    def trained(masters: str) -> tuple[torch.nn.Module, Any]:
        model = torch.nn.Linear(8, 8, dtype=BFLOAT16, device=DEVICE)
        optimizer = fusedopt.AdamW(model.parameters(), master_weights=masters)  # type: ignore[arg-type]
        model(torch.ones(4, 8, dtype=BFLOAT16, device=DEVICE)).sum().backward()
        optimizer.step()
        return model, optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"optimizer": get_optimizer_state_dict(*trained(kind))}, checkpoint_id=tmp_path)
        wanted = {"optimizer": get_optimizer_state_dict(*trained(other))}
        with pytest.raises(dcp.api.CheckpointException, match="param_remainder"):
            dcp.load(wanted, checkpoint_id=tmp_path)
