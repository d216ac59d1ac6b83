"""How long one optimizer step takes: fusedopt beside torch.optim and other packages, interleaved.

Examples:
    python bench/step.py                    AdamW in float32, all workloads, all candidates
    python bench/step.py --optimizer SGD --dtype bfloat16 --shapes gpt2-124m many-1000x64
    python bench/step.py --grads kept --cache cold --shapes many-1000x1000
    python bench/step.py --targets          what this project aims at: pass or miss
    python bench/step.py --targets --optimizer RMSprop NAdam SparseAdam
    python bench/step.py --device cuda --targets --max-seconds 300
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch

from lib import report
from lib.baselines import BASELINES, Baseline, NotComparableError, who_can_take_part
from lib.cases import HYPER, WORKLOADS, Case, gpt, param_groups
from lib.targets import HEADING, TARGETS
from lib.timing import MIB, Candidate, fresh_grads, measure

DTYPES = ("float32", "bfloat16", "float16", "float64")


def parse_args() -> argparse.Namespace:
    parser = report.make_parser(__doc__, timed="case")
    add = parser.add_argument
    add("--optimizer", nargs="+", choices=HYPER, help="default: AdamW")
    add("--dtype", nargs="+", choices=DTYPES, help="of params, grads and states; default: float32")
    add("--shapes", nargs="+", choices=["all", *WORKLOADS], metavar="NAME",
        help=f"default: all; the large ones on a GPU only ({', '.join(WORKLOADS)})")  # fmt: skip
    add("--candidates", nargs="+", choices=["all", *BASELINES], metavar="NAME",
        help=f"default: all ({', '.join(BASELINES)})")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help="write a bar chart of the ratios (PNG)")
    add("--targets", action="store_true",
        help="compare with the targets, exit status 1 if one is missed; chooses the optimizers, "
        "dtypes, shapes and candidates needed unless they are given")  # fmt: skip
    args = report.parse_args(parser)
    needed = TARGETS[args.device.type]
    usual = [["AdamW"], ["float32"], ["all"], ["all"]]
    if args.targets:
        asked = args.optimizer or list(gpt.HYPER)
        usual = [asked, *(needed.choices(place, asked) for place in (1, 2)), needed.candidates]
    for name, value in zip(("optimizer", "dtype", "shapes", "candidates"), usual, strict=True):
        setattr(args, name, getattr(args, name) or value)
    if "all" in args.shapes:
        on_gpu = args.device.type == "cuda"
        args.shapes = [name for name, work in WORKLOADS.items() if on_gpu or not work.large]
    if "all" in args.candidates:
        args.candidates = list(BASELINES)
    return args


def first_steps(
    case: Case, notes: dict[Baseline, str], shared: bool, grads: str
) -> tuple[list[Candidate], dict[str, str]]:
    """Give all who take part their tensors and make their first step."""
    template = case.template()
    moved = case.bytes_per_element * case.workload.elements
    candidates, skipped = [], {}
    for baseline, note in notes.items():
        try:
            groups = param_groups(template, shared)
            step = baseline.make(groups, case.optimizer)
            step()  # creates the states, builds caches, compiles
        except Exception as error:
            skipped[baseline.name] = report.reason(error, NotComparableError)
            continue
        is_fresh = grads == "fresh" and not baseline.keeps_grads
        params = [param for group in groups for param in group["params"]]
        before = fresh_grads(params if is_fresh else [])
        candidates.append(Candidate(baseline.name, step, moved, len(params), note, before))
    return candidates, skipped


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one case; the result is what goes into the JSON file."""
    gc.collect()  # what the last case left
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    asked = [BASELINES[name] for name in args.candidates]
    notes, skipped = who_can_take_part(asked, case.optimizer, case.dtype, case.device)
    free = report.available_memory(case.device) * 0.8
    shared = case.memory(len(notes), shared=False) > free
    needed = case.memory(len(notes), shared)
    result: dict[str, Any] = {
        **case.key,
        "grads": args.grads, "cache": args.cache,
        "tensors": case.workload.tensors, "groups": len(case.workload.groups),
        "elements": case.workload.elements, "bytes_per_element": case.bytes_per_element,
        "memory_mib": needed // MIB, "shared_params": shared,
        "rounds": 0, "candidates": {}, "probes": {}, "skipped": skipped,
    }  # fmt: skip
    if case.device.type == "cuda":
        # Repeated steps on little data read it from the GPU's cache, where training would not.
        l2 = report.gpu_info(case.device)["l2_mib"]
        result |= {"l2_mib": l2, "may_sit_in_l2": case.footprint <= l2 * MIB}
    if needed > free:
        why = f"needs {needed // MIB} MiB, {int(free) // MIB} MiB may be used"
        return result | {"skipped": skipped | {baseline.name: why for baseline in notes}}
    candidates, failed = first_steps(case, notes, shared, args.grads)
    try:
        _, figures = measure(candidates, case.device, case.footprint, args)
    except torch.OutOfMemoryError as error:  # of a GPU: temporaries, which nobody can foresee
        failed |= {candidate.name: report.reason(error) for candidate in candidates}
        figures = {}
    return result | figures | {"skipped": skipped | failed}


def main() -> int:
    args = parse_args()
    asked = [
        Case(optimizer, getattr(torch, dtype), WORKLOADS[shapes], args.device)
        for optimizer in args.optimizer for dtype in args.dtype for shapes in args.shapes
    ]  # fmt: skip
    asked = [case for case in asked if case.makes_sense]
    content = report.run_all(
        args, "cases", asked, lambda case: run_case(case, args), report.print_case
    )
    cases = content["cases"]
    print(f"\n{report.LEGEND}")
    if args.plot:
        report.draw(content, list(BASELINES), args.plot)
    if not args.targets:
        return 0
    lines, good = TARGETS[args.device.type].compare(cases)
    print("\n".join(["", HEADING, *lines]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
