"""When tensors are equal: bit for bit, in all of their memory, or but for roundings."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def bits(tensor: Tensor) -> Tensor:
    """The memory of the elements in order, every NaN as the same NaN."""
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if plain.is_floating_point():
        plain = torch.where(plain.isnan(), torch.full_like(plain, torch.nan), plain)
    else:
        plain = plain.clone(memory_format=torch.contiguous_format)  # one element counts as dense
    return plain.contiguous().reshape(-1).view(torch.uint8)


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(bits(first[name]), bits(second[name])) for name in first)


def tensor_bytes(tensor: Tensor) -> bytes:
    """All of the storage: what lies around a slice counts too."""
    storage = tensor.detach().untyped_storage().cpu()
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy().tobytes()


def assert_close(ours: Any, theirs: Any, **tolerances: Any) -> None:
    """Tensors, or lists and dicts of them. Dtypes and shapes count; what is no tensor is equal."""
    if isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, **tolerances)
    elif isinstance(ours, dict | list | tuple):
        assert len(ours) == len(theirs)
        for key in ours if isinstance(ours, dict) else range(len(ours)):
            assert_close(ours[key], theirs[key], **tolerances)
    else:
        assert ours == theirs


def assert_equal(ours: Any, theirs: Any) -> None:
    """Bit for bit, but that every NaN is like any other."""
    assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def assert_same_math(ours: Any, theirs: Any) -> None:
    """Float64 results of the same formula: a few roundings apart."""
    assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


def without_parameter(run: Callable[..., Any], name: str, *others: str) -> inspect.Signature:
    """What a test shall ask pytest for, if something else gives it the parameter of that name."""
    signature = inspect.signature(run)
    asked = {key: p for key, p in signature.parameters.items() if key != name}
    for other in others:
        asked.setdefault(other, inspect.Parameter(other, inspect.Parameter.POSITIONAL_OR_KEYWORD))
    return signature.replace(parameters=list(asked.values()))


def both_ways(run: Callable[..., Any]) -> Callable[..., None]:
    """Makes a test of a function whose first parameter is a bool: either way it gives the same."""
    name = next(iter(inspect.signature(run).parameters))

    @functools.wraps(run)
    def test(**given: Any) -> None:
        assert_equal(*(run(way, **given) for way in (True, False)))

    test.__signature__ = without_parameter(run, name)  # which pytest reads
    return test
