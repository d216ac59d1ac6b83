"""What is measured: shapes, computed from the architectures, and the params that have them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.timing import probe_size

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
import gpt as gpt  # for others, too

# Those of examples/, where they are trained; of others torch's own, with the usual states.
HYPER: dict[str, dict[str, Any]] = {
    **gpt.HYPER,
    "RMSprop": {"momentum": 0.9}, "Adagrad": {}, "Adadelta": {}, "Adamax": {}, "NAdam": {},
    "RAdam": {}, "ASGD": {}, "Rprop": {}, "SparseAdam": {},
}  # fmt: skip
STATES = dict.fromkeys(HYPER, 2) | dict.fromkeys(("SGD", "Adagrad", "ASGD"), 1)
# Memory streams of a one-pass step: param, grad and every state are read, all but grad are written.
STREAMS = {name: 3 + 2 * states for name, states in STATES.items()}

Shape = tuple[int, ...]
Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Workload:
    """Shapes of the parameters, one tuple for each parameter group."""

    name: str
    groups: tuple[tuple[Shape, ...], ...]
    options: tuple[Mapping[str, Any], ...] = ()  # for each group, what differs from the defaults
    large: bool = False  # left out of "all" on a CPU, where it takes too much memory and time
    hits: int = 0  # rows that a sparse grad is of, some twice; 0: grads are dense

    @property
    def tensors(self) -> int:
        return sum(len(group) for group in self.groups)

    @property
    def elements(self) -> int:
        """That a step updates."""
        sizes = [math.prod(shape) for group in self.groups for shape in group]
        return sum(sizes) if not self.hits else self.hits * self.groups[0][0][1]


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


def _one_group(name: str, shapes: Iterable[Shape], *, large: bool = False) -> Workload:
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
        _one_group("matrix-256Mi", [(65536, 4096)], large=True),  # has states in 8 bits
        _llama_8b_eighth(),
        # An embedding of which a batch hits a hundredth.
        Workload("embedding-1Mx64", (((1_000_000, 64),),), hits=10_000),
    )
}


@dataclass(frozen=True)
class Case:
    optimizer: str
    dtype: torch.dtype
    workload: Workload
    device: torch.device

    @property
    def makes_sense(self) -> bool:
        """Sparse grads are for SparseAdam alone."""
        return (self.optimizer == "SparseAdam") == (self.workload.hits > 0)

    @property
    def key(self) -> dict[str, str]:
        """As the JSON files name it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"optimizer": self.optimizer, "dtype": dtype, "workload": self.workload.name}

    @property
    def bytes_per_element(self) -> int:
        return STREAMS[self.optimizer] * self.dtype.itemsize

    @property
    def footprint(self) -> int:
        """Bytes of params, grads and states."""
        streams = 2 + STATES[self.optimizer]
        return streams * self.workload.elements * self.dtype.itemsize

    def memory(self, candidates: int, shared: bool) -> int:
        """Bytes allocated: params and grads (and the template they are cloned from), states."""
        copies = 1 if shared else candidates + 1
        tensors = 2 * copies + STATES[self.optimizer] * candidates
        return tensors * self.workload.elements * self.dtype.itemsize + 2 * probe_size(
            self.device, self.footprint
        )

    def template(self) -> Groups:
        """Params with grads, of a size that float16 can square."""
        generator = torch.Generator(self.device).manual_seed(0)

        def values(shape: Shape) -> torch.Tensor:
            empty = torch.empty(shape, dtype=torch.float32, device=self.device)
            return empty.uniform_(0.05, 0.1, generator=generator).to(self.dtype)

        def sparse(shape: Shape) -> torch.Tensor:
            hits = self.workload.hits
            rows = torch.randint(shape[0], (1, hits), device=self.device, generator=generator)
            numbers = values((hits, *shape[1:]))
            return torch.sparse_coo_tensor(rows, numbers, shape, check_invariants=True)

        def param(shape: Shape) -> torch.Tensor:
            value = values(shape)
            grad = sparse(shape) if self.workload.hits else values(shape)
            value.requires_grad_().grad = grad
            return value

        groups = self.workload.groups
        options = self.workload.options or ({},) * len(groups)
        return [
            {"params": [param(shape) for shape in shapes], **more}
            for shapes, more in zip(groups, options, strict=True)
        ]


def param_groups(template: Groups, share: bool) -> Groups:
    """For one candidate: tensors of its own, or, to save memory, those that all share."""

    def own(param: torch.Tensor) -> torch.Tensor:
        copied = param.detach() if share else param.detach().clone()
        copied.requires_grad_().grad = param.grad if share else param.grad.clone()
        return copied

    return [group | {"params": [own(param) for param in group["params"]]} for group in template]
