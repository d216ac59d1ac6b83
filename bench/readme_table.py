"""The README's tables of ratios, from JSON files that step.py wrote.

Examples:
    python bench/readme_table.py bench/results/step-cpu.json
    python bench/readme_table.py bench/results/step-cuda.json bench/results/step-cuda-sgd-adam.json
    python bench/readme_table.py bench/results/step-cuda.json --columns \\
        AdamW:float32:torch-foreach AdamW:bfloat16:optimi
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
CUDA_KINDS = [(o, d) for o in ("AdamW", "SGD") for d in ("float32", "bfloat16")]
GRAPHS = ("AdamW", "float32"), "torch-graph/fusedopt-graph"
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
NAMES = {"torch-fused": "`fused=True`", "torch-foreach": "`foreach=True`"}
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
    found = _by_kind(cases)
    asked = [column.split(":") for column in columns]
    rows = {
        work: [ratio(found.get((o, d, work)), contender) for o, d, contender in asked]
        for work in _works(cases)
    }
    rows = {work: row for work, row in rows.items() if any(row)}
    kept = [index for index in range(len(asked)) if any(row[index] for row in rows.values())]
    heads, before = [], ("", "")
    for index in kept:
        optimizer, dtype, contender = asked[index]
        kind = "" if (optimizer, dtype) == before else f"{optimizer} {SHORT[dtype]}: "
        heads.append(f"{kind}{NAMES.get(contender, contender)}")
        before = (optimizer, dtype)
    cells = {work: [_cell(row[index]) for index in kept] for work, row in rows.items()}
    return _markdown(heads, {TITLES.get(work, work): row for work, row in cells.items()})


def gpu_table(cases: list[dict[str, Any]]) -> list[str]:
    """Ratios to torch's fused step beside the share of a copy's bandwidth on the GPU itself."""
    found = _by_kind(cases)
    kind, graphs = GRAPHS
    heads = [f"{optimizer} {SHORT[dtype]}" for optimizer, dtype in CUDA_KINDS]
    rows = {}
    for work in _works(cases):
        row = [_with_share(found.get((o, d, work))) for o, d in CUDA_KINDS]
        row.append(_cell(ratio(found.get((*kind, work)), graphs)))
        cached = any(case["may_sit_in_l2"] for case in cases if case["workload"] == work)
        rows[TITLES.get(work, work) + (" (fits L2)" if cached else "")] = row
    return _markdown([*heads, f"{kind[0]} {SHORT[kind[1]]}, both in a CUDA graph"], rows)


def _by_kind(cases: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(c["optimizer"], c["dtype"], c["workload"]): c for c in cases}


def _works(cases: list[dict[str, Any]]) -> list[str]:
    measured = {case["workload"] for case in cases}.difference(NO_ROW)
    return [work for work in dict.fromkeys((*TITLES, *WORKLOADS)) if work in measured]


def _markdown(heads: list[str], rows: dict[str, list[str]]) -> list[str]:
    lines = ["| work | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    return lines + [f"| {work} | " + " | ".join(cells) + " |" for work, cells in rows.items()]


def _with_share(case: dict[str, Any] | None) -> str:
    value = ratio(case, "torch-fused")
    if case is None or value is None:
        return "-"
    return f"{_cell(value)} x, {case['contenders']['fusedopt']['gpu']['percent_of_copy']:.0f} %"


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
    add("results", type=Path, nargs="+", help="JSON files of step.py, of one device")
    add("--columns", nargs="+", metavar="OPTIMIZER:DTYPE:CONTENDER", help="default: the README's")
    args = parser.parse_args()
    contents = [json.loads(path.read_text()) for path in args.results]
    cases = [case for content in contents for case in content["cases"]]
    devices = {content["machine"]["device"] for content in contents}
    if len(devices) > 1:
        parser.error(f"files of several devices: {', '.join(sorted(devices))}")
    if any(column.count(":") != 2 for column in args.columns or ()):
        parser.error("a column is OPTIMIZER:DTYPE:CONTENDER")
    columns = args.columns or (list(COLUMNS) if devices == {"cpu"} else [])
    print("\n".join(table(cases, columns) if columns else gpu_table(cases)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
