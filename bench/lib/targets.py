"""What fusedopt aims at on two CPU cores and on an H100, and whether a run of step.py is there.

The launches of a step are counted by gpu/launches.py; the targets of training.py are in configs.py.
"""

from __future__ import annotations

import dataclasses
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
    rows = (case or {}).get("candidates", {})
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
    instead: Target | None = None  # does as well

    def is_met(self, case: Figures, value: float) -> bool:
        if SIGNS[self.sign](value, self.bar):
            return True
        other = None if self.instead is None else self.instead.value(case)
        return other is not None and self.instead is not None and self.instead.is_met(case, other)


def times(name: str, bar: float, sign: str = ">=") -> Target:
    what = name.replace("/", " / ") if "/" in name else f"{name} / fusedopt"
    return Target(what, lambda case: ratio(case, name), sign, bar)


def ours(what: str, path: str, sign: str, bar: float) -> Target:
    """One of fusedopt's own figures, such as "host.us_per_tensor"."""

    def value(case: Figures) -> float | None:
        found = case["candidates"]["fusedopt"]
        for name in path.split("."):
            found = found.get(name, {})
        return found or None

    return Target(what, value, sign, bar)


def times_on_gpu(name: str, bar: float) -> Target:
    """A ratio of times of the GPU alone, the host's left out."""

    def value(case: Figures) -> float | None:
        found = (case["candidates"].get(name, {}).get("gpu") or {}).get("ratio")
        return found and float(found["median"])

    return Target(f"{name} / ours, GPU alone", value, ">=", bar)


def of_copy(percent: float) -> Target:
    return ours("% of copy, GPU alone", "gpu.percent_of_copy", ">=", percent)


@dataclass(frozen=True)
class Targets:
    candidates: list[str]
    lines: dict[Key, list[Target]]

    def choices(self, place: int, optimizers: list[str]) -> list[str]:
        """Of the dtypes or workloads: those that a run of these optimizers must have measured."""
        return list(dict.fromkeys(key[place] for key in self.lines if key[0] in optimizers))

    def compare(self, cases: Iterable[Figures]) -> tuple[list[str], bool]:
        """Lines to print and whether all that were measured pass; what was not is said to be so.

        A baseline that is not installed gives no line.
        """
        found = {(c["optimizer"], c["dtype"], c["workload"]): c for c in cases}
        text, good, missing = [], True, Counter[str]()
        for key, targets in self.lines.items():
            case = found.get(key, {})
            is_measured = "fusedopt" in case.get("candidates", ())
            values = [target.value(case) if is_measured else None for target in targets]
            missing[f"{key[0]:6} {key[1]:9}"] += all(value is None for value in values)
            for target, value in zip(targets, values, strict=True):
                if value is None:
                    continue
                passed = target.is_met(case, value)
                good = good and passed
                text.append(
                    f"  {'pass' if passed else 'MISS'}  {key[0]:6} {key[1]:9} {key[2]:16} "
                    f"{target.what:25} {value:8.2f}  {target.sign} {target.bar:g}"
                    + (
                        f", or {target.instead.what} {target.instead.sign} {target.instead.bar:g}"
                        if target.instead
                        else ""
                    )
                )
        text += [f"  -     {kind} {n} workloads not measured" for kind, n in missing.items() if n]
        return text, good


def _targets(
    candidates: list[str], workloads: Iterable[str], adamw: dict[str, dict[str, list[Target]]],
    others: dict[Key, list[Target]] | None = None, for_all: dict[str, list[Target]] | None = None,
) -> Targets:  # fmt: skip
    """Wherever AdamW has none of its own, fusedopt has to be ahead of torch's best.

    ``for_all``: by the workload, what holds for every optimizer and dtype beside that.
    """
    kinds = [(o, d) for o in ("AdamW", "SGD", "Adam") for d in ("float32", "bfloat16")]
    lines = {(o, d, work): [times("torch-fused", 1.0, ">")] for o, d in kinds for work in workloads}
    own = {("AdamW", d, work): bars for d, found in adamw.items() for work, bars in found.items()}
    lines |= own
    for (optimizer, dtype, work), targets in lines.items():
        lines[optimizer, dtype, work] = [*targets, *(for_all or {}).get(work, ())]
    return Targets(candidates, lines | (others or {}))


# AdamW in float32 on a CPU with fresh grads: times as fast as torch's fused and foreach.
CPU_TIMES = {
    "one-64Mi": (1.0, 5.0), "gpt2-124m": (1.0, 3.0), "many-1000x1000": (8.0, 24.0),
    "many-1000x64": (10.0, 28.0), "many-10000x64": (10.0, 28.0), "groups-400x5000": (8.0, 22.0),
}  # fmt: skip
CPU_MORE = {
    "one-64Mi": ours("% of in-place multiply", "percent_of_multiply", ">=", 90.0),
    "host-1000x1": ours("host us per tensor", "us_per_tensor", "<=", 0.5),
}
CPU = {
    work: [*map(times, ("torch-fused", "torch-foreach"), CPU_TIMES.get(work, ())),
           *([CPU_MORE[work]] if work in CPU_MORE else [])]
    for work in (*CPU_TIMES, "host-1000x1")
}  # fmt: skip

# Those of which torch has no fused form, but of Adagrad on a CPU. SparseAdam's only one is a loop.
OTHERS = ("RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")


def _others(model: float, many: float, instead: Target) -> dict[Key, list[Target]]:
    """Beside torch's foreach, for GPT-2 (or as fast as memory is) and for 1000 x 1000."""
    of_model = dataclasses.replace(times("torch-foreach", model), instead=instead)
    targets = {"gpt2-124m": of_model, "many-1000x1000": times("torch-foreach", many)}
    found = {
        (optimizer, "float32", work): [target]
        for optimizer in OTHERS
        for work, target in targets.items()
    }
    return found | {("SparseAdam", "float32", "embedding-1Mx64"): [times("torch-loop", 5.0)]}


CPU_OTHERS = _others(3.0, 10.0, ours("% of in-place multiply", "percent_of_multiply", ">=", 90.0))
for _work in ("gpt2-124m", "many-1000x1000"):
    CPU_OTHERS["Adagrad", "float32", _work].append(times("torch-fused", 1.0))
CUDA_OTHERS = _others(2.5, 6.0, ours("% of device copy", "percent_of_copy", ">=", 93.0))

# On a GPU, by the wall clock where nothing else is said. What all optimizers should reach in any
# format: the memory's speed, and that of a kernel which was compiled for one tensor.
FOR_ALL = {
    "one-256Mi": [of_copy(97.0), times_on_gpu("optimi", 0.99)],
    "gpt2-124m": [of_copy(95.0)],
    "llama-8b-eighth": [of_copy(95.0)],
}
LARGE = [times("torch-fused", 1.2), times("torch-foreach", 2.5)]
MODEL = [times("torch-fused", 1.5)]
LLAMA = [times("torch-fused", 1.3), times("apex", 1.3)]
MANY = [
    times("torch-fused", 6.0),
    ours("host us per tensor", "host.us_per_tensor", "<=", 0.6),
    ours("ms, GPU alone", "gpu.ms.median", "<=", 0.008),
]
MANY_AND_GRAPHS = [*MANY, times("torch-graph/fusedopt-graph", 3.0)]
CUDA = {
    "float32": {"one-256Mi": LARGE, "gpt2-124m": MODEL, "resnet50": MODEL,
                "many-1000x1000": MANY_AND_GRAPHS, "many-10000x64": MANY},
    "bfloat16": {"one-256Mi": LARGE, "llama-8b-eighth": LLAMA},
}  # fmt: skip
CUDA_CANDIDATES = [
    "fusedopt", "torch-fused", "torch-foreach", "torch-loop", "fusedopt-graph", "torch-graph",
    "apex", "te", "flashoptim", "optimi", "bitsandbytes",
]  # fmt: skip

TARGETS = {
    "cpu": _targets(["fusedopt", "torch-fused", "torch-foreach"], CPU_TIMES, {"float32": CPU},
                    CPU_OTHERS),
    "cuda": _targets(CUDA_CANDIDATES, CUDA["bfloat16"] | CUDA["float32"], CUDA, CUDA_OTHERS,
                     FOR_ALL),
}  # fmt: skip
