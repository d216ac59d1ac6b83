"""The two drivers side by side: tests of the CUDA driver do the same on a GPU and on the CPU.

A test is a function of a Side that returns tensors; both sides must give the same bits. With
`--device emulated` both are on the CPU, and the side decides which driver steps them.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fusedopt import _C
from support.device import DEVICE, IS_CUDA, needs_driver
from support.equality import bits, without_parameter
from support.optimizers import Case
from support.tensors import BFLOAT16, FLOAT32, FLOAT64, draw, set_grads

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
        _C.emulation.begin_capture()
        try:
            yield
        finally:
            _C.emulation.end_capture()

    def replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            _C.emulation.replay()


@contextmanager
def _emulating(emulate: bool) -> Iterator[None]:
    if IS_CUDA:
        yield
        return
    _C.emulation.use(emulate)
    try:
        yield
    finally:
        _C.emulation.use(True)


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


def on_both_drivers(run: Callable[..., Results]) -> Callable[..., None]:
    """Makes a test of a function of a side, and of what else a test may ask for."""

    @needs_driver
    @functools.wraps(run)
    def test(**given: Any) -> None:
        assert_same_on_both(lambda side: run(side, **given))

    test.__signature__ = without_parameter(run, "side")  # which pytest reads
    return test


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
WORK_DTYPES = [FLOAT32, BFLOAT16, FLOAT64, torch.complex64]  # of each kind of work


def capturable(side: Side, case: Case, dtype: torch.dtype = FLOAT32, **more: Any) -> Any:
    """On the GPU: elsewhere the option has no meaning."""
    return case.ours(draw(SIZES, side.device, dtype), capturable=side.is_gpu, **more)


def warmed_up(side: Side, case: Case, dtype: torch.dtype = FLOAT32) -> Any:
    """Ready to be captured: with state and grads."""
    optimizer = capturable(side, case, dtype)
    set_grads(optimizer, 0)
    optimizer.step()
    set_grads(optimizer, 1, in_place=True)
    optimizer.step()
    return optimizer
