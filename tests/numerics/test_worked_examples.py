"""Figures that textbooks print, reproduced in float32."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedopt
from support.optimizers import step_with
from support.tensors import by_id, values

Grad = Callable[[Tensor], Tensor]


def descend(start: list[float], grad: Grad, steps: int, **options: float) -> list[list[float]]:
    """The iterates of SGD, the start included."""
    param = torch.tensor(start)
    optimizer = fusedopt.SGD([param], **options)
    trace = [param.tolist()]
    for _ in range(steps):
        step_with(optimizer, [grad(param)])
        trace.append(param.tolist())
    return trace


def test_momentum_by_hand() -> None:
    param = torch.tensor([1.0])
    optimizer = fusedopt.SGD([param], lr=0.1, momentum=0.9)
    for grad, v, p in ((2, 2, 0.8), (2, 3.8, 0.42), (2, 5.42, -0.122), (0, 4.878, -0.6098)):
        step_with(optimizer, [torch.tensor([float(grad)])])
        assert optimizer.state[param]["momentum_buffer"].item() == pytest.approx(v, rel=1e-6)
        assert param.item() == pytest.approx(p, rel=1e-5)


def other_form(rates: list[float], momentum: float) -> float:
    """v <- momentum v + lr g; p <- p - v, with p = 1 and every g = 2."""
    p, v = 1.0, 0.0
    for lr in rates:
        v = momentum * v + lr * 2
        p -= v
    return p


@pytest.mark.parametrize(("second_lr", "same"), [(0.1, True), (0.01, False)])
def test_lr_scales_the_buffer_when_it_is_applied(second_lr: float, same: bool) -> None:
    param = torch.tensor([1.0])
    optimizer = fusedopt.SGD([param], lr=0.1, momentum=0.9)
    for lr in (0.1, second_lr):
        optimizer.param_groups[0]["lr"] = lr
        step_with(optimizer, [torch.tensor([2.0])])
    assert (param.item() == pytest.approx(other_form([0.1, second_lr], 0.9))) is same


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        (1.0, [-14, 98, -686]),
        (0.5, [-6, 18, -54]),
        (0.2, [-1.2, 0.72, -0.432]),
        (0.1, [0.4, 0.08, 0.016]),
        (0.125, [0, 0, 0]),
    ],
)
def test_learning_rates_on_a_parabola(lr: float, expected: list[float]) -> None:
    trace = descend([2.0], lambda x: 8 * x, 3, lr=lr)
    np.testing.assert_allclose(np.ravel(trace[1:]), expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("lr", "momentum", "expected"),
    [
        (0.01, 0, [16, 6.950215, 3.019093, 0.569683, 0.023965]),
        (0.03, 0, [16, 1.028622, 0.066129, 0.000273, 0]),
        (0.01, 0.63, [16, 2.338153, 0.002510, 0.002030, 0]),
    ],
)
def test_loss_curves_on_a_parabola(lr: float, momentum: float, expected: list[float]) -> None:
    trace = np.ravel(descend([2.0], lambda x: 8 * x, 39, lr=lr, momentum=momentum))
    losses = 4 * trace[[0, 5, 10, 20, 39]] ** 2
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=6e-7)  # printed to six places


@pytest.mark.parametrize(
    ("lr", "momentum", "x1", "x2"),
    [
        (0.4, 0, -0.943467, -0.000073),
        (0.6, 0, -0.387814, -1673.365109),
        (0.6, 0.5, 0.007188, 0.002553),
        (0.6, 0.25, -0.126340, -0.186632),
    ],
)
def test_narrow_valley(lr: float, momentum: float, x1: float, x2: float) -> None:
    slopes = torch.tensor([0.2, 4.0])  # of f = 0.1 x1^2 + 2 x2^2
    last = descend([-5.0, -2.0], lambda x: slopes * x, 20, lr=lr, momentum=momentum)[-1]
    np.testing.assert_allclose(last, [x1, x2], rtol=1e-5, atol=6e-7)


@pytest.mark.parametrize("momentum", [0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("at", "converges"), [(0.98, True), (1.02, False)], ids=["in", "out"])
def test_border_of_convergence(momentum: float, at: float, converges: bool) -> None:
    # On curvature * x^2 / 2: exactly for 0 < lr * curvature < 2 + 2 momentum.
    curvature = 4.0
    lr = at * (2 + 2 * momentum) / curvature
    last = descend([1.0], lambda x: curvature * x, 2000, lr=lr, momentum=momentum)[-1][0]
    assert (abs(last) < 1e-3) is converges  # NaN, after overflow, is not below either


@pytest.mark.parametrize("momentum", [0.25, 0.5, 0.9])
def test_weights_of_past_grads(momentum: float) -> None:
    param = torch.zeros(1)
    optimizer = fusedopt.SGD([param], lr=0.1, momentum=momentum)
    buffers = []
    for grad in (1.0, 0.0, 0.0, 0.0):
        step_with(optimizer, [torch.tensor([grad])])
        buffers.append(optimizer.state[param]["momentum_buffer"].item())
    np.testing.assert_allclose(buffers, momentum ** np.arange(4), rtol=1e-6)
    step_with(optimizer, [torch.ones(1)] * 300)
    assert optimizer.state[param]["momentum_buffer"].item() == pytest.approx(1 / (1 - momentum))


THETAS = [100.0, 114.0, 118.0, 117.0, 120.0, 122.0]
AVERAGES = [30, 55.2, 74.04, 86.928, 96.8496, 104.39472]


def test_exponentially_weighted_average() -> None:
    param = torch.zeros(1)
    optimizer = fusedopt.Adam([param], betas=(0.7, 0.999))
    for theta, average in zip(THETAS, AVERAGES, strict=True):
        step_with(optimizer, [torch.tensor([theta])])
        assert optimizer.state[param]["exp_avg"].item() == pytest.approx(average, rel=1e-6)


@pytest.mark.parametrize("steps", range(1, 7))
def test_bias_correction(steps: int) -> None:
    # beta2 = 0 and a last grad of 1 leave a denominator of 1: the last step is lr * m_hat.
    param = torch.zeros(1)
    optimizer = fusedopt.Adam([param], lr=1.0, betas=(0.7, 0.0), eps=0.0)
    grads = [theta / THETAS[steps - 1] for theta in THETAS[:steps]]
    step_with(optimizer, [torch.tensor([grad]) for grad in grads[:-1]])
    before = param.item()
    step_with(optimizer, [torch.tensor([1.0])])
    m_hat = AVERAGES[steps - 1] / (1 - 0.7**steps) / THETAS[steps - 1]
    assert before - param.item() == pytest.approx(m_hat, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_the_first_adam_steps_are_lr_in_size(scale: float) -> None:
    param = torch.zeros(4)
    optimizer = fusedopt.Adam([param], lr=0.01)
    for step in (1, 2, 3):
        step_with(optimizer, [torch.tensor([1.0, -1.0, 2.5, -0.3]) * scale])
        np.testing.assert_allclose(param.abs().tolist(), 0.01 * step, rtol=5e-4)  # eps / 3e-5


# Optimizer and options, and after each grad a state of that name and the param, from 1.
BY_HAND: dict[str, tuple[str, dict[str, Any], str, list[tuple[float, float, float]]]] = {
    "RMSprop": (  # v <- 0.9 v + 0.1 g^2; p <- p - 0.1 g / sqrt(v)
        "RMSprop",
        {"lr": 0.1, "alpha": 0.9, "eps": 0.0},
        "square_avg",
        [(2, 0.4, 0.68377223), (1, 0.46, 0.53633018), (0, 0.414, 0.53633018)],
    ),
    "RMSprop with momentum": (  # b <- 0.5 b + g / sqrt(v); p <- p - 0.1 b
        "RMSprop",
        {"lr": 0.1, "alpha": 0.9, "eps": 0.0, "momentum": 0.5},
        "momentum_buffer",
        [(2, 3.1622777, 0.68377223), (1, 3.0555584, 0.37821639), (0, 1.5277792, 0.22543847)],
    ),
    "Adagrad": (  # s <- s + g^2; p <- p - g / sqrt(s)
        "Adagrad",
        {"lr": 1.0},
        "sum",
        [(3, 9, 0.0), (4, 25, -0.8), (0, 25, -0.8), (12, 169, -1.7230769)],
    ),
    "Adamax": (  # u <- max(0.5 u, |g|); m <- 0.5 m + 0.5 g; p <- p - 0.1 m / (1 - 0.5^t) / u
        "Adamax",
        {"lr": 0.1, "betas": (0.5, 0.5), "eps": 0.0},
        "exp_inf",
        [(-8, 8, 1.1), (1, 4, 1.15), (1, 2, 1.1642857)],
    ),
    "Rprop": (  # 1.2 times the step size, or half of it and a rest
        "Rprop",
        {"lr": 0.1},
        "step_size",
        [(5, 0.1, 0.9), (1, 0.12, 0.78), (-3, 0.06, 0.78), (-3, 0.06, 0.84), (-1, 0.072, 0.912)],
    ),
    "ASGD": (  # without its decay: plain steps, and the mean of the params from the second on
        "ASGD",
        {"lr": 0.1, "lambd": 0.0, "t0": 0},
        "ax",
        [(1, 0.9, 0.9), (1, 0.8, 0.8), (2, 0.7, 0.6), (-1, 0.7, 0.7), (0, 0.7, 0.7)],
    ),
    "Lion": (  # p <- p - 0.1 sign(0.5 m + 0.5 g); m <- 0.75 m + 0.25 g
        "Lion",
        {"lr": 0.1, "betas": (0.5, 0.75)},
        "exp_avg",
        [(4, 1, 0.9), (-0.5, 0.625, 0.8), (-1, 0.21875, 0.9), (0, 0.1640625, 0.8)],
    ),
}


@pytest.mark.parametrize(("name", "options", "state", "steps"), **by_id(BY_HAND))
def test_by_hand(
    name: str, options: dict[str, Any], state: str, steps: list[tuple[float, float, float]]
) -> None:
    param = torch.tensor([1.0])
    optimizer = getattr(fusedopt, name)([param], **options)
    for grad, kept, expected in steps:
        step_with(optimizer, [torch.tensor([float(grad)])])
        assert optimizer.state[param][state].item() == pytest.approx(kept, rel=1e-6)
        assert param.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


# Sizes of steps with a constant grad, times the learning rate: of the whole formula.
CONSTANT: dict[str, tuple[str, dict[str, Any], Callable[[int], float]]] = {
    "RMSprop": ("RMSprop", {"alpha": 0.9, "eps": 1e-12}, lambda t: (1 - 0.9**t) ** -0.5),
    "Adagrad": ("Adagrad", {}, lambda t: t**-0.5),
    "Adagrad with a decay": ("Adagrad", {"lr_decay": 1}, lambda t: t**-1.5),
    "Adamax": ("Adamax", {}, lambda t: 1.0),  # noqa: ARG005
    "Lion": ("Lion", {}, lambda t: 1.0),  # noqa: ARG005
    "Rprop": ("Rprop", {}, lambda t: 1.2 ** (t - 1)),
}


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize(("name", "options", "size"), **by_id(CONSTANT))
def test_steps_with_a_constant_grad(
    name: str, options: dict[str, Any], size: Callable[[int], float], scale: float
) -> None:
    """Whatever its scale is, but for eps."""
    param, moved = torch.zeros(4), 0.0
    optimizer = getattr(fusedopt, name)([param], lr=0.01, **options)
    for step in range(1, 9):
        step_with(optimizer, [torch.tensor([1.0, -1.0, 2.5, -0.3]) * scale])
        moved += 0.01 * size(step)
        np.testing.assert_allclose(param.abs().tolist(), moved, rtol=5e-4)


def trained(
    optimizer_class: type[torch.optim.Optimizer], start: Tensor, **options: float
) -> Tensor:
    param = start.clone()
    step_with(optimizer_class([param], **options), [values(99, seed=seed) for seed in range(5)])
    return param


@pytest.mark.parametrize("library", [fusedopt, torch.optim], ids=["ours", "theirs"])
def test_rmsprop_is_adam_without_momentum_and_correction(library: Any) -> None:
    # Far from the first step the corrections are 1: Adam with beta1 = 0 then is RMSprop.
    params = [values(99, dtype=torch.float64) for _ in range(2)]
    adam = fusedopt.Adam([params[0]], lr=0.1, betas=(0.0, 0.5), eps=1e-3)
    rmsprop = library.RMSprop([params[1]], lr=0.1, alpha=0.5, eps=1e-3)
    grads = [values(99, dtype=torch.float64, seed=seed) for seed in range(80)]
    for optimizer, param in zip((adam, rmsprop), params, strict=True):
        step_with(optimizer, grads[:70])
        param.zero_()
        step_with(optimizer, grads[70:])
    torch.testing.assert_close(*params, rtol=1e-12, atol=1e-12)


def test_adam_and_adamw_are_one_without_decay() -> None:
    start = values(99)
    adam = trained(fusedopt.Adam, start, weight_decay=0.0)
    assert torch.equal(adam, trained(fusedopt.AdamW, start, weight_decay=0.0))


def test_l2_and_decoupled_decay_differ() -> None:
    start = values(99)
    adam = trained(fusedopt.Adam, start, lr=0.01, weight_decay=0.1)
    adamw = trained(fusedopt.AdamW, start, lr=0.01, weight_decay=0.1)
    assert (adam - adamw).abs().max() > 1e-3


def test_decoupled_decay_shrinks_the_param() -> None:
    param = torch.tensor([3.0])
    step_with(fusedopt.AdamW([param], lr=0.1, weight_decay=0.5), [torch.zeros(1)] * 10)
    assert param.item() == pytest.approx(3 * (1 - 0.1 * 0.5) ** 10, rel=1e-6)


def regression_losses(
    optimizer_class: type[torch.optim.Optimizer], lr: float, momentum: float
) -> list[float]:
    """Mean loss of each of 8 epochs, batch 10, on a noisy linear regression of 300 rows."""
    inputs, weights = values(300, 6), torch.tensor([2.0, -3.4, 0.5, 1.0, 0.0, 4.2])
    targets = inputs @ weights + 1.5 + 0.1 * values(300, seed=1)
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    optimizer = optimizer_class(model.parameters(), lr=lr, momentum=momentum)
    losses = []
    for _ in range(8):
        total = 0.0
        for rows in torch.randperm(300).split(10):
            optimizer.zero_grad()
            loss = functional.mse_loss(model(inputs[rows]).squeeze(-1), targets[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() / 30
        losses.append(total)
    return losses


@pytest.mark.parametrize(("lr", "momentum"), [(0.02, 0.5), (0.01, 0.9), (0.005, 0.9)])
def test_a_regression_that_must_train(lr: float, momentum: float) -> None:
    ours = regression_losses(fusedopt.SGD, lr, momentum)
    assert ours[0] > 1
    assert ours[-1] == pytest.approx(0.01, rel=0.3)  # the variance of the noise
    np.testing.assert_allclose(ours, regression_losses(torch.optim.SGD, lr, momentum), rtol=1e-4)
