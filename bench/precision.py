"""What each setting of the precision costs and gives: bytes per parameter, final loss.

The GPT of train_gpt.py is trained under every setting on the same batches, from the same float32
weights, with several seeds: the differences are small, and one seed alone does not show whether
there are any. Bytes are counted from the tensors that a step leaves.

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import OPTIMIZERS, describe, load_fusedopt, machine_info, parse_device, write_json
from gpt import GPT, Batches, Config, decay_groups, load_text
from readme_training import precision_table
from torch.nn import functional
from train_gpt import BATCH, show_progress
from twins import Run, start_run, tail_mean

BF16, FP32 = torch.bfloat16, torch.float32
PARTS = {"master_param": "masters", "param_remainder": "masters", "ema_param": "averages"}
EVALUATIONS = 20  # batches


@dataclass(frozen=True)
class Setting:
    name: str
    dtype: torch.dtype  # of params and grads, and of the states unless an option says otherwise
    options: dict[str, Any] = field(default_factory=dict)


SETTINGS = (
    Setting("fp32", FP32),
    Setting("fp32, bf16 states", FP32, {"state_dtype": BF16}),
    Setting("bf16", BF16),
    Setting("bf16, stochastic rounding", BF16, {"stochastic_rounding": True}),
    Setting("bf16, fp32 states", BF16, {"state_dtype": FP32}),
    Setting("bf16, float32 masters, fp32 states", BF16,
            {"master_weights": "float32", "state_dtype": FP32}),
    Setting("bf16, split masters, fp32 states", BF16,
            {"master_weights": "split", "state_dtype": FP32}),
    Setting("bf16, split masters, bf16 states", BF16,
            {"master_weights": "split", "state_dtype": BF16}),
)  # fmt: skip


def params_of(groups: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [param for group in groups for param in group["params"]]


def start(setting: Setting, first: GPT, args: argparse.Namespace) -> Run:
    """Masters, too, start from the float32 weights, and not from their rounding."""
    model = copy.deepcopy(first).to(setting.dtype)
    options = dict(setting.options)
    if args.ema is not None:
        options |= {"ema_decay": args.ema, "ema_bias_correction": True}
    library = load_fusedopt()
    run = start_run(setting.name, model, library, args.optimizer, args.steps, options)
    optimizer: Any = run.optimizer
    optimizer.load_fp32_params([p.detach() for p in params_of(decay_groups(first, 0.0))])
    return run


def bytes_per_parameter(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Counted; a step count is no state that grows with the parameters."""
    found = {"params": 0, "grads": 0, "states": 0, "masters": 0, "averages": 0}
    elements = 0
    for param in params_of(optimizer.param_groups):
        assert param.grad is not None
        elements += param.numel()
        found["params"] += param.numel() * param.element_size()
        found["grads"] += param.grad.numel() * param.grad.element_size()
        for name, state in optimizer.state[param].items():
            if name != "step" and isinstance(state, torch.Tensor):
                found[PARTS.get(name, "states")] += state.numel() * state.element_size()
    counted = {name: total / elements for name, total in found.items()}
    return counted | {"total": sum(counted.values())}


@torch.no_grad()
def loss_of(model: GPT, text: torch.Tensor, device: torch.device) -> float:
    batches = Batches(text, BATCH, model.config.context, seed=12345)
    losses = []
    for _ in range(EVALUATIONS):
        tokens, targets = batches.next(device)
        logits = model(tokens).flatten(0, 1).float()
        losses.append(functional.cross_entropy(logits, targets.flatten()).item())
    return statistics.mean(losses)


def train(seed: int, text: torch.Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All settings side by side, on the same batches."""
    torch.manual_seed(seed)
    first = GPT(Config()).to(args.device)
    runs = [start(setting, first, args) for setting in SETTINGS]
    batches = Batches(text, BATCH, first.config.context, seed)
    begin = time.perf_counter()
    for step in range(args.steps):
        tokens, targets = batches.next(args.device)
        for run in runs:
            run.train(tokens, targets)
        show_progress(step + 1, args.steps, runs[:1], time.perf_counter() - begin)
    return [results(run, text, args) for run in runs]


def results(run: Run, text: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "bytes": bytes_per_parameter(run.optimizer),
        "final_loss": tail_mean(run.losses),
        "step_ms": 1e3 * statistics.median(run.step_s),
        "optimizer_ms": 1e3 * statistics.median(run.optimizer_s),
    }
    if args.ema is not None:
        optimizer: Any = run.optimizer
        found["weights_loss"] = loss_of(run.model, text, args.device)
        with optimizer.swap_ema():
            found["averages_loss"] = loss_of(run.model, text, args.device)
    return found


def over_seeds(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "stdev": deviation, "values": values}


def summary(setting: Setting, rows: list[dict[str, Any]], base: list[float]) -> dict[str, Any]:
    """One setting over all seeds; ``base``: the final losses in float32 with the same seeds."""
    losses = [row["final_loss"] for row in rows]
    merged: dict[str, Any] = {
        "name": setting.name,
        "dtype": str(setting.dtype),
        "options": {key: str(value) for key, value in setting.options.items()},
        "bytes": rows[0]["bytes"],
        "final_loss": over_seeds(losses),
        "against_fp32": over_seeds([one - two for one, two in zip(losses, base, strict=True)]),
    }
    for key in ("step_ms", "optimizer_ms"):
        merged[key] = statistics.median(row[key] for row in rows)
    for key in ("weights_loss", "averages_loss"):
        if key in rows[0]:
            merged[key] = over_seeds([row[key] for row in rows])
    return merged


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", choices=OPTIMIZERS, default="AdamW", help="default: %(default)s")
    add("--steps", type=int, default=250, metavar="N", help="default: %(default)s")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED",
        help="of weights and batches (default: 0 1 2)")  # fmt: skip
    add("--max-seconds", type=float, default=480.0, metavar="S",
        help="begin no further seed that would end after that (default: %(default)s)")  # fmt: skip
    add("--ema", type=float, metavar="DECAY", help="with averages, whose loss is measured too")
    add("--device", type=parse_device, default=torch.device("cpu"), help="cpu (default) or cuda")
    add("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    add("--text", type=Path, metavar="FILE", help="default: Python's standard library")
    add("--json", "--out", type=Path, metavar="FILE", help="write machine and figures")
    args = parser.parse_args()
    if min(args.steps, args.threads or 1) < 1:
        parser.error("--steps and --threads must be at least 1")
    return args


def main() -> int:
    args = parse_args()
    load_fusedopt()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = machine_info(args.device)
    text, config = load_text(args.text), Config()
    print(describe(machine))
    rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    seeds: list[int] = []
    begin = time.monotonic()
    for seed in args.seeds:
        passed = time.monotonic() - begin
        if seeds and passed * (len(seeds) + 1) / len(seeds) > args.max_seconds:
            print(f"stopped after {len(seeds)} of {len(args.seeds)} seeds (--max-seconds)")
            break
        for setting, found in zip(SETTINGS, train(seed, text, args), strict=True):
            rows[setting.name].append(found)
        seeds.append(seed)
    base = [row["final_loss"] for row in rows["fp32"]]
    content = {
        "machine": machine,
        "config": asdict(config)
        | {"batch": BATCH, "optimizer": args.optimizer, "steps": args.steps, "seeds": seeds,
           "ema_decay": args.ema, "text_bytes": len(text)},
        "seconds": time.monotonic() - begin,
        "settings": [summary(setting, rows[setting.name], base) for setting in SETTINGS],
    }  # fmt: skip
    print("\n".join(["", *precision_table(content)]))
    if args.json:
        write_json(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
