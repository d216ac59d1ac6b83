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
from typing import Any

import torch

from lib import report
from lib.cases import WORKLOADS, Workload
from lib.configs import COMPARISONS, SHORT, Comparison, difference_between, parameters
from lib.targets import HEADING
from lib.timing import Candidate, background_load, fresh_grads, measure

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


def measure_row(row: Comparison, work: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of all candidates; what they are made of is freed with this function's frame."""
    shapes = [shape for group in work.groups for shape in group]
    every = parameters(row.configs, shapes, args.device)
    timed = []
    for config, params in zip(row.configs, every, strict=True):
        step = config.make(params)[0]
        step()  # creates the states
        moved, note = (
            config.bytes_per_element * work.elements,
            f"{SHORT[config.dtype]} {config.what}",
        )
        before = fresh_grads(params if args.grads == "fresh" else [])
        timed.append(Candidate(config.name, step, moved, len(params), note, before))
    with background_load() if row.busy else contextlib.nullcontext():
        more = BUSY_ROUNDS if row.busy else 1
        waits = any(config.scaled for config in row.configs)
        named, figures = measure(
            timed, args.device, STORED * work.elements, args, wall_only=waits, more=more
        )
    for config in row.configs:
        figures["candidates"][config.name] |= {
            "what": config.what, "dtype": SHORT[config.dtype],
            "bytes_per_element": config.bytes_per_element,
        }  # fmt: skip
    kind = row.kind(args.device)
    return figures | {"comparisons": [pair.compare(named, args.device, kind) for pair in row.pairs]}


def run_row(name: str, row: Comparison, args: argparse.Namespace) -> dict[str, Any]:
    is_on_gpu = args.device.type == "cuda"
    work = WORKLOADS[(is_on_gpu and row.on_gpu) or row.workload]
    work = smaller(work) if args.quick else work
    result: dict[str, Any] = {
        "row": name, "title": row.title, "workload": work.name, "busy": row.busy,
        "tensors": work.tensors, "elements": work.elements,
        "grads": args.grads, "cache": args.cache,
    }  # fmt: skip
    gc.collect()  # what the last row left
    if is_on_gpu:
        torch.cuda.empty_cache()
    try:
        for config in row.configs[:-1] if row.is_alike else ():
            if difference := difference_between(config, row.configs[-1], args.device):
                return result | {"failed": f"not the same update: {difference}"}
        return result | measure_row(row, work, args)
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
    report.print_rows(row["title"], row)
    print("\n".join(target_lines([row])))


def main() -> int:
    parser = report.make_parser(__doc__, timed="configuration")
    add = parser.add_argument
    add("--configs", "--rows", nargs="+", choices=COMPARISONS, metavar="NAME",
        help=f"default: those with a target on the device ({', '.join(COMPARISONS)})")  # fmt: skip
    args = report.parse_args(parser)
    usual = [name for name, row in COMPARISONS.items() if args.device.type in row.devices]
    args.configs = args.configs or usual
    content = report.run_all(
        args, "rows", args.configs, lambda name: run_row(name, COMPARISONS[name], args), print_row
    )
    rows = content["rows"]
    print("\n".join(["", HEADING, *target_lines(rows)]))
    failed = any("failed" in row for row in rows)
    missed = any(one["good"] is False for row in rows for one in row.get("comparisons", ()))
    return 1 if failed or (missed and not args.quick) else 0


if __name__ == "__main__":
    sys.exit(main())
