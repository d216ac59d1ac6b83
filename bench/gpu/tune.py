"""Compare builds that differ in one constant of csrc/cuda/tuning.h.

Each variant is built in a copy of the tree and measured by step.py in a process of its own; all
take turns, twice. No result of a step depends on these constants: time is all there is to compare.

Examples:
    python bench/gpu/tune.py                                  every constant halved and doubled
    python bench/gpu/tune.py --set kBlockThreads=128,512 --shapes one-64Mi
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib import report

HEADER = Path("csrc/cuda/tuning.h")
CONSTANT = r"(constexpr \w+ {name} = )(\d+);"
FIXED = ("kWarp",)  # of the hardware
SHAPES = ("one-64Mi", "gpt2-124m", "many-1000x1000")
ROUNDS, BUILDERS = 2, 4


@dataclass
class Variant:
    change: tuple[str, int] | None  # a constant and its value; None: as it is
    tree: Path
    error: str = ""
    ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by case

    def build(self) -> None:
        leave_out = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.pyc")
        shutil.copytree(report.ROOT, self.tree, ignore=leave_out)
        if self.change:
            constant = CONSTANT.format(name=self.change[0])
            text = (self.tree / HEADER).read_text()
            changed = re.sub(constant, rf"\g<1>{self.change[1]};", text)
            (self.tree / HEADER).write_text(changed)
        self.run(self.tree, "setup.py", "-q", "build_ext", "--inplace", FUSEDOPT_CUDA="1")

    def measure(self, device: str, shapes: list[str]) -> None:
        result = self.tree / "step.json"
        what = ("--candidates", "fusedopt", "--dtype", "float32", "bfloat16", "--shapes", *shapes)
        self.run(report.ROOT, "bench/step.py", "--device", device, "--quick", *what,
                 "--json", str(result), PYTHONPATH=str(self.tree))  # fmt: skip
        for case in [] if self.error else json.loads(result.read_text())["cases"]:
            if row := case["candidates"].get("fusedopt"):
                ms = row.get("gpu", row)["ms"]["median"]
                self.ms[f"{case['workload']} {case['dtype']}"].append(ms)
            else:
                self.error = str(case["skipped"])

    def run(self, folder: Path, *command: str, **env: str) -> None:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=os.environ | env,
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            self.error = (done.stdout + done.stderr)[-600:]


def changes(asked: list[str] | None) -> list[tuple[str, int]]:
    found = re.findall(CONSTANT.format(name=r"(\w+)"), (report.ROOT / HEADER).read_text())
    known = {name: int(value) for _, name, value in found if name not in FIXED}
    if asked is None:
        return [(n, v) for n, value in known.items() for v in (value // 2, value * 2) if v]
    pairs = []
    for setting in asked:
        name, _, values = setting.partition("=")
        if name not in known or not re.fullmatch(r"\d+(,\d+)*", values):
            raise SystemExit(f"--set {setting}: NAME=VALUE,... with one of {', '.join(known)}")
        pairs += [(name, int(value)) for value in values.split(",")]
    return pairs


def table_of(variants: list[Variant]) -> list[dict[str, Any]]:
    """Median ms, and time / time of the constants as they are."""
    medians = [{case: statistics.median(ms) for case, ms in v.ms.items()} for v in variants]
    table = []
    for variant, ms in zip(variants, medians, strict=True):
        name = "{}={}".format(*variant.change) if variant.change else "as it is"
        ratios = {case: time / medians[0][case] for case, time in ms.items() if case in medians[0]}
        table.append({"name": name, "ms": ms, "ratio": ratios, "error": variant.error})
    return table


def main() -> int:
    parser = report.make_parser(__doc__, device="cuda")
    add = parser.add_argument
    add("--set", nargs="+", metavar="NAME=VALUES", help="default: half and double of each")
    add("--shapes", nargs="+", default=SHAPES, metavar="NAME", help=f"default: {' '.join(SHAPES)}")
    add("--max-seconds", type=float, default=float("inf"), metavar="S",
        help="no further measurement is begun after that (default: no limit)")  # fmt: skip
    args = report.parse_args(parser)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        planned = enumerate([None, *changes(args.set)])
        variants = [Variant(change, Path(folder) / str(number)) for number, change in planned]
        with ThreadPoolExecutor(BUILDERS) as builders:
            list(builders.map(Variant.build, variants))
        print(f"built {len(variants)} variants in {time.monotonic() - start:.0f} s", flush=True)
        for number in range(ROUNDS):
            for variant in variants if number % 2 == 0 else variants[::-1]:
                if not variant.error and time.monotonic() - start < args.max_seconds:
                    variant.measure(str(args.device), args.shapes)
            if args.json:
                report.write_json(args.json, {"variants": table_of(variants)})
    print("time / time of the constants as they are (ms), on the device")
    for row in table_of(variants):
        print(f"\n{row['name']} {row['error']}")
        for case, ratio in row["ratio"].items():
            print(f"  {case:26}{ratio:8.3f} ({row['ms'][case]:.4f})")
    return 1 if variants[0].error else 0


if __name__ == "__main__":
    sys.exit(main())
