"""What fusedopt aims at on two CPU cores and on an H100, and whether a run of step.py is there.

The launches of a step are counted by gpu/launches.py; the targets of training.py are in configs.py.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

HEADING = "Targets:"  # gpu/parts.py takes it as the end of a run
SIGNS = {">=": operator.ge, ">": operator.gt, "<=": operator.le}

Key = tuple[str, str, str]  # optimizer, dtype, workload
Figures = dict[str, Any]


def ratio(case: Figures | None, name: str) -> float | None:
    """Time of a baseline, or of "one/other", over fusedopt's, or over the other's."""
    name, _, other = name.partition("/")
    rows = (case or {}).get("contenders", {})
    if case is None or case.get("base") != "fusedopt" or not {name, other or name} <= rows.keys():
        return None
    below = rows[other]["ratio"]["median"] if other else 1.0
    return float(rows[name]["ratio"]["median"] / below)


@dataclass(frozen=True)
class Target:
    what: str
    value: Callable[[Figures], float | None]  # of a case; None: not measured
    sign: str
    bar: float

    def line(self, value: float, title: str) -> tuple[str, bool]:
        passed = SIGNS[self.sign](value, self.bar)
        verdict = "pass" if passed else "MISS"
        text = f"  {verdict}  {title} {self.what:25} {value:8.2f}  {self.sign} {self.bar:g}"
        return text, passed


def times(name: str, bar: float, sign: str = ">=") -> Target:
    what = " / ".join(name.split("/")) if "/" in name else f"{name} / fusedopt"
    return Target(what, lambda case: ratio(case, name), sign, bar)


def ours(what: str, path: str, sign: str, bar: float) -> Target:
    """One of fusedopt's own figures, such as "host.us_per_tensor"."""

    def value(case: Figures) -> float | None:
        found: Any = case["contenders"]["fusedopt"]
        for name in path.split("."):
            found = found.get(name, {})
        return None if found == {} else float(found)

    return Target(what, value, sign, bar)


AHEAD = [times("torch-fused", 1.0, ">")]  # wherever there is no target of its own


@dataclass(frozen=True)
class Targets:
    candidates: list[str]
    lines: dict[Key, list[Target]]

    def choices(self, place: int) -> list[str]:
        """Of the optimizers, dtypes or workloads: those that a run must have measured."""
        return list(dict.fromkeys(key[place] for key in self.lines))

    def compare(self, cases: Iterable[Figures]) -> tuple[list[str], bool]:
        """Lines to print and whether all that were measured pass; what was not is said to be so.

        A baseline that is not installed gives no line.
        """
        found = {(c["optimizer"], c["dtype"], c["workload"]): c for c in cases}
        text, good = [], True
        missing: Counter[tuple[str, str]] = Counter()
        for key, targets in self.lines.items():
            case = found.get(key)
            is_measured = case is not None and "fusedopt" in case["contenders"]
            values = [(each, each.value(case)) for each in targets if case] if is_measured else []
            measured = [(each, value) for each, value in values if value is not None]
            missing[key[:2]] += not measured
            for target, value in measured:
                line, passed = target.line(value, f"{key[0]:6} {key[1]:9} {key[2]:16}")
                text.append(line)
                good = good and passed
        for (optimizer, dtype), count in missing.items():
            if count:
                text.append(f"  -     {optimizer:6} {dtype:9} {count} workloads not measured")
        return text, good


def _targets(
    candidates: list[str], workloads: Iterable[str], special: dict[Key, list[Target]]
) -> Targets:
    optimizers, dtypes = ("AdamW", "SGD", "Adam"), ("float32", "bfloat16")
    ahead = {(o, d, w): AHEAD for o in optimizers for d in dtypes for w in workloads}
    return Targets(candidates, ahead | special)


# AdamW in float32 on a CPU: times as fast as torch's fused and foreach.
CPU_TIMES = {
    "one-64Mi": (1.0, 5.0),
    "gpt2-124m": (1.0, 3.0),
    "many-1000x1000": (8.0, 24.0),
    "many-1000x64": (10.0, 30.0),
    "many-10000x64": (10.0, 30.0),
    "groups-400x5000": (8.0, 25.0),
}
CPU_LINES = {
    ("AdamW", "float32", workload): [times("torch-fused", fused), times("torch-foreach", foreach)]
    for workload, (fused, foreach) in CPU_TIMES.items()
}
CPU_LINES["AdamW", "float32", "one-64Mi"].append(
    ours("% of in-place multiply", "percent_of_multiply", ">=", 90.0)
)
CPU_LINES["AdamW", "float32", "host-1000x1"] = [
    ours("host us per tensor", "us_per_tensor", "<=", 0.6)
]

# AdamW on a GPU, by the wall clock where nothing else is said.
LARGE = [
    times("torch-fused", 1.2),
    times("torch-foreach", 2.5),
    ours("% of device copy", "percent_of_copy", ">=", 93.0),
]
MODEL = [times("torch-fused", 1.5)]
MANY = [
    times("torch-fused", 6.0),
    ours("host us per tensor", "host.us_per_tensor", "<=", 0.6),
    # On the device: within twice the time of the bytes.
    ours("% of copy, GPU alone", "gpu.percent_of_copy", ">=", 50.0),
]
CUDA_LINES = {
    ("AdamW", "float32", "one-256Mi"): LARGE,
    ("AdamW", "bfloat16", "one-256Mi"): LARGE,
    ("AdamW", "bfloat16", "llama-8b-eighth"): [times("torch-fused", 1.3), times("apex", 1.3)],
    ("AdamW", "float32", "gpt2-124m"): MODEL,
    ("AdamW", "float32", "resnet50"): MODEL,
    ("AdamW", "float32", "many-1000x1000"): [*MANY, times("torch-graph/fusedopt-graph", 3.0)],
    ("AdamW", "float32", "many-10000x64"): MANY,
}

TARGETS = {
    "cpu": _targets(["fusedopt", "torch-fused", "torch-foreach"], CPU_TIMES, CPU_LINES),
    "cuda": _targets(
        ["fusedopt", "torch-fused", "torch-foreach", "torch-loop", "fusedopt-graph", "torch-graph",
         "apex", "te", "flashoptim", "optimi", "bitsandbytes"],
        dict.fromkeys(workload for _, _, workload in CUDA_LINES),
        CUDA_LINES,
    ),
}  # fmt: skip
