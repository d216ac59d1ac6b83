"""Weights in torchao's wrappers, which multiply in fewer bits: what they wrap is stepped.

Stand-ins under torchao's names; tests/stacks/test_torchao.py has the real ones.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.equality import assert_equal
from support.tensors import BFLOAT16, FLOAT32, by_id, values

pytestmark = pytest.mark.unemulated

aten = torch.ops.aten
KEEP_THE_WRAPPER = {
    *(aten.detach.default, aten.empty_like.default, aten.new_zeros.default, aten.slice.Tensor),
    *(aten.copy_.default, aten.view.default, aten._to_copy.default, aten.clone.default),
}


class Weight(Tensor):
    """As torchao's: some operations on it give another of its kind, all others a plain tensor."""

    attribute: str

    @staticmethod
    def __new__(cls, tensor: Tensor) -> "Weight":
        like = {"strides": tensor.stride(), "dtype": tensor.dtype, "device": tensor.device}
        return torch.Tensor._make_wrapper_subclass(cls, tensor.size(), **like)

    def __init__(self, tensor: Tensor) -> None:
        setattr(self, self.attribute, tensor)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(arg: Any) -> Any:
            return getattr(arg, cls.attribute) if isinstance(arg, Weight) else arg

        if func is aten.detach.default:
            return cls(unwrap(args[0]))
        out = func(*map(unwrap, args), **{k: unwrap(v) for k, v in (kwargs or {}).items()})
        return cls(out) if func in KEEP_THE_WRAPPER else out


class Float8(Weight):
    __module__ = "torchao.float8.fsdp_utils"
    __qualname__ = "WeightWithDynamicFloat8CastTensor"
    attribute = "_tensor"


class Base(Weight):
    __module__ = "torchao.prototype.moe_training.tensor"
    __qualname__ = "TrainingWeightWrapperBaseTensor"
    attribute = "_data"


class OfBase(Base):
    """Subclasses are known by their base."""


class Unknown(Weight):
    attribute = "_tensor"


SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (FLOAT32, {"max_grad_norm": 0.5}),
    "averages": (FLOAT32, {"ema_decay": 0.9}),
    "masters": (BFLOAT16, {"master_weights": "float32", "ema_decay": 0.9}),
    "split": (BFLOAT16, {"master_weights": "split", "state_dtype": "bfloat16"}),
    "codes": (BFLOAT16, {"master_weights": "split8", "state_dtype": "q8", "ema_decay": 0.9}),
}
SHAPE = (64, 64)


def make(kind: Any, mesh: Any, dtype: torch.dtype, **options: Any) -> Any:
    """A param of this kind, inside a DTensor if there is a mesh, and its optimizer."""
    weight = values(*SHAPE, dtype=dtype, seed=0)
    wrapped = weight if kind is None else kind(weight)
    param = Parameter(wrapped if mesh is None else sharded(mesh, wrapped))
    return param, fusedopt.AdamW([param], lr=0.01, **options)


def sharded(mesh: Any, tensor: Tensor) -> Any:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)


def steps(param: Any, optimizer: Any, *seeds: int) -> None:
    for seed in seeds:
        grad = values(*SHAPE, dtype=param.dtype, seed=seed)
        param.grad = sharded(param.device_mesh, grad) if hasattr(param, "device_mesh") else grad
        optimizer.step()


def plain(tensor: Any) -> Any:
    tensor = getattr(tensor.detach(), "_local_tensor", tensor.detach())
    return getattr(tensor, tensor.attribute) if isinstance(tensor, Weight) else tensor


def contents(param: Any, optimizer: Any) -> list[Any]:
    entries = optimizer.state[param]
    for entry in entries.values():
        assert not isinstance(getattr(entry, "_local_tensor", entry), Weight)
    return [plain(param), {name: plain(entry) for name, entry in entries.items()}]


@pytest.mark.parametrize("in_dtensor", [False, True], ids=["alone", "in a DTensor"])
@pytest.mark.parametrize("kind", [Float8, OfBase])
@pytest.mark.parametrize(("dtype", "options"), **by_id(SETTINGS))
def test_as_plain_weights(
    dtype: torch.dtype, options: Any, kind: Any, in_dtensor: bool, mesh: Any
) -> None:
    results: list[Any] = []
    for each in (kind, None):
        param, optimizer = make(each, mesh if in_dtensor else None, dtype, **options)
        steps(param, optimizer, 1, 2)
        found = [contents(param, optimizer), optimizer.memory()]
        weights = optimizer.fp32_params()
        assert not isinstance(getattr(weights[0], "_local_tensor", weights[0]), Weight)
        assert not weights[0].requires_grad
        found.append(plain(weights[0]))
        with torch.no_grad():
            param.copy_(param * 1.25)  # a write, which masters follow
        steps(param, optimizer, 3)
        optimizer.load_fp32_params(weights)
        found.append(plain(optimizer.fp32_params()[0]))
        if "ema_decay" in options:
            with optimizer.swap_ema():
                found.append(plain(param).clone())
        saved = copy.deepcopy(optimizer.state_dict())
        others = {**options, "state_dtype": "float32"}
        if "master_weights" in options:  # converted together with the param
            others["master_weights"] = "split"
        optimizer = fusedopt.AdamW([param], lr=0.01, **others)
        optimizer.load_state_dict(saved)
        steps(param, optimizer, 4)
        results.append([*found, contents(param, optimizer)])
    assert_equal(*results)


def test_other_wrappers_are_refused() -> None:
    param, optimizer = make(Unknown, None, FLOAT32)
    with pytest.raises(TypeError, match=r"Unknown, a tensor subclass.*torchao's wrappers"):
        steps(param, optimizer, 1)
