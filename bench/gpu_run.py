"""How gpu.py runs a command: with a time limit, into one log, or not at all (--dry-run)."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import MIB, without_folders

ROOT = Path(__file__).resolve().parent.parent
TOOL_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")
MAX_LOG_BYTES = 3 * MIB // 2  # of one command
GRACE_S = 8.0  # between the polite end of a command and the other one


@dataclass
class Finished:
    """A command that ended, by itself or not."""

    text: str
    code: int | None
    seconds: float
    timed_out: bool = False

    @property
    def good(self) -> bool:
        return self.code == 0 and not self.timed_out

    def tail(self, lines: int = 25) -> list[str]:
        """For the JSON, so without the folders of this machine."""
        return without_folders(self.text).splitlines()[-lines:]


@dataclass
class Runner:
    out: Path
    scratch: Path
    dry: bool = False
    wheel: Path | None = None  # to install in place of a build
    archs: str | None = None  # compute capabilities of the GPUs here, as FUSEDOPT_CUDA_ARCHS
    deadline: float = 0.0
    commands: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.out / "gpu.log"

    def left(self) -> float:
        """Seconds that the current part may still take."""
        return self.deadline - time.monotonic()

    def tool(self, name: str) -> str | None:
        """Path of a program of the CUDA toolkit; in a dry run its name."""
        home = os.environ.get("CUDA_HOME")
        folders = [*([f"{home}/bin"] if home else []), *TOOL_FOLDERS]
        path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
        return path or (name if self.dry else None)

    def python(
        self, *arguments: str | Path, share: float = 1.0, installed: bool = False,
        under: list[str] | None = None, env: dict[str, str] | None = None,
    ) -> Finished:  # fmt: skip
        """Run this Python; ``installed``: on the package that was installed, not the sources here.

        ``python -m`` and ``-c`` would otherwise find the folder ``fusedopt`` of the working tree,
        which has no extension in it. (PYTHONSAFEPATH needs Python 3.11.)
        """
        extra = dict(env or {}) | ({"PYTHONSAFEPATH": "1"} if installed else {})
        command = [*(under or []), sys.executable, *map(str, arguments)]
        return self.run(command, self.left() * share, extra)

    def run(
        self, command: list[str], timeout: float, extra: dict[str, str] | None = None
    ) -> Finished:
        shown = shlex.join(command).replace(sys.executable, "python")
        shown = " ".join([*(f"{key}={value}" for key, value in (extra or {}).items()), shown])
        self.commands.append(without_folders(shown))
        if self.dry:
            print(f"  {shown}  # {timeout:.0f} s at most")
            return Finished("", 0, 0.0)
        start = time.monotonic()
        with self.log.open("ab") as log:
            log.write(f"\n$ {shown}\n".encode())
            log.flush()
            before = log.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **(extra or {})}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            timed_out = _wait(process, timeout)
        text = self._shortened(before)
        return Finished(text, process.returncode, time.monotonic() - start, timed_out)

    def _shortened(self, before: int) -> str:
        """What the command wrote; in the log, a very long text keeps its two ends."""
        with self.log.open("r+b") as log:
            log.seek(before)
            written = log.read()
            if len(written) > MAX_LOG_BYTES:
                half = MAX_LOG_BYTES // 2
                cut = b"\n[... %d bytes left out ...]\n" % (len(written) - 2 * half)
                log.seek(before)
                log.truncate()
                log.write(written[:half] + cut + written[-half:])
        return written.decode(errors="replace")


def _wait(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Whether it had to be ended: first as by Ctrl-C, on which pytest sums up what it has."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(timeout - GRACE_S, 1.0))
        return False
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
            break
    with contextlib.suppress(ProcessLookupError):  # what it left behind
        os.killpg(process.pid, signal.SIGKILL)
    return True
