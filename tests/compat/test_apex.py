"""State dicts of apex's optimizers, made as its sources say, are read by those of fusedopt."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.compat import apex
from support.equality import assert_equal
from support.optimizers import train
from support.snapshots import refused
from support.tensors import BFLOAT16, FLOAT16, FLOAT32, params_of, values

SHAPES = ((5, 3), (40,))


def made_by_apex(steps: Any, **more: Any) -> dict[str, Any]:
    """apex/optimizers/fused_adam.py: moments in float32, the count of the steps in the groups."""
    state = {
        index: {"exp_avg": values(*shape, seed=1), "exp_avg_sq": values(*shape, seed=2).square()}
        for index, shape in enumerate(SHAPES)
    }
    groups = [
        {
            **{"lr": lr, "bias_correction": True, "betas": (0.8, 0.95), "eps": 1e-3},
            **{"weight_decay": 0.1, "params": [index], **more},
            **({} if steps is None else {"step": steps}),
        }
        for index, lr in enumerate((0.01, 0.02))
    ]
    return {"state": state, "param_groups": groups}


def groups_of(dtype: torch.dtype) -> list[dict[str, Any]]:
    return [
        {"params": [Parameter(values(*shape, seed=seed, dtype=dtype))]}
        for seed, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("steps", [9, torch.tensor([9], dtype=torch.int32)], ids=["int", "tensor"])
def test_adam_goes_on(steps: Any, dtype: torch.dtype) -> None:
    """As AdamW does from the same numbers in torch's layout."""
    saved = made_by_apex(steps)
    before = copy.deepcopy(saved)
    of_torch: dict[str, Any] = copy.deepcopy(saved)
    for entries in of_torch["state"].values():
        entries["step"] = torch.tensor(9.0)
    for group in of_torch["param_groups"]:
        del group["step"], group["bias_correction"]
    twin = fusedopt.AdamW(groups_of(dtype))
    twin.load_state_dict(copy.deepcopy(of_torch))
    reader = fusedopt.AdamW(groups_of(dtype))
    reader.load_state_dict(copy.deepcopy(apex.convert_state_dict(saved, reader)))
    stand_in = apex.FusedAdam(groups_of(dtype))
    stand_in.load_state_dict(copy.deepcopy(saved))
    assert_equal(saved, before)
    for optimizer in (twin, reader, stand_in):
        train(optimizer)
    for param, *others in zip(*map(params_of, (twin, reader, stand_in)), strict=True):
        for optimizer, other in zip((reader, stand_in), others, strict=True):
            assert_equal(other, param)
            assert_equal(optimizer.state[other], twin.state[param])


def test_sgd_goes_on() -> None:
    """Its layout is that of torch, but that there is a buffer of zeros without momentum, too."""
    for momentum in (0.0, 0.9):
        group = {
            **{"lr": 0.1, "momentum": momentum, "dampening": 0, "weight_decay": 0.1},
            **{"nesterov": False, "params": [0]},
        }
        buffer = values(6, seed=3)
        saved = {"state": {0: {"momentum_buffer": buffer.clone()}}, "param_groups": [group]}
        start = values(6)
        optimizer = apex.FusedSGD([Parameter(start.clone())], lr=1.0)
        optimizer.load_state_dict(saved)
        (param,) = params_of(optimizer)
        param.grad = grad = values(6, seed=4)
        optimizer.step()
        velocity = momentum * buffer + grad + 0.1 * start
        torch.testing.assert_close(param.detach(), start - 0.1 * velocity)


def change(saved: dict[str, Any], **entries: Any) -> dict[str, Any]:
    saved["state"][1] = {**saved["state"][1], **entries}
    return saved


BROKEN: dict[str, tuple[Any, type, str]] = {
    "no-count": (
        lambda: made_by_apex(None),
        ValueError,
        r"step of .* index 0\) is missing|step of",
    ),
    "no-moment": (
        lambda: change(made_by_apex(2), exp_avg=None),
        *(ValueError, r"exp_avg of the parameter at group 1, index 0 is missing; there is exp_avg"),
    ),
    "integers": (
        lambda: change(made_by_apex(2), exp_avg=torch.zeros(40, dtype=torch.int32)),
        *(ValueError, "exp_avg of .* is torch.int32, but must be torch.float32 or torch.bfloat16"),
    ),
    "flat": (
        lambda: change(made_by_apex(2), exp_avg_sq=torch.zeros(41)),
        *(ValueError, r"exp_avg_sq of .* is of shape \(41,\), but must be of \(40,\)"),
    ),
    "others": (
        lambda: change(made_by_apex(2), state1=torch.zeros(40)),
        *(ValueError, "state1 of .* is not known"),
    ),
    "no-dict": (
        lambda: {**made_by_apex(2), "state": {0: torch.zeros(3)}},
        *(TypeError, r"the state of the parameter at group 0, index 0 is tensor"),
    ),
    "uncorrected": (
        lambda: made_by_apex(2, bias_correction=False),
        *(ValueError, "bias_correction=False in group 0 of the state dict is not supported"),
    ),
    "no-groups": (lambda: {"state": {}}, ValueError, "param_groups is missing"),
    "other-groups": (
        lambda: {**made_by_apex(2), "param_groups": made_by_apex(2)["param_groups"][:1]},
        *(ValueError, "different number of parameter groups: 1"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_its_layout_is_refused(name: str) -> None:
    broken, error, match = BROKEN[name]
    optimizer = apex.FusedAdam(groups_of(FLOAT32))
    train(optimizer, steps=1)
    saved = broken()
    before = copy.deepcopy(saved)
    with refused(optimizer, error, match):
        optimizer.load_state_dict(saved)
    assert_equal(saved, before)


def test_names_are_in_messages() -> None:
    named: list[tuple[str, Tensor]] = [("weight", Parameter(torch.zeros(3)))]
    optimizer = fusedopt.AdamW(named)
    saved = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}
    with pytest.raises(ValueError, match=r"exp_avg_sq of parameter 'weight' \(group 0, index 0\)"):
        apex.convert_state_dict(saved, optimizer)


def test_masters_of_its_fp16_optimizer() -> None:
    """apex/contrib/optimizers/fp16_optimizer.py: the optimizer's state dict, and the weights."""
    weights = [values(*shape, seed=7) for shape in SHAPES]
    saved = {
        "optimizer_state_dict": made_by_apex(4),
        "fp32_groups": [[weight.clone()] for weight in weights],
    }
    optimizer = apex.FusedAdam(groups_of(FLOAT16), master_weights=True)
    optimizer.load_state_dict(saved["optimizer_state_dict"])
    optimizer.load_fp32_params([weight for group in saved["fp32_groups"] for weight in group])
    assert_equal(optimizer.fp32_params(), weights)
    train(optimizer, steps=1)
    assert {int(state["step"]) for state in optimizer.state.values()} == {5}
