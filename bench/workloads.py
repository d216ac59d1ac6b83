"""The shapes that step.py measures, computed from the architectures (no model library needed)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """Shapes of the parameters, one tuple for each parameter group."""

    name: str
    groups: tuple[tuple[Shape, ...], ...]
    options: tuple[Mapping[str, Any], ...] = ()  # for each group, what differs from the defaults
    large: bool = False  # left out of "all" on a CPU, where it takes too much memory and time

    def group_options(self) -> tuple[Mapping[str, Any], ...]:
        return self.options or ({},) * len(self.groups)

    @property
    def tensors(self) -> int:
        return sum(len(group) for group in self.groups)

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for group in self.groups for shape in group)


def _resnet50() -> Iterator[Shape]:
    """161 tensors, 25 557 032 elements: torchvision's resnet50."""

    def conv_and_norm(outputs: int, inputs: int, kernel: int) -> Iterator[Shape]:
        yield from ((outputs, inputs, kernel, kernel), (outputs,), (outputs,))

    yield from conv_and_norm(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from conv_and_norm(width, inputs, 1)
            yield from conv_and_norm(width, width, 3)
            yield from conv_and_norm(4 * width, width, 1)
            if block == 0:  # the shortcut changes the number of channels
                yield from conv_and_norm(4 * width, inputs, 1)
            inputs = 4 * width
    yield from ((1000, inputs), (1000,))


def _gpt2() -> Iterator[Shape]:
    """148 tensors, 124 439 808 elements: GPT-2 small, its head tied to the token embedding."""
    width = 768
    yield from ((50257, width), (1024, width))
    for _ in range(12):
        yield from ((width,), (width,))
        yield from ((width, 3 * width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,))
        yield from ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    yield from ((width,), (width,))


def _llama_8b_layer() -> Iterator[Shape]:
    """9 tensors, 218 112 000 elements: one decoder layer of Llama-3-8B."""
    width, keys, hidden = 4096, 1024, 14336
    yield from ((width, width), (keys, width), (keys, width), (width, width))
    yield from ((hidden, width), (hidden, width), (width, hidden))
    yield from ((width,), (width,))


def _llama_8b_eighth() -> Workload:
    """291 tensors, 1 003 782 656 elements: Llama-3-8B on one of 8 GPUs, as FSDP shards it.

    Every tensor is cut along its first dimension. Matrices decay, norms do not.
    """
    shapes: list[Shape] = [(128256, 4096)]
    for _ in range(32):
        shapes += _llama_8b_layer()
    shapes += [(4096,), (128256, 4096)]
    shards = [(shape[0] // 8, *shape[1:]) for shape in shapes]
    matrices = tuple(shape for shape in shards if len(shape) > 1)
    norms = tuple(shape for shape in shards if len(shape) == 1)
    decay = ({"weight_decay": 0.1}, {"weight_decay": 0.0})
    return Workload("llama-8b-eighth", (matrices, norms), decay, large=True)


def _one_group(
    name: str, shapes: Iterator[Shape] | list[Shape], *, large: bool = False
) -> Workload:
    return Workload(name, (tuple(shapes),), large=large)


WORKLOADS = {
    workload.name: workload
    for workload in (
        _one_group("resnet50", _resnet50()),
        _one_group("gpt2-124m", _gpt2()),
        _one_group("llama-8b-layer", _llama_8b_layer()),
        _one_group("many-1000x1000", [(1000,)] * 1000),
        _one_group("many-1000x64", [(64,)] * 1000),
        _one_group("many-10000x64", [(64,)] * 10000),
        Workload("groups-400x5000", (((5000,),),) * 400),
        _one_group("one-4Mi", [(4 * 2**20,)]),
        _one_group("one-64Mi", [(64 * 2**20,)]),
        # One element each: next to no memory, so the time is what a tensor costs on the host.
        _one_group("host-1000x1", [(1,)] * 1000),
        _one_group("one-256Mi", [(256 * 2**20,)], large=True),
        _llama_8b_eighth(),
    )
}


def all_workloads(device_type: str) -> list[str]:
    """Names of what a run measures unless told otherwise."""
    return [name for name, work in WORKLOADS.items() if device_type == "cuda" or not work.large]
