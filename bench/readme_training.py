"""The README's tables from the JSON files of training_step.py and precision.py.

Examples:
    python bench/readme_training.py bench/results/training-step-cpu.json
    python bench/readme_training.py bench/results/precision-cpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def training_table(content: dict[str, Any]) -> list[str]:
    """One line for each comparison that something is promised for."""
    lines = ["| work | fusedopt | against | measured | target |", "|---|---|---|---|---|"]
    for row in content["rows"]:
        for found in row.get("comparisons", ()):
            if found["target"] is None:
                continue
            mine, other = (row["contenders"][found[key]] for key in ("of", "against"))
            by_time = found["by"] == "time"
            value = found["value"]["median"]
            measured = f"{value:.3g} x" if by_time else f"{value:.0%} of its bytes/s"
            bar = f">= {found['target']:g} x" if by_time else f">= {found['target']:.0%}"
            missed = "" if found["good"] else ", missed"
            whose = "torch" if found["against"] == "torch" else "fusedopt"
            lines.append(
                f"| {row['title']} | {mine['dtype']} `{mine['what']}` "
                f"| {whose}, {other['dtype']} `{other['what']}` | {measured} | {bar}{missed} |"
            )
    return lines


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of either program")
    for path in parser.parse_args().results:
        content = json.loads(path.read_text())
        table = training_table if "rows" in content else precision_table
        print("\n".join(table(content)), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
