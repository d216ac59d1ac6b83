"""How the CPU driver divides and computes a step, which tests may prescribe."""

import pytest
import torch

import fusedopt

MANY = 1 << 40
each_isa = pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])


def use_plan(optimizer: torch.optim.Optimizer, isa: str, chunk_elements: int) -> None:
    optimizer._plan_ = fusedopt._C.Plan(optimizer._row, isa, chunk_elements)


def best_isa() -> str:
    return fusedopt._C.build_info()["isas"][-1]


def require(isa: str) -> None:
    if isa not in fusedopt._C.build_info()["isas"]:
        pytest.skip(f"{isa} is not available on this machine")
