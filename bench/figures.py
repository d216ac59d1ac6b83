"""Draw the textbook pictures of optimization with fusedopt's optimizers.

Every number with a known answer is checked before anything is drawn; a wrong one ends the run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import examples
import torch
from common import load_fusedopt, load_pyplot


def momentum(plt: ModuleType, optim: ModuleType) -> Any:
    """What the buffer does, step by step, and how long it remembers."""
    velocity, position = examples.momentum_by_hand(optim.SGD)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for values, label in ((velocity, "momentum_buffer v"), (position, "parameter p")):
        left.plot(values, marker="o", label=label)
        for step, value in enumerate(values):
            left.annotate(f"{value:g}", (step, value), (0, 7), textcoords="offset points",
                          ha="center", fontsize=9)  # fmt: skip
    left.axvspan(3.4, 4.6, color="0.92", zorder=0)
    left.annotate("grad 0, a saddle:\nv carries p on", (4, 2.2), ha="center", fontsize=9)
    left.set(title="Grads 2, 2, 2, 0 with lr 0.1, momentum 0.9", xlabel="step", ylabel="value",
             xlim=(-0.3, 4.6), xticks=range(5))  # fmt: skip
    left.margins(y=0.15)
    left.legend(loc="upper left")
    for beta in (0.5, 0.9, 0.95, 0.98):
        weights = examples.grad_weights(optim.SGD, beta, 60)
        right.plot(weights, label=f"momentum {beta}: sum {1 / (1 - beta):g}")
    right.set(title="Weight of a grad, τ steps later", xlabel="τ (steps)", ylabel=r"$\beta^\tau$")
    right.legend()
    return figure


def learning_rate(plt: ModuleType, optim: ModuleType) -> Any:
    """Too large, too small and just right on a parabola; a smaller rate with momentum wins."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for lr in examples.PARABOLA_X:
        left.plot(examples.parabola(optim.SGD, lr, 0.0, 4), marker="o", label=f"lr {lr:g}")
    left.set(title="x on y = 4 x² from x = 2 (grad 8x)", xlabel="iteration", xticks=range(5),
             ylabel="x (linear within ±2, log beyond)")  # fmt: skip
    left.set_yscale("symlog", linthresh=2, linscale=2)
    left.set_ylim(-5e3, 2e4)
    left.legend(loc="lower left")
    for lr, beta in examples.PARABOLA_Y:
        x = examples.parabola(optim.SGD, lr, beta, 39)
        right.plot([4 * value**2 for value in x], label=f"lr {lr:g}, momentum {beta:g}")
    right.set(title="Loss y = 4 x²", xlabel="iteration", ylabel="y (log)", yscale="log")
    right.legend()
    return figure


def _valley_background(axis: Any, height: float) -> None:
    x1 = torch.linspace(-5.8, 2.8, 200)
    x2 = torch.linspace(-height, height, 200)
    loss = 0.1 * x1**2 + 2 * x2[:, None] ** 2
    levels = [0.02, 0.1, 0.3, 0.7, 1.5, 3, 6, 12, 24]
    axis.contour(x1.tolist(), x2.tolist(), loss.tolist(), levels, colors="0.7", linewidths=0.8)
    axis.plot(0, 0, "k*", markersize=9)
    axis.grid(visible=False)
    axis.set(xlabel="x1", ylabel="x2", xlim=(-5.8, 2.8), ylim=(-height, height))


def valley(plt: ModuleType, optim: ModuleType) -> Any:
    """A rate that the steep axis cannot bear without momentum, and what momentum makes of it."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, sharey=True)
    for axis, (lr, beta) in zip(axes.flat, examples.VALLEY_END, strict=True):
        path = examples.valley(optim.SGD, lr, beta)
        _valley_background(axis, 3.4)
        axis.plot(*zip(*path, strict=True), marker="o", markersize=4, color="C1", clip_on=True)
        x1, x2 = path[-1]
        axis.set_title(f"lr {lr:g}, momentum {beta:g}: ends at ({x1:.2g}, {x2:.2g})")
        axis.label_outer()
    figure.suptitle("SGD on f(x) = 0.1 x1² + 2 x2², 20 steps from (-5, -2)")
    return figure


def momentum_border(plt: ModuleType, optim: ModuleType) -> Any:
    """Where momentum SGD converges, measured, under the line that theory draws."""
    from matplotlib.colors import TwoSlopeNorm

    betas = torch.linspace(0, 0.98, 50, dtype=torch.float64)
    curvatures = torch.linspace(0.02, 4.4, 220, dtype=torch.float64)
    factor = examples.contraction(optim.SGD, betas, curvatures)
    figure, axis = plt.subplots(figsize=(9, 5.5))
    mesh = axis.pcolormesh(
        curvatures.tolist(), betas.tolist(), factor.tolist(), cmap="RdBu_r", shading="nearest",
        norm=TwoSlopeNorm(1.0, 0.0, 2.0), rasterized=True,
    )  # fmt: skip
    axis.plot((2 + 2 * betas).tolist(), betas.tolist(), "k--", label="lr λ = 2 + 2 beta")
    bar = figure.colorbar(mesh, label="change of |x| in a step (factor, measured)", extend="max")
    bar.ax.set_yscale("linear")
    axis.set(title="Momentum SGD on f = λ x² / 2: blue converges, red diverges",
             xlabel="lr λ", ylabel="momentum beta", xlim=(0, 4.4), ylim=(0, 0.98))  # fmt: skip
    axis.grid(visible=False)
    axis.legend(loc="upper left", frameon=True)
    return figure


def weighted_average(plt: ModuleType, optim: ModuleType) -> Any:
    """An average that starts at 0 is too low at first; dividing by 1 - beta^t corrects it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    generator = torch.Generator().manual_seed(0)
    days = torch.arange(200, dtype=torch.float64)
    noise = torch.randn(200, generator=generator, dtype=torch.float64)
    year = 16 + 8 * torch.cos(2 * torch.pi * days / 150) + 3 * noise
    for axis, values, beta, marker in (
        (left, examples.TEMPERATURES, 0.7, "."),
        (right, year.tolist(), 0.95, ""),
    ):
        averages = examples.weighted_average(optim.Adam, values, beta)
        corrected = examples.bias_corrected(averages, beta)
        steps = range(1, len(values) + 1)
        size = 7 if marker else 2.5
        axis.plot(steps, values, "o", color="0.5", markersize=size, label="values (fed as grads)")
        axis.plot(steps, averages, marker=marker, label="exp_avg")
        axis.plot(steps, corrected, marker=marker, label=r"exp_avg / $(1 - \beta^t)$")
        axis.set(title=f"beta {beta}", xlabel="step t", ylabel="value")
    left.set_ylim(0, 135)
    left.legend(loc="lower right")
    figure.suptitle("Exponentially weighted average: Adam's first moment")
    return figure


def adam(plt: ModuleType, optim: ModuleType) -> Any:
    """What the second moment, the first moment and a decoupled decay change."""
    examples.check_decay(optim.Adam, optim.AdamW)
    figure, axes = plt.subplot_mosaic([["path", "path"], ["scale", "decay"]], figsize=(11, 8.5))
    _draw_paths(axes["path"], optim)
    for scale, style in ((1e-3, "-"), (1.0, "--"), (1e3, ":")):
        distance = examples.first_steps(optim.Adam, scale, 0.1, 10)
        axes["scale"].plot(distance, style, linewidth=2.5, label=f"grad {scale:g}")
    axes["scale"].set(title="Adam, constant grad, lr 0.1: each step is lr",
                      xlabel="step", ylabel="distance from the start")  # fmt: skip
    axes["scale"].legend()
    _draw_decay(axes["decay"], optim)
    return figure


def _draw_paths(axis: Any, optim: ModuleType) -> None:
    steps = 40
    paths = {
        "SGD, lr 0.4": examples.in_valley(lambda p: optim.SGD(p, lr=0.4), steps),
        "SGD, lr 0.4, momentum 0.5": examples.in_valley(
            lambda p: optim.SGD(p, lr=0.4, momentum=0.5), steps
        ),
        "Adam without first moment (RMSprop), lr 0.3": examples.rmsprop_in_valley(
            optim.Adam, 0.3, 0.9, steps
        ),
        "Adam, lr 0.3": examples.in_valley(lambda p: optim.Adam(p, lr=0.3), steps),
    }
    _valley_background(axis, 2.4)
    for label, path in paths.items():
        axis.plot(*zip(*path, strict=True), marker="o", markersize=3, linewidth=1.2, label=label)
    axis.set_title(f"f(x) = 0.1 x1² + 2 x2²: {steps} steps from (-5, -2)")
    axis.legend(loc="upper right", fontsize=9, frameon=True)


def _draw_decay(axis: Any, optim: ModuleType) -> None:
    lr, weight_decay, steps = 5e-3, 1.0, 400
    looks = {"Adam": (("C0", "-"), ("C0", ":")), "AdamW": (("C1", "-"), ("black", ":"))}
    for name, styles in looks.items():
        path = examples.decay(getattr(optim, name), weight_decay, lr, steps)
        weights = zip(*path, strict=True)
        for weight, scale, (color, line) in zip(weights, (0.1, 10), styles, strict=True):
            axis.plot(
                weight, line, color=color, linewidth=2, label=f"{name}, grads of size {scale}"
            )
    expected = [(1 - lr * weight_decay) ** step for step in range(steps + 1)]
    axis.plot(expected, color="C3", linewidth=1, label=r"$(1 - lr\,\lambda)^t$")
    axis.set(title="Weight decay λ = 1, lr 0.005, grads around 0", xlabel="step", ylabel="weight",
             ylim=(0, 1.75))  # fmt: skip
    axis.legend(fontsize=9, loc="upper right")


FIGURES = (momentum, learning_rate, valley, momentum_border, weighted_average, adam)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR",
                        help="where to write the PNG files (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    optim, plt = load_fusedopt(), load_pyplot()
    try:
        drawn = {function.__name__: function(plt, optim) for function in FIGURES}
    except examples.WrongAnswerError as error:
        print(f"wrong answer, nothing drawn: {error}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        path = args.out / f"{name}.png"
        figure.savefig(path)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
