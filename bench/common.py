"""What the programs in this folder share: helpful import errors, statistics, the machine, JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

OPTIMIZERS = ("AdamW", "Adam", "SGD")
MIB = 2**20


def load_fusedopt() -> ModuleType:
    """Import fusedopt late, so that ``--help`` works and a missing install is explained."""
    try:
        import fusedopt
    except ImportError as error:
        raise SystemExit(
            f"cannot import fusedopt: {error}\nInstall it from the root of the repository first: "
            "pip install '.[bench]'"
        ) from error
    return fusedopt


def load_pyplot() -> ModuleType:
    """Import matplotlib without a display; call it before any long work, not after."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(
            f"a picture needs matplotlib: {error}\nInstall it with: pip install 'fusedopt[bench]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "savefig.dpi": 130,
            "font.size": 11,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )
    return pyplot


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the range that holds 80 % of the values: robust on a machine with other work."""
    if len(values) < 2:
        return dict.fromkeys(("median", "p10", "p90"), values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated now without pushing other work out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def parse_device(name: str) -> torch.device:
    """argparse type for ``--device``: refuse what this torch cannot use before any work is done."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch finds no CUDA device here")
    return device


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _fusedopt_config(fusedopt: ModuleType) -> str | None:
    show = getattr(fusedopt, "show_config", None)  # a stand-in or an old version may lack it
    if show is None:
        return None
    with contextlib.redirect_stdout(io.StringIO()) as text:
        show()
    return without_folders(text.getvalue()).strip()


def without_folders(text: str) -> str:
    """For results that are published: a file's name says what it is, its folder whose machine."""
    return re.sub(r"(?<![\w.~-])/(?:[^\s/'\"]+/)+", "", text)


def _cuda_info(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {
        "cuda": torch.version.cuda,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "gpu_memory_mib": found.total_memory // MIB,
        "l2_mib": found.L2_cache_size // MIB,
    }


def machine_info(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge a figure or to measure it again."""
    fusedopt = load_fusedopt()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedopt": getattr(fusedopt, "__version__", None),
        "fusedopt_config": _fusedopt_config(fusedopt),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": without_folders(
            " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        ),
        **_cuda_info(device),
    }


def describe(machine: dict[str, Any]) -> str:
    """The one line printed above every result."""
    where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    return (
        f"{where}, {machine['cores']} cores, {machine['threads']} threads, "
        f"load {machine['load_average'] or 0:.1f}; python {machine['python']}, "
        f"torch {machine['torch']}, fusedopt {machine['fusedopt']}"
    )


def write_json(path: Path, content: dict[str, Any], *, quiet: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    if not quiet:
        print(f"wrote {path}")
