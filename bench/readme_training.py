"""The README's tables from the JSON files of training_step.py and precision.py.

Examples:
    python bench/readme_training.py bench/results/training-step-cpu.json
    python bench/readme_training.py bench/results/precision-cpu.json
    python bench/readme_training.py bench/results/training-step-cuda.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def training_table(content: dict[str, Any]) -> list[str]:
    """One line for each comparison with torch that something is promised for."""
    lines = ["| work | fusedopt | against | measured | target |", "|---|---|---|---|---|"]
    for row, found in _promised(content, against_torch=True):
        mine, other = (row["contenders"][found[key]] for key in ("of", "against"))
        lines.append(
            f"| {row['title']} | {mine['dtype']} `{mine['what']}` "
            f"| torch, {other['dtype']} `{other['what']}` "
            f"| {found['value']['median']:.3g} x | >= {found['target']:g} x{_missed(found)} |"
        )
    return lines


def settings_table(content: dict[str, Any]) -> list[str]:
    """What a setting costs beside another one: by the bytes that it moves, or by time."""
    lines = ["| setting | beside | speed | target |", "|---|---|---|---|"]
    for row, found in _promised(content, against_torch=False):
        is_by_time = found["by"] == "time"
        name = f", {found['of']}" if is_by_time and len(row["comparisons"]) > 2 else ""
        other = {"fusedopt-fp32": "plain fp32"}.get(found["against"], found["against"])
        lines.append(
            f"| {row['title']}{name} | {other}, by {'time' if is_by_time else 'bytes'} "
            f"| {found['value']['median']:.0%} | >= {found['target']:.0%}{_missed(found)} |"
        )
    return lines


def _promised(
    content: dict[str, Any], against_torch: bool
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for row in content["rows"]:
        for found in row.get("comparisons", ()):
            is_wanted = (found["against"] == "torch") == against_torch
            if is_wanted and found["target"] is not None:
                yield row, found


def _missed(found: dict[str, Any]) -> str:
    return "" if found["good"] else ", missed"


def share_table(content: dict[str, Any]) -> list[str]:
    """For a GPU: how near each setting comes to a copy, and to torch for the same work."""
    lines = ["| work | fusedopt | share of a copy | torch's time / fusedopt's | target |",
             "|---|---|---|---|---|"]  # fmt: skip
    for row in content["rows"]:
        for name, mine in row.get("contenders", {}).items():
            about = [found for found in row["comparisons"] if found["of"] == name]
            times = [f"{c['value']['median']:.3g}" for c in about if c["against"] == "torch"]
            if times:
                lines.append(
                    f"| {row['title']} | {mine['dtype']} `{mine['what']}` "
                    f"| {mine['percent_of_copy']:.0f} % | {times[0]} | {_targets(about) or '-'} |"
                )
    return lines


def _targets(comparisons: list[dict[str, Any]]) -> str:
    return "; ".join(
        (f">= {c['target']:g}" if c["by"] == "time" else f">= {c['target']:.0%} of fp32's bytes/s")
        + ("" if c["good"] else ", missed")
        for c in comparisons
        if c["target"] is not None
    )


def precision_table(content: dict[str, Any]) -> list[str]:
    """Columns in which everything is zero are left out."""
    settings = content["settings"]
    parts = [
        part for part in settings[0]["bytes"] if any(row["bytes"][part] > 0 for row in settings)
    ]
    heads = ["setting", *parts, "final loss", "against fp32"]
    averaged = "averages_loss" in settings[0]
    heads += ["weights, test loss", "averages"] if averaged else []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in settings:
        cells = [row["name"], *(f"{row['bytes'][part]:.3g}" for part in parts)]
        cells += [_loss(row["final_loss"], "{:.4f}"), _loss(row["against_fp32"], "{:+.4f}")]
        if averaged:
            cells += [_loss(row[key], "{:.4f}") for key in ("weights_loss", "averages_loss")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _loss(over_seeds: dict[str, Any], shape: str) -> str:
    deviation = over_seeds["stdev"]
    text = shape.format(over_seeds["mean"])
    return text if deviation is None else f"{text} ± {deviation:.4f}"


def tables_of(content: dict[str, Any]) -> list[list[str]]:
    if "rows" not in content:
        return [precision_table(content)]
    if content["machine"]["device"] != "cpu":
        return [share_table(content)]
    return [training_table(content), settings_table(content)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of either program")
    for path in parser.parse_args().results:
        content = json.loads(path.read_text())
        for table in tables_of(content):
            print("\n".join(table), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
