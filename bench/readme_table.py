"""The README's table of ratios, from a JSON file that step.py wrote.

Examples:
    python bench/readme_table.py bench/results/step-cpu.json
    python bench/readme_table.py bench/results/step-cuda.json --columns \\
        AdamW:float32:torch-fused SGD:bfloat16:torch-fused AdamW:float32:torch-graph/fusedopt-graph
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from workloads import WORKLOADS

COLUMNS = (
    "AdamW:float32:torch-fused",
    "AdamW:float32:torch-foreach",
    "AdamW:bfloat16:torch-fused",
    "SGD:float32:torch-fused",
)
CUDA_COLUMNS = (*COLUMNS, "AdamW:bfloat16:apex", "AdamW:float32:torch-graph/fusedopt-graph")
NO_ROW = ("host-1000x1",)  # its figure is a cost, not a ratio
TITLES = {
    "one-64Mi": "1 tensor x 64 Mi",
    "one-256Mi": "1 tensor x 256 Mi",
    "gpt2-124m": "GPT-2 124M (148 tensors)",
    "resnet50": "ResNet-50 (161 tensors)",
    "llama-8b-layer": "a layer of Llama-3-8B (9 tensors)",
    "llama-8b-eighth": "Llama-3-8B / 8 (291 tensors, 2 groups)",
    "many-1000x1000": "1000 x 1000",
    "many-1000x64": "1000 x 64",
    "many-10000x64": "10000 x 64",
    "groups-400x5000": "400 groups of 1 x 5000",
}
NAMES = {"torch-fused": "`fused=True`", "torch-foreach": "`foreach=True`",
         "torch-graph/fusedopt-graph": "`fused=True`, both in a CUDA graph"}  # fmt: skip
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def ratio(case: dict[str, Any] | None, contender: str) -> float | None:
    """Time of ``contender``, or of "one/other", over fusedopt's, or over the other's."""
    name, _, other = contender.partition("/")
    rows = (case or {}).get("contenders", {})
    if case is None or case.get("base") != "fusedopt" or not {name, other or name} <= rows.keys():
        return None
    below = rows[other]["ratio"]["median"] if other else 1.0
    return rows[name]["ratio"]["median"] / below


def table(cases: list[dict[str, Any]], columns: list[str]) -> list[str]:
    """Markdown; what was not measured is a dash, and a column or row of dashes is left out."""
    found = {(c["optimizer"], c["dtype"], c["workload"]): c for c in cases}
    asked = [column.split(":") for column in columns]
    measured = {case["workload"] for case in cases}
    works = [work for work in dict.fromkeys((*TITLES, *WORKLOADS)) if work in measured]
    rows = {
        work: [ratio(found.get((o, d, work)), contender) for o, d, contender in asked]
        for work in works
        if work not in NO_ROW
    }
    rows = {work: row for work, row in rows.items() if any(row)}
    kept = [index for index in range(len(asked)) if any(row[index] for row in rows.values())]
    heads, before = [], ("", "")
    for index in kept:
        optimizer, dtype, contender = asked[index]
        kind = "" if (optimizer, dtype) == before else f"{optimizer} {SHORT[dtype]}: "
        heads.append(f"{kind}{NAMES.get(contender, contender)}")
        before = (optimizer, dtype)
    lines = ["| work | " + " | ".join(heads) + " |", "|---" * (len(kept) + 1) + "|"]
    for work, row in rows.items():
        cells = [_cell(row[index]) for index in kept]
        lines.append(f"| {TITLES.get(work, work)} | " + " | ".join(cells) + " |")
    return lines


def _cell(value: float | None) -> str:
    """Three digits, as many as runs agree on."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, help="a JSON file of step.py")
    add("--columns", nargs="+", metavar="OPTIMIZER:DTYPE:CONTENDER", help="default: the README's")
    args = parser.parse_args()
    content = json.loads(args.results.read_text())
    on_cpu = content["machine"]["device"] == "cpu"
    columns = args.columns or list(COLUMNS if on_cpu else CUDA_COLUMNS)
    if any(column.count(":") != 2 for column in columns):
        parser.error("a column is OPTIMIZER:DTYPE:CONTENDER")
    print("\n".join(table(content["cases"], columns)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
