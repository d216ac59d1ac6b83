"""The parts of gpu.py. Each runs its commands and returns its verdict and figures."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import targets_cuda
from gpu_logs import METRICS, ncu_cases, pytest_counts, sanitizer_findings
from gpu_run import ROOT, Finished, Runner
from training_report import lines_of as training_lines
from training_rows import ROWS, SETTINGS

Result = dict[str, Any]
OK, FAILED, TIMED_OUT, MISSED, NO_TOOL = "ok", "failed", "timed out", "target missed", "no tool"
# pytest-benchmark warns under xdist, and warnings are errors. pytest takes names it does not know.
NO_PLUGINS = ("-p", "no:cacheprovider", "-p", "no:benchmark")
PYTEST = ("-m", "pytest", "--device", "cuda", "-q", *NO_PLUGINS)
MAX_WORKERS = 14  # each has a context of its own on the GPU
CUDA_TESTS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/test_cuda*.py"))
SHOW_CONFIG = "import fusedopt; fusedopt.show_config()"
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else one allocation holds many tensors


def _verdict(*runs: Finished, good: bool = True) -> str:
    if any(run.timed_out for run in runs):
        return TIMED_OUT
    return OK if good and all(run.good for run in runs) else FAILED


def _read(path: Path) -> Result:
    return json.loads(path.read_text()) if path.exists() else {}


def build(runner: Runner) -> Result:
    """For the GPUs here alone, which is sooner; or a wheel that was built before."""
    env = {"PIP_ROOT_USER_ACTION": "ignore", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    what = ["--no-build-isolation", "."]
    if runner.wheel is not None:
        what = [str(runner.wheel)]
    else:
        env["FUSEDOPT_CUDA"] = "1"
        if runner.archs and not os.environ.get("FUSEDOPT_CUDA_ARCHS"):
            env["FUSEDOPT_CUDA_ARCHS"] = runner.archs
    options = ("--disable-pip-version-check", "-q", "--no-deps", "--force-reinstall")
    install = runner.python("-m", "pip", "install", *options, *what, share=0.9, env=env)
    if not install.good:
        return {"verdict": _verdict(install), "tail": install.tail(60)}
    shown = runner.python("-c", SHOW_CONFIG, installed=True)
    with_cuda = "built for" in shown.text or runner.dry
    result = {"verdict": _verdict(shown, good=with_cuda), "config": shown.tail()}
    result |= {"wheel": runner.wheel.name} if runner.wheel else {"build_s": install.seconds}
    return result | (
        {} if with_cuda else {"why": "fusedopt has no CUDA in it", "tail": shown.tail()}
    )


def tests(runner: Runner) -> Result:
    """First those of the CUDA driver, then the others."""
    cores = len(os.sched_getaffinity(0))
    count = min(max(cores - 2, 2), MAX_WORKERS) if importlib.util.find_spec("xdist") else 0
    workers = ("-n", str(count)) if count else ()
    threads = {"OMP_NUM_THREADS": "2"} if count else {}
    result: Result = {"workers": count}
    first = runner.python(*PYTEST, *workers, *CUDA_TESTS, share=0.3, installed=True, env=threads)
    result["cuda"] = pytest_counts(first.text) | {"seconds": first.seconds}
    rest = [f"--ignore={name}" for name in CUDA_TESTS]
    others = runner.python(*PYTEST, *workers, *rest, installed=True, env=threads)
    result["others"] = pytest_counts(others.text) | {"seconds": others.seconds}
    for name, run in (("cuda", first), ("others", others)):
        if not result[name]["finished"]:
            result[name]["tail"] = run.tail()
    return result | {"verdict": _verdict(first, others)}


def sanitizer(runner: Runner) -> Result:
    """Initcheck looks at all kernels: it has to see torch's writes to know what we may read."""
    program = runner.tool("compute-sanitizer")
    if program is None:
        return {"verdict": NO_TOOL, "why": "compute-sanitizer is not installed here"}
    known = runner.run([program, "--help"], 30.0).text
    ours = ["--kernel-name" if "--kernel-name" in known else "--kernel-regex", "kns=fusedopt"]
    result: Result = {}
    verdicts = []
    for tool, share, options in (
        ("memcheck", 0.35, [*ours, "--report-api-errors", "no"]),
        ("racecheck", 0.5, ours),
        ("initcheck", 1.0, []),
    ):
        limits = ["--error-exitcode", "9", "--print-limit", "1000"]
        under = [program, "--tool", tool, *limits, *options]
        selected = (*PYTEST, *CUDA_TESTS, "-k", "sanitizer")
        run = runner.python(*selected, share=share, installed=True, under=under, env=UNCACHED)
        found, counts = sanitizer_findings(run.text), pytest_counts(run.text)
        clean = found["finished"] and not found["errors_in_ours"] and not found["unprinted"]
        clean = clean and counts["passed"] > 0 and not counts["failed"]
        verdict = TIMED_OUT if run.timed_out else OK if clean or runner.dry else FAILED
        tail = {} if verdict == OK else {"tail": run.tail()}
        tests_run = {key: counts[key] for key in ("passed", "failed", "skipped")}
        result[tool] = {"verdict": verdict, "seconds": run.seconds, **tests_run, **found, **tail}
        verdicts.append(verdict)
    worst = next((verdict for verdict in verdicts if verdict != OK), OK)
    return result | {"verdict": worst}


def step(runner: Runner) -> Result:
    path, picture = runner.out / "step-cuda.json", runner.out / "step-cuda.png"
    limit = max(runner.left() - 45, 5)  # for the last case, the picture, the start
    run = runner.python(
        "bench/step.py", "--device", "cuda", "--targets", "--budget", "3",
        "--max-seconds", f"{limit:.0f}", "--json", path, "--plot", picture,
    )  # fmt: skip
    cases = _read(path).get("cases", [])
    lines, good = targets_cuda.compare(cases)
    result = {"cases": len(cases), "targets": lines, "file": path.name}
    finished = "Promised figures:" in run.text or runner.dry  # exit status 1 is also a traceback's
    if run.timed_out or not finished:
        return result | {"verdict": _verdict(run, good=False), "tail": run.tail()}
    return result | {"verdict": OK if good else MISSED}


def exactness(runner: Runner) -> Result:
    """Roots and quotients of the kernels beside IEEE's, all floats and billions of pairs."""
    run = runner.python(*PYTEST, "tests/test_exactness.py", "-rA", installed=True)
    counts = pytest_counts(run.text)
    verdict = _verdict(run, good=counts["passed"] > 1 or runner.dry)
    return {"verdict": verdict, **counts, "tail": run.tail()}


def training(runner: Runner) -> Result:
    return _training(runner, [name for name in ROWS if name not in SETTINGS], "training-step")


def settings(runner: Runner) -> Result:
    """Every mixture of formats, averages, clipping, misaligned grads."""
    return _training(runner, list(SETTINGS), "settings")


def _training(runner: Runner, rows: list[str], name: str) -> Result:
    path = runner.out / f"{name}-cuda.json"
    wanted = [row for row in rows if "cuda" in ROWS[row].devices]
    limit = max(runner.left() - 20, 5)  # for the last row, the start
    run = runner.python(
        "bench/training_step.py", "--device", "cuda", "--budget", "2", "--rows", *wanted,
        "--max-seconds", f"{limit:.0f}", "--json", path,
    )  # fmt: skip
    measured = _read(path).get("rows", [])
    result = {"cases": len(measured), "targets": training_lines(measured), "file": path.name}
    finished = "Promised figures:" in run.text or runner.dry
    failed = any("failed" in row for row in measured)
    if run.timed_out or not finished or failed:
        return result | {"verdict": _verdict(run, good=False), "tail": run.tail()}
    return result | {"verdict": OK if run.good else MISSED}


def launches(runner: Runner) -> Result:
    path = runner.scratch / "launches.json"
    run = runner.python("bench/launches.py", "--device", "cuda", "--json", path)
    content = _read(path)
    result = {"launches": content.get("launches", [])}
    if run.code == 1 and content.get("good") is False:
        return result | {"verdict": MISSED}
    tail = {} if run.good else {"tail": run.tail()}
    return result | {"verdict": _verdict(run), **tail}


def ncu(runner: Runner) -> Result:
    program = runner.tool("ncu")
    if program is None:
        return {"verdict": NO_TOOL, "why": "ncu (Nsight Compute) is not installed here"}
    table, cases = runner.scratch / "ncu.csv", runner.scratch / "ncu_cases.json"
    under = [
        program, "--csv", "--print-units", "base", "--clock-control", "none",
        "--profile-from-start", "off", "--log-file", str(table), "--metrics", ",".join(METRICS),
        "--kernel-name", "regex:update_kernel|schedule_kernel|spin_kernel",
    ]  # fmt: skip
    run = runner.python("bench/ncu_target.py", "--device", "cuda", "--json", cases, under=under)
    text = table.read_text(errors="replace") if table.exists() else ""
    asked = _read(cases).get("cases", [])
    rows = ncu_cases(asked, text)
    complete = len(rows) == len(asked) and all(row["launches"] for row in rows)
    verdict = _verdict(run, good=bool(rows and complete) or runner.dry)
    tail = {} if verdict == OK else {"tail": [*run.tail(10), *text.splitlines()[-10:]]}
    return {"verdict": verdict, "cases": rows, **tail}


def train(runner: Runner) -> Result:
    path, picture = runner.out / "train-gpt-cuda.json", runner.out / "train-gpt-cuda.png"
    limit = max(runner.left() - 25, 5)
    run = runner.python(
        "bench/train_gpt.py", "--device", "cuda", "--max-seconds", f"{limit:.0f}",
        "--json", path, "--plot", picture,
    )  # fmt: skip
    content = _read(path)
    runs = [{k: v for k, v in row.items() if k != "losses"} for row in content.get("runs", [])]
    result = {"runs": runs, "apart": content.get("apart"), "file": path.name}
    return result | {"verdict": _verdict(run)} | ({} if run.good else {"tail": run.tail()})


def tune(runner: Runner) -> Result:
    path = runner.scratch / "tune.json"
    limit = max(runner.left() - 15, 5)
    run = runner.python("bench/tune.py", "--max-seconds", f"{limit:.0f}", "--json", path)
    tail = {} if run.good else {"tail": run.tail()}
    return {"verdict": _verdict(run), "variants": _read(path).get("variants", []), **tail}


@dataclass(frozen=True)
class Part:
    run: Callable[[Runner], Result]
    share: float  # of the time that is left, beside the parts still to come
    default: bool = True


# Seconds that the parts should take on 16 cores, the most important first.
PARTS = {
    "build": Part(build, 100),
    "tests": Part(tests, 190),
    "sanitizer": Part(sanitizer, 100),
    "step": Part(step, 140),
    "launches": Part(launches, 20),
    "ncu": Part(ncu, 45),
    "exactness": Part(exactness, 25),
    "settings": Part(settings, 90),
    "training": Part(training, 50),
    "train": Part(train, 40),
    "tune": Part(tune, 200, default=False),
}
