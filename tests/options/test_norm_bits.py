"""The global norm has the same bits however grads are ordered, cut, laid out and distributed.

It is also right: the squares of float32 grads are rounded to float32, and what else is lost of them
is far less. At the very worst it is 2^-44 of the largest square for each, which
tests/cpp/test_norm.cpp holds; here, of any grads whose numbers are as different as they may be.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedopt
from support.device import DEVICE
from support.equality import same_bits
from support.processes import run_ranks
from support.sides import Results, Side, on_both_drivers
from support.tensors import by_id, misaligned, some_dtypes, values

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
repeatable = settings(derandomize=True, deadline=None, max_examples=60)


def clip(grads: list[Tensor], dtype: torch.dtype | None = None) -> tuple[float, Tensor]:
    """The norm, and where a step that is clipped leads from 0."""
    params = [torch.zeros_like(grad, dtype=dtype) for grad in grads]
    optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=0.5)
    for param, grad in zip(params, grads, strict=True):
        param.grad_dtype = None
        param.grad = grad
    optimizer.step()
    assert not optimizer.skipped
    return float(optimizer.grad_norm), torch.cat([param.reshape(-1) for param in params])


def norm_of(*grads: Tensor) -> float:
    return clip(list(grads))[0]


def squares_of(grad: Tensor) -> list[float]:
    """Exact, of grads below float64 then rounded to 24 digits."""
    wide = grad.detach().cpu().to(torch.float64).numpy().ravel()
    squares = wide * wide
    if grad.dtype != torch.float64:
        wide[np.abs(wide) < 2.0**-126] = 0
        fractions, exponents = np.frexp(wide * wide)
        squares = np.ldexp(np.rint(fractions * 2.0**24), exponents - 24)
    return squares.tolist()


def expected_of(*grads: Tensor) -> float:
    return math.sqrt(math.fsum(square for grad in grads for square in squares_of(grad)))


def cut(grad: Tensor, at: list[int]) -> list[Tensor]:
    """Each piece has memory of its own."""
    return [piece.clone() for piece in torch.tensor_split(grad, at)]


WAYS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "two parts": lambda grad: cut(grad, [30011]),
    "three parts": lambda grad: cut(grad, [1, 8192]),
    "eight parts": lambda grad: cut(grad, [5, 5, 700, 4096, 4097, 32768, 60000]),
    "many": lambda grad: cut(grad, list(range(0, grad.numel(), 97))),
    "views": lambda grad: list(torch.tensor_split(grad, [3, 1234, 50001])),
    "a matrix": lambda grad: [grad.view(61, -1)],
    "misaligned": lambda grad: [misaligned(grad)],
    "strided": lambda grad: [torch.stack([grad, torch.ones_like(grad)], 1)[:, 0]],
}
SIZE = 61 * 1237


@pytest.mark.parametrize("way", WAYS)
@some_dtypes(*DTYPES)
def test_pieces_and_layouts(dtype: torch.dtype, way: str) -> None:
    grad = values(SIZE, dtype=dtype, seed=4) / 64
    norm, moved = clip([grad])
    assert norm == pytest.approx(expected_of(grad), rel=1e-12)
    other, moved_too = clip(WAYS[way](grad))
    assert other == norm
    assert torch.equal(moved_too, moved)


@some_dtypes(*DTYPES)
def test_order(dtype: torch.dtype) -> None:
    """Of the params, and of the elements: a transposed grad is visited in the param's order."""
    grads = [values(40 + seed, 33, dtype=dtype, seed=seed) for seed in range(40)]
    norm, moved = clip(grads)
    reverse, moved_back = clip(grads[::-1])
    transposed = [grad.t().contiguous().t() for grad in grads]
    assert {norm, reverse, norm_of(*transposed), norm_of(*map(torch.t, grads))} == {norm}
    ends = list(np.cumsum([grad.numel() for grad in grads[::-1]])[:-1])
    assert torch.equal(torch.cat(torch.tensor_split(moved_back, ends)[::-1]), moved)
    shuffled = torch.cat([grad.reshape(-1) for grad in grads])
    for _ in range(3):
        shuffled = shuffled[torch.randperm(len(shuffled)).to(shuffled.device)]
        assert norm_of(shuffled) == norm


def mixed() -> list[Tensor]:
    """Grads of all dtypes, from large to tiny."""
    sizes = [1, 50000, 0, 3, 16385, 8192, 700]
    return [
        values(size, dtype=DTYPES[i % 4], seed=i) * scale
        for i, (size, scale) in enumerate(
            (size, scale) for scale in (1, 2.0**-9, 2.0**-14) for size in sizes
        )
    ]


def test_mixed_dtypes() -> None:
    grads = mixed()
    norm = norm_of(*grads)
    assert norm == pytest.approx(expected_of(*grads), rel=1e-12)
    assert norm_of(*sorted(grads, key=lambda grad: (str(grad.dtype), grad.numel()))) == norm
    assert norm_of(*(piece for grad in grads for piece in cut(grad, [1, 5000]))) == norm


@pytest.mark.cpu_only
def test_threads_and_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [*mixed(), values(1 << 20, seed=9)]
    found = []
    for threads in (1, 2, 3, 4):
        for isa in fusedopt._C.build_info()["isas"]:
            monkeypatch.setenv("FUSEDOPT_ISA", isa)
            torch.set_num_threads(threads)
            found.append(clip(grads))
    assert len({norm for norm, _ in found}) == 1
    assert all(torch.equal(moved, found[0][1]) for _, moved in found)


@on_both_drivers
def test_both_drivers(side: Side) -> Results:
    grads = [grad.to(side.device) for grad in [*mixed(), *map(torch.tensor, BORDERS.values())]]
    norms = [clip([grad])[0] for grad in grads if grad.numel() > 0] + [clip(grads)[0]]
    return {"norms": torch.tensor(norms, dtype=torch.float64)}


ROOT = math.sqrt(2)
# Grads whose squares are at borders of bins or halfway between two numbers of one.
BORDERS: dict[str, list[float]] = {
    "powers": [2.0**e for e in range(-60, 60)],
    "below powers": [2.0**e * (1 - 2.0**-24) for e in range(-60, 60)],
    "above powers": [2.0**e * (1 + 2.0**-23) for e in range(-60, 60)],
    "halves": [2.0**e * m for e in range(-60, 60) for m in (1.5, 1.25, 1.75, 1.125)],
    "roots": [ROOT * 2.0**e for e in range(-60, 60)],
    "around roots": [float(np.float32(ROOT * 2.0**e)) * f for e in range(-60, 60)
                     for f in (1 - 2.0**-23, 1, 1 + 2.0**-23)],
}  # fmt: skip


@pytest.mark.parametrize("numbers", **by_id(BORDERS))
@some_dtypes(torch.float32, torch.float64)
def test_borders(dtype: torch.dtype, numbers: list[float]) -> None:
    """Around each exponent of the grads: a bin has 11 binary digits of those in float, or 10."""
    grad = torch.tensor(numbers, dtype=dtype).to(DEVICE)
    for first in range(0, len(numbers) - 60, 7):
        some = grad[first : first + 60]
        norm = norm_of(some)
        assert norm == pytest.approx(expected_of(some), rel=1e-12)
        assert norm_of(*some.split(1)) == norm_of(some.flip(0)) == norm


@some_dtypes(*DTYPES)
def test_a_spike(dtype: torch.dtype) -> None:
    """Whatever was summed before it is met, it is what decides which digits count."""
    tiny, spike = 2.0**-11, 2.0**9
    grad = torch.full((1 << 20,), tiny, dtype=dtype).to(DEVICE)
    found = set()
    for at in (0, 1, 4095, 5000, 32767, 700001, len(grad) - 1):
        grad.fill_(tiny)
        grad[at] = spike
        found |= {norm_of(grad), norm_of(*grad.split(1 << 18))}
    assert found == {math.sqrt(spike**2 + (len(grad) - 1) * tiny**2)}


@pytest.mark.parametrize("exponent", [-30, -22, -20, -11, -10, 10, 11, 20, 22, 30])
def test_one_bin_far_from_another(exponent: int) -> None:
    """Grads that are all too small to count beside others, in the sum or for its digits."""
    grad = values(9000, seed=1)
    both = [grad, grad * 2.0**exponent]
    norm = norm_of(*both)
    assert (
        norm == norm_of(*both[::-1]) == norm_of(torch.cat(both)) == norm_of(torch.cat(both[::-1]))
    )
    assert norm == pytest.approx(expected_of(*both), rel=1e-12)


def test_nothing_and_almost_nothing() -> None:
    for number in (0.0, -0.0, 1e-45, -1e-39):  # subnormal: they count as 0
        assert norm_of(torch.full((300,), number).to(DEVICE)) == 0
    smallest = torch.full((4,), 2.0**-126).to(DEVICE)
    assert norm_of(smallest) == 2.0**-125
    largest = torch.full((4,), torch.finfo().max).to(DEVICE)
    assert norm_of(largest) == pytest.approx(2 * torch.finfo().max, rel=1e-7)


def bits_of_float32() -> st.SearchStrategy[float]:
    return st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@given(numbers=st.lists(bits_of_float32(), min_size=1, max_size=32), data=st.data())
@repeatable
def test_all_exponents(numbers: list[float], data: st.DataObject) -> None:
    grad = torch.tensor(numbers, device=DEVICE)
    order = torch.tensor(data.draw(st.permutations(range(len(numbers)))), device=DEVICE)
    at = sorted(data.draw(st.lists(st.integers(0, len(numbers)), max_size=3)))
    norm = norm_of(grad)
    assert norm_of(*cut(grad[order], at)) == norm
    assert norm == pytest.approx(expected_of(grad), rel=1e-12, abs=2.0**-140)


@given(exponents=st.lists(st.integers(-500, 500), min_size=1, max_size=20), data=st.data())
@repeatable
def test_all_exponents_of_float64(exponents: list[int], data: st.DataObject) -> None:
    numbers = [data.draw(st.floats(1, 2)) * 2.0**exponent for exponent in exponents]
    grad = torch.tensor(numbers, dtype=torch.float64, device=DEVICE)
    order = torch.tensor(data.draw(st.permutations(range(len(numbers)))), device=DEVICE)
    norm = norm_of(grad)
    assert norm_of(*grad[order].split(1)) == norm
    assert norm == pytest.approx(expected_of(grad), rel=1e-12)


def test_what_is_not_finite_is_counted_wherever_it_is() -> None:
    grad = values(40000, seed=2)
    grad[7], grad[5000], grad[5001], grad[39999] = math.inf, -math.inf, math.inf, -math.inf
    for extra, expected in ((0.0, math.inf), (math.nan, math.nan), (-math.nan, math.nan)):
        grad[20000] = extra
        for pieces in ([grad], cut(grad, [7, 8, 5001, 30000])):
            params = [torch.zeros_like(piece) for piece in pieces]
            optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=0.5)
            for param, piece in zip(params, pieces, strict=True):
                param.grad = piece
            optimizer.step()
            assert optimizer.nonfinite_grads == 4 + (extra != 0)
            assert same_bits(
                {"norm": optimizer.grad_norm.abs().isinf()},
                {"norm": torch.tensor(expected == math.inf).to(DEVICE)},
            )
            assert optimizer.skipped


# Each process has the rows of every grad that FSDP2 would give it, as DTensors or as plain tensors.
RANKS = """
import os, sys, torch, torch.distributed as dist, fusedopt
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
rank, world = int(sys.argv[1]), int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))

def rows(whole):
    chunks = whole.chunk(world)
    return chunks[rank].clone() if rank < len(chunks) else whole[:0].clone()

for sharded in (True, False):
    params = []
    for seed, (shape, dtype, scale) in enumerate({grads!r}):
        generator = torch.Generator().manual_seed(seed)
        whole = (torch.randn(shape, generator=generator) * scale).to(getattr(torch, dtype))
        grad = rows(whole)
        param = torch.zeros_like(grad)
        if sharded:
            param, grad = (
                DTensor.from_local(t, mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())
                for t in (param, grad))
        param = torch.nn.Parameter(param)
        param.grad = grad
        params.append(param)
    options = dict() if sharded else dict(norm_group="world")
    optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=0.5, **options)
    optimizer.step()
    print(float(optimizer.grad_norm).hex())
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a process that ends while they do
"""
SHARDED: list[tuple[tuple[int, ...], str, float]] = [
    ((50, 33), "float32", 1.0),
    ((7, 5), "bfloat16", 2.0**-9),
    ((1, 2000), "float32", 2.0**-12),
    ((3,), "float64", 8.0),
    ((129, 64), "float16", 2.0**-5),
]


@pytest.mark.cpu_only
@pytest.mark.unsanitized  # what each process steps are ordinary tensors
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_any_number_of_processes(tmp_path: Path, world: int) -> None:
    grads = []
    for seed, (shape, dtype, scale) in enumerate(SHARDED):
        generator = torch.Generator().manual_seed(seed)
        whole: Any = torch.randn(shape, generator=generator) * scale
        grads.append(whole.to(getattr(torch, dtype)))
    expected = norm_of(*grads).hex()
    script = RANKS.replace("{grads!r}", repr(SHARDED))
    for out in run_ranks(tmp_path, script, world):
        assert out.split() == [expected, expected]
