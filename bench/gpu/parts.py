"""The parts of run_all.py, each with its verdict and figures, and how it runs a command.

A command has a time limit and writes into one log, or it is only shown (--dry-run).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logs import MARK, METRICS, UPDATES, ncu_cases, pytest_counts, sanitizer_findings
from training import target_lines

from lib.configs import COMPARISONS, SETTINGS
from lib.report import ROOT, without_folders
from lib.targets import HEADING, OTHERS, TARGETS
from lib.timing import MIB

Result = dict[str, Any]
OK, FAILED, TIMED_OUT, MISSED, NO_TOOL = "ok", "failed", "timed out", "target missed", "no tool"
TOOL_FOLDERS = (f"{os.environ.get('CUDA_HOME', '')}/bin", "/usr/local/cuda/bin", "/opt/cuda/bin")
MAX_LOG_BYTES = 3 * MIB // 2  # of one command
GRACE_S = 8.0  # between the polite end of a command and the other one
# pytest-benchmark warns under xdist, and warnings are errors. pytest takes names it does not know.
NO_PLUGINS = ("-p", "no:cacheprovider", "-p", "no:benchmark")
PYTEST = ("-m", "pytest", "--device", "cuda", "-q", *NO_PLUGINS)
MAX_WORKERS = 14  # each has a context of its own on the GPU
CUDA_TESTS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/cuda/test_*.py"))
SHOW_CONFIG = "import fusedopt; fusedopt.show_config()"
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else one allocation holds many tensors


@dataclass
class Finished:
    """A command that ended, by itself or not."""

    text: str = ""
    code: int | None = 0
    seconds: float = 0.0
    timed_out: bool = False

    @property
    def good(self) -> bool:
        return self.code == 0 and not self.timed_out

    def tail(self, lines: int = 25) -> list[str]:
        """For the JSON, so without the folders of this machine."""
        return without_folders(self.text).splitlines()[-lines:]

    def result(self, good: bool = True, lines: int = 25, **figures: Any) -> Result:
        """Figures with the verdict, and what was written at the end unless all is well."""
        verdict = TIMED_OUT if self.timed_out else OK if good and self.good else FAILED
        tail = {} if verdict == OK else {"tail": self.tail(lines)}
        return {**figures, "verdict": verdict, **tail}


@dataclass
class Runner:
    out: Path
    scratch: Path
    dry: bool = False
    wheel: Path | None = None  # to install in place of a build
    archs: str | None = None  # compute capabilities of the GPUs here, as FUSEDOPT_CUDA_ARCHS
    deadline: float = 0.0
    commands: list[str] = field(default_factory=list)

    def left(self, reserve: float = 0.0) -> float:
        """Seconds that the current part may still take."""
        return self.deadline - time.monotonic() - reserve

    def max_seconds(self, reserve: float) -> tuple[str, str]:
        """For a program that must begin nothing new once only the reserve is left."""
        return "--max-seconds", f"{max(self.left(reserve), 5):.0f}"

    def tool(self, name: str) -> str | None:
        """Path of a program of the CUDA toolkit; in a dry run its name."""
        path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(TOOL_FOLDERS))
        return path or (name if self.dry else None)

    def python(
        self, *arguments: str | Path, share: float = 1.0, installed: bool = False,
        under: list[str] | None = None, env: dict[str, str] | None = None,
    ) -> Finished:  # fmt: skip
        """Run this Python; ``installed``: on the package that was installed, not the sources here.

        ``python -m`` and ``-c`` would otherwise find the folder ``fusedopt`` of the working tree,
        which has no extension in it. (PYTHONSAFEPATH needs Python 3.11.)
        """
        extra = (env or {}) | ({"PYTHONSAFEPATH": "1"} if installed else {})
        command = [*(under or []), sys.executable, *map(str, arguments)]
        return self.run(command, self.left() * share, **extra)

    def run(self, command: list[str], timeout: float, **env: str) -> Finished:
        shown = shlex.join(command).replace(sys.executable, "python")
        shown = " ".join([*(f"{key}={value}" for key, value in env.items()), shown])
        self.commands.append(without_folders(shown))
        if self.dry:
            print(f"  {shown}  # {timeout:.0f} s at most")
            return Finished()
        start = time.monotonic()
        with (self.out / "gpu.log").open("a+b") as log:
            log.write(f"\n$ {shown}\n".encode())
            log.flush()
            before = log.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            timed_out = _wait(process, timeout)
            log.seek(before)
            written = log.read()
            if len(written) > MAX_LOG_BYTES:  # a very long text keeps its two ends
                half = MAX_LOG_BYTES // 2
                cut = b"\n[... %d bytes left out ...]\n" % (len(written) - 2 * half)
                log.truncate(before)
                log.write(written[:half] + cut + written[-half:])
        text = written.decode(errors="replace")
        return Finished(text, process.returncode, time.monotonic() - start, timed_out)


def _wait(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Whether it had to be ended: first as by Ctrl-C, on which pytest sums up what it has."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(timeout - GRACE_S, 1.0))
        return False
    for number in (signal.SIGINT, signal.SIGKILL):  # the second for what is left, of it or by it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    return True


def _read(path: Path, key: str) -> Any:
    """What a program left in its JSON file, even if it was ended."""
    return json.loads(path.read_text()).get(key, []) if path.exists() else []


def _worst(results: dict[str, Result]) -> str:
    verdicts = [result["verdict"] for result in results.values()]
    return next((verdict for verdict in (TIMED_OUT, FAILED) if verdict in verdicts), OK)


def build(runner: Runner) -> Result:
    """For the GPUs here alone, which is sooner; or a wheel that was built before."""
    env = {"PIP_ROOT_USER_ACTION": "ignore", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    what = [str(runner.wheel)] if runner.wheel else ["--no-build-isolation", "."]
    if not runner.wheel:
        env["FUSEDOPT_CUDA"] = "1"
        if runner.archs and not os.environ.get("FUSEDOPT_CUDA_ARCHS"):
            env["FUSEDOPT_CUDA_ARCHS"] = runner.archs
    options = ("--disable-pip-version-check", "-q", "--no-deps", "--force-reinstall")
    install = runner.python("-m", "pip", "install", *options, *what, share=0.9, env=env)
    if not install.good:
        return install.result(lines=60)
    shown = runner.python("-c", SHOW_CONFIG, installed=True)
    with_cuda = "built for" in shown.text or runner.dry
    result = shown.result(with_cuda, config=shown.tail())
    result |= {"wheel": runner.wheel.name} if runner.wheel else {"build_s": install.seconds}
    return result | ({} if with_cuda else {"why": "fusedopt has no CUDA in it"})


def tests(runner: Runner) -> Result:
    """First those of the CUDA driver, then the others."""
    cores = len(os.sched_getaffinity(0))
    count = min(max(cores - 2, 2), MAX_WORKERS) if importlib.util.find_spec("xdist") else 0
    workers = ("-n", str(count)) if count else ()
    env = {"OMP_NUM_THREADS": "2"} if count else {}
    result: Result = {}
    rest = [f"--ignore={name}" for name in CUDA_TESTS]
    for name, share, chosen in (("cuda", 0.3, CUDA_TESTS), ("others", 1.0, rest)):
        run = runner.python(*PYTEST, *workers, *chosen, share=share, installed=True, env=env)
        result[name] = run.result(**pytest_counts(run.text), seconds=run.seconds)
    return result | {"workers": count, "verdict": _worst(result)}


def sanitizer(runner: Runner) -> Result:
    """Initcheck looks at all kernels: it has to see torch's writes to know what we may read."""
    program = runner.tool("compute-sanitizer")
    if program is None:
        return {"verdict": NO_TOOL, "why": "compute-sanitizer is not installed here"}
    known = runner.run([program, "--help"], 30.0).text
    ours = ["--kernel-name" if "--kernel-name" in known else "--kernel-regex", "kns=fusedopt"]
    memory = [*ours, "--report-api-errors", "no"]
    limits = ["--error-exitcode", "9", "--print-limit", "1000"]
    selected = (*PYTEST, *CUDA_TESTS, "-k", "sanitizer")
    result: Result = {}
    for tool, share, options in (
        ("memcheck", 0.35, memory), ("racecheck", 0.5, ours), ("initcheck", 1.0, [])
    ):  # fmt: skip
        under = [program, "--tool", tool, *limits, *options]
        run = runner.python(*selected, share=share, installed=True, under=under, env=UNCACHED)
        found, counts = sanitizer_findings(run.text), pytest_counts(run.text)
        clean = found["finished"] and not found["errors_in_ours"] and not found["unprinted"]
        clean = clean and counts["passed"] > 0 and not counts["failed"]
        verdict = TIMED_OUT if run.timed_out else OK if clean or runner.dry else FAILED
        tail = {} if verdict == OK else {"tail": run.tail()}
        tests_run = {key: counts[key] for key in ("passed", "failed", "skipped")}
        result[tool] = {"verdict": verdict, "seconds": run.seconds, **tests_run, **found, **tail}
    return result | {"verdict": _worst(result)}


def step(runner: Runner) -> Result:
    return _step(runner, "step-cuda.json", "--plot", runner.out / "step-cuda.png")


def others(runner: Runner) -> Result:
    """The optimizers of which torch has no fused form."""
    candidates = ("fusedopt", "torch-foreach", "torch-loop")
    chosen = ("--optimizer", *OTHERS, "SparseAdam", "--candidates", *candidates)
    return _step(runner, "step-cuda-others.json", *chosen)


def _step(runner: Runner, file: str, *more: str | Path) -> Result:
    path = runner.out / file
    limit = runner.max_seconds(45)  # for the last case, the picture, the start
    run = runner.python("bench/step.py", "--device", "cuda", "--targets", "--budget", "3", *limit,
                        "--json", path, *more)  # fmt: skip
    cases = _read(path, "cases")
    lines, good = TARGETS["cuda"].compare(cases)
    return _with_targets(runner, run, good, cases=len(cases), targets=lines, file=path.name)


def _with_targets(runner: Runner, run: Finished, good: bool, **figures: Any) -> Result:
    finished = HEADING in run.text or runner.dry  # exit status 1 is also a traceback's
    if run.timed_out or not finished or any("failed:" in line for line in figures["targets"]):
        return run.result(good=False, **figures)
    return figures | {"verdict": OK if good else MISSED}


def shares(runner: Runner) -> Result:
    path = runner.out / "shares-cuda.json"
    run = runner.python("bench/gpu/shares.py", "--json", path)
    return run.result(cases=len(_read(path, "shares")), file=path.name)


def exactness(runner: Runner) -> Result:
    """Roots and quotients of the kernels beside IEEE's, all floats and billions of pairs."""
    run = runner.python(*PYTEST, "tests/cuda/test_exactness.py", "-rA", installed=True)
    counts = pytest_counts(run.text)
    return run.result(counts["passed"] > 1 or runner.dry, **counts) | {"tail": run.tail()}


def training(runner: Runner) -> Result:
    names = [name for name in COMPARISONS if name not in SETTINGS]
    return _training(runner, names, "training-step-cuda.json")


def settings(runner: Runner) -> Result:
    """Every mixture of formats, averages, clipping, misaligned grads."""
    return _training(runner, list(SETTINGS), "settings-cuda.json")


def _training(runner: Runner, names: list[str], file: str) -> Result:
    wanted = [name for name in names if "cuda" in COMPARISONS[name].devices]
    limit = runner.max_seconds(20)  # for the last row, the start
    run = runner.python("bench/training.py", "--device", "cuda", "--budget", "2",
                        "--configs", *wanted, *limit, "--json", runner.out / file)  # fmt: skip
    rows = _read(runner.out / file, "rows")
    lines = target_lines(rows)
    return _with_targets(runner, run, run.good, cases=len(rows), targets=lines, file=file)


def launches(runner: Runner) -> Result:
    path = runner.scratch / "launches.json"
    run = runner.python("bench/gpu/launches.py", "--device", "cuda", "--json", path)
    result = run.result(launches=_read(path, "launches"))
    missed = run.code == 1 and _read(path, "good") is False
    return result | ({"verdict": MISSED} if missed else {})


def ncu(runner: Runner) -> Result:
    program = runner.tool("ncu")
    if program is None:
        return {"verdict": NO_TOOL, "why": "ncu (Nsight Compute) is not installed here"}
    table, cases = runner.scratch / "ncu.csv", runner.scratch / "ncu_cases.json"
    under = [
        program, "--csv", "--print-units", "base", "--clock-control", "none",
        "--profile-from-start", "off", "--log-file", str(table), "--metrics", ",".join(METRICS),
        "--kernel-name", "regex:" + "|".join((*UPDATES, MARK)),
    ]  # fmt: skip
    run = runner.python("bench/gpu/launches.py", "--for-ncu", "--json", cases, under=under)
    text = table.read_text(errors="replace") if table.exists() else ""
    asked = _read(cases, "cases")
    rows = ncu_cases(asked, text)
    complete = bool(rows) and len(rows) == len(asked) and all(row["launches"] for row in rows)
    end = text.splitlines()[-10:]
    return run.result(complete or runner.dry, 10, cases=rows) | ({} if complete else {"csv": end})


def train(runner: Runner) -> Result:
    path, picture = runner.out / "train-gpt-cuda.json", runner.out / "train-gpt-cuda.png"
    limit = runner.max_seconds(25)
    run = runner.python("examples/train_gpt.py", "--device", "cuda", *limit, "--json", path,
                        "--plot", picture)  # fmt: skip
    runs = [{k: v for k, v in row.items() if k != "losses"} for row in _read(path, "runs")]
    return run.result(runs=runs, apart=_read(path, "apart"), file=path.name)


def tune(runner: Runner) -> Result:
    path = runner.scratch / "tune.json"
    run = runner.python("bench/gpu/tune.py", *runner.max_seconds(15), "--json", path)
    return run.result(variants=_read(path, "variants"))


# Seconds that the parts should take on 16 cores, the most important first: their shares of the time
# that is left.
PARTS: dict[str, tuple[Callable[[Runner], Result], float]] = {
    "build": (build, 100), "tests": (tests, 190), "shares": (shares, 35),
    "sanitizer": (sanitizer, 100),
    "step": (step, 140), "others": (others, 80), "launches": (launches, 20), "ncu": (ncu, 45),
    "exactness": (exactness, 25), "settings": (settings, 90), "training": (training, 50),
    "train": (train, 40), "tune": (tune, 200),
}  # fmt: skip
USUAL = [name for name in PARTS if name != "tune"]
