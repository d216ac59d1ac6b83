"""Time of one optimizer step: fusedopt beside torch.optim and other packages, interleaved.

Examples:
    python bench/step.py                    AdamW in float32, all workloads, all contenders
    python bench/step.py --optimizer SGD --dtype bfloat16 --shapes gpt2-124m many-1000x64
    python bench/step.py --targets          what this project promises: pass or miss
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import targets
import torch
from common import (
    OPTIMIZERS,
    describe,
    load_fusedopt,
    load_pyplot,
    machine_info,
    parse_device,
    write_json,
)
from contenders import CONTENDERS
from measure import MIN_ROUNDS, Case, run_case
from workloads import WORKLOADS

DTYPES = ("float32", "bfloat16", "float16", "float64")
LEGEND = """\
ms, ratio: median (10 %..90 %) over rounds in which every contender runs once; ratio: time / base's
GB/s: bytes that a one-pass step must move (stated per element) / time; the shares are of a copy
and an in-place multiply timed in the same rounds, in cache where the work itself fits there"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", nargs="+", choices=OPTIMIZERS, help="default: AdamW")
    add("--dtype", nargs="+", choices=DTYPES, help="of params, grads and states; default: float32")
    add("--shapes", nargs="+", choices=["all", *WORKLOADS], metavar="NAME",
        help=f"default: all ({', '.join(WORKLOADS)})")  # fmt: skip
    add("--contenders", nargs="+", choices=["all", *CONTENDERS], metavar="NAME",
        help=f"default: all ({', '.join(CONTENDERS)})")  # fmt: skip
    add("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    add("--repeats", type=int, default=15, metavar="N", help="rounds a case (default: %(default)s)")
    add("--budget", type=float, default=20.0, metavar="S",
        help=f"seconds a case, kept after {MIN_ROUNDS} rounds (default: %(default)s)")  # fmt: skip
    add("--device", type=parse_device, default=torch.device("cpu"), help="cpu (default) or cuda")
    add("--json", type=Path, metavar="FILE", help="write machine and figures")
    add("--plot", type=Path, metavar="FILE", help="write a bar chart of the ratios (PNG)")
    add("--quick", action="store_true", help=f"{MIN_ROUNDS} rounds, no more than needed to look")
    add("--targets", action="store_true",
        help="compare with the promised figures, exit status 1 if one is missed; chooses the "
        "optimizers, dtypes, shapes and contenders needed unless they are given")  # fmt: skip
    args = parser.parse_args()
    if min(args.repeats, args.threads or 1) < 1:
        parser.error("--repeats and --threads must be at least 1")
    return _fill_defaults(args)


def _fill_defaults(args: argparse.Namespace) -> argparse.Namespace:
    needed = targets if args.targets else None
    args.optimizer = args.optimizer or (needed.OPTIMIZERS if needed else ["AdamW"])
    args.dtype = args.dtype or (needed.DTYPES if needed else ["float32"])
    args.shapes = args.shapes or (needed.WORKLOADS if needed else ["all"])
    args.contenders = args.contenders or (needed.CONTENDERS if needed else ["all"])
    if "all" in args.shapes:
        args.shapes = list(WORKLOADS)
    if "all" in args.contenders:
        args.contenders = list(CONTENDERS)
    if args.quick:
        args.repeats, args.budget = MIN_ROUNDS, 0.0
    return args


def print_case(title: str, case: dict[str, Any]) -> None:
    """One table: probes first, then the contenders in the order they were asked for."""
    shared = ", params and grads shared to save memory" if case["shared_params"] else ""
    print(
        f"\n{title}: {case['tensors']} tensors, {case['groups']} groups, "
        f"{case['elements'] / 1e6:.2f} M elements, {case['bytes_per_element']} B/element, "
        f"{case['memory_mib']} MiB{shared}, {case['rounds']} rounds"
    )
    if case["contenders"]:
        probes = ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in case["probes"].items())
        print(f"  same rounds: {probes}")
        print(
            f"  {'':14}{'ms':>10} {'(10 %..90 %)':>21}{'us/tensor':>11}{'GB/s':>8}{'% copy':>8}"
            f"{'% mul':>8}   time / {case['base']} (10 %..90 %)"
        )
    for name, row in case["contenders"].items():
        ms, ratio = row["ms"], row["ratio"]
        ms_range = f"({ms['p10']:.3f}..{ms['p90']:.3f})"
        ratio_range = "" if name == case["base"] else f" ({ratio['p10']:.2f}..{ratio['p90']:.2f})"
        note = f"  [{row['note']}]" if row["note"] else ""
        print(
            f"  {name:14}{ms['median']:10.3f} {ms_range:>21}{row['us_per_tensor']:11.2f}"
            f"{row['gb_per_s']:8.1f}{row['percent_of_copy']:8.0f}{row['percent_of_multiply']:8.0f}"
            f"   {ratio['median']:7.2f}{ratio_range}{note}"
        )
    for name, reason in case["skipped"].items():
        print(f"  {name:14}skipped: {reason}")


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


def main() -> int:
    args = parse_args()
    load_fusedopt()
    if args.plot:
        load_pyplot()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = machine_info(args.device)
    print(describe(machine))
    if (machine["load_average"] or 0) > 0.5:
        print("warning: this machine is busy with other work, which slows contenders unequally")
    cases = []
    for optimizer, dtype, shapes in (
        (o, d, s) for o in args.optimizer for d in args.dtype for s in args.shapes
    ):
        case = Case(optimizer, getattr(torch, dtype), WORKLOADS[shapes], args.device)
        chosen = [CONTENDERS[name] for name in args.contenders]
        cases.append(run_case(case, chosen, args.repeats, args.budget))
        print_case(case.title, cases[-1])
    print(f"\n{LEGEND}")
    if args.json:
        write_json(args.json, {"machine": machine, "cases": cases})
    if args.plot:
        draw(cases, machine, args.plot)
    if not args.targets:
        return 0
    lines, good = targets.compare(cases)
    print("\n".join(["", "Promised figures:", *lines]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
