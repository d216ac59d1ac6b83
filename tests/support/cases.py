"""The optimizer cases, one row each, the tolerances, and what tests need to run a case."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedopt
from support import oracles
from support.device import DEVICE

CSRC = Path(__file__).parents[2] / "csrc"


@dataclass(frozen=True)
class Case:
    """An optimizer's name and options, and the three ways to run it."""

    id: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)

    def fused(self, params: Iterable[Any], **more: Any) -> torch.optim.Optimizer:
        return getattr(fusedopt, self.optimizer)(params, **self.options, **more)

    def unfused(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        """torch's plain loop. Its fused=True is no reference: it updates 16-bit params wrongly.

        Decay that torch lacks is what its AdamW has: a multiplication before the update.
        """
        options = dict(self.options)
        lr_independent = options.pop("lr_independent_weight_decay", False)
        sgdw = self.optimizer == "SGD" and options.pop("decoupled_weight_decay", False)
        kept = 1.0
        if lr_independent or sgdw:
            kept -= options.pop("weight_decay") * (1 if lr_independent else options["lr"])
            options["weight_decay"] = 0
        twin = getattr(torch.optim, self.optimizer)(params, **options, foreach=False, fused=False)

        def decay(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.detach().mul_(kept)

        if lr_independent or sgdw:
            twin.register_step_pre_hook(decay)
        return twin

    def suited_to(self, dtype: torch.dtype) -> "Case":
        """float16 has no number near Adam's usual eps: torch would divide by zero."""
        if self.optimizer == "SGD" or dtype != torch.float16:
            return self
        return replace(self, options={**self.options, "eps": 1e-3})

    def oracle(self, param: Tensor, **more: Any) -> oracles.Oracle:
        return oracles.BY_NAME[self.optimizer](param, **self.options, **more)


CASES = [
    Case("sgd", "SGD", {"lr": 0.05}),
    Case("sgd-l2", "SGD", {"lr": 0.05, "weight_decay": 0.1}),
    Case("sgd-maximize", "SGD", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    Case("momentum", "SGD", {"lr": 0.02, "momentum": 0.9}),
    Case("momentum-l2", "SGD", {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.05}),
    Case("momentum-damped", "SGD", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3}),
    Case("momentum-maximize", "SGD", {"lr": 0.02, "momentum": 0.5, "maximize": True}),
    Case("nesterov", "SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    Case(
        "nesterov-l2",
        "SGD",
        {"lr": 0.02, "momentum": 0.7, "nesterov": True, "weight_decay": 0.05},
    ),
    Case("sgdw", "SGD", {"lr": 0.05, "weight_decay": 0.5, "decoupled_weight_decay": True}),
    Case(
        "sgdw-momentum",
        "SGD",
        {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.5, "decoupled_weight_decay": True},
    ),
    Case(
        "sgdw-lr-independent",
        "SGD",
        {
            **{"lr": 0.02, "momentum": 0.7, "nesterov": True, "weight_decay": 0.02},
            **{"decoupled_weight_decay": True, "lr_independent_weight_decay": True},
        },
    ),
    Case("adam", "Adam", {"lr": 0.01}),
    Case("adam-l2", "Adam", {"lr": 0.01, "weight_decay": 0.1}),
    Case(
        "adam-decoupled", "Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}
    ),
    Case(
        "adam-lr-independent",
        "Adam",
        {
            **{"lr": 0.01, "weight_decay": 0.01},
            **{"decoupled_weight_decay": True, "lr_independent_weight_decay": True},
        },
    ),
    Case("adam-amsgrad", "Adam", {"lr": 0.01, "betas": (0.9, 0.9), "amsgrad": True}),
    Case("adam-amsgrad-l2", "Adam", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    Case("adam-maximize", "Adam", {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    Case("adam-low-betas", "Adam", {"lr": 0.01, "betas": (0.3, 0.7), "eps": 1e-3}),
    Case("adam-no-beta1", "Adam", {"lr": 0.01, "betas": (0.0, 0.99)}),
    Case("adam-no-beta1-amsgrad", "Adam", {"lr": 0.01, "betas": (0.0, 0.99), "amsgrad": True}),
    Case("adamw", "AdamW", {"lr": 0.01}),
    Case("adamw-strong-decay", "AdamW", {"lr": 0.01, "weight_decay": 0.5}),
    Case("adamw-amsgrad", "AdamW", {"lr": 0.01, "betas": (0.8, 0.9), "amsgrad": True}),
    Case("adamw-maximize", "AdamW", {"lr": 0.01, "maximize": True}),
    Case(
        "adamw-lr-independent",
        "AdamW",
        {"lr": 0.01, "weight_decay": 0.01, "lr_independent_weight_decay": True},
    ),
]
BY_ID = {case.id: case for case in CASES}


@dataclass(frozen=True)
class Tolerance:
    """Against float64 an error may be `factor` times unfused torch's, plus `floor`."""

    factor: float
    floor: float


TOLERANCES = {
    torch.float32: Tolerance(1.5, 2 * 2.0**-24),
    torch.float64: Tolerance(1.5, 8 * 2.0**-53),
    torch.bfloat16: Tolerance(2, 2.0**-9),
    torch.float16: Tolerance(2, 2.0**-12),
    torch.complex64: Tolerance(1.5, 2 * 2.0**-24),
    torch.complex128: Tolerance(1.5, 8 * 2.0**-53),
}
DTYPES = list(TOLERANCES)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def some_cases(*ids: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [BY_ID[case] for case in ids], ids=ids)


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normally distributed numbers, the same on every device and, but for rounding, dtype."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    numbers = torch.randn(shape, generator=generator, dtype=wide, device="cpu")
    return numbers.to(dtype).to(DEVICE)


def step_with(optimizer: torch.optim.Optimizer, grads: Iterable[Tensor]) -> None:
    """One step for each grad; all params of the optimizer get the same one."""
    for grad in grads:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = grad
        optimizer.step()


def results(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """The param and its states (without the step count) under torch's names."""
    state = {k: v for k, v in optimizer.state.get(param, {}).items() if k != "step"}
    return {"param": param.detach(), **state}


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


def assert_rounded_once(value: Tensor, expected: oracles.Array, units: float = 0.5) -> None:
    """Half a unit in the last place of the storage format, and what computing cost before that.

    Stochastic rounding may be off by one unit.
    """
    finfo = torch.finfo(value.dtype)
    compute = 2 * min(finfo.eps, torch.finfo(torch.float32).eps) * np.abs(expected).max(initial=0)
    rounding = units * finfo.eps * np.maximum(np.abs(expected), finfo.smallest_normal)
    assert (np.abs(oracles.exact(value) - expected) <= rounding + compute).all()


def constant(file: str, name: str) -> int:
    """A constant of the C++ code, so that the sizes below stay at its boundaries."""
    return int(re.search(rf"\b{name} = (\d+);", (CSRC / file).read_text())[1])
