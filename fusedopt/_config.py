"""Which code runs here, and how a user finds out."""

import os
import platform
import re
from pathlib import Path

import torch

from . import _C


def cpu_isa() -> str:
    """Name of the instruction set to use: ``FUSEDOPT_ISA`` if set, else the best there is."""
    return os.environ.get("FUSEDOPT_ISA") or _C.build_info()["isas"][-1]


def _openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes loaded into this process (Linux; empty elsewhere)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"/\S*lib(?:gomp|omp|iomp5)\S*\.so\S*", maps)))


def _threads() -> str:
    if not _C.build_info()["openmp"]:
        return "1 (built without OpenMP)"
    runtimes = _openmp_runtimes()
    pool = f"torch's pool, {runtimes[0]}" if len(runtimes) == 1 else f"pools: {runtimes}"
    return f"{torch.get_num_threads()} ({pool})"


def show_config() -> None:
    """Print what was built and what is used here.

    >>> fusedopt.show_config()
    fusedopt ...
      compiler: ...
      torch:    ...
      CPU:      ...
      threads:  ...
      unchanged tensors: ...
      CUDA:     ...
    """
    from . import __version__

    info = _C.build_info()
    forced = ", forced by FUSEDOPT_ISA" if os.environ.get("FUSEDOPT_ISA") else ""
    missing = info["cuda_unavailable"]
    cuda = f"no: {missing}" if missing else f"built for {info['cuda_archs']}"
    print(
        f"fusedopt {__version__} ({_C.__file__})\n"
        f"  compiler: {info['compiler']}\n"
        f"  torch:    {torch.__version__}, python {platform.python_version()}\n"
        f"  CPU:      {cpu_isa()}{forced} (available: {', '.join(info['isas'])})\n"
        f"  threads:  {_threads()}\n"
        f"  unchanged tensors: recognised by {_recognition()}\n"
        f"  CUDA:     {cuda}"
    )


def _recognition() -> str:
    obstacle = _C.build_info()["fingerprint_obstacle"]
    if obstacle is None:
        return "fingerprints (FUSEDOPT_FINGERPRINTS=0 switches them off)"
    is_off = "=" in obstacle
    reason = f"as {obstacle} asks for" if is_off else f"this torch is not known in {obstacle}"
    return f"reading all of them, {reason}"
