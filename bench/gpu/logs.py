"""What run_all.py reads from the output of pytest, compute-sanitizer and Nsight Compute."""

from __future__ import annotations

import csv
import re
from collections import Counter
from typing import Any

OURS = "fusedopt"  # is in the name of every kernel of this package
UPDATES = ("update_kernel", "codes_kernel", "usual_kernel")  # those of kernels.cuh that update
MARK = "spin_kernel"  # of launches.py --for-ncu
MAX_NAMES = 40

_COUNTS = re.compile(r"^(?:=+ )?((?:\d+ [a-z]+(?:, )?)+|no tests ran) in [\d.]+s", re.MULTILINE)
_SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", re.MULTILINE)
_METRICS = {
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
    "gpu__time_duration.sum": "ns",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent_of_peak",
}
METRICS = tuple(_METRICS)


def pytest_counts(text: str) -> dict[str, Any]:
    """Counts of the last summary line, names of the failures, reasons of the skips."""
    found = _COUNTS.findall(text)
    words = re.findall(r"(\d+) ([a-z]+)", found[-1] if found else "")
    counts = Counter({word.removesuffix("s"): int(number) for number, word in words})
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+.*)$", text, re.MULTILINE)
    skips = re.findall(r"^SKIPPED \[(\d+)\] (.*)$", text, re.MULTILINE)
    return {
        "finished": bool(found),
        "passed": counts["passed"], "skipped": counts["skipped"],
        "failed": counts["failed"] + counts["error"],
        "failures": [failure[:200] for failure in failures[:MAX_NAMES]],
        "skips": [f"{count} x {why}"[:200] for count, why in skips[:MAX_NAMES]],
    }  # fmt: skip


def sanitizer_findings(text: str) -> dict[str, Any]:
    """Errors in all, and those whose report names one of our kernels.

    A report begins with a line without indentation and goes on with indented ones. The summary
    also counts those that were not printed because they were too many.
    """
    summaries = [int(number) for number in _SUMMARY.findall(text)]
    reports: list[list[str]] = []
    for line in text.splitlines():
        body = line.lstrip("=")
        if not line.startswith("=========") or not body.strip():
            continue
        if "SUMMARY" in line or "COMPUTE-SANITIZER" in line:
            continue
        if not body.startswith("  "):
            reports.append([body.strip()])
        elif reports:
            reports[-1].append(body.strip())
    ours = [report for report in reports if any(OURS in line for line in report[:4])]
    kinds = Counter(report[0][:100] for report in ours)
    return {
        "finished": bool(summaries), "errors": sum(summaries), "errors_in_ours": len(ours),
        "unprinted": max(0, sum(summaries) - len(reports)),
        "kinds": dict(kinds.most_common(10)), "first": ours[0][:6] if ours else [],
    }  # fmt: skip


def ncu_launches(text: str) -> list[list[dict[str, Any]]]:
    """Launches of our kernels after each mark, from ncu's CSV (one metric a line)."""
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if (name := _METRICS.get(row["Metric Name"])) is not None:
            launch[name] = _number(row["Metric Value"])
    marked: list[list[dict[str, Any]]] = []
    for launch in launches.values():
        if MARK in launch["kernel"]:
            marked.append([])
        elif marked:
            launch["kernel"] = launch["kernel"].partition("(")[0][:120]
            marked[-1].append(launch)
    return marked


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:  # "n/a": this GPU or this driver does not count it
        return None


def is_update(kernel: str) -> bool:
    return any(name in kernel for name in UPDATES)


def ncu_cases(cases: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Each case with what it had to move beside what it moved."""
    rows = []
    for case, launches in zip(cases, ncu_launches(text), strict=False):
        row = case | {"launches": launches}
        updates = [launch for launch in launches if is_update(launch["kernel"])]
        for moved in ("read", "written"):
            row[moved] = sum(launch.get(moved) or 0 for launch in updates)
        seconds = 1e-9 * sum(launch.get("ns") or 0 for launch in updates)
        if updates and seconds:
            row["us"] = 1e6 * seconds
            row["dram_gb_per_s"] = 1e-9 * (row["read"] + row["written"]) / seconds
        rows.append(row)
    return rows
