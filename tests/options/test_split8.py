"""Weights of 24 bits: a bfloat16 param and a remainder of one byte, rounded stochastically."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.equality import bits
from support.optimizers import Case, some_cases, step_with
from support.settings import OF_24_BITS, nearest_of_24_bits
from support.snapshots import refused
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
    (entry,) = [optimizer.state[param]["param_remainder"] for param in params_of(optimizer)]
    assert entry.dtype == torch.int8


STEPS = 2000
# Each is less than half of what 24 bits can tell from 1, but for the first.
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
    assert theirs.state_dict()["state"][0]["param_remainder"].dtype == BFLOAT16
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(bits(ours.fp32_params()[0]), bits(before))


def test_a_group_that_changes_its_kind() -> None:
    # A step does not guess; load_state_dict() converts.
    param = Parameter(values(64, dtype=BFLOAT16))
    optimizer: Any = fusedopt.AdamW([param], master_weights="split")
    step_with(optimizer, [torch.ones_like(param)] * 3)
    before = optimizer.fp32_params()[0]
    optimizer.param_groups[0]["master_weights"] = "split8"
    param.grad = torch.ones_like(param)
    with refused(optimizer, TypeError, r"param_remainder.*int16.*must be torch.int8.*load_state"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    after = optimizer.fp32_params()[0]
    assert torch.equal(bits(after).cpu(), bits(nearest_of_24_bits(before.cpu())))
    optimizer.step()
