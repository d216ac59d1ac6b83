"""Another process that keeps a core busy, as the workers of a data loader do."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

ARITHMETIC = (
    "while True: sum(range(1000))"  # plain Python: no threads of its own, next to no memory
)
SETTLE_S = 0.5


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """Pinned to no core: where it runs is the operating system's choice, as in training."""
    process = subprocess.Popen([sys.executable, "-c", ARITHMETIC])
    try:
        time.sleep(SETTLE_S)
        if process.poll() is not None:
            raise RuntimeError(f"the busy process ended by itself: status {process.returncode}")
        yield
    finally:
        process.kill()
        process.wait()
