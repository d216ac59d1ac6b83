"""Usual steps of AdamW have kernels of their own (csrc/cuda/usual.h): these, and steps that are
near to them and have not, give the bits of the CPU driver. Those with codes are in test_q8.py."""

from typing import Any

import pytest
import torch

import fusedopt
from support.optimizers import NEAR_ADAMW
from support.sides import Results, Side, on_both_drivers
from support.snapshots import record
from support.tensors import (
    BFLOAT16,
    EDGES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    around,
    by_id,
    draw,
    misaligned,
    set_grads,
)

# Below, at and above a thread's elements, a warp's, a block's and a chunk's.
SIZES = [1, 7, 8, 9, 40, 255, 256, 257, 1023, 1024, 1025, 2051, 5000]

SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bf16": (BFLOAT16, {}),
    "fp16": (FLOAT16, {}),
    "fp32-bf16-states": (FLOAT32, {"state_dtype": BFLOAT16}),
    "bf16-fp32-states": (BFLOAT16, {"state_dtype": FLOAT32}),
    "masters": (BFLOAT16, {"state_dtype": FLOAT32, "master_weights": "float32"}),
    "split": (BFLOAT16, {"state_dtype": BFLOAT16, "master_weights": "split"}),
    "split8": (BFLOAT16, {"state_dtype": BFLOAT16, "master_weights": "split8"}),
    "bf16-average": (BFLOAT16, {"ema_decay": 0.9}),
    "split-average": (
        BFLOAT16,
        {"state_dtype": BFLOAT16, "master_weights": "split", "ema_decay": 0.9},
    ),
}
each_setting = pytest.mark.parametrize("setting", **by_id(SETTINGS))


@pytest.mark.parametrize("who", ["nobody", "param", "grad"])
@pytest.mark.parametrize("options", **by_id(NEAR_ADAMW | {"drawn": {"stochastic_rounding": True}}))
@each_setting
@on_both_drivers
def test_usual_steps(side: Side, setting: Any, options: Any, who: str) -> Results:
    """Tensors of many sizes; the largest meets numbers of every kind."""
    dtype, own = setting
    options = {"lr": 0.1, **own, **options}
    if dtype == FLOAT16:
        options.pop("stochastic_rounding", None)
    optimizer_class = getattr(fusedopt, options.pop("optimizer", "AdamW"))
    params = draw([(size,) for size in SIZES], side.device, dtype)
    if who == "param":
        params = [misaligned(param, 1 + i % 9) for i, param in enumerate(params)]
    optimizer = optimizer_class(params, **options)
    for step in range(3):
        set_grads(params, step)
        if step == 1:
            edges = torch.tensor(EDGES, dtype=FLOAT64).to(dtype).to(side.device)
            params[-1].grad[70 : 70 + len(EDGES)] = edges
        if who == "grad":
            for i, param in enumerate(params):
                param.grad = misaligned(param.grad, 1 + i % 9)
        optimizer.step()
    return record(optimizer) | around(params if who == "param" else [])


@pytest.mark.parametrize("name", ["bf16", "split8", "fp32-bf16-states", "q8"])
@pytest.mark.parametrize("offset", [1, 3, 7])
@on_both_drivers
def test_views_that_end_their_memory(side: Side, name: str, offset: int) -> Results:
    """Nothing is read behind a tensor, nor before it: sanitizers would see it."""
    dtype, options = SETTINGS.get(name, (BFLOAT16, {"state_dtype": "q8"}))

    def at_the_end(tensor: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype).to(tensor.device)
        return memory[offset:].view(tensor.shape).copy_(tensor)

    shapes = [9, 15, 16, 17, 25, 31, 257, 265, 1025, 1033, 2049, (65, 64), (129, 33), (3, 2048)]
    params = [at_the_end(param) for param in draw(shapes, side.device, dtype)]
    optimizer = fusedopt.AdamW(params, lr=0.1, **options)
    for step in range(2):
        set_grads(params, step)
        for param in params:
            param.grad = at_the_end(param.grad)
        optimizer.step()
    return record(optimizer)


@pytest.mark.parametrize("rounding", [None, True])
@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize(
    "setting", ["bf16", "fp32-bf16-states", "bf16-fp32-states", "split", "split8"]
)
@on_both_drivers
def test_numbers_about_to_become_infinite(
    side: Side, setting: str, ema: float | None, rounding: bool | None
) -> Results:
    """What draws are for must stay finite, and NaN: in some threads, and in most of them not."""
    dtype, options = SETTINGS[setting]
    (param,) = draw([(4099,)], side.device, dtype)
    largest = torch.finfo(BFLOAT16).max
    param.data[1000:2000] = torch.where(param.data[1000:2000] > 0, largest, -largest)
    param.data[3000:3005] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    optimizer = fusedopt.AdamW(
        [param], lr=2.0**119, weight_decay=0, stochastic_rounding=rounding, ema_decay=ema, **options
    )
    for step in range(4):
        set_grads([param], step)
        param.grad[2000:2100] *= largest / 8  # moments near the largest, squares beyond it
        optimizer.step()
    assert param[1000:2000].isfinite().any()
    return record(optimizer)
