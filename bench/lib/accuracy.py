"""How far the updates of an AdamW are off, whose states have few bits: a simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
STEPS, LAST = 1000, 100
SHAPE = (64, 128)
FALLS = ("none", "all", "half")


@dataclass
class Found:
    error: float  # RMS of the error of the updates against float64, over the RMS of the updates
    largest: float  # the largest update over the true largest
    optimizer: Any
    param: Parameter
    exp_avg_sq: Tensor  # the true one, after the last step, in float64


def simulate(
    make: Callable[[list[Parameter]], Any],
    spread: float,
    fall: str,
    seed: int = 3,
    device: torch.device | str = "cpu",
) -> Found:
    """``make`` gives an AdamW with lr 1, no weight decay, and the betas and eps above, which are
    everyone's defaults.

    Grads have standard deviations that are log-normal with this spread (of their logarithms), and a
    mean of about a tenth of that. The figures are of the last 100 steps of 1000; or of 1000 more,
    in which all grads, or every second one, have fallen to a tenth.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(SHAPE, generator=generator, dtype=torch.float64, device="cpu")

    sizes = torch.exp(spread * normal())
    means = 0.1 * sizes * normal()
    param = Parameter(torch.zeros(SHAPE, device=device))
    optimizer = make([param])
    m, v = (torch.zeros(SHAPE, dtype=torch.float64, device="cpu") for _ in range(2))
    wrong = true = 0.0
    largest = [0.0, 0.0]
    steps = STEPS if fall == "none" else 2 * STEPS
    for step in range(1, steps + 1):
        grad = means + sizes * normal()
        if step > STEPS:
            columns = torch.arange(SHAPE[1], device="cpu")
            grad *= torch.where((columns % 2 == 0) | (fall == "all"), 0.1, 1.0)
        grad = grad.float()
        with torch.no_grad():
            param.zero_()
        param.grad = grad.to(device)
        optimizer.step()
        m = BETA1 * m + (1 - BETA1) * grad.double()
        v = BETA2 * v + (1 - BETA2) * grad.double() ** 2
        if step <= steps - LAST:
            continue
        expected = -(m / (1 - BETA1**step)) / ((v / (1 - BETA2**step)).sqrt() + EPS)
        found = param.detach().cpu().double()
        wrong += float(((found - expected) ** 2).sum())
        true += float((expected**2).sum())
        for at, updates in enumerate((found, expected)):
            largest[at] = max(largest[at], float(updates.abs().max()))
    return Found((wrong / true) ** 0.5, largest[0] / largest[1], optimizer, param, v)
