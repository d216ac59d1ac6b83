"""Everything that a GPU is needed for, in one run with a limit on its time.

Builds and installs this tree with CUDA, tests it, looks at it under compute-sanitizer, measures
steps, launches and DRAM traffic, trains. All figures go to FOLDER/gpu.json, written after every
part; the benchmark's and the training's own JSON and pictures lie beside it, and gpu.log.

Examples:
    python bench/gpu.py --out build/gpu
    python bench/gpu.py --out build/gpu --parts build step --budget 240
    python bench/gpu.py --out build/gpu --dry-run
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from common import without_folders, write_json
from gpu_parts import FAILED, OK, PARTS, TIMED_OUT, Result
from gpu_run import Runner

TOOLS = ("nvcc", "ncu", "compute-sanitizer")
ABOUT = """\
import json, platform, torch
device = torch.cuda.get_device_properties(0)
print(json.dumps({
    "gpu": device.name, "capability": f"{device.major}.{device.minor}",
    "multiprocessors": device.multi_processor_count, "l2_mib": device.L2_cache_size >> 20,
    "memory_mib": device.total_memory >> 20, "torch": torch.__version__,
    "cuda": torch.version.cuda, "python": platform.python_version(),
}))"""


def about(runner: Runner) -> dict[str, Any]:
    """What a figure depends on; what could not be found out is None."""
    device = runner.python("-c", ABOUT).text.strip().splitlines()
    try:
        machine = json.loads(device[-1])
    except (IndexError, ValueError):
        machine = {"gpu": None}
    smi = runner.tool("nvidia-smi")
    query = ["--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"]
    limits = runner.run([smi, *query, "--format=csv,noheader"], 30.0).tail(1) if smi else []
    machine["driver_and_limits"] = limits[0] if limits else None
    for name in TOOLS:
        path = runner.tool(name)
        version = runner.run([path, "--version"], 30.0).tail(2) if path else None
        machine[name] = None if version is None else " ".join(version)
    git = ["git", "-c", "safe.directory=*"]
    commit = runner.run([*git, "rev-parse", "HEAD"], 30.0) if runner.tool("git") else None
    machine["commit"] = commit.text.strip() if commit and commit.good else None
    if machine["commit"]:
        changed = runner.run([*git, "status", "--porcelain"], 30.0).text.splitlines()
        machine["changed_files"] = len(changed)
    return machine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="where all files go")
    usual = [name for name, part in PARTS.items() if part.default]
    add("--parts", nargs="+", choices=PARTS, default=usual, metavar="PART",
        help=f"in this order (default: {' '.join(usual)}; also: tune)")  # fmt: skip
    add("--budget", type=float, default=560.0, metavar="S",
        help="seconds in all, shared by the parts (default: %(default)s)")  # fmt: skip
    add("--dry-run", action="store_true", help="print the commands and run none")
    return parser.parse_args()


def require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            f"gpu.py: torch {torch.__version__} finds no CUDA device here, so nothing was run "
            "(--dry-run shows the commands)"
        )


def run_part(name: str, runner: Runner, left: float, weights: float) -> Result:
    """One part within its share of the time; whatever it raises is its result."""
    start = time.monotonic()
    runner.deadline = start + left * PARTS[name].share / weights
    runner.commands = []
    try:
        result = PARTS[name].run(runner)
    except Exception as error:  # a fault of this script must not cost the other parts
        result = {"verdict": FAILED, "why": f"{type(error).__name__}: {error}"}
    result["seconds"] = round(time.monotonic() - start, 1)
    result["commands"] = runner.commands
    return result


def run_all(args: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    end = time.monotonic() + args.budget
    runner.deadline = end
    content: dict[str, Any] = {
        "command": without_folders(shlex.join(["python", "bench/gpu.py", *sys.argv[1:]])),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": about(runner),
        "parts": {},
    }
    file = args.out / "gpu.json"
    for index, name in enumerate(args.parts):
        if content["parts"].get("build", {}).get("verdict", OK) != OK:
            content["parts"][name] = {"verdict": "not run", "why": "there is no build"}
            continue
        left = end - time.monotonic()
        if left < 10:
            content["parts"][name] = {"verdict": "not run", "why": "no time left"}
            continue
        print(f"{name}:" if args.dry_run else f"{name} ...", flush=True)
        weights = sum(PARTS[other].share for other in args.parts[index:])
        result = content["parts"][name] = run_part(name, runner, left, weights)
        if not args.dry_run:
            print(f"  {result['verdict']}, {result['seconds']} s", flush=True)
            write_json(file, content, quiet=True)
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
    lines = [*part.get("failures", []), *part.get("first", []), *part.get("tail", [])[-30:]]
    for name, inner in part.items():
        if isinstance(inner, dict) and (found := _why(inner)):
            lines += [f"{name}:", *found]
    return lines


def _remark(part: Result) -> str:
    if "why" in part:
        return str(part["why"])
    inner = {name: row for name, row in part.items() if isinstance(row, dict)}
    if "all" in part:
        return "; ".join(f"{name}: {row['passed']} passed, {row['failed']} failed, "
                         f"{row['skipped']} skipped" for name, row in inner.items())  # fmt: skip
    if "memcheck" in part:
        return "; ".join(f"{tool}: {row['verdict']}, {row['errors_in_ours']} errors in fusedopt"
                         for tool, row in inner.items())  # fmt: skip
    if "targets" in part:
        missed = sum("MISS" in line for line in part["targets"])
        return f"{part['cases']} cases, {missed} targets missed"
    return ""


def main() -> int:
    args = parse_args()
    if not args.dry_run:
        require_cuda()
        args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        runner = Runner(args.out, Path(scratch), args.dry_run)
        content = run_all(args, runner)
    if args.dry_run:
        return 0
    good = report(content)
    write_json(args.out / "gpu.json", content)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
