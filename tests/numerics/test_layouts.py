"""Sizes around every boundary of the code, and every way for tensors to lie in memory.

torch's fused CPU step updates 16-bit params in part, transposed and sliced ones wrongly; other
packages write outside a slice or update a contiguous copy. Each would fail here.
"""

import pytest
import torch

from support.files import constant
from support.layouts import GRADS, Layout, each_grad, each_layout
from support.optimizers import Case, some_cases, step_with
from support.oracles import assert_rounded_once
from support.pairs import in_pairs, together
from support.snapshots import results
from support.tensors import by_id, some_dtypes, values

CHUNK = constant("core/chunks.h", "kMinChunkElements")
BOUNDARIES = {
    "vector-of-4": 4,
    "vector-of-8": 8,
    "vector-of-16": 16,
    "vector-of-32": 32,
    "two-vectors-of-32": 64,
    "alignment": constant("core/chunks.h", "kChunkAlignment"),
    "tile": constant("cpu/tile.h", "kTileElements"),
    "first-chunk": CHUNK - constant("core/chunks.h", "kTensorCost"),
    "chunk": CHUNK,
}
SIZES = {
    "empty": 0,
    "one": 1,
    **{f"{name}{d:+}": size + d for name, size in BOUNDARIES.items() for d in (-1, 0, 1)},
    "three-chunks-and-five": 3 * CHUNK + 5,
}


@in_pairs(
    some_cases("momentum-l2", "adamw-amsgrad"),
    pytest.mark.parametrize("size", **by_id(SIZES)),
    together(
        some_dtypes(torch.float32, torch.float64, torch.bfloat16),
        pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "offset-by-one"]),
        pytest.mark.parametrize("stride", [1, 2], ids=["dense", "strided"]),
    ),
)
def test_sizes(case: Case, size: int, stride: int, offset: int, dtype: torch.dtype) -> None:
    room = slice(offset, offset + size * stride, stride)
    storage, grad_storage = (values(size * stride + 40, dtype=dtype, seed=s) for s in (1, 2))
    before = storage.clone()
    optimizer = case.ours([storage[room]], stochastic_rounding=False)
    oracle = case.oracle(storage[room])
    param = optimizer.param_groups[0]["params"][0]
    step_with(optimizer, [grad_storage[room]])
    oracle.step(grad_storage[room])
    for name, value in results(optimizer, param).items():
        assert_rounded_once(value, oracle.results()[name])
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside[room] = False
    assert torch.equal(storage[outside], before[outside])


@in_pairs(
    each_layout,
    each_grad,
    some_cases("momentum", "nesterov-l2", "adam-amsgrad-l2", "adamw", "rmsprop-all"),
    some_dtypes(torch.float64, torch.complex128),
)
def test_layouts(case: Case, layout: Layout, grad_layout: str, dtype: torch.dtype) -> None:
    storage = layout.storage(dtype)
    before, param = storage.clone(), layout.view(storage)
    twin = param.cpu().clone(memory_format=torch.contiguous_format)
    grads = [GRADS[grad_layout](layout.shape, dtype, seed) for seed in (1, 2, 3)]
    optimizer, unfused = case.ours([param]), case.theirs([twin])
    step_with(optimizer, grads)
    step_with(unfused, [grad.cpu().contiguous() for grad in grads])
    for name, expected in results(unfused, twin).items():
        found = results(optimizer, param)[name]
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-13, atol=1e-15)
    outside = torch.ones(storage.shape, dtype=torch.bool)
    layout.view(outside).fill_(False)
    assert torch.equal(storage[outside], before[outside])


@each_layout
@some_cases("momentum", "adamw-amsgrad", "rprop")
def test_state_of_another_layout(case: Case, layout: Layout) -> None:
    # As after load_state_dict of a checkpoint that was saved in another memory format.
    param = layout.view(layout.storage(torch.float64))
    twin = param.cpu().clone(memory_format=torch.contiguous_format)
    optimizer, unfused = case.ours([param]), case.theirs([twin])
    for step in range(3):
        grad = values(*layout.shape, dtype=torch.float64, seed=step)
        step_with(optimizer, [grad])
        step_with(unfused, [grad.cpu()])
        state = optimizer.state[param]
        for name in state.keys() - {"step"}:
            state[name] = torch.stack([state[name], state[name]], dim=-1)[..., 1]
    for name, expected in results(unfused, twin).items():
        found = results(optimizer, param)[name]
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-13, atol=1e-15)


@some_cases("momentum", "adamw", "lion")
def test_lazy_grads(case: Case) -> None:
    # Memory that does not hold the values: torch conjugates and negates when it reads.
    pairs = values(9, dtype=torch.complex128).conj()
    assert pairs.is_conj()
    assert pairs.imag.is_neg()
    for grad in (pairs, pairs.imag):
        lazy, plain = (values(9, dtype=grad.dtype, seed=1) for _ in range(2))
        step_with(case.ours([lazy]), [grad])
        step_with(case.ours([plain]), [grad.resolve_conj().resolve_neg().clone()])
        assert torch.equal(lazy, plain)


@some_cases("momentum", "adamw")
def test_two_slices_of_one_buffer(case: Case) -> None:
    buffer = values(8, 10)
    left, right = buffer[:, :4], buffer[:, 4:]
    twins = [left.clone(), right.clone()]
    grads = [values(*twin.shape, seed=1) for twin in twins]
    for params in ([left, right], twins):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        case.ours(params).step()
    assert torch.equal(left, twins[0])
    assert torch.equal(right, twins[1])
