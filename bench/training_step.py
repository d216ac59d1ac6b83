"""Time of everything that a training step does to parameters, interleaved in one process.

Clipping, low-precision states and masters, averaging, GradScaler: fusedopt's one pass beside what
torch offers for the same work. Before it is timed, each contender's update is checked.

Examples:
    python bench/training_step.py
    python bench/training_step.py --rows clip ema --repeats 30 --json build/training-step.json
    python bench/training_step.py --device cuda --budget 3
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from clocks import Entrant
from common import describe, load_fusedopt, machine_info, parse_device, spread, write_json
from neighbour import busy_neighbour
from race import MIN_ROUNDS, bandwidth, bandwidth_probes, clock_for, percent, probe_size, race
from recipes import reason
from training_report import good, lines_of, show
from training_rows import ROWS, Bar, Row
from training_work import SHORT, disagreement, parameters
from workloads import WORKLOADS, Workload

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


def compare(bar: Bar, entrants: dict[str, Entrant], device: torch.device) -> dict[str, Any]:
    promised = bar.promised(device, load_fusedopt()._config.cpu_isa())
    value = bar.value(entrants)
    good = None if promised is None else value["median"] >= promised
    key = {"of": bar.of, "against": bar.against, "by": "bytes/s" if bar.by_bytes else "time"}
    return {**key, "text": bar.text, "value": value, "target": promised, "good": good}


def measure(row: Row, work: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of all contenders; what they are made of is freed with this function's frame."""
    device = args.device
    shapes = [shape for group in work.groups for shape in group]
    footprint = STORED * work.elements
    racing = []
    for contender, params in zip(row.works, parameters(row.works, shapes, device), strict=True):
        step = contender.make(params)[0]
        step()  # creates the states
        moved = contender.bytes_per_element * work.elements
        racing.append(Entrant(contender.name, step, moved))
    entrants = racing + bandwidth_probes(probe_size(device, footprint), device)
    gc.disable()
    try:
        with busy_neighbour() if row.busy else contextlib.nullcontext():
            clock = clock_for(device, footprint, wall_only=True)
            more = BUSY_ROUNDS if row.busy else 1
            race(clock, entrants, more * args.repeats, more * args.budget)
    finally:
        gc.enable()
    named = {entrant.name: entrant for entrant in entrants}
    return {
        "rounds": len(entrants[0].seconds),
        "contenders": {
            contender.name: {
                "what": contender.what,
                "dtype": SHORT[contender.dtype],
                "ms": spread([1e3 * seconds for seconds in named[contender.name].seconds]),
                "bytes_per_element": contender.bytes_per_element,
                "gb_per_s": bandwidth(named[contender.name]),
                "percent_of_copy": percent(named[contender.name], named["copy"]),
            }
            for contender in row.works
        },
        "probes": {name: bandwidth(named[name]) for name in ("copy", "multiply")},
        "comparisons": [compare(bar, named, device) for bar in row.bars],
    }


def run_row(name: str, row: Row, args: argparse.Namespace) -> dict[str, Any]:
    is_on_gpu = args.device.type == "cuda"
    work = WORKLOADS[(is_on_gpu and row.on_gpu) or row.workload]
    work = smaller(work) if args.quick else work
    result: dict[str, Any] = {
        "row": name,
        "title": row.title,
        "workload": work.name,
        "tensors": work.tensors,
        "elements": work.elements,
        "busy": row.busy,
    }
    gc.collect()  # what the last row left
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        for contender in row.works[:-1] if row.is_alike else ():
            if difference := disagreement(contender, row.works[-1], args.device):
                return result | {"failed": f"not the same update: {difference}"}
        return result | measure(row, work, args)
    except Exception as error:  # one row's fault must not cost the others
        return result | {"failed": reason(error)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, metavar="ROW",
        help=f"default: those with a target on the device ({', '.join(ROWS)})")  # fmt: skip
    add("--repeats", type=int, default=15, metavar="N", help="rounds a row (default: %(default)s)")
    add("--budget", type=float, default=20.0, metavar="S",
        help=f"seconds a row, kept after {MIN_ROUNDS} rounds (default: %(default)s)")  # fmt: skip
    add("--max-seconds", type=float, default=float("inf"), metavar="S",
        help="in all: no further row is begun after that (default: no limit)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    add("--device", type=parse_device, default=torch.device("cpu"), help="cpu (default) or cuda")
    add("--json", "--out", type=Path, metavar="FILE",
        help="write machine and figures, anew after each row")  # fmt: skip
    add("--quick", action="store_true", help="small shapes, few rounds, exit status 0 after MISS")
    args = parser.parse_args()
    if min(args.repeats, args.threads or 1) < 1:
        parser.error("--repeats and --threads must be at least 1")
    if args.quick:
        args.repeats, args.budget = MIN_ROUNDS, 0.0
    args.rows = args.rows or [name for name in ROWS if args.device.type in ROWS[name].devices]
    return args


def main() -> int:
    args = parse_args()
    load_fusedopt()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = machine_info(args.device)
    print(describe(machine))
    if (machine["load_average"] or 0) > 0.5:
        print("warning: this machine is busy with other work, which slows contenders unequally")
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    for name in args.rows:
        if time.monotonic() - start > args.max_seconds:
            print(f"\nstopped after {len(rows)} of {len(args.rows)} rows (--max-seconds)")
            break
        rows.append(run_row(name, ROWS[name], args))
        show(rows[-1])
        if args.json:  # a run that is cut short leaves what it has
            write_json(args.json, {"machine": machine, "quick": args.quick, "rows": rows},
                       quiet=True)  # fmt: skip
    print("\n".join(["", "Promised figures:", *lines_of(rows)]))
    if args.json:
        print(f"wrote {args.json}")
    failed = any("failed" in row for row in rows)
    return 0 if good(rows) or (args.quick and not failed) else 1


if __name__ == "__main__":
    sys.exit(main())
