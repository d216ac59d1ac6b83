"""The accuracy of states in 8 bits: the simulation that chose their formats (csrc/core/codes.h),
with the real kernels."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import fusedopt
from support.codes import (
    decoded,
    numbers_of,
    one_step,
)
from support.device import DEVICE


def found_by_simulation(spread: float, fall: str, seed: int = 3, **options: Any) -> Any:
    from lib.accuracy import simulate

    def make(params: list[Parameter]) -> Any:
        return fusedopt.AdamW(params, lr=1.0, weight_decay=0, **options)

    return simulate(make, spread, fall, seed, DEVICE)


def root_over_true(found: Any) -> float:
    """Of those whose grads fall, if some do."""
    second = decoded(found.optimizer.state[found.param], "exp_avg_sq")
    return float(np.mean(np.sqrt(second / found.exp_avg_sq.numpy())[:, ::2]))


# Spread of grads in a group, what falls; the largest error and how far sqrt(v) may be off.
ACCURACY = [
    (0.5, "none", None, 0.06, 0.02),
    (0.5, "all", None, 0.06, 0.02),
    (0.5, "half", None, 0.07, 0.03),
    (1.0, "none", None, 0.12, 0.03),
    (0.5, "none", False, 0.06, 0.02),
    (0.5, "all", False, 0.06, 0.02),
    (1.0, "none", False, 0.12, 0.03),
]


@pytest.mark.unsanitized  # no other accesses than in fewer steps
@pytest.mark.unemulated  # it has the same bits
@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize(("spread", "fall", "rounding", "error", "drift"), ACCURACY)
def test_accuracy(
    spread: float, fall: str, rounding: bool | None, error: float, drift: float
) -> None:
    found = found_by_simulation(spread, fall, state_dtype="q8", stochastic_rounding=rounding)
    assert found.error <= error
    assert root_over_true(found) == pytest.approx(1, abs=drift)
    assert found.largest < 1.5


@pytest.mark.unsanitized
@pytest.mark.unemulated
@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize("seed", range(3, 8))
@pytest.mark.parametrize("rounding", [False, None])
def test_no_update_is_far_too_large(rounding: bool | None, seed: int) -> None:
    # Of other formats it is thousands of times the largest: where second moments become 0.
    found = found_by_simulation(1.5, "none", seed, state_dtype="q8", stochastic_rounding=rounding)
    assert found.error < 0.3
    assert found.largest < 3


@pytest.mark.unsanitized
@pytest.mark.unemulated
@pytest.mark.parametrize("beta", [0.9, 0.99])
@pytest.mark.parametrize(
    "pattern", [[1.0, -0.7], [1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]], ids=["back", "2nd", "5th"]
)
def test_patterns_of_grads_do_not_move_the_mean(pattern: list[float], beta: float) -> None:
    # They would if the draws of an element in successive steps depended on each other.
    means = {"q8": 0.0, "float32": 0.0}
    options = {"lr": 0.0, "momentum": beta, "dampening": beta}
    runs = {
        dtype: fusedopt.SGD([torch.zeros(64, 128, device=DEVICE)], **options, state_dtype=dtype)
        for dtype in means
    }
    for step in range(600):
        grad = torch.full((64, 128), 0.05 * pattern[step % len(pattern)], device=DEVICE)
        grad[:, ::64] = 1.0  # the scale
        for dtype, optimizer in runs.items():
            one_step(optimizer, [grad])
            (state,) = optimizer.state.values()
            entry = numbers_of(state)["momentum_buffer"]
            means[dtype] += float(entry.double()[:, 1:64].mean()) if step >= 300 else 0.0
    assert means["q8"] == pytest.approx(means["float32"], rel=0.02)


@pytest.mark.unsanitized
@pytest.mark.unemulated
@pytest.mark.usefixtures("bench")
def test_to_nearest_second_moments_stand_still_in_their_group() -> None:
    # Why they are drawn by default: half of the grads of each group fall.
    found = found_by_simulation(0.5, "half", state_dtype="q8", stochastic_rounding=False)
    assert root_over_true(found) > 1.2
    assert found.error > 0.15
