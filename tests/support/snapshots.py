"""What an optimizer holds: results to be compared, and photographs to tell that nothing changed."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from support.equality import tensor_bytes
from support.tensors import params_of

# What torch keeps beside its counts, and ours finds from "step": torch's NAdam, and its ASGD.
DERIVED = ("mu_product", "eta", "mu")
FROM_STEP = ("step", *DERIVED)


def results(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    """The param and its states (without what counts steps) under torch's names."""
    state = {k: v for k, v in optimizer.state.get(param, {}).items() if k not in FROM_STEP}
    return {"param": param.detach(), **state}


def record(optimizer: Any) -> dict[str, Tensor]:
    """Copies of all params and of all of their state, step counts included."""
    found = {}
    for index, param in enumerate(params_of(optimizer)):
        entries = optimizer.state.get(param, {})
        for name, entry in {"param": param, **entries}.items():
            if name not in DERIVED:
                found[f"{name} {index}"] = entry.detach().cpu().clone()
    return found


def photograph(value: Any, values_only: bool = False) -> Any:
    """Something that is equal later if and only if nothing was written to.

    With `values_only`, a tensor may have been moved, copied or written to with what it held.
    """
    if not isinstance(value, Tensor):
        return repr(value)
    if values_only:
        return f"{value.dtype}: {value.tolist()}"
    value = getattr(value, "wrapped", value)  # a Wrapper of these tests
    what = (id(value), value._version, value.dtype, tuple(value.shape), value.device.type)
    if value.layout != torch.strided:
        return (*what, tensor_bytes(value._values()))
    return what if value.is_meta else (*what, tensor_bytes(value))


def snapshot(optimizer: Any, values_only: bool = False) -> dict[str, Any]:
    """Params, grads, state and groups of an optimizer, versions of its tensors included."""

    def look(value: Any) -> Any:
        return photograph(value, values_only)

    photo: dict[str, Any] = {"number of states": len(optimizer.state)}
    for g, group in enumerate(optimizer.param_groups):
        photo[f"group {g}"] = {k: look(v) for k, v in group.items() if k != "params"}
        for i, param in enumerate(group["params"]):
            photo[f"param {g}.{i}"] = look(param)
            photo[f"grad {g}.{i}"] = look(param.grad)
            if param in optimizer.state:
                entries = optimizer.state[param]
                photo[f"state {g}.{i}"] = {k: look(v) for k, v in entries.items()}
    return photo


@contextmanager
def refused(optimizer: Any, exception: Any, match: str) -> Iterator[Any]:
    """What is done inside raises, and changes nothing of the optimizer."""
    before = snapshot(optimizer)
    with pytest.raises(exception, match=match) as raised:
        yield raised
    assert snapshot(optimizer) == before


def copy_params(optimizer: Any) -> list[Parameter]:
    return [Parameter(param.detach().clone()) for param in params_of(optimizer)]


def through_a_file(saved: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


# Ways to copy a whole optimizer.
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": lambda optimizer: through_a_file(optimizer, weights_only=False),
}


def resumed(build: Callable[..., Any], saved: Any) -> Any:
    """A new optimizer over copies of the parameters, with the other's state loaded from a file."""
    optimizer = build(copy_params(saved))
    optimizer.load_state_dict(through_a_file(saved.state_dict()))
    return optimizer
