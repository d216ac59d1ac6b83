"""Every setting of precision with every optimizer: against float64 oracles, in every layout, beside
other settings, and on both drivers with the same bits.

An average is taken of the weight as it is kept, whatever came before, so it meets every setting and
every optimizer, but not every two of these.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import oracles
from support.equality import bits
from support.layouts import Layout, each_layout
from support.optimizers import MOST, Case, most_cases, some_cases, step_with, train, varied_cases
from support.pairs import in_pairs
from support.plans import MANY, each_isa, require, use_plan
from support.settings import (
    EMAS,
    ROWS,
    Honest,
    Row,
    assert_one_step,
    build,
    each_ema,
    each_row,
    entries,
    rms,
    suited,
)
from support.sides import Results, Side, on_both_drivers
from support.snapshots import record
from support.tensors import FLOAT16, FLOAT32, around, draw, misaligned, params_of, set_grads, values

SHAPE = (5, 61)
LARGE = (50, 61)  # for a mean that stochastic rounding hardly moves


def grads_of(row: Row, seeds: Iterable[int], shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    return [values(*shape, dtype=row[1], seed=seed) for seed in seeds]


@pytest.mark.unemulated  # test_both_drivers has these rows, too
@in_pairs(most_cases, each_ema, each_row)
def test_one_step(case: Case, ema: dict[str, Any], row: Row) -> None:
    # From the same state: nothing but the rounding to each operand's own dtype is left.
    param = values(*SHAPE, dtype=row[1])
    optimizer = build(case, row, [param], **ema)
    step_with(optimizer, grads_of(row, (1, 2, 3)))
    assert_one_step(optimizer, case, row, ema, grads_of(row, (9,))[0])
    row[0].but(**ema).assert_state_of(optimizer, case, param)


@pytest.mark.unemulated
@pytest.mark.unsanitized  # no other accesses than in one step
@each_row
@most_cases
def test_error_over_several_steps(case: Case, row: Row) -> None:
    start, grads = values(*LARGE, dtype=row[1], seed=1), grads_of(row, range(2, 9), LARGE)
    param = start.clone()
    optimizer = build(case, row, [param], ema_decay=0.9)
    honest = Honest(case, row, start, 0.9)
    oracle = suited(case, row).oracle(start, ema_decay=0.9)
    step_with(optimizer, grads)
    for index, grad in enumerate(grads):
        oracle.step(grad)
        honest.step(grad, index == 0)
    ours, theirs = entries(optimizer, param), honest.results()
    for name, expected in oracle.results().items():
        if case.optimizer == "Lion" and name != "exp_avg":
            continue  # steps of one size: where their sign is that of nearly 0, it may turn
        unit = torch.finfo(theirs[name].dtype).eps * float(np.abs(expected).max())
        allowed = 1.25 * rms(oracles.exact(theirs[name]) - expected) + unit
        assert rms(oracles.exact(ours[name]) - expected) <= allowed, name


def after_steps(optimizer: Any, grads: list[Tensor]) -> Results:
    """Of an optimizer of one param: all there is after these steps, in the order of elements."""
    (param,) = params_of(optimizer)
    step_with(optimizer, grads)
    weight = optimizer.fp32_params()[0]
    return {k: bits(v) for k, v in {**optimizer.state[param], "param": param, "w": weight}.items()}


def assert_equal(first: Results, second: Results) -> None:
    assert first.keys() == second.keys()
    for name, found in first.items():
        assert torch.equal(found, second[name]), name


@in_pairs(some_cases("momentum", "adamw-amsgrad", "rmsprop-all"), each_row, each_layout)
def test_layouts(case: Case, row: Row, layout: Layout) -> None:
    storage = layout.storage(row[1])
    before, strided = storage.clone(), layout.view(storage)
    dense = strided.clone(memory_format=torch.contiguous_format)
    grads = [values(*layout.shape, dtype=row[1], seed=seed) for seed in (1, 2, 3)]
    found, expected = (
        after_steps(build(case, row, [param], ema_decay=0.9), grads) for param in (strided, dense)
    )
    assert_equal(found, expected)
    outside = torch.ones(storage.shape, dtype=torch.bool)
    layout.view(outside).fill_(False)
    assert torch.equal(storage[outside], before[outside])


@each_row
@some_cases("momentum", "adamw-amsgrad", "nadam")
def test_replaced_tensors(case: Case, row: Row) -> None:
    # All that belongs to a param moves, to memory of another layout, between the steps.
    moved, kept = values(*SHAPE, dtype=row[1]), values(*SHAPE, dtype=row[1])
    ours, theirs = build(case, row, [moved], ema_decay=0.9), build(case, row, [kept], ema_decay=0.9)
    for step in range(4):
        found, expected = (after_steps(each, grads_of(row, [step])) for each in (ours, theirs))
        assert_equal(found, expected)
        state = ours.state[moved]
        for name in state.keys() - {"step"}:
            state[name] = torch.stack([state[name]] * 2, dim=step % 3).select(step % 3, 1)
        moved.data = torch.stack([moved.data] * 3, dim=step % 2).select(step % 2, 2)


def cut(case: Case, row: Row, isa: str, chunk_elements: int, threads: int) -> Results:
    params = draw([1, 31, 33, 64, 1000, 5000], torch.device("cpu"), row[1])
    optimizer = build(case, row, params, ema_decay=0.9)
    use_plan(optimizer, isa, chunk_elements)
    torch.set_num_threads(threads)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    return record(optimizer)


@pytest.mark.cpu_only
@in_pairs(some_cases("momentum", "adamw-amsgrad", "adadelta", "lion"), each_row, each_isa)
def test_instruction_sets_threads_and_chunks(case: Case, row: Row, isa: str) -> None:
    require(isa)
    assert_equal(cut(case, row, isa, 64, 2), cut(case, row, "baseline", MANY, 1))


def different_groups(tensors: list[Tensor]) -> list[dict[str, Any]]:
    """A group for each row, with and without an average in turn."""
    emas = list(EMAS.values())
    return [
        {"params": [tensor], **setting.options, **emas[index % len(emas)]}
        for index, (tensor, (setting, _)) in enumerate(zip(tensors, ROWS, strict=True))
    ]


@pytest.mark.parametrize("unfrozen_at", [0, 2], ids=["all-together", "some-unfrozen-later"])
@varied_cases
def test_groups_of_all_settings(case: Case, unfrozen_at: int) -> None:
    # Each group ends with the bits that it has in an optimizer of its own, begun when it began.
    case = case.suited_to(FLOAT16)
    params = [values(301, dtype=dtype, seed=i) for i, (_, dtype) in enumerate(ROWS)]
    together: Any = case.ours(different_groups(params))
    alone: list[Any] = [case.ours([g]) for g in different_groups([p.clone() for p in params])]
    for step in range(5):
        for index, optimizer in enumerate(alone):
            if index % 3 == 0 or step >= unfrozen_at:
                set_grads(optimizer, step)
                (twin,) = params_of(optimizer)
                params[index].grad = twin.grad
                optimizer.step()
        together.step()
    weights = together.fp32_params()
    for param, weight, optimizer in zip(params, weights, alone, strict=True):
        (twin,) = params_of(optimizer)
        assert_equal(
            {"param": param, "w": weight}, {"param": twin, "w": optimizer.fp32_params()[0]}
        )
        assert_equal(together.state[param], optimizer.state[twin])


SIZES = [0, 1, 3, 31, 33, 128, 255, 256, 257, 511, 1024, 2047, 2049, 5000]


@varied_cases
@on_both_drivers
def test_groups_on_both_drivers(side: Side, case: Case) -> Results:
    case = case.suited_to(FLOAT16)
    params = [draw([300 + i], side.device, row[1])[0] for i, row in enumerate(ROWS)]
    optimizer = case.ours(different_groups(params))
    for step in range(5):
        set_grads(params, step)
        for param in params[:: step % 3 + 2] if step < 3 else ():
            param.grad = None
        optimizer.step()
    return record(optimizer)


# Every optimizer and every setting meets all sizes, half of them in a test.
@in_pairs(
    some_cases(*MOST, "nadam-lr-independent"),
    each_ema,
    each_row,
    pytest.mark.parametrize("sizes", [SIZES[::2], SIZES[1::2]], ids=["from-0", "from-1"]),
)
@on_both_drivers
def test_both_drivers(
    side: Side, case: Case, ema: dict[str, Any], row: Row, sizes: list[int]
) -> Results:
    optimizer = build(case, row, draw(sizes, side.device, row[1]), **ema)
    train(optimizer, 3)
    weights = {f"w {index}": weight for index, weight in enumerate(optimizer.fp32_params())}
    return record(optimizer) | weights


@in_pairs(
    some_cases("momentum-l2", "adamw-amsgrad", "rmsprop-all"),
    pytest.mark.parametrize("who", ["params", "states", "strided", "wide-grads"]),
    each_row,
)
@on_both_drivers
def test_both_drivers_off_the_vectors(side: Side, case: Case, who: str, row: Row) -> Results:
    params = draw(SIZES[:11], side.device, row[1])
    if who == "params":
        params = [misaligned(param, 1 + i % 5) for i, param in enumerate(params)]
    elif who == "strided":
        params = [torch.stack([param, param], dim=-1)[:, 1] for param in params]
    optimizer = build(case, row, params, ema_decay=0.9)
    for step in range(3):
        set_grads(params, step)
        for param in params if who == "wide-grads" else ():
            param.grad_dtype = None  # whatever is assigned
            param.grad = param.grad.to(FLOAT32)
        optimizer.step()
        for state in optimizer.state.values() if who == "states" else ():
            moved = {k: misaligned(v, 1 + i % 3) for i, (k, v) in enumerate(state.items())}
            state.update({k: v for k, v in moved.items() if k != "step"})
    return record(optimizer) | (around(params) if who == "params" else {})


@in_pairs(some_cases("sgd-l2", "sgdw-momentum", "adam-amsgrad", "adamw"), each_ema, each_row)
@on_both_drivers
def test_replays(side: Side, case: Case, ema: dict[str, Any], row: Row) -> Results:
    params = draw(SIZES[:9], side.device, row[1])
    optimizer = build(case, row, params, capturable=side.is_gpu, **ema)
    set_grads(params, 0)
    optimizer.step()
    replay = side.replayable(optimizer.step)
    for seed in range(2, 6):
        set_grads(optimizer, seed, in_place=True)
        (optimizer.step if seed == 3 else replay)()
    return record(optimizer)
