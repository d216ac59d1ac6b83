"""How long everything takes that a training step does to parameters, interleaved in one process.

Clipping, low-precision states and masters, averaging, GradScaler: fusedopt's one pass beside what
torch offers for the same work. Before it is timed, the update of each configuration is verified.

Examples:
    python bench/training.py
    python bench/training.py --configs clip ema --repeats 30 --json build/training-step.json
    python bench/training.py --device cuda --budget 3
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import sys
import time
from typing import Any

import torch
from lib import report
from lib.cases import WORKLOADS, Workload
from lib.configs import COMPARISONS, SHORT, Comparison, parameters, verify_equivalent
from lib.targets import HEADING
from lib.timing import (
    Candidate,
    background_load,
    bandwidth_probes,
    clock_for,
    fresh_grads,
    probe_size,
    run_interleaved,
)

QUICK_PART = 16  # of the large workloads' first dimensions
BUSY_ROUNDS = 2  # times as many where the luck of the scheduler decides each round
STORED = 16  # bytes of an element in float32: param, grad and two states


def smaller(work: Workload) -> Workload:
    """For a look at whether all runs; the figures say nothing."""
    groups = tuple(
        tuple((max(1, shape[0] // QUICK_PART), *shape[1:]) for shape in group)
        for group in work.groups
    )
    return dataclasses.replace(work, name=f"{work.name}-quick", groups=groups)


def measure(row: Comparison, work: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of all candidates; what they are made of is freed with this function's frame."""
    device = args.device
    shapes = [shape for group in work.groups for shape in group]
    footprint = STORED * work.elements
    timed = []
    for config, params in zip(row.configs, parameters(row.configs, shapes, device), strict=True):
        step = config.make(params)[0]
        step()  # creates the states
        moved = config.bytes_per_element * work.elements
        before = fresh_grads(params) if args.grads == "fresh" else None
        timed.append(Candidate(config.name, step, moved, before=before))
    timed += bandwidth_probes(probe_size(device, footprint), device)
    gc.disable()
    try:
        with background_load() if row.busy else contextlib.nullcontext():
            clock = clock_for(device, footprint, args.grads, args.cache, wall_only=True)
            more = BUSY_ROUNDS if row.busy else 1
            run_interleaved(clock, timed, more * args.repeats, more * args.budget)
    finally:
        gc.enable()
    named = {candidate.name: candidate for candidate in timed}
    return {
        "rounds": len(timed[0].samples["wall"]),
        "contenders": {
            config.name: {
                "what": config.what,
                "dtype": SHORT[config.dtype],
                "ms": named[config.name].ms(),
                "bytes_per_element": config.bytes_per_element,
                "gb_per_s": named[config.name].bandwidth(),
                "percent_of_copy": named[config.name].percent_of(named["copy"]),
            }
            for config in row.configs
        },
        "probes": {name: named[name].bandwidth() for name in ("copy", "multiply")},
        "comparisons": [pair.compare(named, device) for pair in row.pairs],
    }


def run_row(name: str, row: Comparison, args: argparse.Namespace) -> dict[str, Any]:
    is_on_gpu = args.device.type == "cuda"
    work = WORKLOADS[(is_on_gpu and row.on_gpu) or row.workload]
    work = smaller(work) if args.quick else work
    result: dict[str, Any] = {
        "row": name,
        "title": row.title,
        "workload": work.name,
        "grads": args.grads,
        "cache": args.cache,
        "tensors": work.tensors,
        "elements": work.elements,
        "busy": row.busy,
    }
    gc.collect()  # what the last row left
    if is_on_gpu:
        torch.cuda.empty_cache()
    try:
        for config in row.configs[:-1] if row.is_alike else ():
            if difference := verify_equivalent(config, row.configs[-1], args.device):
                return result | {"failed": f"not the same update: {difference}"}
        return result | measure(row, work, args)
    except Exception as error:  # one row's fault must not cost the others
        return result | {"failed": report.reason(error)}


def target_lines(rows: list[dict[str, Any]]) -> list[str]:
    """One for each comparison: what gpu/run_all.py repeats."""
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append(f"  MISS  {row['title']:42} failed: {row['failed']}")
        for found in row.get("comparisons", ()):
            value = found["value"]
            verdict = {True: "pass", False: "MISS", None: "-"}[found["good"]]
            around = f"({value['p10']:.2f}..{value['p90']:.2f})"
            target = "" if found["target"] is None else f"  >= {found['target']:g}"
            lines.append(
                f"  {verdict:4}  {row['title']:42} {found['text']:38} "
                f"{value['median']:6.2f} {around:14}{target}"
            )
    return lines


def print_row(row: dict[str, Any]) -> None:
    size = f"{row['tensors']} tensors, {row['elements'] / 1e6:.2f} M elements"
    axes = f"{row['grads']} grads, {row['cache']} caches"
    print(f"\n{row['title']}: {size}, {axes}, {row.get('rounds', 0)} rounds", flush=True)
    if "contenders" in row:
        report.print_probes(row)
    for name, figures in row.get("contenders", {}).items():
        ms = figures["ms"]
        around = f"({ms['p10']:.2f}..{ms['p90']:.2f})"
        print(
            f"  {name:14}{ms['median']:9.2f} ms {around:20}{figures['bytes_per_element']:4} B"
            f"{figures['gb_per_s']:8.1f} GB/s{figures['percent_of_copy']:6.0f} % copy"
            f"  {figures['dtype']} {figures['what']}"
        )
    print("\n".join(target_lines([row])))


def parse_args() -> argparse.Namespace:
    parser = report.make_parser(__doc__, timed="configuration")
    add = parser.add_argument
    add("--configs", "--rows", nargs="+", choices=COMPARISONS, metavar="NAME",
        help=f"default: those with a target on the device ({', '.join(COMPARISONS)})")  # fmt: skip
    add("--quick", action="store_true", help="small shapes, few rounds, exit status 0 after MISS")
    args = report.parse_args(parser)
    usual = [name for name, row in COMPARISONS.items() if args.device.type in row.devices]
    args.configs = args.configs or usual
    return args


def main() -> int:
    args = parse_args()
    machine = report.start(args)
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    for name in args.configs:
        if time.monotonic() - begin > args.max_seconds:
            print(f"\nstopped after {len(rows)} of {len(args.configs)} rows (--max-seconds)")
            break
        rows.append(run_row(name, COMPARISONS[name], args))
        print_row(rows[-1])
        if args.json:  # a run that is cut short leaves what it has
            content = {"machine": machine, "quick": args.quick, "rows": rows}
            report.write_json(args.json, content, quiet=True)
    print("\n".join(["", HEADING, *target_lines(rows)]))
    if args.json:
        print(f"wrote {args.json}")
    failed = any("failed" in row for row in rows)
    missed = any(one["good"] is False for row in rows for one in row.get("comparisons", ()))
    return 1 if failed or (missed and not args.quick) else 0


if __name__ == "__main__":
    sys.exit(main())
