"""State dicts of DeepSpeed's optimizers and its universal checkpoints, made as its sources say."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt.compat import deepspeed
from support.equality import assert_equal
from support.optimizers import train
from support.snapshots import refused
from support.tensors import BFLOAT16, FLOAT32, params_of, values

NAMES = ("embed.weight", "norm.weight")
SHAPES = ((5, 3), (40,))


def params(dtype: torch.dtype = FLOAT32) -> list[Parameter]:
    return [Parameter(values(*shape, seed=9, dtype=dtype)) for shape in SHAPES]


def moments(index: int) -> dict[str, Any]:
    shape = SHAPES[index]
    return {"exp_avg": values(*shape, seed=1), "exp_avg_sq": values(*shape, seed=2).square()}


def saved_by(counts: tuple[int, int], group_step: int | None) -> dict[str, Any]:
    group: dict[str, Any] = {
        **{"lr": 0.01, "bias_correction": True, "betas": (0.8, 0.95), "eps": 1e-8},
        **{"weight_decay": 0.1, "params": [0, 1]},
        **({"amsgrad": False} if group_step is None else {"step": group_step}),
    }
    state = {index: {"step": count, **moments(index)} for index, count in enumerate(counts)}
    return {"state": state, "param_groups": [group]}


ORIGINS: dict[str, tuple[type, tuple[int, int], int | None, tuple[int, int]]] = {
    # ops/adam/cpu_adam.py: each parameter counts.
    "cpu": (deepspeed.DeepSpeedCPUAdam, (6, 4), None, (6, 4)),
    # ops/adam/fused_adam.py: the last one counts for its group.
    "fused": (deepspeed.FusedAdam, (0, 6), 0, (6, 6)),
    # Of an older version: the group did.
    "fused-before": (deepspeed.FusedAdam, (0, 0), 6, (6, 6)),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_it_goes_on(name: str) -> None:
    origin, counts, group_step, wanted = ORIGINS[name]
    saved = saved_by(counts, group_step)
    before = copy.deepcopy(saved)
    of_torch: dict[str, Any] = copy.deepcopy(saved)
    for entries, count in zip(of_torch["state"].values(), wanted, strict=True):
        entries["step"] = torch.tensor(float(count))
    of_torch["param_groups"] = [
        {
            k: v
            for k, v in of_torch["param_groups"][0].items()
            if k not in ("step", "bias_correction")
        }
    ]
    optimizers: list[Any] = [fusedopt.AdamW(params()), fusedopt.AdamW(params()), origin(params())]
    optimizers[0].load_state_dict(of_torch)
    converted = deepspeed.convert_state_dict(copy.deepcopy(saved), optimizers[1])
    optimizers[1].load_state_dict(converted)
    optimizers[2].load_state_dict(copy.deepcopy(saved))
    assert_equal(saved, before)
    for optimizer in optimizers:
        train(optimizer)
    twin = optimizers[0]
    for optimizer in optimizers[1:]:
        for param, other in zip(params_of(twin), params_of(optimizer), strict=True):
            assert_equal(other, param)
            assert_equal(optimizer.state[other], twin.state[param])


@pytest.mark.parametrize("count", [-1, 1.5, "six"])
def test_no_number_of_steps(count: Any) -> None:
    for group_step in (None, 0):
        saved = saved_by((3, count), group_step)
        optimizer = fusedopt.AdamW(params())
        with pytest.raises((TypeError, ValueError), match=r"step of (group 0|the parameter)"):
            deepspeed.convert_state_dict(saved, optimizer)


def write_universal(
    folder: Path, stage: int, step: int | None = 5, dtype: torch.dtype = FLOAT32
) -> list[torch.Tensor]:
    """As checkpoint/ds_to_universal.py: a folder for each parameter. Returns the weights."""
    weights = [values(*shape, seed=5) for shape in SHAPES]
    for index, (name, weight) in enumerate(zip(NAMES, weights, strict=True)):
        place = folder / "zero" / name
        place.mkdir(parents=True)
        for state, tensor in {"fp32": weight, **moments(index)}.items():
            tensor = tensor.cpu().to(dtype)
            whole = {"param": tensor, "cat_dim": 0} if stage < 3 else tensor.reshape(-1)
            torch.save(whole, place / f"{state}.pt")
        if step is not None:
            torch.save(step, place / "step.pt")
    return weights


@pytest.mark.parametrize("masters", ["split", "float32"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_universal_checkpoint(stage: int, masters: Any, tmp_path: Path) -> None:
    weights = write_universal(tmp_path, stage, step=5 if stage < 3 else None)
    named = [
        (name, Parameter(weight.to(BFLOAT16))) for name, weight in zip(NAMES, weights, strict=True)
    ]
    optimizer = fusedopt.AdamW(named, lr=0.25, master_weights=masters, state_dtype=FLOAT32)
    step = None if stage < 3 else 5
    optimizer.load_state_dict(deepspeed.universal_state_dict(tmp_path, optimizer, step=step))
    assert_equal(optimizer.fp32_params(), weights)
    for index, (_, param) in enumerate(named):
        state = optimizer.state[param]
        assert state["step"] == 5
        assert_equal({name: state[name] for name in deepspeed.MOMENTS}, moments(index))
    assert optimizer.param_groups[0]["lr"] == 0.25
    train(optimizer, steps=1)


def test_universal_checkpoint_without_masters(tmp_path: Path) -> None:
    """The weights are for the model to load; by a stand-in, with names that are given."""
    write_universal(tmp_path, 2)
    optimizer = deepspeed.DeepSpeedCPUAdam(params())
    saved = deepspeed.universal_state_dict(str(tmp_path), optimizer, NAMES)
    optimizer.load_state_dict(saved)
    for index, param in enumerate(params_of(optimizer)):
        assert {*optimizer.state[param]} == {"step", *deepspeed.MOMENTS}
        assert_equal(param.detach(), params()[index].detach())


UNREADABLE: dict[str, tuple[dict[str, Any], dict[str, Any], type, str]] = {
    "no-names": ({}, {"names": None}, ValueError, "without names of its parameters: give names="),
    "one-name": ({}, {"names": NAMES[:1]}, ValueError, "1 names for 2 parameters"),
    "other-names": ({}, {"names": ("a", "b")}, FileNotFoundError, "a/fp32.pt"),
    "swapped": (
        *({}, {"names": NAMES[::-1]}, ValueError),
        r"master_param of parameter 'norm.weight' is of shape \(40,\), but must be of \(5, 3\)",
    ),
    "no-count": ({"step": None}, {}, ValueError, "no step.pt of parameter 'embed.weight': give"),
    "narrow": (
        *({"dtype": BFLOAT16}, {}, ValueError),
        "master_param of parameter 'embed.weight' is torch.bfloat16",
    ),
    "half-a-step": ({"step": 0.5}, {}, ValueError, "step of parameter 'embed.weight' is 0.5"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_universal_checkpoint_that_does_not_fit(name: str, tmp_path: Path) -> None:
    written, given, error, match = UNREADABLE[name]
    write_universal(tmp_path, 2, **written)
    optimizer = deepspeed.FusedAdam(params())
    with refused(optimizer, error, match):
        deepspeed.universal_state_dict(tmp_path, optimizer, **{"names": NAMES, **given})


def test_weights_of_zero_to_fp32() -> None:
    """Its utils/zero_to_fp32.py writes a dict of float32 weights by name."""
    weights = {name: values(*shape, seed=4) for name, shape in zip(NAMES, SHAPES, strict=True)}
    optimizer = fusedopt.AdamW(params(BFLOAT16), master_weights="split")
    optimizer.load_fp32_params([weights[name] for name in NAMES])
    assert_equal(optimizer.fp32_params(), list(weights.values()))
