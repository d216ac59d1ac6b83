"""How many kernels and copies one step puts on the GPU, counted by torch's profiler.

A step is profiled after two others, when states exist and nothing has moved since.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import load_fusedopt, machine_info, parse_device, write_json
from contenders import CONTENDERS
from measure import Case, param_groups, values_for
from recipes import Step, reason
from workloads import WORKLOADS

CASES = (
    ("AdamW", "bfloat16", "llama-8b-eighth"),
    ("AdamW", "float32", "many-10000x64"),
    ("AdamW", "float32", "groups-400x5000"),
    ("SGD", "float32", "many-1000x1000"),
)
PROMISED = CASES[0]  # one launch
ASKED = ("fusedopt", "torch-fused", "torch-foreach", "apex", "te")
ON_DEVICE = {"kernel": "kernels", "gpu_memcpy": "copies", "gpu_memset": "fills"}


def count(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a trace in Chrome's format holds of work on the device and of waits for it."""
    counts: Counter[str] = Counter(dict.fromkeys(ON_DEVICE.values(), 0))
    kernels: Counter[str] = Counter()
    waits = 0
    for event in events:
        category, name = event.get("cat"), event.get("name", "")
        if category in ON_DEVICE:
            counts[ON_DEVICE[category]] += 1
        if category == "kernel":
            plain = name.replace("(anonymous namespace)::", "")
            kernels[plain.partition("(")[0].partition("<")[0][:80]] += 1
        if category == "cuda_runtime" and "StreamSynchronize" in name:
            waits += 1
    return {**counts, "waits": waits, "names": dict(kernels.most_common(5))}


def profile(step: Step, device: torch.device) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return count(json.loads(path.read_text(errors="replace"))["traceEvents"])


def run_case(case: Case, names: list[str]) -> dict[str, Any]:
    """Each contender alone and on the same params: the memory of one at a time."""
    pairs = values_for(case)
    results: dict[str, Any] = {}
    for name in names:
        gc.collect()
        try:
            step = CONTENDERS[name].make(param_groups(case, pairs, True), case.optimizer)
            for _ in range(2):
                step()
            results[name] = profile(step, case.device)
        except Exception as error:
            results[name] = {"skipped": reason(error)}
    return results


def show(case: Case, results: dict[str, Any]) -> None:
    print(f"\n{case.title}: {case.workload.tensors} tensors, {len(case.workload.groups)} groups")
    for name, row in results.items():
        if "skipped" in row:
            print(f"  {name:15}skipped: {row['skipped']}")
            continue
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in row["names"].items())
        print(
            f"  {name:15}{row['kernels']:6} kernels, {row['copies']} copies, "
            f"{row['fills']} fills, {row['waits']} waits  ({kernels})"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", type=parse_device, default="cuda", help="default: cuda")
    add("--contenders", nargs="+", choices=CONTENDERS, default=ASKED, metavar="NAME",
        help=f"default: {' '.join(ASKED)}")  # fmt: skip
    add("--shapes", nargs="+", choices=WORKLOADS, metavar="NAME", help="default: a few")
    add("--json", type=Path, metavar="FILE", help="write machine and counts")
    args = parser.parse_args()
    load_fusedopt()
    cases = CASES
    if args.shapes:
        cases = tuple(("AdamW", "float32", name) for name in args.shapes)
    rows, good = [], True
    for optimizer, dtype, workload in cases:
        case = Case(optimizer, getattr(torch, dtype), WORKLOADS[workload], args.device)
        results = run_case(case, args.contenders)
        show(case, results)
        key = {"optimizer": optimizer, "dtype": dtype, "workload": workload}
        rows.append(key | {"contenders": results})
        if (optimizer, dtype, workload) == PROMISED and "fusedopt" in results:
            kernels = results["fusedopt"].get("kernels")
            good = kernels == 1
            print(f"  {'pass' if good else 'MISS'}  launches of fusedopt: {kernels}, promised 1")
        if args.json:
            content = {"machine": machine_info(args.device), "launches": rows, "good": good}
            write_json(args.json, content, quiet=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
