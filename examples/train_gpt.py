"""A small GPT learns Python source, byte by byte: once with fusedopt, once with torch.optim.

Both runs start from the same weights and see the same batches, and they take turns step by step,
so that whatever else the machine does slows both. Their loss curves have to lie on each other
(exit status 1 if not); what differs is the time that the optimizer takes. With a setting that
torch.optim lacks, but for --max-grad-norm, there is the run with fusedopt alone.

Examples:
    python examples/train_gpt.py
    python examples/train_gpt.py --optimizer SGD --steps 200 --text my_book.txt
    python examples/train_gpt.py --dtype bfloat16 --master-weights split --ema-decay 0.99
    torchrun --nproc-per-node 2 examples/train_gpt.py --fsdp --checkpoint gpt --save-every 100
    torchrun --nproc-per-node 2 examples/train_gpt.py --fsdp --checkpoint gpt --resume
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from typing import Any

import parallel
import torch
import torch.distributed as dist
from flags import SETTINGS, TORCH_KINDS, parse_args
from gpt import (
    BATCH,
    GPT,
    Batches,
    Config,
    Run,
    load_text,
    show_progress,
    start_run,
    tail_mean,
)

import fusedopt
from fusedopt.integrations import swap_ema

# The two runs differ by rounding alone, which training amplifies: at first the curves agree to
# many digits, later one batch's loss may differ in the fourth, while both learn the same. The
# yardstick is how far torch's own fused and unfused AdamW are apart in this program, given as in
# the first 50 steps, anywhere, in the final loss. float32: 5e-7, 3e-4, 3e-6 (Adam: 5e-5, 4e-4,
# 6e-6). bfloat16, where unfused torch rounds after every operation: 0.09, 0.11, 0.02.
EARLY_STEPS = 50
TOLERANCES = {"float32": (1e-3, 0.01), "bfloat16": (0.3, 0.1)}  # early, final


def start_runs(args: argparse.Namespace) -> list[Run]:
    """With fusedopt and, if it has all that is asked for, with torch.optim."""
    torch.manual_seed(args.seed)
    first = GPT(Config()).to(args.device, getattr(torch, args.dtype))
    asked = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}

    def start(name: str, library: Any, options: dict[str, Any], clip: float | None) -> Run:
        model = copy.deepcopy(first)
        forward = parallel.spread(model, args.parallel)
        run = start_run(name, model, library, args.optimizer, args.steps, options)
        run.clip, run.forward = clip, forward
        return run

    limit = asked.get("max_grad_norm")
    runs = [start("fusedopt", fusedopt, asked, clip=1.0 if limit is None else None)]
    # Which of its implementations is not asked by these two.
    of_torch = {k: v for k, v in asked.items() if k not in ("foreach", "fused", "max_grad_norm")}
    if set(of_torch) <= set(inspect.signature(getattr(torch.optim, args.optimizer)).parameters):
        name, kind = f"torch.optim ({args.torch})", TORCH_KINDS[args.torch]
        runs.append(start(name, torch.optim, of_torch | kind, clip=limit or 1.0))
    return runs


def train(runs: list[Run], batches: Batches, args: argparse.Namespace) -> int:
    """Turn by turn, and each in turn first; the number of steps made before time ran out."""
    first = parallel.load(args.checkpoint, runs, batches) if args.resume else 0
    if first >= args.steps:
        raise SystemExit(f"--resume: the checkpoint has made all of {args.steps} steps")
    start = time.perf_counter()
    for step in range(first, args.steps):
        tokens, targets = batches.next(args.device)
        for run in runs if step % 2 == 0 else runs[::-1]:
            run.train(tokens, targets)
        seconds = time.perf_counter() - start
        if batches.part == 0:
            show_progress(step + 1, args.steps, runs, seconds, first)
        is_last = step + 1 == args.steps
        stops = not is_last and parallel.is_true_of_the_first(seconds > args.max_seconds)
        is_due = args.save_every and (step + 1) % args.save_every == 0
        if args.checkpoint and (is_last or stops or is_due):
            parallel.save(args.checkpoint, step + 1, runs, batches)
        if stops:
            print(f"\nstopped after {step + 1} of {args.steps} steps: {seconds:.0f} s have passed "
                  "(--max-seconds); on a busy machine, try --threads 1")  # fmt: skip
            return step + 1
    return int(args.steps)


def agreement(ours: Run, theirs: Run, dtype: str) -> dict[str, Any]:
    """How far the two loss curves are apart, and whether rounding explains it."""
    early_limit, final_limit = TOLERANCES[dtype]
    apart = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    early = max(apart[:EARLY_STEPS])
    final = abs(tail_mean(ours.losses) - tail_mean(theirs.losses))
    return {
        "max": max(apart),
        "early": early,
        "early_steps": EARLY_STEPS,
        "early_limit": early_limit,
        "final": final,
        "final_limit": final_limit,
        # Not "greater than": a loss that is NaN must fail too.
        "good": early <= early_limit and final <= final_limit,
    }


def report(runs: list[Run], figures: list[dict[str, float]], apart: dict[str, Any] | None) -> None:
    print(f"\n{'':24}{'loss':>8}{'tokens/s':>10}{'ms/step':>9}{'optimizer ms':>14}{'share':>8}")
    for run, row in zip(runs, figures, strict=True):
        print(
            f"{run.name:24}{row['final_loss']:8.4f}{row['tokens_per_s']:10.0f}{row['step_ms']:9.1f}"
            f"{row['optimizer_ms']:14.3f}{row['optimizer_share']:8.1%}"
        )
    if apart is None:
        return
    median, total = (
        figures[1][key] / figures[0][key] for key in ("optimizer_ms", "optimizer_total_s")
    )
    print(f"optimizer time, torch / fusedopt: {median:.2f} (medians), {total:.2f} (totals)")
    print(
        f"loss curves apart: at most {apart['early']:.1e} in the first {EARLY_STEPS} steps "
        f"(allowed {apart['early_limit']:g}), {apart['max']:.1e} anywhere; final loss "
        f"{apart['final']:.1e} (allowed {apart['final_limit']:g}): "
        f"{'they lie on each other' if apart['good'] else 'THEY DIFFER'}"
    )


def machine_info(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedopt": fusedopt.__version__,
    }


def main() -> int:
    args = parse_args(__doc__)
    if not args.no_plot:
        from plot import draw  # a missing matplotlib should show now, not after the training
    if args.threads:
        torch.set_num_threads(args.threads)
    part, parts = 0, 1
    if args.parallel:
        args.device = parallel.join_processes(args.device)
        part, parts = dist.get_rank(), dist.get_world_size()
        if BATCH % parts:
            raise SystemExit(f"a batch of {BATCH} cannot be divided among {parts} processes")
    machine = machine_info(args.device)
    config = Config()
    batches = Batches(load_text(args.text), BATCH, config.context, args.seed, part, parts)
    runs = start_runs(args)
    params = list(runs[0].model.parameters())
    title = (
        f"{args.optimizer} {args.dtype}: GPT of {sum(p.numel() for p in params) / 1e6:.2f} M "
        f"parameters in {len(params)} tensors, {BATCH} x {config.context} tokens a step"
    )
    where = ", ".join(f"{key} {value}" for key, value in machine.items())
    print(where, f"{title}, {len(batches.text) / 1e6:.1f} MB of text", sep="\n")
    steps = train(runs, batches, args)
    figures = [run.figures(BATCH * config.context) for run in runs]
    apart = agreement(runs[0], runs[1], args.dtype) if len(runs) > 1 else None
    report(runs, figures, apart)
    with swap_ema(runs[0].optimizer, runs[0].model):  # if it keeps averages
        written = runs[0].model.generate(b"def ", 300)
    print("\nThe model trained with fusedopt writes:\n" + written)
    result = {
        "machine": machine,
        "config": asdict(config) | {"batch": BATCH, "steps": steps, "seed": args.seed},
        "apart": apart,
        "runs": [
            {"name": run.name, **row, "losses": run.losses}
            for run, row in zip(runs, figures, strict=True)
        ],
    }
    if args.json and part == 0:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")
    if not args.no_plot and part == 0:
        draw(args.plot, f"{title}\n{where}", result)
    if args.parallel:
        dist.barrier()  # gloo's threads may abort a process that ends while they save
        dist.destroy_process_group()
    return 0 if apart is None or apart["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
