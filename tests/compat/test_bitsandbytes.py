"""State dicts of bitsandbytes' Adam and AdamW, made as its sources say, are read."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.compat import bitsandbytes
from support.equality import assert_equal
from support.optimizers import train
from support.snapshots import refused
from support.tensors import BFLOAT16, params_of, values

WRAPPED = "__bnb_optimizer_quant_state__"
SHAPES = ((4096,), (5, 1001), (2, 3, 7, 128), (256,), (4097,), ())


def quantization_map(is_signed: bool) -> Tensor:
    """256 numbers of [-1, 1] or [0, 1] in order, finer near zero: what the codes stand for."""
    steps = torch.linspace(-1, 1, 256) if is_signed else torch.linspace(0, 1, 256)
    return steps * steps.abs()


def quantized(moment: Tensor, is_signed: bool, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the moment's shape, the map, and the scales of its blocks."""
    numbers = quantization_map(is_signed)
    blocks = moment.reshape(-1).split(block)
    scales = torch.stack([part.abs().max() for part in blocks])
    codes = [
        (part[:, None] / scale - numbers).abs().argmin(dim=1)
        for part, scale in zip(blocks, scales, strict=True)
    ]
    return torch.cat(codes).to(torch.uint8).view(moment.shape), numbers, scales


def dequantized(codes: Tensor, numbers: Tensor, scales: Tensor, block: int) -> Tensor:
    """By the loop of its kernels: quantiles[code] * absmax[i / block], in float32."""
    flat = [
        numbers[part.long()] * scale
        for part, scale in zip(codes.reshape(-1).split(block), scales, strict=True)
    ]
    return torch.cat(flat).view(codes.shape)


def saved_by_bitsandbytes(block: int | None, wraps: bool = True) -> tuple[Any, list[Any]]:
    """8-bit with blocks of a size, or 32-bit; what the moments are."""
    state: dict[int, Any] = {}
    expected = []
    for index, shape in enumerate(SHAPES):
        moments = [values(*shape, seed=1), values(*shape, seed=2).square()]
        entries: dict[str, Any] = {}
        for number, moment in enumerate(moments, start=1):
            entries[f"state{number}"] = moment
            if block is not None:
                codes, numbers, scales = quantized(moment, number == 1, block)
                entries[f"state{number}"] = codes
                entries[f"qmap{number}"], entries[f"absmax{number}"] = numbers, scales
                moments[number - 1] = dequantized(codes, numbers, scales, block)
        hidden = {WRAPPED: entries} if wraps else entries
        state[index] = {"step": 11, **hidden}
        expected.append(moments)
    group = {
        **{"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1, "alpha": 0.0},
        **{"t_alpha": None, "t_beta3": None, "params": list(range(len(SHAPES)))},
    }
    return {"state": state, "param_groups": [group]}, expected


def optimizer_of(**options: Any) -> Any:
    return fusedopt.AdamW([Parameter(values(*shape, seed=3)) for shape in SHAPES], **options)


@pytest.mark.parametrize("wraps", [True, False], ids=["wrapped", "bare"])
@pytest.mark.parametrize("block", [256, 2048, None], ids=["8-bit", "8-bit-before", "32-bit"])
def test_it_is_read(block: int | None, wraps: bool) -> None:
    saved, expected = saved_by_bitsandbytes(block, wraps)
    before = copy.deepcopy(saved)
    optimizer = optimizer_of()
    optimizer.load_state_dict(bitsandbytes.convert_state_dict(saved, optimizer))
    assert_equal(saved, before)
    for param, moments in zip(params_of(optimizer), expected, strict=True):
        state = optimizer.state[param]
        assert {*state} == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"] == 11
        assert_equal([state["exp_avg"], state["exp_avg_sq"]], moments)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    assert "alpha" not in optimizer.param_groups[0]
    train(optimizer, steps=1)


def test_it_becomes_what_the_optimizer_is_set_to() -> None:
    saved, expected = saved_by_bitsandbytes(256)
    optimizer = optimizer_of(state_dtype=BFLOAT16)
    optimizer.load_state_dict(bitsandbytes.convert_state_dict(saved, optimizer))
    for param, (exp_avg, _) in zip(params_of(optimizer), expected, strict=True):
        assert_equal(optimizer.state[param]["exp_avg"], exp_avg.to(BFLOAT16))


@pytest.mark.parametrize("block", [256, None], ids=["8-bit", "32-bit"])
def test_strides_of_its_states_mean_nothing(block: int | None) -> None:
    """Its step makes the parameter contiguous, after a state like it: both go by memory."""
    shape = (8, 16, 5, 8)
    moments = [values(*shape, seed=1), values(*shape, seed=2).square()]
    entries: dict[str, Any] = {"step": 3}
    for number, moment in enumerate(moments, start=1):
        stored = moment
        if block is not None:
            codes, numbers, scales = quantized(moment, number == 1, block)
            entries[f"qmap{number}"], entries[f"absmax{number}"] = numbers, scales
            moments[number - 1], stored = dequantized(codes, numbers, scales, block), codes
        like_param = torch.empty_like(stored, memory_format=torch.channels_last)
        like_param.as_strided((stored.numel(),), (1,)).copy_(stored.reshape(-1))
        entries[f"state{number}"] = like_param
    param = Parameter(values(*shape).contiguous(memory_format=torch.channels_last))
    optimizer = fusedopt.AdamW([param])
    group = {**optimizer.state_dict()["param_groups"][0], "lr": 0.1}
    saved = {"state": {0: entries}, "param_groups": [group]}
    optimizer.load_state_dict(bitsandbytes.convert_state_dict(saved, optimizer))
    state = optimizer.state[param]
    for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        assert torch.equal(state[name], moment)
        assert state[name].stride() == param.stride()


def without(*names: str) -> Any:
    return lambda entries: [entries.pop(name) for name in names]


def setting(**entries: Any) -> Any:
    return lambda state: state.update(entries)


BROKEN: dict[str, tuple[Any, type, str]] = {
    "no-scales": (without("absmax1"), ValueError, "absmax1 of the parameter at group 0, index 1"),
    "no-map": (without("qmap2"), ValueError, "qmap2 of .* is missing; there is step"),
    "no-second-state": (without("state2"), ValueError, "state2 of .* is missing"),
    "two-scales": (
        setting(absmax1=torch.ones(2)),
        *(ValueError, "absmax1 of .* has 2 scales, but must have 3 or 20"),
    ),
    "wide-scales": (
        setting(absmax2=torch.ones(20, dtype=torch.float64)),
        *(ValueError, "absmax2 of .* is torch.float64, but must be torch.float32"),
    ),
    "short-map": (setting(qmap1=torch.ones(16)), ValueError, r"qmap1 of .* must be of \(256,\)"),
    "one-scale-for-all": (setting(max1=torch.ones(1)), ValueError, "max1 of .* block_wise=False"),
    "float16": (
        setting(state1=torch.zeros(5, 1001, dtype=torch.float16)),
        *(ValueError, "state1 of .* is torch.float16, but must be torch.uint8 or torch.float32"),
    ),
    "ademamix": (
        setting(state1=torch.zeros(2, 5, 1001, dtype=torch.uint8)),
        *(ValueError, r"state1 of .* is of shape \(2, 5, 1001\)"),
    ),
    "no-count": (without("step"), ValueError, "step of .* is missing"),
    "half-a-step": (
        setting(step=0.5),
        ValueError,
        "step of .* is 0.5, but must be one whole number",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_its_layout_is_refused(name: str) -> None:
    spoil, error, match = BROKEN[name]
    saved, _ = saved_by_bitsandbytes(256, wraps=False)
    spoil(saved["state"][1])
    optimizer = optimizer_of()
    train(optimizer, steps=1)
    with refused(optimizer, error, match):
        optimizer.load_state_dict(bitsandbytes.convert_state_dict(saved, optimizer))


def test_others_are_passed_on() -> None:
    optimizer = optimizer_of()
    train(optimizer, steps=1)
    saved = optimizer.state_dict()
    assert_equal(bitsandbytes.convert_state_dict(saved, optimizer), saved)
