"""What each setting of the precision costs and gives: bytes per parameter, final loss.

The GPT of examples/train_gpt.py is trained under every setting on the same batches, from the same
float32 weights, with several seeds: the differences are small, and one seed alone does not show
whether there are any. Bytes are counted from the tensors that a step leaves.

Examples:
    python bench/precision.py
    python bench/precision.py --steps 1000 --seeds 0 1 2 3 4 --max-seconds 4000 --ema 0.99
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lib import report
from lib.cases import HYPER, gpt

BF16, FP32 = torch.bfloat16, torch.float32
EVALUATIONS = 20  # batches

# The dtype of params and grads, and of the states unless an option says otherwise.
SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (FP32, {}),
    "fp32, bf16 states": (FP32, {"state_dtype": BF16}),
    "fp32, q8 states": (FP32, {"state_dtype": "q8"}),
    "bf16": (BF16, {}),
    "bf16, stochastic rounding": (BF16, {"stochastic_rounding": True}),
    "bf16, fp32 states": (BF16, {"state_dtype": FP32}),
    "bf16, float32 masters, fp32 states":
        (BF16, {"master_weights": "float32", "state_dtype": FP32}),
    "bf16, split masters, fp32 states": (BF16, {"master_weights": "split", "state_dtype": FP32}),
    "bf16, split masters, bf16 states": (BF16, {"master_weights": "split", "state_dtype": BF16}),
    "bf16, split8 masters, bf16 states": (BF16, {"master_weights": "split8", "state_dtype": BF16}),
    "bf16, split8 masters, q8 states": (BF16, {"master_weights": "split8", "state_dtype": "q8"}),
}  # fmt: skip


def start(name: str, first: gpt.GPT, args: argparse.Namespace) -> gpt.Run:
    """Masters, too, start from the float32 weights, and not from their rounding."""
    dtype, options = SETTINGS[name]
    if args.ema is not None:
        options = options | {"ema_decay": args.ema, "ema_bias_correction": True}
    model = copy.deepcopy(first).to(dtype)
    library = report.load_fusedopt()
    run = gpt.start_run(name, model, library, args.optimizer, args.steps, options)
    of_rounded = dict(zip(model.parameters(), first.parameters(), strict=True))
    optimizer: Any = run.optimizer
    optimizer.load_fp32_params([of_rounded[p].detach() for p in params_of(optimizer)])
    return run


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def bytes_per_parameter(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Counted; a step count is no state that grows with the parameters."""
    counting: Any = optimizer
    found: dict[str, int] = counting.memory()
    steps = sum(state["step"].nbytes for state in optimizer.state.values() if "step" in state)
    elements = sum(param.numel() for param in params_of(optimizer))
    for name in ("states", "total"):
        found[name] -= steps
    return {name: total / elements for name, total in found.items()}


@torch.no_grad()
def loss_of(model: gpt.GPT, text: torch.Tensor, device: torch.device) -> float:
    batches = gpt.Batches(text, gpt.BATCH, model.config.context, seed=12345)
    losses = []
    for tokens, targets in (batches.next(device) for _ in range(EVALUATIONS)):
        logits = model(tokens).flatten(0, 1).float()
        losses.append(functional.cross_entropy(logits, targets.flatten()).item())
    return statistics.mean(losses)


def train(seed: int, text: torch.Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All settings side by side, on the same batches."""
    torch.manual_seed(seed)
    first = gpt.GPT(gpt.Config()).to(args.device)
    runs = [start(name, first, args) for name in args.settings]
    batches = gpt.Batches(text, gpt.BATCH, first.config.context, seed)
    begin = time.perf_counter()
    for step in range(args.steps):
        tokens, targets = batches.next(args.device)
        for run in runs:
            run.train(tokens, targets)
        gpt.show_progress(step + 1, args.steps, runs[:1], time.perf_counter() - begin)
    return [results(run, text, args) for run in runs]


def results(run: gpt.Run, text: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    figures = run.figures(gpt.BATCH * run.model.config.context)
    found: dict[str, Any] = {"bytes": bytes_per_parameter(run.optimizer)}
    found |= {key: figures[key] for key in ("final_loss", "step_ms", "optimizer_ms")}
    if args.ema is not None:
        optimizer: Any = run.optimizer
        found["weights_loss"] = loss_of(run.model, text, args.device)
        with optimizer.swap_ema():
            found["averages_loss"] = loss_of(run.model, text, args.device)
    return found


def over_seeds(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "stdev": deviation, "values": values}


def summary(name: str, rows: list[dict[str, Any]], base: list[float]) -> dict[str, Any]:
    """One setting over all seeds; ``base``: the final losses in float32 with the same seeds."""
    dtype, options = SETTINGS[name]
    losses = [row["final_loss"] for row in rows]
    of_averages = [key for key in ("weights_loss", "averages_loss") if key in rows[0]]
    return {
        "name": name,
        "dtype": str(dtype),
        "options": {key: str(value) for key, value in options.items()},
        "bytes": rows[0]["bytes"],
        "final_loss": over_seeds(losses),
        "against_fp32": over_seeds([one - two for one, two in zip(losses, base, strict=True)]),
        "step_ms": statistics.median(row["step_ms"] for row in rows),
        "optimizer_ms": statistics.median(row["optimizer_ms"] for row in rows),
        **{key: over_seeds([row[key] for row in rows]) for key in of_averages},
    }


def print_settings(settings: list[dict[str, Any]]) -> None:
    print(f"\n{'bytes for each parameter, loss':36}{'bytes':>6}{'final':>8}  against fp32")
    for row in settings:
        final, apart = row["final_loss"], row["against_fp32"]
        print(f"{row['name']:36}{row['bytes']['total']:6.3g}{final['mean']:8.4f}"
              f"{apart['mean']:+8.4f} (deviation {apart['stdev'] or 0:.4f})")  # fmt: skip
        if "averages_loss" in row:
            weights, averages = row["weights_loss"]["mean"], row["averages_loss"]["mean"]
            print(f"{'':36}test loss: weights {weights:.4f}, averages {averages:.4f}")


def main() -> int:
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    add("--optimizer", choices=HYPER, default="AdamW", help="default: %(default)s")
    add("--steps", type=int, default=250, metavar="N", help="default: %(default)s")
    in_all = "begin no further seed that would end after that (default: %(default)s)"
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--max-seconds", type=float, default=480.0, metavar="S", help=in_all)
    add("--ema", type=float, metavar="DECAY", help="with averages, whose loss is measured too")
    add("--text", type=Path, metavar="FILE", help="default: Python's standard library")
    of_all = "those to train in (default: all); float32 is what the others are compared with"
    add("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], metavar="NAME", help=of_all)
    args = report.parse_args(parser)
    if "fp32" not in args.settings:
        parser.error("--settings must have fp32 among them")
    machine = report.start(args)
    text = gpt.load_text(args.text)
    rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    seeds: list[int] = []
    begin = time.monotonic()
    for seed in args.seeds:
        passed = time.monotonic() - begin
        if seeds and passed * (len(seeds) + 1) / len(seeds) > args.max_seconds:
            print(f"stopped after {len(seeds)} of {len(args.seeds)} seeds (--max-seconds)")
            break
        for name, found in zip(args.settings, train(seed, text, args), strict=True):
            rows[name].append(found)
        seeds.append(seed)
    base = [row["final_loss"] for row in rows["fp32"]]
    config = {"batch": gpt.BATCH, "optimizer": args.optimizer, "steps": args.steps,
              "seeds": seeds, "ema_decay": args.ema, "text_bytes": len(text)}  # fmt: skip
    settings = [summary(name, rows[name], base) for name in args.settings]
    print_settings(settings)
    if args.json:
        of_run = {"config": asdict(gpt.Config()) | config, "seconds": time.monotonic() - begin}
        report.write_json(args.json, {"machine": machine, **of_run, "settings": settings})
    return 0


if __name__ == "__main__":
    sys.exit(main())
