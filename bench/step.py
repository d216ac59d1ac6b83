"""Time of one optimizer step: fusedopt beside torch.optim and other packages, interleaved.

Examples:
    python bench/step.py                    AdamW in float32, all workloads, all contenders
    python bench/step.py --optimizer SGD --dtype bfloat16 --shapes gpt2-124m many-1000x64
    python bench/step.py --targets          what this project promises: pass or miss
    python bench/step.py --device cuda --targets --max-seconds 300
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import ModuleType

import targets
import targets_cuda
import torch
from common import (
    OPTIMIZERS,
    describe,
    load_fusedopt,
    load_pyplot,
    machine_info,
    parse_device,
    write_json,
)
from contenders import CONTENDERS
from measure import Case, run_case
from race import MIN_ROUNDS
from step_report import CUDA_LEGEND, LEGEND, draw, print_case
from workloads import WORKLOADS, all_workloads

DTYPES = ("float32", "bfloat16", "float16", "float64")


def promises(device: torch.device) -> ModuleType:
    return targets_cuda if device.type == "cuda" else targets


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", nargs="+", choices=OPTIMIZERS, help="default: AdamW")
    add("--dtype", nargs="+", choices=DTYPES, help="of params, grads and states; default: float32")
    add("--shapes", nargs="+", choices=["all", *WORKLOADS], metavar="NAME",
        help=f"default: all; the large ones on a GPU only ({', '.join(WORKLOADS)})")  # fmt: skip
    add("--contenders", nargs="+", choices=["all", *CONTENDERS], metavar="NAME",
        help=f"default: all ({', '.join(CONTENDERS)})")  # fmt: skip
    add("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    add("--repeats", type=int, default=15, metavar="N", help="rounds a case (default: %(default)s)")
    add("--budget", type=float, default=20.0, metavar="S",
        help=f"seconds a case, kept after {MIN_ROUNDS} rounds (default: %(default)s)")  # fmt: skip
    add("--max-seconds", type=float, default=float("inf"), metavar="S",
        help="in all: no further case is begun after that (default: no limit)")  # fmt: skip
    add("--device", type=parse_device, default=torch.device("cpu"), help="cpu (default) or cuda")
    add("--json", type=Path, metavar="FILE", help="write machine and figures, anew after each case")
    add("--plot", type=Path, metavar="FILE", help="write a bar chart of the ratios (PNG)")
    add("--quick", action="store_true", help=f"{MIN_ROUNDS} rounds, no more than needed to look")
    add("--targets", action="store_true",
        help="compare with the promised figures, exit status 1 if one is missed; chooses the "
        "optimizers, dtypes, shapes and contenders needed unless they are given")  # fmt: skip
    args = parser.parse_args()
    if min(args.repeats, args.threads or 1) < 1:
        parser.error("--repeats and --threads must be at least 1")
    return _fill_defaults(args)


def _fill_defaults(args: argparse.Namespace) -> argparse.Namespace:
    needed = promises(args.device) if args.targets else None
    args.optimizer = args.optimizer or (needed.OPTIMIZERS if needed else ["AdamW"])
    args.dtype = args.dtype or (needed.DTYPES if needed else ["float32"])
    args.shapes = args.shapes or (needed.WORKLOADS if needed else ["all"])
    args.contenders = args.contenders or (needed.CONTENDERS if needed else ["all"])
    if "all" in args.shapes:
        args.shapes = all_workloads(args.device.type)
    if "all" in args.contenders:
        args.contenders = list(CONTENDERS)
    if args.quick:
        args.repeats, args.budget = MIN_ROUNDS, 0.0
    return args


def main() -> int:
    args = parse_args()
    load_fusedopt()
    if args.plot:
        load_pyplot()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = machine_info(args.device)
    print(describe(machine))
    if (machine["load_average"] or 0) > 0.5:
        print("warning: this machine is busy with other work, which slows contenders unequally")
    cases, start = [], time.monotonic()
    asked = [(o, d, s) for o in args.optimizer for d in args.dtype for s in args.shapes]
    for optimizer, dtype, shapes in asked:
        if time.monotonic() - start > args.max_seconds:
            print(f"\nstopped after {len(cases)} of {len(asked)} cases (--max-seconds)")
            break
        case = Case(optimizer, getattr(torch, dtype), WORKLOADS[shapes], args.device)
        chosen = [CONTENDERS[name] for name in args.contenders]
        cases.append(run_case(case, chosen, args.repeats, args.budget))
        print_case(case.title, cases[-1])
        if args.json:  # a run that is cut short leaves what it has
            write_json(args.json, {"machine": machine, "cases": cases}, quiet=True)
    print(f"\n{LEGEND if args.device.type == 'cpu' else CUDA_LEGEND}")
    if args.json:
        print(f"wrote {args.json}")
    if args.plot:
        draw(cases, machine, args.plot)
    if not args.targets:
        return 0
    lines, good = promises(args.device).compare(cases)
    print("\n".join(["", "Promised figures:", *lines]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
