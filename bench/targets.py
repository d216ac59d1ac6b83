"""What fusedopt promises on two CPU cores, and whether a run of step.py has kept it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

OPTIMIZERS = ["AdamW", "SGD", "Adam"]
DTYPES = ["float32", "bfloat16"]
CONTENDERS = ["fusedopt", "torch-fused", "torch-foreach"]

# AdamW in float32: times as fast as torch's fused and foreach.
ADAMW = {
    "one-64Mi": (1.0, 5.0),
    "gpt2-124m": (1.0, 3.0),
    "many-1000x1000": (8.0, 24.0),
    "many-1000x64": (10.0, 30.0),
    "many-10000x64": (10.0, 30.0),
    "groups-400x5000": (8.0, 25.0),
}
ALSO = "host-1000x1"
MIN_PERCENT_OF_MULTIPLY = 90.0
MAX_HOST_US = 0.6

WORKLOADS = [*ADAMW, ALSO]
Key = tuple[str, str, str]
Line = tuple[str, float, str, bool]  # what, value, bar, passed


def ratio_to_ours(case: dict[str, Any], contender: str) -> float | None:
    figures = case["contenders"].get(contender)
    return figures["ratio"]["median"] if figures and case.get("base") == "fusedopt" else None


def _adamw(case: dict[str, Any]) -> Iterator[Line]:
    """The lines with numbers of their own."""
    ours = case["contenders"]["fusedopt"]
    if case["workload"] == ALSO:
        cost = ours["us_per_tensor"]
        yield "host us per tensor", cost, f"<= {MAX_HOST_US}", cost <= MAX_HOST_US
        return
    bars = ADAMW.get(case["workload"], ())
    for contender, bar in zip(("torch-fused", "torch-foreach"), bars, strict=False):
        if (ratio := ratio_to_ours(case, contender)) is not None:
            yield f"{contender} / fusedopt", ratio, f">= {bar:g}", ratio >= bar
    if case["workload"] == "one-64Mi":
        share = ours["percent_of_multiply"]
        bar = MIN_PERCENT_OF_MULTIPLY
        yield "% of in-place multiply", share, f">= {bar:g}", share >= bar


def _ahead(case: dict[str, Any]) -> Iterator[Line]:
    """Everything else has to be ahead of torch's best."""
    if case["workload"] in ADAMW and (ratio := ratio_to_ours(case, "torch-fused")) is not None:
        yield "torch-fused / fusedopt", ratio, "> 1", ratio > 1.0


def report(
    measured: dict[Key, list[Line]], promised: list[Key], width: int = 16
) -> tuple[list[str], bool]:
    """Lines to print and whether all measured lines pass; a line not measured is said to be so."""
    text, missing = [], []
    for key in promised:
        title = f"{key[0]:6} {key[1]:9} {key[2]:{width}}"
        if not measured.get(key):
            missing.append(key[:2])
        for what, value, bar, passed in measured.get(key, ()):
            verdict = "pass" if passed else "MISS"
            text.append(f"  {verdict}  {title} {what:25} {value:8.2f}  {bar}")
    for (optimizer, dtype), count in Counter(missing).items():
        text.append(f"  -     {optimizer:6} {dtype:9} {count} workloads not measured")
    good = all(line[-1] for key in promised for line in measured.get(key, ()))
    return text, good


def key_of(case: dict[str, Any]) -> Key:
    return case["optimizer"], case["dtype"], case["workload"]


def compare(cases: list[dict[str, Any]]) -> tuple[list[str], bool]:
    measured: dict[Key, list[Line]] = {}
    for case in cases:
        key = key_of(case)
        if "fusedopt" in case["contenders"]:
            lines = _adamw(case) if key[:2] == ("AdamW", "float32") else _ahead(case)
            measured[key] = list(lines)
    promised = [(o, d, w) for o in OPTIMIZERS for d in DTYPES for w in ADAMW]
    promised.append(("AdamW", "float32", ALSO))
    return report(measured, promised)
