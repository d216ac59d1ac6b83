"""Everything that a GPU is needed for, in one run with a limit on its time.

Builds and installs this tree with CUDA, tests it, looks at it under compute-sanitizer, measures
steps, launches and DRAM traffic, trains: in 12 minutes on 16 cores, each part alone in 4. All
figures go to FOLDER/gpu.json, written after every part; the benchmark's and the training's own
JSON and pictures lie beside it, and gpu.log. Without the part "build", what is installed is used.

Examples:
    python bench/gpu/run_all.py
    python bench/gpu/run_all.py --wheel dist/fusedopt-0.1.0-[...].whl --parts build tests
    python bench/gpu/run_all.py --out build/gpu-step --parts step
    python bench/gpu/run_all.py --dry-run
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from parts import FAILED, OK, PARTS, SHOW_CONFIG, TIMED_OUT, USUAL, Result, Runner

from lib.report import without_folders, write_json

# Of 4 and 12 minutes, less the start of Python and torch and the end of what must be ended.
PART_S, ALL_S = 230.0, 700.0
ABOUT = """\
import json, platform, sys, torch
sys.path.insert(0, "bench")
from lib.report import gpu_info
devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
found = gpu_info(devices[0])
archs = {gpu_info(each)["capability"].replace(".", "") for each in devices}
print(json.dumps({
    "gpu": torch.cuda.get_device_name(devices[0]), "torch": torch.__version__,
    "python": platform.python_version(), "archs": ";".join(sorted(archs, key=int)), **found,
}))"""


def about(runner: Runner) -> dict[str, Any]:
    """What a figure depends on; what could not be found out is None."""

    def end_of(lines: int, name: str, *options: str) -> str | None:
        path = runner.tool(name)
        run = runner.run([path, *options], 30.0) if path else None
        return " ".join(run.tail(lines)) if run and run.good else None

    machine: dict[str, Any] = {"gpu": None}
    device = runner.python("-c", ABOUT)  # in a process that ends and leaves the GPU alone
    with contextlib.suppress(IndexError, ValueError):
        machine = json.loads(device.text.strip().splitlines()[-1])
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    machine["driver_and_limits"] = end_of(1, "nvidia-smi", query, "--format=csv,noheader")
    for name in ("nvcc", "ncu", "compute-sanitizer"):
        machine[name] = end_of(2, name, "--version")
    git = ("git", "-c", "safe.directory=*")
    machine["commit"] = end_of(1, *git, "rev-parse", "HEAD")
    if machine["commit"]:
        changed = runner.run([*git, "status", "--porcelain"], 30.0)
        machine["changed_files"] = len(changed.text.splitlines())
    return machine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    in_order = f"in this order (default: {' '.join(USUAL)}; also: tune)"
    in_all = f"in all, shared by the parts (default: {PART_S:g} a part, {ALL_S:g})"
    add("--out", type=Path, default="build/gpu", metavar="FOLDER", help="default: %(default)s")
    add("--parts", nargs="+", choices=PARTS, default=USUAL, metavar="PART", help=in_order)
    add("--wheel", type=Path, metavar="FILE", help="install this; the part build builds nothing")
    add("--budget", type=float, metavar="S", help=in_all)
    add("--commit", metavar="ID", help="of these sources, if git does not know them")
    add("--dry-run", action="store_true", help="print the commands and run none")
    args = parser.parse_args()
    if args.wheel and "build" not in args.parts:
        parser.error("--wheel is for the part build, which is not among --parts")
    if args.wheel and not (args.wheel.is_file() or args.dry_run):
        parser.error(f"--wheel: there is no file {args.wheel}")
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error(f"torch {torch.__version__} finds no CUDA device here, so nothing was run "
                     "(--dry-run shows the commands)")  # fmt: skip
    args.wheel = args.wheel and args.wheel.resolve()
    return args


def run_part(name: str, runner: Runner, limit: float) -> Result:
    """One part within its time; whatever it raises is its result."""
    start = time.monotonic()
    runner.deadline = start + limit
    runner.commands = []
    try:
        result = PARTS[name][0](runner)
    except Exception as error:  # a fault of this script must not cost the other parts
        result = {"verdict": FAILED, "why": f"{type(error).__name__}: {error}"}
    seconds = round(time.monotonic() - start, 1)
    return result | {"seconds": seconds, "commands": runner.commands}


def run_all(args: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    budget = args.budget or min(PART_S * len(args.parts), ALL_S)
    at_most = budget if args.budget else PART_S
    end = runner.deadline = time.monotonic() + budget
    content: dict[str, Any] = {
        "command": without_folders(shlex.join(["python", "bench/gpu/run_all.py", *sys.argv[1:]])),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": about(runner) | ({"commit": args.commit} if args.commit else {}),
        "parts": {},
    }
    runner.archs = "THIS_GPU" if args.dry_run else content["machine"].get("archs")
    if "build" not in args.parts:
        shown = runner.python("-c", SHOW_CONFIG, installed=True)
        content["machine"]["installed"] = shown.tail()
    for index, name in enumerate(args.parts):
        left = end - time.monotonic()
        no_build = content["parts"].get("build", {}).get("verdict", OK) != OK
        if no_build or left < 10:
            why = "there is no build" if no_build else "no time left"
            content["parts"][name] = {"verdict": "not run", "why": why}
            continue
        shares = [PARTS[each][1] for each in args.parts[index:]]
        limit = min(left * shares[0] / sum(shares), at_most)
        print(f"{name}, {limit:.0f} s at most:" if args.dry_run else f"{name} ...", flush=True)
        result = content["parts"][name] = run_part(name, runner, limit)
        if args.dry_run:  # as if it had taken them
            end -= limit
            continue
        print(f"  {result['verdict']}, {result['seconds']} s", flush=True)
        write_json(args.out / "gpu.json", content)
    return content


def report(content: dict[str, Any]) -> bool:
    """The table that a reader of the output's end sees."""
    for name, part in content["parts"].items():
        if part["verdict"] in (FAILED, TIMED_OUT):
            print(f"\n--- {name}: {part['verdict']} {part.get('why', '')}".rstrip())
            print("\n".join(_why(part)))
    for part in content["parts"].values():
        print("".join(f"{line}\n" for line in part.get("targets", [])), end="")
    machine = content["machine"]
    print(f"\n{machine['gpu']}, torch {machine.get('torch')}, commit {machine['commit']}")
    for name, part in content["parts"].items():
        print(f"{name:11}{part['verdict']:15}{part.get('seconds', 0):7.1f} s  {_remark(part)}")
    return all(part["verdict"] == OK for part in content["parts"].values())


def _why(part: Result) -> list[str]:
    """What a part, or the commands within it, left as an explanation."""
    lines = [*part.get("failures", []), *part.get("first", []), *part.get("tail", [])[-30:],
             *part.get("csv", [])]  # fmt: skip
    for name, inner in part.items():
        if isinstance(inner, dict) and (found := _why(inner)):
            lines += [f"{name}:", *found]
    return lines


def _remark(part: Result) -> str:
    if "why" in part:
        return str(part["why"])
    if "targets" in part:
        missed = sum("MISS" in line for line in part["targets"])
        return f"{part['cases']} cases, {missed} targets missed"
    keys = ("passed", "failed", "skipped", "errors_in_ours")
    inner = {name: row for name, row in part.items() if isinstance(row, dict) and "passed" in row}
    return "; ".join(f"{name}: " + ", ".join(f"{row[key]} {key}" for key in keys if key in row)
                     for name, row in inner.items())  # fmt: skip


def main() -> int:
    args = parse_args()
    args.out = args.out.resolve()
    if not args.dry_run:
        args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        runner = Runner(args.out, Path(scratch), args.dry_run, args.wheel)
        content = run_all(args, runner)
    return 0 if args.dry_run or report(content) else 1


if __name__ == "__main__":
    sys.exit(main())
