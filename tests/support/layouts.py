"""How tensors can lie in memory: one row for each way, as torch.as_strided takes it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from support.tensors import values


@dataclass(frozen=True)
class Layout:
    id: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def storage(self, dtype: torch.dtype, seed: int = 0) -> Tensor:
        """Memory for one such tensor, with random numbers around it too."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True) if n)
        return values(self.offset + last + 20, dtype=dtype, seed=seed)

    def view(self, storage: Tensor) -> Tensor:
        return storage.as_strided(self.shape, self.strides, self.offset)


LAYOUTS = [
    Layout("0-dim", (), ()),
    Layout("0-dim-inside", (), (), 5),
    Layout("empty", (3, 0, 2), (2, 2, 1)),
    Layout("contiguous", (6, 10), (10, 1)),
    Layout("offset-by-one", (6, 10), (10, 1), 1),
    Layout("transposed", (6, 10), (1, 6)),
    Layout("permuted", (4, 5, 6), (5, 1, 20)),
    Layout("channels-last", (2, 3, 4, 5), (60, 1, 15, 3)),
    Layout("channels-last-3d", (2, 3, 2, 4, 5), (120, 1, 60, 15, 3)),
    Layout("column-slice", (6, 10), (25, 1), 3),
    Layout("one-column", (50,), (7,), 2),
    Layout("every-second", (6, 10), (20, 2), 1),
    Layout("slice-of-transposed", (6, 10), (1, 13), 4),
    Layout("slice-of-three-dims", (3, 4, 5), (100, 11, 2), 9),
    Layout("odd-strides-of-size-one", (1, 12, 1, 5), (999, 5, 777, 1)),
    Layout("column-slice-of-many-chunks", (300, 130), (170, 1), 7),
    Layout("transposed-of-many-tiles", (33, 45), (1, 33)),
]


def expanded(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """One row for all: stride 0, as the grad of a sum has it."""
    row = (min(shape[0], 1), *shape[1:]) if shape else ()
    return values(*row, dtype=dtype, seed=seed).expand(shape)


GRADS: dict[str, Callable[[tuple[int, ...], torch.dtype, int], Tensor]] = {
    "contiguous": lambda shape, dtype, seed: values(*shape, dtype=dtype, seed=seed),
    "reversed": lambda shape, dtype, seed: values(*shape[::-1], dtype=dtype, seed=seed).permute(
        tuple(range(len(shape))[::-1])
    ),
    "sliced": lambda shape, dtype, seed: values(*shape, 3, dtype=dtype, seed=seed)[..., 1],
    "expanded": expanded,
}

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.id)
each_grad = pytest.mark.parametrize("grad_layout", GRADS)
