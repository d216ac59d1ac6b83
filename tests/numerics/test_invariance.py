"""An element's result depends on nothing but its own inputs: bit for bit the same however the work
is cut, spread over threads, ordered, grouped, laid out or vectorised."""

import random
from itertools import product

import pytest
import torch
from torch import Tensor

from support.equality import bits, same_bits
from support.layouts import Layout, each_layout
from support.optimizers import Case, each_case, most_cases, some_cases, step_with
from support.pairs import in_pairs, together
from support.plans import MANY, best_isa, each_isa, require, use_plan
from support.snapshots import results
from support.tensors import DTYPES, EDGES, each_dtype, some_dtypes, values

# The last tensor is empty: see PEERS' pack loops.
SIZES = [1, 0, 64, 1000, 5000, 16385, 7, 40001, 3, 0]


def train(
    case: Case,
    dtype: torch.dtype,
    *,
    threads: int = 1,
    chunk_elements: int | None = None,
    order: list[int] | None = None,
    group_size: int = MANY,
) -> list[dict[str, Tensor]]:
    """Three steps on tensors of all SIZES; their results in the order of SIZES."""
    params = [values(size, dtype=dtype, seed=index) for index, size in enumerate(SIZES)]
    grads = [
        [values(p.numel(), dtype=dtype, seed=100 * s + i) for i, p in enumerate(params)]
        for s in (1, 2, 3)
    ]
    order = order or list(range(len(SIZES)))
    groups = [order[at : at + group_size] for at in range(0, len(order), group_size)]
    optimizer = case.ours([{"params": [params[index] for index in group]} for group in groups])
    if chunk_elements is not None:
        use_plan(optimizer, best_isa(), chunk_elements)
    torch.set_num_threads(threads)
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad
        optimizer.step()
    return [results(optimizer, param) for param in params]


def assert_same(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> None:
    for size, ours, theirs in zip(SIZES, first, second, strict=True):
        assert same_bits(ours, theirs), size


@pytest.mark.unemulated  # it has the bits of the CPU driver: test_sizes of tests/cuda
@each_dtype
@each_case
def test_a_tensor_of_one_value_keeps_one_value(case: Case, dtype: torch.dtype) -> None:
    # torch's fused bf16 and fp16 SGD leaves full SIMD blocks as they are; elsewhere the tail rounds
    # differently from the body. No tolerance hides that here.
    size = 2 * 16384 + 77
    start = complex(0.7, -1.3) if dtype.is_complex else 0.7
    param = torch.full((size,), start, dtype=dtype)
    grads = [torch.full((size,), start * factor, dtype=dtype) for factor in (0.3, -1.1, 2.3, 0.1)]
    optimizer = case.ours([param], stochastic_rounding=False)
    step_with(optimizer, grads)
    for name, value in results(optimizer, param).items():
        assert not torch.equal(value[0], torch.tensor(start, dtype=dtype)), name
        assert torch.equal(bits(value), bits(value[0]).repeat(size)), name


@pytest.mark.cpu_only
@some_cases("sgd", "momentum-l2", "adam-low-betas", "adamw-amsgrad", "rmsprop-all", "asgd-averaged")
@some_dtypes(torch.float32, torch.bfloat16, torch.complex64)
def test_chunks_and_threads(case: Case, dtype: torch.dtype) -> None:
    plain = train(case, dtype)
    for threads, chunk_elements in product((1, 2), (1, 64, 1000, 16384, MANY)):
        cut = train(case, dtype, threads=threads, chunk_elements=chunk_elements)
        assert_same(cut, plain)


@some_cases("nesterov", "adam-l2", "adamw")
@pytest.mark.parametrize("seed", [None, 1, 2], ids=["reversed", "shuffled", "shuffled-again"])
def test_order(case: Case, seed: int | None) -> None:
    order = list(range(len(SIZES)))[::-1]
    if seed is not None:
        random.Random(seed).shuffle(order)
    assert_same(train(case, torch.float32, order=order), train(case, torch.float32))


@some_cases("nesterov", "adam-l2", "adamw", "nadam-l2")
@pytest.mark.parametrize("group_size", [1, 3])
def test_param_groups(case: Case, group_size: int) -> None:
    grouped = train(case, torch.float32, group_size=group_size)
    assert_same(grouped, train(case, torch.float32))


@some_cases("sgd-l2", "momentum", "adam-amsgrad", "adamw", "rmsprop-all", "rprop")
@some_dtypes(*DTYPES)
def test_one_param_or_its_parts(case: Case, dtype: torch.dtype) -> None:
    whole = values(20011, dtype=dtype)
    parts = [part.clone() for part in whole.split([1, 10, 16000, 4000])]
    # Draws depend on the place in the tensor, so to the nearest.
    optimizer, split = (case.ours(p, stochastic_rounding=False) for p in ([whole], parts))
    for seed in (1, 2, 3):
        whole.grad = values(20011, dtype=dtype, seed=seed)
        for part, grad in zip(parts, whole.grad.split([1, 10, 16000, 4000]), strict=True):
            part.grad = grad
        optimizer.step()
        split.step()
    joined = [results(split, part) for part in parts]
    expected = results(optimizer, whole)
    assert same_bits({name: torch.cat([j[name] for j in joined]) for name in expected}, expected)


@in_pairs(each_layout, some_cases("momentum", "adamw-amsgrad", "adagrad-initial"), each_dtype)
def test_strided_or_dense(case: Case, dtype: torch.dtype, layout: Layout) -> None:
    strided = layout.view(layout.storage(dtype))
    dense = strided.clone(memory_format=torch.contiguous_format)
    grads = [values(*layout.shape, dtype=dtype, seed=seed) for seed in (1, 2, 3)]
    optimizers = [case.ours([strided]), case.ours([dense])]
    for optimizer in optimizers:
        step_with(optimizer, grads)
    assert same_bits(results(optimizers[0], strided), results(optimizers[1], dense))


def run_isa(case: Case, dtype: torch.dtype, stride: int) -> dict[str, Tensor]:
    storage = values(2 * 700, dtype=dtype)
    storage[: len(EDGES)] = torch.tensor(EDGES, dtype=torch.float64)
    param = storage[::stride]
    optimizer = case.ours([param])
    grads = [values(2 * 700, dtype=dtype, seed=seed) for seed in (1, 2, 3)]
    grads[1][5 : 5 + len(EDGES)] = torch.tensor(EDGES, dtype=torch.float64)
    step_with(optimizer, [grad[::stride] for grad in grads])
    return results(optimizer, param)


@pytest.mark.cpu_only
@in_pairs(
    most_cases,
    each_dtype,
    together(each_isa, pytest.mark.parametrize("stride", [1, 2], ids=["dense", "strided"])),
)
def test_instruction_sets(
    case: Case, dtype: torch.dtype, isa: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(isa)
    monkeypatch.setenv("FUSEDOPT_ISA", "baseline")
    expected = run_isa(case, dtype, stride)
    monkeypatch.setenv("FUSEDOPT_ISA", isa)
    assert same_bits(run_isa(case, dtype, stride), expected)
