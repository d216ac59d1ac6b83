"""Codes of 8 bits have the bits of the CPU driver, whatever the sizes, formats and addresses."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from support.codes import SHAPES, coded_names, each_coded_case, few_coded_cases, of_q8
from support.optimizers import NEAR_ADAMW, Case
from support.pairs import in_pairs
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
    some_dtypes,
)

# Beside SHAPES: groups that end with a chunk, with a block of threads and with a warp; one element
# more and one less than that.
MORE_SHAPES = [(16, 1024), (3, 2048), (2, 2111), (2, 2049), (65, 64), (129, 33), (9, 1024)]


def train(
    side: Side, case: Case, dtypes: tuple[torch.dtype, ...], shapes: Any, who: str, **options: Any
) -> Results:
    """Dtypes of params and of grads; whose memory is misaligned. The last tensor meets numbers of
    every kind."""

    def moved(name: str, tensors: list[Tensor]) -> list[Tensor]:
        if who not in (name, "all"):
            return tensors
        return [misaligned(tensor, 1 + i % 9) for i, tensor in enumerate(tensors)]

    params = moved("param", draw(shapes, side.device, dtypes[0]))
    views = [param for param in params if param._base is not None]
    optimizer = of_q8(case.suited_to(dtypes[0]), params, **options)
    for step in range(3):
        set_grads(params, step)
        if step == 1:
            edges = torch.tensor(EDGES, dtype=FLOAT64).to(dtypes[0])
            params[-1].grad.view(-1)[70 : 70 + len(EDGES)] = edges.to(side.device)
        grads = moved("grad", [param.grad.to(dtypes[1]) for param in params])
        for param, grad in zip(params, grads, strict=True):
            param.grad_dtype = None  # whatever is assigned
            param.grad = grad
        optimizer.step()
        states = [optimizer.state[param] for param in params]
        for name in [name for name in states[0] if name.endswith("_q8")]:
            entries = moved("codes", [state[name] for state in states if name in state])
            for state, entry in zip([s for s in states if name in s], entries, strict=True):
                state[name] = entry
            views += entries if entries[0]._base is not None else []
    return record(optimizer) | around(views)


MIXES = {
    "float32": (FLOAT32, FLOAT32),
    "bfloat16": (BFLOAT16, BFLOAT16),
    "float16": (FLOAT16, FLOAT16),
    "wide-grad": (BFLOAT16, FLOAT32),
    "double-grad": (FLOAT32, FLOAT64),
}
each_mix = pytest.mark.parametrize("dtypes", **by_id(MIXES))
each_rounding = pytest.mark.parametrize("rounding", [None, False, True])
each_masters = pytest.mark.parametrize("masters", [None, "float32", "split", "split8"])
each_ema = pytest.mark.parametrize("ema", [None, 0.9])


def options_of(dtypes: Any, rounding: Any, masters: Any, ema: Any) -> dict[str, Any]:
    """As near to these as the dtype of the params allows."""
    if dtypes[0] == FLOAT16:
        rounding = None
    if dtypes[0] != BFLOAT16 and masters is not None:
        masters = "float32"
    return {"stochastic_rounding": rounding, "master_weights": masters, "ema_decay": ema}


@pytest.mark.unsanitized  # test_sanitizer_codes has each kind of access
@in_pairs(each_coded_case, each_mix, each_rounding, each_masters, each_ema)
@on_both_drivers
def test_formats(
    side: Side, case: Case, dtypes: Any, rounding: Any, masters: Any, ema: Any
) -> Results:
    options = options_of(dtypes, rounding, masters, ema)
    return train(side, case, dtypes, [*SHAPES, *MORE_SHAPES], "nobody", **options)


@in_pairs(
    few_coded_cases,
    each_mix,
    pytest.mark.parametrize("who", ["param", "grad", "codes", "all"]),
)
@on_both_drivers
def test_misaligned(side: Side, case: Case, dtypes: Any, who: str) -> Results:
    return train(side, case, dtypes, [*SHAPES, *MORE_SHAPES], who)


@pytest.mark.parametrize("who", ["nobody", "param", "grad", "codes"])
@pytest.mark.parametrize("options", **by_id(NEAR_ADAMW | {"ema": {"ema_decay": 0.9}}))
@on_both_drivers
def test_five_bytes_for_a_weight(side: Side, options: Any, who: str) -> Results:
    """What has a kernel of its own, and what is near to it and has not."""
    options = {"lr": 0.1, **options}
    case = Case(options.pop("optimizer", "AdamW"), options)
    shapes = [*SHAPES, *MORE_SHAPES]
    return train(side, case, (BFLOAT16, BFLOAT16), shapes, who, master_weights="split8")


@on_both_drivers
def test_weights_about_to_become_infinite(side: Side) -> Results:
    """Rounding to 24 bits and to bfloat16 must not make a finite one infinite."""
    params = draw([(64, 128), (8, 1024)], side.device, BFLOAT16)
    largest = torch.finfo(BFLOAT16).max
    for param in params:
        param.data.copy_(torch.where(param > 0, largest, -largest))
        param.data[::3] = 1.0
        param.data[1, :5] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    optimizer = fusedopt.AdamW(
        params, lr=2.0**119, weight_decay=0, state_dtype="q8", master_weights="split8"
    )
    for step in range(4):
        set_grads(params, step)
        optimizer.step()
    assert params[0].isfinite().any()
    return record(optimizer)


@pytest.mark.parametrize("size", [1e-20, 1e-39])
@each_mix
@few_coded_cases
@on_both_drivers
def test_groups_of_subnormal_numbers(side: Side, case: Case, dtypes: Any, size: float) -> Results:
    """Squares or numbers that are subnormal in float32; computing in double, they stay."""
    params = draw([(64, 64), (41, 101)], side.device, dtypes[0])
    optimizer = of_q8(case.suited_to(dtypes[0]), params)
    for step in range(2):
        set_grads(params, step)
        for param in params:
            grad = param.grad.to(dtypes[1]) * size
            param.grad_dtype = None
            param.grad = grad
        optimizer.step()
    return record(optimizer)


STRIDES = {(8, 16, 5, 8): (640, 1, 128, 16), (96, 64): (1, 96), (61, 71): (142, 2)}


def train_strided(side: Side, case: Case, dtype: torch.dtype) -> Results:
    """Beside them dense tensors: all of it is one step."""
    params = []
    for shape, strides in STRIDES.items():
        room = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        params.append(draw([room], side.device, dtype)[0].as_strided(shape, strides))
    optimizer = of_q8(case, [*params, *draw([(64, 64), (67, 65)], side.device, dtype)])
    for seed in range(3):
        set_grads(optimizer, seed)
        optimizer.step()
    assert all("_q8" in "".join(optimizer.state[param]) for param in params)
    return record(optimizer)


@few_coded_cases
@some_dtypes(FLOAT32, BFLOAT16)
@on_both_drivers
def test_strided(side: Side, case: Case, dtype: torch.dtype) -> Results:
    return train_strided(side, case, dtype)


TINY = [(64, 64), (5, 1024), (41, 101)]


@in_pairs(few_coded_cases, each_mix, each_masters, each_ema)
@on_both_drivers
def test_sanitizer_codes(side: Side, case: Case, dtypes: Any, masters: Any, ema: Any) -> Results:
    options = options_of(dtypes, None, masters, ema)
    who = "all" if dtypes[0] == BFLOAT16 else "nobody"
    return train(side, case, dtypes, TINY, who, **options)


@few_coded_cases
@on_both_drivers
def test_sanitizer_strided_codes(side: Side, case: Case) -> Results:
    return train_strided(side, case, BFLOAT16)


@few_coded_cases
@on_both_drivers
def test_in_a_graph(side: Side, case: Case) -> Results:
    params = draw(TINY, side.device, BFLOAT16)
    optimizer = of_q8(case, params, capturable=side.is_gpu, max_grad_norm=0.5)
    set_grads(params, 0)
    optimizer.step()
    set_grads(params, 1, in_place=True)
    replay = side.replayable(optimizer.step)
    for seed in (1, 2, 3):
        set_grads(params, seed, in_place=True)
        replay()
    assert all(coded_names(optimizer.state[param]) for param in params)
    return record(optimizer)
