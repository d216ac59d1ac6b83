"""One step of each case under a profiler: how many kernels and copies it puts on the GPU.

torch's profiler counts a step after two others, when states exist and nothing has moved since.
With --for-ncu it is Nsight Compute that watches fusedopt's step, with a mark before each case:

    ncu --profile-from-start off --kernel-name "regex:usual_kernel|spin_kernel" ... \\
        python bench/gpu/launches.py --for-ncu --json cases.json

The mark is torch's spin_kernel, so that the launches of a case can be told apart in ncu's table.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib import report
from lib.baselines import BASELINES, NotComparableError
from lib.cases import WORKLOADS, Case, param_groups
from lib.timing import Step

CASES = [
    ("AdamW", "bfloat16", "llama-8b-eighth"),
    ("AdamW", "float32", "many-10000x64"),
    ("AdamW", "float32", "groups-400x5000"),
    ("SGD", "float32", "many-1000x1000"),
]
ONE_LAUNCH = CASES[0]  # is the target
NCU_CASES = [
    (optimizer, dtype, workload)
    for workload in ("one-64Mi", "gpt2-124m", "many-1000x1000", "many-10000x64")
    for optimizer in ("AdamW", "SGD")
    for dtype in ("float32", "bfloat16")
]
ASKED = ("fusedopt", "torch-fused", "torch-foreach", "apex", "te")
ON_DEVICE = {"kernel": "kernels", "gpu_memcpy": "copies", "gpu_memset": "fills"}


def prepared_step(case: Case, name: str) -> Step:
    """Alone and on params that are nobody else's: the memory of one candidate at a time."""
    step = BASELINES[name].make(param_groups(case.template(), True), case.optimizer)
    for _ in range(2):  # states exist and tables are sent
        step()
    return step


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


def wait(device: torch.device) -> None:
    if device.type == "cuda":  # a CPU is good for a look at this program
        torch.cuda.synchronize(device)


def profile(step: Step, device: torch.device) -> dict[str, Any]:
    wait(device)
    with torch.profiler.profile() as profiler:  # of CPU and GPU
        step()
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return count(json.loads(path.read_text(errors="replace"))["traceEvents"])


def count_case(case: Case, names: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    print(f"\n{report.title_of(case.key)}: {case.workload.tensors} tensors")
    for name in names:
        gc.collect()
        try:
            results[name] = profile(prepared_step(case, name), case.device)
        except Exception as error:
            results[name] = {"skipped": report.reason(error, NotComparableError)}
        print(f"  {name:15}" + ", ".join(f"{key}: {value}" for key, value in results[name].items()))
    return results


def show_to_ncu(case: Case) -> None:
    step = prepared_step(case, "fusedopt")
    wait(case.device)
    with torch.cuda.profiler.profile() if case.device.type == "cuda" else nullcontext():
        if case.device.type == "cuda":
            torch.cuda._sleep(1000)
        step()
        wait(case.device)


def main() -> int:
    parser = report.make_parser(__doc__, device="cuda")
    add = parser.add_argument
    add("--candidates", nargs="+", choices=BASELINES, default=ASKED, metavar="NAME",
        help=f"default: {' '.join(ASKED)}")  # fmt: skip
    add("--shapes", nargs="+", choices=WORKLOADS, metavar="NAME", help="default: a few")
    add("--for-ncu", action="store_true", help="mark the cases and count nothing")
    args = report.parse_args(parser)
    asked = [("AdamW", "float32", name) for name in args.shapes or ()]
    asked = asked or (NCU_CASES if args.for_ncu else CASES)
    rows: list[dict[str, Any]] = []
    key = "cases" if args.for_ncu else "launches"
    content: dict[str, Any] = {"machine": report.start(args), key: rows, "good": True}
    for kind in asked:
        optimizer, dtype, workload = kind
        case = Case(optimizer, getattr(torch, dtype), WORKLOADS[workload], args.device)
        if args.for_ncu:
            # All but the grad are written once as well.
            written = case.bytes_per_element * case.workload.elements - case.footprint
            rows.append(case.key | {"expected_read": case.footprint, "expected_written": written})
        else:
            rows.append(case.key | {"candidates": count_case(case, args.candidates)})
            if kind == ONE_LAUNCH and (ours := rows[-1]["candidates"].get("fusedopt")):
                content["good"] = ours.get("kernels") == 1
                print(f"  {'pass' if content['good'] else 'MISS'}  one launch of fusedopt")
        if args.json:  # before ncu's launches: a run cut short leaves the names of its marks
            report.write_json(args.json, content)
        if args.for_ncu:
            show_to_ncu(case)
            gc.collect()
    return 0 if content["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
