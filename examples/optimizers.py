"""The optimizers of fusedopt: their ways down a narrow valley, and their losses on a small GPT.

The valley is f(x) = 0.1 x1^2 + 2 x2^2, twenty times as steep across as along, from (-5, -2). The
GPT learns Python source, byte by byte. The learning rates are picked by hand from a few for each,
so the picture shows how the optimizers move, and does not rank them. SparseAdam is left out: no
grad here is of some rows only.

Examples:
    python examples/optimizers.py
    python examples/optimizers.py --steps 1000 --text my_book.txt --json optimizers.json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from gpt import BATCH, GPT, Batches, Config, Run, learning_rate, load_text, tail_mean
from train_gpt import machine_info

import fusedopt

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot

START, CURVATURES = (-5.0, -2.0), torch.tensor([0.1, 2.0])
VALLEY_STEPS = 30
MODEL = Config(context=32, width=64, layers=2, heads=2)
CPU = torch.device("cpu")

# Options in the valley, and for the GPT, whose grads are clipped and whose learning rate is
# scheduled.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SGD": ({"lr": 0.1, "momentum": 0.7}, {"lr": 0.3, "momentum": 0.9}),
    "ASGD": ({"lr": 0.4, "t0": 10}, {"lr": 0.3, "t0": 200}),
    "Rprop": ({"lr": 0.1}, {"lr": 1e-3, "step_sizes": (1e-6, 1e-2)}),
    "Adagrad": ({"lr": 1.0}, {"lr": 1e-2}),
    "Adadelta": ({"lr": 1.0, "eps": 0.05}, {"lr": 1.0}),
    "RMSprop": ({"lr": 0.2, "alpha": 0.9}, {"lr": 1e-3}),
    "Adam": ({"lr": 0.4}, {"lr": 3e-3}),
    "AdamW": ({"lr": 0.4, "weight_decay": 0.1}, {"lr": 3e-3, "weight_decay": 0.1}),
    "Adamax": ({"lr": 0.6}, {"lr": 1e-2}),
    "NAdam": ({"lr": 0.4}, {"lr": 3e-3}),
    "RAdam": ({"lr": 0.3}, {"lr": 6e-3}),
    "Lion": ({"lr": 0.2}, {"lr": 1e-3}),
}
COLORS = dict(zip(
    OPTIONS,
    ("black", "C7", "C5", "C8", "gold", "C2", "C0", "navy", "C4", "C1", "C6", "C3"), strict=True,
))  # fmt: skip


def value(x: torch.Tensor) -> torch.Tensor:
    return (CURVATURES * x.square()).sum(-1)


def walk(name: str, options: dict[str, Any]) -> list[list[float]]:
    """Where it has been in the valley."""
    x = torch.nn.Parameter(torch.tensor(START))
    optimizer = getattr(fusedopt, name)([x], **options)
    path = [x.tolist()]
    for _ in range(VALLEY_STEPS):
        optimizer.zero_grad()
        value(x).backward()
        optimizer.step()
        path.append(x.tolist())
    return path


def train(name: str, options: dict[str, Any], steps: int, text: torch.Tensor) -> list[float]:
    """The loss of each batch. All begin with the same weights, and see the same batches."""
    torch.manual_seed(0)
    model = GPT(MODEL)
    batches = Batches(text, BATCH, MODEL.context, seed=0)
    optimizer = getattr(fusedopt, name)(model.parameters(), max_grad_norm=1.0, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    run = Run(name, model, optimizer, schedule, clip=None)
    for _ in range(steps):
        run.train(*batches.next(CPU))
    return run.losses


def written(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {setting}" for name, setting in options.items())


def draw(file: Path, runs: list[dict[str, Any]], title: str) -> None:
    pyplot.rcParams.update({"figure.constrained_layout.use": True, "savefig.dpi": 90})
    figure = pyplot.figure(figsize=(12, 11))
    valleys, losses = figure.subfigures(2, 1, height_ratios=(1.6, 1))
    axes = valleys.subplots(3, 4, sharex=True, sharey=True)
    x1, x2 = torch.meshgrid(
        torch.linspace(-6, 2.5, 100), torch.linspace(-2.8, 2.8, 100), indexing="xy"
    )
    heights = value(torch.stack([x1, x2], dim=-1))
    for axis, run in zip(axes.flat, runs, strict=True):
        axis.contour(x1, x2, heights, levels=[0.05, 0.2, 0.5, 1, 2, 4, 7, 11],
                     colors="0.75", linewidths=0.7)  # fmt: skip
        first, second = zip(*run["path"], strict=True)
        axis.plot(first, second, "o-", color=COLORS[run["name"]], markersize=3, linewidth=1.2)
        axis.plot(0, 0, "k+")
        axis.set_title(f"{run['name']}: {written(run['options']['valley'])}", fontsize=9)
    axes[0, 0].set(xlim=(-6, 2.5), ylim=(-2.8, 2.8))
    valleys.suptitle(f"$0.1\\,x_1^2 + 2\\,x_2^2$ from {START}, {VALLEY_STEPS} steps")
    axis = losses.subplots()
    for run in sorted(runs, key=lambda run: -run["final_loss"]):  # the legend's order, top down
        label = f"{run['final_loss']:.2f}  {run['name']}: {written(run['options']['gpt'])}"
        axis.plot(smooth(run["losses"]), color=COLORS[run["name"]], linewidth=1.3, label=label)
    low, high = min(run["final_loss"] for run in runs), runs[0]["losses"][0]
    axis.set_ylim(low - 0.1, low + 0.7 * (high - low))
    axis.set(xlabel="step", ylabel="loss (nats per byte)", title=title)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8,
                title="final loss, options")  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    print(f"wrote {file}")


def smooth(losses: list[float], window: int = 15) -> list[float]:
    """The mean of the last few: those of single batches would hide each other."""
    parts = [losses[max(0, end - window) : end] for end in range(1, len(losses) + 1)]
    return [sum(part) / len(part) for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=300, metavar="N", help="of the GPT (default: %(default)s)")
    add("--quick", action="store_true", help="only 20 of them, to see that all runs")
    add("--threads", type=int, default=1, metavar="N",
        help="CPU threads; the model is too small for many (default: %(default)s)")  # fmt: skip
    add("--text", type=Path, metavar="FILE", help="default: Python's standard library")
    add("--plot", type=Path, default=Path("optimizers.png"), metavar="FILE",
        help="picture to write (default: %(default)s)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write machine, options, paths and losses")
    args = parser.parse_args()
    steps = 20 if args.quick else args.steps
    torch.set_num_threads(args.threads)
    text = load_text(args.text)
    runs = []
    print(f"{'':10}{'value in the valley':>20}{'first loss':>12}{'final loss':>12}{'seconds':>9}")
    for name, (in_valley, for_gpt) in OPTIONS.items():
        start = time.perf_counter()
        path, losses = walk(name, in_valley), train(name, for_gpt, steps, text)
        end, final = value(torch.tensor(path[-1])).item(), tail_mean(losses)
        print(f"{name:10}{end:20.2g}{losses[0]:12.3f}{final:12.3f}"
              f"{time.perf_counter() - start:9.1f}", flush=True)  # fmt: skip
        runs.append({
            "name": name, "options": {"valley": in_valley, "gpt": for_gpt}, "path": path,
            "losses": losses, "final_value": end, "final_loss": final,
        })  # fmt: skip
    if args.json:
        config = asdict(MODEL) | {"batch": BATCH, "steps": steps}
        result = {"machine": machine_info(CPU), "config": config, "runs": runs}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")
    draw(args.plot, runs, f"A small GPT, {steps} steps of {BATCH} x {MODEL.context} bytes")


if __name__ == "__main__":
    main()
