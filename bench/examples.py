"""The textbook examples, run with fusedopt's optimizers and compared with their known answers.

Everything here is float64 and takes milliseconds; figures.py draws what these functions return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Path2D = list[list[float]]
OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


class WrongAnswerError(Exception):
    """A computed number is not the known one: no picture is worth drawing then."""


def expect(what: str, found: Sequence[float], known: Sequence[float], tolerance: float) -> None:
    """Compare with numbers known to so many digits; the tolerance is absolute for small ones."""
    for index, (a, b) in enumerate(zip(found, known, strict=True)):
        if not abs(a - b) <= tolerance * max(1.0, abs(b)):
            raise WrongAnswerError(f"{what}, value {index}: {a!r} is not {b!r}")


def descend(
    make: OptimizerFactory,
    gradient: Callable[[Tensor], Tensor],
    start: Sequence[float],
    steps: int,
) -> Path2D:
    """The positions an optimizer visits, the start included."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = make([x])
    path = [x.tolist()]
    for _ in range(steps):
        x.grad = gradient(x.detach())
        optimizer.step()
        path.append(x.tolist())
    return path


def momentum_by_hand(sgd: Any) -> tuple[list[float], list[float]]:
    """Velocity and position: three equal grads, then a saddle point where the grad is 0."""
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = sgd([x], lr=0.1, momentum=0.9)
    velocity, position = [0.0], [1.0]
    for grad in (2.0, 2.0, 2.0, 0.0):
        x.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        velocity.append(optimizer.state[x]["momentum_buffer"].item())
        position.append(x.item())
    expect("velocity", velocity, [0, 2, 3.8, 5.42, 4.878], 1e-12)
    expect("position", position, [1, 0.8, 0.42, -0.122, -0.6098], 1e-12)
    return velocity, position


def grad_weights(sgd: Any, beta: float, steps: int) -> list[float]:
    """What is left in the momentum buffer of one unit grad, tau steps later: beta^tau."""
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = sgd([x], lr=0.1, momentum=beta)
    weights = []
    for step in range(steps):
        x.grad = torch.tensor(1.0 if step == 0 else 0.0, dtype=torch.float64)
        optimizer.step()
        weights.append(optimizer.state[x]["momentum_buffer"].item())
    expect(f"weights for beta {beta}", weights, [beta**tau for tau in range(steps)], 1e-12)
    total = (1 - beta**steps) / (1 - beta)
    expect(f"sum of weights for beta {beta}", [sum(weights)], [total], 1e-12)
    return weights


PARABOLA_X = {1.0: (-14, 98, -686), 0.5: (-6, 18, -54), 0.2: (-1.2, 0.72, -0.432),
              0.125: (0, 0, 0), 0.1: (0.4, 0.08, 0.016)}  # fmt: skip
PARABOLA_Y = {(0.01, 0.0): (16, 6.950215, 3.019093, 0.569683, 0.023965),
              (0.03, 0.0): (16, 1.028622, 0.066129, 0.000273, 0),
              (0.01, 0.63): (16, 2.338153, 0.002510, 0.002030, 0)}  # fmt: skip


def parabola(sgd: Any, lr: float, momentum: float, steps: int) -> list[float]:
    """x on y = 4 x^2 from x = 2."""
    path = descend(lambda p: sgd(p, lr=lr, momentum=momentum), lambda x: 8 * x, [2.0], steps)
    x = [point[0] for point in path]
    if momentum == 0 and lr in PARABOLA_X:
        expect(f"x for lr {lr}", x[1:4], PARABOLA_X[lr], 1e-12)
    if (lr, momentum) in PARABOLA_Y:
        y = [4 * x[step] ** 2 for step in (0, 5, 10, 20, 39)]
        expect(f"y for lr {lr}, momentum {momentum}", y, PARABOLA_Y[lr, momentum], 1e-6)
    return x


VALLEY_START = (-5.0, -2.0)
VALLEY_END = {
    (0.4, 0.0): (-0.943467, -0.000073),
    (0.6, 0.0): (-0.387814, -1673.365109),
    (0.6, 0.5): (0.007188, 0.002553),
    (0.6, 0.25): (-0.126340, -0.186632),
}


def in_valley(make: OptimizerFactory, steps: int) -> Path2D:
    """Positions on f(x) = 0.1 x1^2 + 2 x2^2."""
    slopes = torch.tensor([0.2, 4.0], dtype=torch.float64)
    return descend(make, lambda x: slopes * x, VALLEY_START, steps)


def rmsprop_in_valley(adam: Any, lr: float, beta: float, steps: int) -> Path2D:
    """Adam without its first moment is RMSprop with an unbiased second moment."""
    path = in_valley(lambda p: adam(p, lr=lr, betas=(0.0, beta)), steps)
    for axis, slope in enumerate((0.2, 4.0)):
        x, v = VALLEY_START[axis], 0.0
        for step in range(1, steps + 1):
            grad = slope * x
            v = beta * v + (1 - beta) * grad**2
            x -= lr * grad / (math.sqrt(v / (1 - beta**step)) + 1e-8)
            expect(f"RMSprop, step {step}", [path[step][axis]], [x], 1e-9)
    return path


def valley(sgd: Any, lr: float, momentum: float) -> Path2D:
    path = in_valley(lambda p: sgd(p, lr=lr, momentum=momentum), 20)
    expect(f"end for lr {lr}, momentum {momentum}", path[-1], VALLEY_END[lr, momentum], 1e-6)
    return path


def contraction(sgd: Any, betas: Tensor, curvatures: Tensor) -> Tensor:
    """Factor by which |x| changes a step on f = lambda x^2 / 2, for every beta (row) and lambda.

    Momentum SGD with lr 1 converges exactly for 0 < lambda < 2 + 2 beta, so the factor has to be
    below 1 there and above 1 beyond. x swings and at first grows even where it converges: the
    factor compares the largest |x| of two windows late in the run.
    """
    rows = [torch.ones_like(curvatures).requires_grad_() for _ in betas]
    groups = [{"params": [x], "momentum": beta.item()} for x, beta in zip(rows, betas, strict=True)]
    optimizer = sgd(groups, lr=1.0)
    window, gap = 50, 250
    largest = torch.zeros(2, len(rows), len(curvatures), dtype=curvatures.dtype)
    for step in range(2 * window + gap):
        for x in rows:
            x.grad = curvatures * x.detach()
        optimizer.step()
        seen = 0 if step < window else 1 if step >= window + gap else None
        if seen is not None:
            now = torch.stack([x.detach().abs() for x in rows])
            largest[seen] = torch.maximum(largest[seen], now)
    ratio = torch.where(largest[0] == 0, 0.0, largest[1] / largest[0])  # 0: it got there exactly
    factor = ratio ** (1 / (window + gap))
    border = 2 + 2 * betas[:, None]
    sure = (curvatures - border).abs() > 0.02 * border
    wrong = ((factor < 1) != (curvatures < border)) & sure
    if wrong.any():
        raise WrongAnswerError(f"momentum border: {int(wrong.sum())} cells on the wrong side")
    return factor


TEMPERATURES = (100.0, 114.0, 118.0, 117.0, 120.0, 122.0)


def weighted_average(adam: Any, values: Sequence[float], beta: float) -> list[float]:
    """V <- beta V + (1 - beta) theta from 0, which is Adam's exp_avg over the grads theta."""
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = adam([x], betas=(beta, 0.999))
    averages = []
    for value in values:
        x.grad = torch.tensor(value, dtype=torch.float64)
        optimizer.step()
        averages.append(optimizer.state[x]["exp_avg"].item())
    if (tuple(values), beta) == (TEMPERATURES, 0.7):
        known = (30, 55.2, 74.04, 86.928, 96.8496, 104.39472)
        expect("weighted average", averages, known, 1e-12)
    return averages


def bias_corrected(averages: Sequence[float], beta: float) -> list[float]:
    return [v / (1 - beta**step) for step, v in enumerate(averages, start=1)]


def first_steps(adam: Any, scale: float, lr: float, steps: int) -> list[float]:
    """Distance after each step with a constant grad: lr a step, whatever the grad's scale."""
    path = descend(
        lambda p: adam(p, lr=lr, eps=1e-12), lambda x: torch.full_like(x, scale), [0.0], steps
    )
    distance = [-point[0] for point in path]
    expect(f"Adam with grad {scale}", distance, [lr * step for step in range(steps + 1)], 1e-6)
    return distance


def decay(optimizer: Any, weight_decay: float, lr: float, steps: int) -> Path2D:
    """Two weights from 1, one with small grads that average to 0, one with large ones."""
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = iter(noise[:, None] * torch.tensor([0.1, 10.0], dtype=torch.float64))
    return descend(
        lambda p: optimizer(p, lr=lr, weight_decay=weight_decay),
        lambda _: next(grads),
        [1.0, 1.0],
        steps,
    )


def check_decay(adam: Any, adamw: Any) -> None:
    """Without decay Adam and AdamW are one, bit for bit; AdamW's decay ignores the grad's scale."""
    if decay(adam, 0.0, 1e-2, 50) != decay(adamw, 0.0, 1e-2, 50):
        raise WrongAnswerError("Adam and AdamW differ although weight_decay is 0")
    lr, weight_decay, steps = 1e-2, 0.1, 50
    path = descend(
        lambda p: adamw(p, lr=lr, weight_decay=weight_decay), torch.zeros_like, [1.0], steps
    )
    expect("AdamW's decay alone", path[-1], [math.pow(1 - lr * weight_decay, steps)], 1e-12)
