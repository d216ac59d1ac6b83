"""What Nsight Compute watches: one step of each case, with a mark before each.

    ncu --profile-from-start off --kernel-name "regex:update_kernel|spin_kernel" ... \\
        python bench/ncu_target.py --json cases.json

The mark is torch's spin_kernel, so that the launches of a case can be told apart in ncu's table.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
from common import load_fusedopt, parse_device, write_json
from contenders import CONTENDERS
from measure import Case, param_groups, values_for
from workloads import WORKLOADS

CASES = [
    (optimizer, dtype, workload)
    for workload in ("one-64Mi", "gpt2-124m", "many-1000x1000", "many-10000x64")
    for optimizer in ("AdamW", "SGD")
    for dtype in ("float32", "bfloat16")
]


def show_to_profiler(case: Case) -> None:
    step = CONTENDERS["fusedopt"].make(param_groups(case, values_for(case), True), case.optimizer)
    for _ in range(2):  # states exist and tables are sent
        step()
    if case.device.type != "cuda":
        step()
        return
    torch.cuda.synchronize(case.device)
    torch.cuda.profiler.start()
    torch.cuda._sleep(1000)
    step()
    torch.cuda.synchronize(case.device)
    torch.cuda.profiler.stop()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", type=parse_device, default="cuda", help="default: cuda")
    add("--shapes", nargs="+", choices=WORKLOADS, metavar="NAME", help="default: a few")
    add("--json", type=Path, metavar="FILE", help="write the cases, in the order of the marks")
    args = parser.parse_args()
    load_fusedopt()
    shown = []
    for optimizer, dtype, workload in CASES:
        if args.shapes and workload not in args.shapes:
            continue
        case = Case(optimizer, getattr(torch, dtype), WORKLOADS[workload], args.device)
        moved = case.bytes_per_element * case.workload.elements
        written = moved - case.footprint  # all but the grad are written once as well
        shown.append({
            "optimizer": optimizer, "dtype": dtype, "workload": workload,
            "expected_read": case.footprint, "expected_written": written,
        })  # fmt: skip
        if args.json:  # before its launches: a run cut short leaves the names of its marks
            write_json(args.json, {"cases": shown}, quiet=True)
        show_to_profiler(case)
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
