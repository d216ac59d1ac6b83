"""Compare builds that differ in one constant of csrc/cuda/tuning.h.

Each variant is built in a copy of the tree and measured by step.py in a process of its own; all
take turns, twice. No result of a step depends on these constants: time is all there is to compare.

Examples:
    python bench/gpu/tune.py                                  every constant halved and doubled
    python bench/gpu/tune.py --set kBlockThreads=128,512 --shapes one-64Mi
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from lib.report import ROOT, write_json

HEADER = Path("csrc/cuda/tuning.h")
CONSTANT = r"(constexpr \w+ {name} = )(\d+);"
FIXED = ("kWarp",)  # of the hardware
NEEDED = ("csrc", "fusedopt", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SHAPES = ("one-64Mi", "gpt2-124m", "many-1000x1000")
ROUNDS, BUILDERS = 2, 4


@dataclass
class Variant:
    name: str  # "kBlockThreads=128", or "as it is"
    tree: Path
    error: str = ""
    ms: dict[str, list[float]] = field(default_factory=dict)  # by case; one for each round

    def run(self, command: list[str], folder: Path, **env: str) -> bool:
        """Whether it succeeded; if not, the end of what it wrote is kept."""
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env={**os.environ, **env},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            self.error = (done.stdout + done.stderr)[-600:]
        return done.returncode == 0


def changes(text: str, asked: list[str] | None) -> list[tuple[str, int]]:
    """(constant, value) of each variant."""
    found = re.findall(CONSTANT.format(name=r"(\w+)"), text)
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


def copy_tree(tree: Path, change: tuple[str, int] | None) -> Variant:
    tree.mkdir()
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
        else:
            shutil.copy(source, tree)
    if change is None:
        return Variant("as it is", tree)
    name, value = change
    text = (tree / HEADER).read_text()
    (tree / HEADER).write_text(re.sub(CONSTANT.format(name=name), rf"\g<1>{value};", text))
    return Variant(f"{name}={value}", tree)


def build(variant: Variant) -> None:
    variant.run(["setup.py", "-q", "build_ext", "--inplace"], variant.tree, FUSEDOPT_CUDA="1")


def measure(variant: Variant, args: argparse.Namespace) -> None:
    result = variant.tree / "step.json"
    command = ["bench/step.py", "--device", args.device, "--quick", "--candidates", "fusedopt",
               "--dtype", "float32", "bfloat16", "--shapes", *args.shapes,
               "--json", str(result)]  # fmt: skip
    if not variant.run(command, ROOT, PYTHONPATH=str(variant.tree)):
        return
    for case in json.loads(result.read_text())["cases"]:
        row = case["contenders"].get("fusedopt")
        if row is None:
            variant.error = str(case["skipped"])
            return
        ms = row.get("gpu", row)["ms"]["median"]
        variant.ms.setdefault(f"{case['workload']} {case['dtype']}", []).append(ms)


def table_of(variants: list[Variant]) -> list[dict[str, Any]]:
    """Median ms, and time / time of the constants as they are."""
    base = {case: statistics.median(ms) for case, ms in variants[0].ms.items()}
    table = []
    for variant in variants:
        ms = {case: statistics.median(times) for case, times in variant.ms.items()}
        ratios = {case: time / base[case] for case, time in ms.items() if case in base}
        table.append({"name": variant.name, "ms": ms, "ratio": ratios, "error": variant.error})
    return table


def show(table: list[dict[str, Any]]) -> None:
    print("time / time of the constants as they are (ms), on the device")
    for row in table:
        print(f"\n{row['name']} {row['error']}")
        for case, ratio in row["ratio"].items():
            print(f"  {case:26}{ratio:8.3f} ({row['ms'][case]:.4f})")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--set", nargs="+", metavar="NAME=VALUES", help="default: half and double of each")
    add("--shapes", nargs="+", default=SHAPES, metavar="NAME",
        help=f"default: {' '.join(SHAPES)}")  # fmt: skip
    add("--device", default="cuda", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the table")
    add("--max-seconds", type=float, default=float("inf"), metavar="S",
        help="no further measurement is begun after that (default: no limit)")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    start = time.monotonic()
    planned = [None, *changes((ROOT / HEADER).read_text(), args.set)]
    with tempfile.TemporaryDirectory() as folder:
        variants = [copy_tree(Path(folder) / str(i), change) for i, change in enumerate(planned)]
        with ThreadPoolExecutor(BUILDERS) as builders:
            list(builders.map(build, variants))
        print(f"built {len(variants)} variants in {time.monotonic() - start:.0f} s", flush=True)
        for number in range(ROUNDS):
            for variant in variants if number % 2 == 0 else variants[::-1]:
                if not variant.error and time.monotonic() - start < args.max_seconds:
                    measure(variant, args)
            if args.json:
                write_json(args.json, {"variants": table_of(variants)})
    table = table_of(variants)
    show(table)
    return 1 if table[0]["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
