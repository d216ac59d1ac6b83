"""What the programs share: options, the machine, JSON files, tables and pictures of results."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lib.timing import MIB, MIN_ROUNDS

ROOT = Path(__file__).resolve().parents[2]

GRADS_HELP = """fresh (default): before every step each grad becomes a new tensor object, untimed,
as a backward leaves it; on a GPU each step is then waited for. kept: the same objects in all steps.
CUDA graphs keep theirs in either case: a graph needs its grads in place"""
CACHE_HELP = """warm (default): what fits the caches is in them, by an untimed step before each
sample. cold: before every step so much other memory is read that nothing is"""

STYLE = {
    "figure.constrained_layout.use": True, "savefig.dpi": 130, "font.size": 11, "axes.grid": True,
    "axes.axisbelow": True, "grid.alpha": 0.3, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip
LEGEND = """\
ms, ratio: by the wall clock, median (10 %..90 %) over rounds in which every candidate runs once
GB/s: bytes that a one-pass step must move (stated per element) / time; the shares are of a copy
and an in-place multiply timed in the same rounds, in a CPU's cache where the work fits there
On a GPU also, host us: to hand a step to an idle one, per tensor; GPU ms and the last share: on the
device, the host hidden, with * where it could not be"""


def make_parser(
    doc: str | None, *, device: str = "cpu", timed: str | None = None
) -> argparse.ArgumentParser:
    """Options that mean the same everywhere; ``timed``: what a program times one after another."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", type=torch.device, default=device, help="cpu or cuda (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add("--json", type=Path, metavar="FILE", help="write the machine and all figures")
    if timed:
        limit = f"seconds a {timed} after {MIN_ROUNDS} rounds (default: %(default)s)"
        in_all = f"begin no further {timed} after that (default: no limit)"
        add("--grads", choices=("fresh", "kept"), default="fresh", help=GRADS_HELP)
        add("--cache", choices=("warm", "cold"), default="warm", help=CACHE_HELP)
        add("--repeats", type=int, default=15, metavar="N", help="rounds (default: %(default)s)")
        add("--budget", type=float, default=20.0, metavar="S", help=limit)
        add("--max-seconds", type=float, default=float("inf"), metavar="S", help=in_all)
        add("--quick", action="store_true", help="only a look at whether all runs")
    return parser


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device here")
    for name in ("repeats", "threads", "steps"):
        if (getattr(args, name, None) or 1) < 1:
            parser.error(f"--{name} must be at least 1")
    if getattr(args, "quick", False):
        args.repeats, args.budget = MIN_ROUNDS, 0.0
    return args


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Before any work is done: is all there, and on what machine."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if getattr(args, "plot", None):
        load_pyplot()
    machine = machine_info(args.device)
    print(_describe(machine))
    if machine["load_average"] > 0.5:
        print("warning: this machine is busy with other work, which slows candidates unequally")
    return machine


def run_all(
    args: argparse.Namespace, key: str, asked: list[Any], run: Callable[[Any], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """What goes into the JSON file, written anew after each: a run cut short leaves what it has."""
    results: list[dict[str, Any]] = []
    content = {"machine": start(args), "quick": args.quick, key: results}
    begin = time.monotonic()
    for each in asked:
        if time.monotonic() - begin > args.max_seconds:
            print(f"\nstopped after {len(results)} of {len(asked)} {key} (--max-seconds)")
            break
        results.append(run(each))
        show(results[-1])
        if args.json:
            write_json(args.json, content)
    return content


def _describe(machine: dict[str, Any]) -> str:
    where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    return (f"{where}, {machine['cores']} cores, {machine['threads']} threads, "
            f"load {machine['load_average']:.1f}; python {machine['python']}, "
            f"torch {machine['torch']}, fusedopt {machine['fusedopt']}")  # fmt: skip


def _load(name: str, how: str) -> Any:
    """Late, so that ``--help`` works and a missing install is explained."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"cannot import {name}: {error}\nInstall it first: {how}") from error


def load_fusedopt() -> Any:
    return _load("fusedopt", "pip install '.[bench]' in the root of the repository")


def load_pyplot() -> Any:
    """Without a display; called before any long work, not after."""
    _load("matplotlib", "pip install 'fusedopt[bench]'").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.rcParams.update(STYLE)
    return pyplot


def _line_of(file: str, start: str) -> str:
    """What follows the colon."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(start):
                return line.partition(":")[2].strip()
    return ""


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated now without pushing other work out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if free := _line_of("/proc/meminfo", "MemAvailable:"):
        return int(free.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def without_folders(text: str) -> str:
    """For results that are published: a file's name says what it is, its folder whose machine."""
    return re.sub(r"(?<![\w.~-])/(?:[^\s/'\"]+/)+", "", text)


def machine_info(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge a figure or to measure it again."""
    fusedopt: ModuleType = load_fusedopt()
    with contextlib.redirect_stdout(io.StringIO()) as config:
        fusedopt.show_config()
    program = os.path.relpath(Path(sys.argv[0]).resolve(), ROOT)
    machine = {
        "cpu": _line_of("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedopt": fusedopt.__version__,
        "fusedopt_config": without_folders(config.getvalue()).strip(),
        "load_average": os.getloadavg()[0],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": without_folders(" ".join(["python", program, *sys.argv[1:]])),
    }
    return machine | (gpu_info(device) if device.type == "cuda" else {})


def gpu_info(device: torch.device) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    return {
        "cuda": torch.version.cuda, "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "gpu_memory_mib": found.total_memory // MIB, "l2_mib": found.L2_cache_size // MIB,
    }  # fmt: skip


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def reason(error: Exception, *plain: type[Exception]) -> str:
    """Why something is skipped, in one line; errors of the ``plain`` kinds say it themselves."""
    if isinstance(error, plain):
        return str(error)
    first_line = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first_line}"


def title_of(case: dict[str, Any]) -> str:
    return f"{case['optimizer']} {case['dtype']} {case['workload']}"


def print_case(case: dict[str, Any]) -> None:
    """One table: probes first, then the candidates in the order they were asked for."""
    shared = ", params and grads shared to save memory" if case["shared_params"] else ""
    print_rows(title_of(case), case, f", {case['groups']} groups, {case['bytes_per_element']} "
               f"B/element, {case['memory_mib']} MiB{shared}")  # fmt: skip
    for name, why in case["skipped"].items():
        print(f"  {name:15}skipped: {why}")


def print_rows(title: str, case: dict[str, Any], more: str = "") -> None:
    size = f"{case['tensors']} tensors, {case['elements'] / 1e6:.2f} M elements"
    print(f"\n{title}: {size}{more}, {case['grads']} grads, {case['cache']} caches", flush=True)
    if not case.get("candidates"):
        return
    probes = ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in case["probes"].items())
    print(f"  {case['rounds']} rounds; in the same: {probes}")
    if case.get("may_sit_in_l2"):
        print(f"  the data may sit in the L2 cache ({case['l2_mib']} MiB)")
    cells = {n: _cells(row, "may_sit_in_l2" in case) for n, row in case["candidates"].items()}
    heads = "".join(f"{head:>12}" for head in next(iter(cells.values())))
    print(f"  {'':15}{'ms':>10}{'(10 %..90 %)':>20}{heads}   time / {case['base']} (10 %..90 %)")
    for name, row in case["candidates"].items():
        ms, ratio = row["ms"], row["ratio"]
        around = f"({ms['p10']:.3f}..{ms['p90']:.3f})"
        ratios = "" if name == case["base"] else f" ({ratio['p10']:.2f}..{ratio['p90']:.2f})"
        note = f"  [{row['note']}]" if row["note"] else ""
        shown = "".join(f"{cell:>12}" for cell in cells[name].values())
        print(f"  {name:15}{ms['median']:10.3f}{around:>20}{shown}"
              f"   {ratio['median']:7.2f}{ratios}{note}")  # fmt: skip


def _cells(row: dict[str, Any], on_gpu: bool) -> dict[str, str]:
    cells = {
        "us/tensor": f"{row['us_per_tensor']:.2f}", "GB/s": f"{row['gb_per_s']:.1f}",
        "% copy": f"{row['percent_of_copy']:.0f}", "% mul": f"{row['percent_of_multiply']:.0f}",
    }  # fmt: skip
    if not on_gpu:
        return cells
    gpu, more = row.get("gpu"), ("host us", "GPU ms", "% copy, GPU")
    if not gpu:
        return cells | dict.fromkeys(more, "-")
    mark = "*" if gpu["waited_for_host"] else ""
    host, ms, share = row["host"]["us_per_tensor"], gpu["ms"]["median"], gpu["percent_of_copy"]
    return cells | dict(zip(more, (f"{host:.2f}", f"{ms:.4f}{mark}", f"{share:.0f}"), strict=True))


def draw(content: dict[str, Any], order: list[str], path: Path) -> None:
    """Bars of time / base's time; one panel for each optimizer and dtype."""
    pyplot, machine = load_pyplot(), content["machine"]
    cases = [case for case in content["cases"] if case["candidates"]]
    kinds = list(dict.fromkeys(f"{case['optimizer']} {case['dtype']}" for case in cases))
    names = [n for n in order if any(n in c["candidates"] and n != c["base"] for c in cases)]
    works = list(dict.fromkeys(case["workload"] for case in cases))
    size = (max(8.0, 2 + 0.4 * (len(names) + 1) * len(works)), 1.6 + 3.2 * len(kinds))
    figure, axes = pyplot.subplots(len(kinds), 1, figsize=size, squeeze=False, sharex=True)
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        mine = {c["workload"]: c["candidates"] for c in cases if title_of(c).startswith(f"{kind} ")}
        _draw_panel(axis, mine, names, works)
        axis.set_title(kind, loc="left", fontweight="bold")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    base, where = cases[0]["base"], _describe(machine).partition(";")[0]
    figure.suptitle(f"Time of one optimizer step / time of {base} (above 1: {base} is faster)\n"
                    f"{where}, torch {machine['torch']}")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_panel(axis: Any, rows: dict[str, Any], names: list[str], works: list[str]) -> None:
    """Bars start at 1, so that one that points down is a loss."""
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        ratios = {w: rows[w][name]["ratio"] for w in works if name in rows.get(w, {})}
        places = [works.index(work) + (index - (len(names) - 1) / 2) * width for work in ratios]
        medians = [ratio["median"] for ratio in ratios.values()]
        around = [[abs(r["median"] - r[end]) for r in ratios.values()] for end in ("p10", "p90")]
        heights = [median - 1 for median in medians]
        bars = axis.bar(places, heights, width, bottom=1, label=name, yerr=around, ecolor="0.3")
        axis.bar_label(bars, [f"{median:.3g}" for median in medians], padding=3, fontsize=8)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_yscale("log", subs=(2, 5))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.margins(y=0.12)
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("ratio of times (log)")
    axis.set_xticks(range(len(works)), works)
