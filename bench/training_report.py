"""What training_step.py shows, and whether its promises were kept."""

from __future__ import annotations

from typing import Any


def verdict(comparison: dict[str, Any]) -> str:
    return {True: "pass", False: "MISS", None: "-"}[comparison["good"]]


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    """One for each comparison: what gpu.py repeats."""
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append(f"  MISS  {row['title']:42} failed: {row['failed']}")
        for found in row.get("comparisons", ()):
            value = found["value"]
            around = f"({value['p10']:.2f}..{value['p90']:.2f})"
            promised = "" if found["target"] is None else f"  >= {found['target']:g}"
            lines.append(
                f"  {verdict(found):4}  {row['title']:42} {found['text']:38} "
                f"{value['median']:6.2f} {around:14}{promised}"
            )
    return lines


def good(rows: list[dict[str, Any]]) -> bool:
    found = [one for row in rows for one in row.get("comparisons", ())]
    return not any("failed" in row for row in rows) and all(c["good"] is not False for c in found)


def show(row: dict[str, Any]) -> None:
    size = f"{row['tensors']} tensors, {row['elements'] / 1e6:.2f} M elements"
    print(f"\n{row['title']}: {size}, {row.get('rounds', 0)} rounds", flush=True)
    if "contenders" in row:
        probes = ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in row["probes"].items())
        print(f"  same rounds: {probes}")
    for name, figures in row.get("contenders", {}).items():
        ms = figures["ms"]
        around = f"({ms['p10']:.2f}..{ms['p90']:.2f})"
        print(
            f"  {name:14}{ms['median']:9.2f} ms {around:20}{figures['bytes_per_element']:4} B"
            f"{figures['gb_per_s']:8.1f} GB/s{figures['percent_of_copy']:6.0f} % copy"
            f"  {figures['dtype']} {figures['what']}"
        )
    print("\n".join(lines_of([row])))
