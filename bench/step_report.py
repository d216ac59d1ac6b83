"""What step.py shows: a table for each case, a picture of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import load_pyplot
from contenders import CONTENDERS

LEGEND = """\
ms, ratio: median (10 %..90 %) over rounds in which every contender runs once; ratio: time / base's
GB/s: bytes that a one-pass step must move (stated per element) / time; the shares are of a copy
and an in-place multiply timed in the same rounds, in cache where the work itself fits there"""
CUDA_LEGEND = """\
ms, ratio: median (10 %..90 %) over rounds in which every contender runs once, by the wall clock
host us: to hand a step to an idle GPU, per tensor; GPU ms: on the device, the host hidden, with *
where it could not be; GB/s: bytes that a one-pass step must move / wall time; % copy: of a large
device copy timed in the same rounds, by the wall and on the device"""


def print_case(title: str, case: dict[str, Any]) -> None:
    """One table: probes first, then the contenders in the order they were asked for."""
    shared = ", params and grads shared to save memory" if case["shared_params"] else ""
    print(
        f"\n{title}: {case['tensors']} tensors, {case['groups']} groups, "
        f"{case['elements'] / 1e6:.2f} M elements, {case['bytes_per_element']} B/element, "
        f"{case['memory_mib']} MiB{shared}, {case['rounds']} rounds"
    )
    if "may_sit_in_l2" in case:
        print_cuda_rows(case)
    elif case["contenders"]:
        print_rows(case)
    for name, reason in case["skipped"].items():
        print(f"  {name:15}skipped: {reason}")


def print_rows(case: dict[str, Any]) -> None:
    print_probes(case)
    print(
        f"  {'':15}{'ms':>10} {'(10 %..90 %)':>21}{'us/tensor':>11}{'GB/s':>8}{'% copy':>8}"
        f"{'% mul':>8}   time / {case['base']} (10 %..90 %)"
    )
    for name, row in case["contenders"].items():
        ms = row["ms"]
        ms_range = f"({ms['p10']:.3f}..{ms['p90']:.3f})"
        print(
            f"  {name:15}{ms['median']:10.3f} {ms_range:>21}{row['us_per_tensor']:11.2f}"
            f"{row['gb_per_s']:8.1f}{row['percent_of_copy']:8.0f}{row['percent_of_multiply']:8.0f}"
            f"   {_ratio_and_note(case, name)}"
        )


def print_cuda_rows(case: dict[str, Any]) -> None:
    if not case["contenders"]:
        return
    print_probes(case)
    if case["may_sit_in_l2"]:
        print(f"  the data may sit in the L2 cache ({case['l2_mib']} MiB)")
    print(
        f"  {'':15}{'ms':>10}{'us/tensor':>11}{'host us':>9}{'GPU ms':>10}{'GB/s':>8}{'% copy':>8}"
        f"{'on GPU':>8}   time / {case['base']} (10 %..90 %)"
    )
    for name, row in case["contenders"].items():
        host, gpu = f"{'-':>9}", f"{'-':>10}"
        share = f"{'-':>8}"
        if "gpu" in row:
            mark = "*" if row["gpu"]["waited_for_host"] else ""
            host = f"{row['host']['us_per_tensor']:9.2f}"
            gpu = f"{row['gpu']['ms']['median']:.4f}{mark}".rjust(10)
            share = f"{row['gpu']['percent_of_copy']:8.0f}"
        print(
            f"  {name:15}{row['ms']['median']:10.3f}{row['us_per_tensor']:11.2f}{host}{gpu}"
            f"{row['gb_per_s']:8.0f}{row['percent_of_copy']:8.0f}{share}"
            f"   {_ratio_and_note(case, name)}"
        )


def print_probes(case: dict[str, Any]) -> None:
    probes = ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in case["probes"].items())
    print(f"  same rounds: {probes}")


def _ratio_and_note(case: dict[str, Any], name: str) -> str:
    row = case["contenders"][name]
    ratio = row["ratio"]
    ratio_range = "" if name == case["base"] else f" ({ratio['p10']:.2f}..{ratio['p90']:.2f})"
    note = f"  [{row['note']}]" if row["note"] else ""
    return f"{ratio['median']:7.2f}{ratio_range}{note}"


def draw(cases: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """Bars of time / base's time; one panel for each optimizer and dtype."""
    pyplot = load_pyplot()
    raced = [case for case in cases if case["contenders"]]
    kinds = list(dict.fromkeys((case["optimizer"], case["dtype"]) for case in raced))
    names = [n for n in CONTENDERS if any(n in c["contenders"] and n != c["base"] for c in raced)]
    works = list(dict.fromkeys(case["workload"] for case in raced))
    size = (max(8.0, 2 + 0.4 * (len(names) + 1) * len(works)), 1.6 + 3.2 * len(kinds))
    figure, axes = pyplot.subplots(len(kinds), 1, figsize=size, squeeze=False, sharex=True)
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        _draw_panel(axis, [c for c in raced if (c["optimizer"], c["dtype"]) == kind], names, works)
        axis.set_title(" ".join(kind), loc="left", fontweight="bold")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    base = " or ".join(dict.fromkeys(case["base"] for case in raced))
    figure.suptitle(
        f"Time of one optimizer step / time of {base} (above 1: {base} is faster)\n"
        f"{where}, {machine['threads']} threads, torch {machine['torch']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")


def _draw_panel(axis: Any, cases: list[dict[str, Any]], names: list[str], works: list[str]) -> None:
    """Bars start at 1, so that one that points down is a loss."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        rows = {works.index(c["workload"]): c["contenders"].get(name) for c in cases}
        ratios = {at: row["ratio"] for at, row in rows.items() if row}
        places = [at + (index - (len(names) - 1) / 2) * width for at in ratios]
        heights = [ratio["median"] - 1 for ratio in ratios.values()]
        axis.bar(places, heights, width, bottom=1, label=name, color=f"C{index}")
        for place, ratio in zip(places, ratios.values(), strict=True):
            axis.vlines(place, ratio["p10"], ratio["p90"], color="black", linewidth=1, alpha=0.5)
            text, top = f"{ratio['median']:.3g}", max(ratio["p90"], 1.0)
            axis.annotate(text, (place, top), (0, 3), textcoords="offset points",
                          ha="center", fontsize=8)  # fmt: skip
    axis.axhline(1, color="black", linewidth=1)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.margins(y=0.12)
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("ratio of times (log)")
    axis.set_xticks(range(len(works)), works)
