"""The picture of train_gpt.py: the loss curves, their difference, where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot

COLORS = ("C0", "C1")


def draw(path: Path, title: str, result: dict[str, Any]) -> None:
    pyplot.rcParams.update(
        {"figure.constrained_layout.use": True, "savefig.dpi": 130, "axes.grid": True,
         "axes.axisbelow": True, "grid.alpha": 0.3, "legend.frameon": False}
    )  # fmt: skip
    is_compared = result["apart"] is not None
    figure, axes = pyplot.subplot_mosaic(
        [["loss", "time"], ["apart" if is_compared else "loss", "time"]],
        figsize=(12, 6.5),
        width_ratios=(2.2, 1),
        height_ratios=(2, 1),
    )
    _draw_losses(axes["loss"], result["runs"])
    if is_compared:
        _draw_difference(axes["apart"], result["runs"], result["apart"])
        axes["apart"].sharex(axes["loss"])
    axes["apart" if is_compared else "loss"].set_xlabel("step")
    _draw_time(axes["time"], result["runs"])
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")


def _draw_losses(axis: Any, runs: list[dict[str, Any]]) -> None:
    ours, *others = runs
    axis.plot(ours["losses"], color=COLORS[0], linewidth=3.5, alpha=0.5, label=ours["name"])
    for theirs in others:
        axis.plot(theirs["losses"], color=COLORS[1], linewidth=1, label=theirs["name"])
    axis.set_ylabel("loss (nats per byte)")
    axis.set_title("Loss of each batch")
    axis.legend()


def _draw_difference(axis: Any, runs: list[dict[str, Any]], apart: dict[str, Any]) -> None:
    """On a log scale from the last digit of float32 upwards: rounding grows as training goes on."""
    floor = 1e-7
    pairs = zip(runs[0]["losses"], runs[1]["losses"], strict=True)
    axis.plot([max(abs(a - b), floor) for a, b in pairs], color="C3", linewidth=1)
    steps, early = len(runs[0]["losses"]), apart["early_steps"]
    limits = {"color": "black", "linestyle": "--", "linewidth": 1}
    axis.hlines(apart["early_limit"], 0, min(early, steps) - 1, **limits)
    axis.set_yscale("log")
    axis.set_ylabel("difference (nats)")
    axis.set_title(f"Difference (dashed: allowed in the first {early} steps)")


def _draw_time(axis: Any, runs: list[dict[str, Any]]) -> None:
    labels = [run["name"].replace(" ", "\n") for run in runs]
    optimizer = [run["optimizer_ms"] for run in runs]
    rest = [run["step_ms"] - run["optimizer_ms"] for run in runs]
    axis.bar(labels, rest, width=0.6, color="0.8")
    bars = axis.bar(labels, optimizer, width=0.6, bottom=rest, color=COLORS[: len(runs)])
    texts = [f"{r['optimizer_ms']:.2f} ms\n{r['optimizer_share']:.1%}" for r in runs]
    axis.bar_label(bars, [f"optimizer\n{text}" for text in texts], padding=3)
    for bar in axis.containers[0]:
        axis.text(bar.get_x() + bar.get_width() / 2, bar.get_height() / 2,
                  "forward,\nbackward,\nclipping", ha="center", va="center")  # fmt: skip
    axis.margins(y=0.2)
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("median time of a step (ms)")
    axis.set_title("Where the time goes")
