"""The two drivers side by side: tests of the CUDA driver do the same on a GPU and on the CPU.

A test is a function of a Side that returns tensors; both sides must give the same bits. With
`--device emulated` both are on the CPU, and the side decides which driver steps them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from fusedopt import _C
from support.cases import Case, bits, values
from support.device import DEVICE, STEPS_ON_DEVICE

IS_CUDA = DEVICE == "cuda"
needs_driver = pytest.mark.skipif(
    not STEPS_ON_DEVICE, reason="about the CUDA driver: --device cuda or emulated"
)
needs_gpu = pytest.mark.skipif(not IS_CUDA, reason="only a real GPU can tell: --device cuda")

Results: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Side:
    """A driver and the device of the tensors that it steps."""

    is_gpu: bool
    device: torch.device

    def tensor(self, data: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(data, dtype=dtype, device=self.device)

    def replayable(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Captures what `step` does on the GPU and returns the replay; elsewhere `step` itself."""
        if not self.is_gpu:
            return step
        graph = Graph()
        with graph.capture():
            step()
        return graph.replay


GPU = Side(True, torch.device(DEVICE))
CPU = Side(False, torch.device("cpu"))


class Graph:
    """A CUDA graph. The emulation keeps the kernels of the latest capture only."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph() if IS_CUDA else None

    @contextmanager
    def capture(self) -> Iterator[None]:
        if self._graph is not None:
            with torch.cuda.graph(self._graph):
                yield
            return
        _C.begin_capture()
        try:
            yield
        finally:
            _C.end_capture()

    def replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            _C.replay()


@contextmanager
def _emulating(emulate: bool) -> Iterator[None]:
    if IS_CUDA:
        yield
        return
    _C.emulate(emulate)
    try:
        yield
    finally:
        _C.emulate(True)


def on_both(run: Callable[[Side], Results]) -> tuple[Results, Results]:
    """What the CUDA driver gives and what the CPU's does."""
    ours = run(GPU)
    with _emulating(False), torch.device("cpu"):
        return ours, run(CPU)


def assert_same_bits(ours: Results, theirs: Results) -> None:
    """NaNs count as equal."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found, expected = ours[name].detach().cpu(), expected.detach().cpu()
        assert found.dtype == expected.dtype, name
        assert found.shape == expected.shape, name
        if not torch.equal(bits(found), bits(expected)):
            raise AssertionError(f"{name}: {_difference(found, expected)}")


def _difference(found: Tensor, expected: Tensor) -> str:
    width = max(found.element_size(), 1)
    wrong = (bits(found) != bits(expected)).view(-1, width).any(dim=1).nonzero().reshape(-1)
    at = int(wrong[0])
    return (
        f"{len(wrong)} of {found.numel()} elements of {tuple(found.shape)} {found.dtype} differ, "
        f"the first at {at}: {found.reshape(-1)[at]} instead of {expected.reshape(-1)[at]}"
    )


def assert_same_on_both(run: Callable[[Side], Results]) -> None:
    assert_same_bits(*on_both(run))


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def record(optimizer: torch.optim.Optimizer) -> Results:
    """Copies of all params and of all of their state, step counts included."""
    found = {}
    for index, param in enumerate(params_of(optimizer)):
        entries = optimizer.state.get(param, {})
        for name, entry in {"param": param, **entries}.items():
            found[f"{name} {index}"] = entry.detach().cpu().clone()
    return found


def draw(
    sizes: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """A tensor of each size, in memory of its own."""
    numbers = values(sum(sizes), dtype=dtype, seed=seed).to(device)
    return [part.clone() for part in numbers.split(list(sizes))]


def give_grads(params: Iterable[Tensor], seed: int) -> None:
    """New grads, in new memory."""
    params = list(params)
    sizes = [param.numel() for param in params]
    dtype = torch.complex128 if any(p.is_complex() for p in params) else torch.float64
    numbers = values(sum(sizes), dtype=dtype, seed=1000 + seed)
    for param, part in zip(params, numbers.split(sizes), strict=True):
        param.grad = None
        param.grad = part.view(param.shape).to(param.dtype).to(param.device, copy=True)


def misaligned(tensor: Tensor, offset: int = 1) -> Tensor:
    """A copy that starts `offset` elements behind an aligned address, with numbers around it."""
    storage = torch.full((tensor.numel() + offset + 9,), 7, dtype=tensor.dtype).to(tensor.device)
    view = storage[offset : offset + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor.detach())


def around(tensors: Iterable[Tensor]) -> Results:
    """All of the memory that misaligned tensors are views of."""
    return {f"around {i}": t._base.cpu().clone() for i, t in enumerate(tensors)}


@contextmanager
def without_waiting() -> Iterator[None]:
    """torch refuses what waits for the GPU, as far as torch does it itself."""
    if not IS_CUDA:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


SIZES = [0, 1, 33, 257, 3000]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]  # of each kind of work


def capturable(
    side: Side, case: Case, dtype: torch.dtype = torch.float32, **more: Any
) -> torch.optim.Optimizer:
    """On the GPU: elsewhere the option has no meaning."""
    return case.fused(draw(SIZES, side.device, dtype), capturable=side.is_gpu, **more)


def write_grads(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Into the grads that are there, as a captured backward pass does."""
    for index, param in enumerate(params_of(optimizer)):
        numbers = values(*param.shape, dtype=param.dtype, seed=100 * seed + index)
        param.grad.copy_(numbers)


def warmed_up(side: Side, case: Case, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """Ready to be captured: with state and grads."""
    optimizer = capturable(side, case, dtype)
    give_grads(params_of(optimizer), 0)
    for seed in range(2):
        write_grads(optimizer, seed)
        optimizer.step()
    return optimizer
