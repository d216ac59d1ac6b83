"""The repository's files, what tests read in them, and Python in processes of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fusedopt

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(fusedopt.__file__).resolve().parent


def constant(file: str, name: str) -> int:
    """A constant of the C++ code, so that sizes in tests stay at its boundaries."""
    return int(re.search(rf"\b{name} = (\d+);", (ROOT / "csrc" / file).read_text())[1])


def start_python(*command: object, **environment: str) -> "subprocess.Popen[str]":
    """With the fusedopt that the tests themselves have imported, in any folder."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd="/",  # else -c would find the sources of fusedopt first, when started beside them
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(*command: object, **environment: str) -> str:
    """Standard output, once all went well."""
    process = start_python(*command, **environment)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    return out
