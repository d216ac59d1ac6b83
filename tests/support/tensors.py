"""Tensors of random numbers, params and their grads, and how tensors are told apart."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from support.device import DEVICE

FLOAT32, FLOAT64 = torch.float32, torch.float64
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
DTYPES = [FLOAT32, FLOAT64, BFLOAT16, FLOAT16, torch.complex64, torch.complex128]
# Numbers of every kind: zeros, subnormal ones, the largest, what is no number.
EDGES = (0.0, -0.0, 1e-45, -3e-39, 6e-8, 6.1e-5, 1e-20, 65504.0, 3e38, -torch.inf, torch.nan)
SHAPES = [(3,), (4, 5), (), (0,), (2, 3, 4), (17,), (3, 3)]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def some_dtypes(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", dtypes, ids=dtype_id)


each_dtype = some_dtypes(*DTYPES)


def by_id(rows: dict[str, Any]) -> dict[str, Any]:
    """Arguments of pytest.mark.parametrize for a table whose keys are the ids."""
    return {"argvalues": list(rows.values()), "ids": list(rows)}


def values(*shape: int, dtype: torch.dtype = FLOAT32, seed: int = 0) -> Tensor:
    """Normally distributed numbers, the same on every device and, but for rounding, dtype."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else FLOAT64
    numbers = torch.randn(shape, generator=generator, dtype=wide, device="cpu")
    return numbers.to(dtype).to(DEVICE)


def draw(
    shapes: Iterable[int | Sequence[int]],
    device: torch.device | str = DEVICE,
    dtype: torch.dtype = FLOAT32,
    seed: int = 0,
) -> list[Tensor]:
    """Such a tensor of each shape or size, in memory of its own."""
    sizes = [torch.Size([shape] if isinstance(shape, int) else shape) for shape in shapes]
    numbers = values(sum(size.numel() for size in sizes), dtype=dtype, seed=seed)
    parts = numbers.split([size.numel() for size in sizes])
    return [part.view(size).to(device, copy=True) for part, size in zip(parts, sizes, strict=True)]


def make_params(dtype: torch.dtype = FLOAT64, seed: int = 0) -> list[Parameter]:
    return [Parameter(tensor) for tensor in draw(SHAPES, dtype=dtype, seed=seed)]


def params_of(optimizer: Any) -> list[Any]:
    """Of all groups; a list of params is taken for what it is."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return list(optimizer)
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_grads(optimizer: Any, seed: int, in_place: bool = False) -> None:
    """Grads that follow from the params' places and shapes and the seed alone.

    In new memory, or in that of the grads that are there, as a captured backward pass does it.
    """
    params = params_of(optimizer)
    dtype = torch.complex128 if any(p.is_complex() for p in params) else FLOAT64
    numbers = draw([param.shape for param in params], dtype=dtype, seed=1000 + seed)
    for param, number in zip(params, numbers, strict=True):
        grad = number.real if number.is_complex() and not param.is_complex() else number
        if in_place:
            param.grad.copy_(grad)
        else:
            param.grad = None  # the old one may be of another dtype or shape
            param.grad = grad.to(param.dtype).to(param.device, copy=True)


def misaligned(tensor: Tensor, offset: int = 1) -> Tensor:
    """A copy that starts `offset` elements behind an aligned address, with numbers around it."""
    storage = torch.full((tensor.numel() + offset + 9,), 7, dtype=tensor.dtype).to(tensor.device)
    view = storage[offset : offset + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor.detach())


def around(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """All of the memory that misaligned tensors are views of."""
    return {f"around {i}": t._base.cpu().clone() for i, t in enumerate(tensors)}


class Wrapper(torch.Tensor):
    """A tensor subclass without memory of its own, as quantized and lazy tensors are."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        like = {"dtype": inner.dtype, "device": inner.device}
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **like)
        wrapper.wrapped = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [arg.wrapped if isinstance(arg, Wrapper) else arg for arg in args]
        out = func(*unwrapped, **(kwargs or {}))
        return Wrapper(out) if isinstance(out, Tensor) else out


def params_with_grads(count: int = 2, dtype: torch.dtype = BFLOAT16) -> list[Parameter]:
    """Of four elements each."""
    params = [Parameter(torch.full((4,), float(index), dtype=dtype)) for index in range(count)]
    set_grads(params, 0)
    return params
