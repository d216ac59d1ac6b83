"""The CUDA driver gives the bits of the CPU driver, whatever the sizes, formats and addresses.

Tests with "sanitizer" in their names are the ones that `make gpu` repeats under compute-sanitizer,
a hundred times slower: they are few and small, and go through every kernel.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.device import needs_driver
from support.files import constant
from support.layouts import GRADS, LAYOUTS
from support.optimizers import Case, each_case, some_cases
from support.sides import Results, Side, on_both_drivers
from support.snapshots import record
from support.tensors import (
    BFLOAT16,
    DTYPES,
    EDGES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    around,
    by_id,
    draw,
    each_dtype,
    misaligned,
    set_grads,
    some_dtypes,
)

pytestmark = needs_driver


def tuning(name: str) -> int:
    return constant("cuda/tuning.h", name)


# Vectors have 2, 4 or 8 elements; a warp takes 32 of them at a time, a block 128, and without
# vectors four elements for each thread.
BOUNDARIES = sorted(
    {
        *(2, 4, 8, 16, 32 * 2, 32 * 4, 32 * 8, 128 * 2, 128 * 4, 128 * 8, 2048),
        tuning("kWarp"),
        tuning("kBlockThreads"),
        tuning("kWarpElements"),
        tuning("kMinChunkElements"),
        2 * tuning("kMinChunkElements"),
    }
)
SIZES = sorted({0, 1, 70000, *(b + d for b in BOUNDARIES for d in (-1, 0, 1))})
FEW_SIZES = [0, 1, 5, 33, 255, 256, 257, 511, 700, 2049]
TINY_SIZES = [0, 1, 3, 33, 255, 257, 513]


def plant_edges(tensor: Tensor, at: int) -> None:
    edges = torch.tensor(EDGES, dtype=torch.float64).to(tensor.dtype)
    tensor[at : at + len(EDGES)] = edges.to(tensor.device)


def train_sizes(
    side: Side, case: Case, dtype: torch.dtype, sizes: list[int], steps: int
) -> Results:
    """The last tensor meets numbers of every kind, in the param and in a grad."""
    params = draw(sizes, side.device, dtype)
    plant_edges(params[-1], 0)
    optimizer = case.ours(params)
    for step in range(steps):
        set_grads(params, step)
        if step == 1:
            plant_edges(params[-1].grad, 5)
        optimizer.step()
    return record(optimizer)


@each_dtype
@each_case
@on_both_drivers
def test_sizes(side: Side, case: Case, dtype: torch.dtype) -> Results:
    return train_sizes(side, case, dtype, SIZES, steps=4)


# Which tensors of a parameter start at an odd address.
MISALIGNED = ["param", "grad", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "all"]


def train_misaligned(
    side: Side, case: Case, dtype: torch.dtype, who: str, sizes: list[int]
) -> Results:
    """All of one kind start between two vectors, each tensor at another offset."""

    def moved(name: str, tensors: list[Tensor]) -> list[Tensor]:
        if who not in (name, "all"):
            return tensors
        return [misaligned(tensor, 1 + i % 9) for i, tensor in enumerate(tensors)]

    params = moved("param", draw(sizes, side.device, dtype))
    views = [param for param in params if param._base is not None]
    optimizer = case.ours(params)
    for step in range(4):
        set_grads(params, step)
        for param, grad in zip(params, moved("grad", [p.grad for p in params]), strict=True):
            param.grad = grad
        optimizer.step()
        states = [optimizer.state[param] for param in params]
        for name in states[0].keys() - {"step"}:
            entries = moved(name, [state[name] for state in states])
            for state, entry in zip(states, entries, strict=True):
                state[name] = entry
            views += entries if entries[0]._base is not None else []
    return record(optimizer) | around(views)


@each_dtype
@pytest.mark.parametrize("who", MISALIGNED)
@some_cases("momentum", "adamw-amsgrad")
@on_both_drivers
def test_misaligned(side: Side, case: Case, who: str, dtype: torch.dtype) -> Results:
    return train_misaligned(side, case, dtype, who, FEW_SIZES)


# Formats of param, grad and states; vectors of a mixed work have 16, 8 or 4 bytes.
MIXED = {
    "wide grad": (BFLOAT16, FLOAT32, BFLOAT16),
    "wide grad and states": (FLOAT16, FLOAT32, FLOAT32),
    "wide states": (BFLOAT16, BFLOAT16, FLOAT32),
    "narrow grad": (FLOAT32, FLOAT16, FLOAT32),
    "narrow states": (FLOAT32, FLOAT32, BFLOAT16),
    "both kinds of 16 bits": (BFLOAT16, FLOAT16, BFLOAT16),
    "all differ": (FLOAT16, FLOAT32, BFLOAT16),
    "double param": (FLOAT64, FLOAT32, FLOAT32),
    "double grad": (FLOAT32, FLOAT64, BFLOAT16),
    "double states": (BFLOAT16, FLOAT16, FLOAT64),
    "complex": (torch.complex64, torch.complex128, torch.complex64),
}
each_mix = pytest.mark.parametrize("dtypes", **by_id(MIXED))


def change_grads(params: list[Tensor], dtype: torch.dtype, offset: int) -> None:
    for param in params:
        grad = param.grad.to(dtype)
        param.grad_dtype = None  # whatever is assigned
        param.grad = misaligned(grad, offset) if offset else grad


def change_states(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    """As after loading a checkpoint that was saved so."""
    saved = optimizer.state_dict()
    for entries in saved["state"].values():
        for name in entries.keys() - {"step"}:
            entries[name] = entries[name].to(dtype)
    optimizer.load_state_dict(saved)


def train_mixed(
    side: Side, case: Case, dtypes: tuple[torch.dtype, ...], offset: int, sizes: list[int]
) -> Results:
    params = draw(sizes, side.device, dtypes[0])
    optimizer = case.ours(params)
    for seed in range(4):
        set_grads(params, seed)
        change_grads(params, dtypes[1], offset)
        optimizer.step()
        change_states(optimizer, dtypes[2])
    return record(optimizer)


@each_mix
@pytest.mark.parametrize("offset", [0, 1, 2], ids=["aligned", "off by one", "off by two"])
@some_cases("sgd-l2", "nesterov", "adam-amsgrad-l2")
@on_both_drivers
def test_mixed_dtypes(side: Side, case: Case, offset: int, dtypes: Any) -> Results:
    return train_mixed(side, case, dtypes, offset, FEW_SIZES)


def train_strided(side: Side, case: Case, dtype: torch.dtype, grad_layout: str) -> Results:
    """Beside them a dense tensor: all of it is one step."""
    storages = [layout.storage(dtype, seed=i).to(side.device) for i, layout in enumerate(LAYOUTS)]
    params = [layout.view(storage) for layout, storage in zip(LAYOUTS, storages, strict=True)]
    params += draw([513], side.device, dtype)
    optimizer = case.ours(params)
    for seed in range(3):
        for param in params:
            param.grad = GRADS[grad_layout](tuple(param.shape), dtype, seed).to(side.device)
        optimizer.step()
    return record(optimizer) | {f"storage {i}": storage for i, storage in enumerate(storages)}


@each_dtype
@pytest.mark.parametrize("grad_layout", GRADS)
@some_cases("momentum-l2", "adamw-amsgrad")
@on_both_drivers
def test_layouts(side: Side, case: Case, grad_layout: str, dtype: torch.dtype) -> Results:
    return train_strided(side, case, dtype, grad_layout)


each_of_two = some_cases("nesterov-l2", "adamw-amsgrad")


@each_of_two
@some_dtypes(*DTYPES[:5])
@on_both_drivers
def test_sanitizer_sizes(side: Side, case: Case, dtype: torch.dtype) -> Results:
    return train_sizes(side, case, dtype, TINY_SIZES, steps=2)


@each_of_two
@some_dtypes(FLOAT32, FLOAT64)
@on_both_drivers
def test_sanitizer_strided(side: Side, case: Case, dtype: torch.dtype) -> Results:
    return train_strided(side, case, dtype, "sliced")


@each_of_two
@some_dtypes(FLOAT32, BFLOAT16)
@on_both_drivers
def test_sanitizer_misaligned(side: Side, case: Case, dtype: torch.dtype) -> Results:
    return train_misaligned(side, case, dtype, "all", TINY_SIZES)


@each_of_two
@pytest.mark.parametrize("mix", ["all differ", "double grad"])
@on_both_drivers
def test_sanitizer_mixed(side: Side, case: Case, mix: str) -> Results:
    return train_mixed(side, case, MIXED[mix], 0, TINY_SIZES)


@each_of_two
@pytest.mark.parametrize("scaled", [False, True], ids=["capturable", "scaler"])
@on_both_drivers
def test_sanitizer_numbers_on_the_device(side: Side, case: Case, scaled: bool) -> Results:
    """Step counts and scalars are the device's, as with capturable=True and with a GradScaler."""
    options = {} if scaled else {"capturable": side.is_gpu, "lr": side.tensor(0.01)}
    params = draw(TINY_SIZES, side.device)
    optimizer = replace(case, options={**case.options, **options}).ours(params)
    for seed, found_inf in enumerate((0.0, 1.0, 0.0)):
        set_grads(params, seed)
        if scaled:
            optimizer.found_inf = side.tensor(found_inf)
            optimizer.grad_scale = side.tensor(4.0)
        optimizer.step()
    return record(optimizer)


@each_of_two
@on_both_drivers
def test_sanitizer_many_groups(side: Side, case: Case) -> Results:
    """More scalars than a kernel's arguments hold."""
    params = draw([3] * 100, side.device)
    groups = [{"params": [param], "lr": 0.001 * (1 + i)} for i, param in enumerate(params)]
    optimizer = case.ours(groups)
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    return record(optimizer)
