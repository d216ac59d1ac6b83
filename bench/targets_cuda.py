"""What fusedopt promises on an H100, and whether a run of step.py has kept it.

The launches of a step are counted by launches.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from targets import Key, Line, key_of, ratio_to_ours, report

OPTIMIZERS = ["AdamW", "SGD", "Adam"]
DTYPES = ["float32", "bfloat16"]
GRAPHS = ("fusedopt-graph", "torch-graph")
CONTENDERS = ["fusedopt", "torch-fused", "torch-foreach", "torch-loop", *GRAPHS,
              "apex", "te", "flashoptim", "optimi", "bitsandbytes"]  # fmt: skip

# AdamW: times as fast as these contenders, by the wall clock.
LARGE = {"torch-fused": 1.2, "torch-foreach": 2.5}
MODEL = {"torch-fused": 1.5}
MANY = {"torch-fused": 6.0}
ADAMW: dict[tuple[str, str], dict[str, float]] = {
    ("float32", "one-256Mi"): LARGE,
    ("bfloat16", "one-256Mi"): LARGE,
    ("bfloat16", "llama-8b-eighth"): {"torch-fused": 1.3, "apex": 1.3},
    ("float32", "gpt2-124m"): MODEL,
    ("float32", "resnet50"): MODEL,
    ("float32", "many-1000x1000"): MANY,
    ("float32", "many-10000x64"): MANY,
}
WORKLOADS = list(dict.fromkeys(workload for _, workload in ADAMW))
MIN_PERCENT_OF_COPY = 93.0  # one-256Mi
MAX_HOST_US = 0.6  # a tensor, in the workloads of MANY
MIN_PERCENT_OF_COPY_MANY = 50.0  # there, on the device: within twice the time of the bytes
GRAPH_WORKLOAD, MIN_GRAPH_RATIO = "many-1000x1000", 3.0


def _adamw(case: dict[str, Any], bars: dict[str, float]) -> Iterator[Line]:
    for contender, bar in bars.items():
        if (ratio := ratio_to_ours(case, contender)) is not None:
            yield f"{contender} / fusedopt", ratio, f">= {bar:g}", ratio >= bar
    ours = case["contenders"]["fusedopt"]
    if bars is LARGE:
        share = ours["percent_of_copy"]
        bar = MIN_PERCENT_OF_COPY
        yield "% of device copy", share, f">= {bar:g}", share >= bar
    if bars is MANY and "gpu" in ours:
        cost = ours["host"]["us_per_tensor"]
        yield "host us per tensor", cost, f"<= {MAX_HOST_US}", cost <= MAX_HOST_US
        share = ours["gpu"]["percent_of_copy"]
        bar = MIN_PERCENT_OF_COPY_MANY
        yield "% of copy, GPU alone", share, f">= {bar:g}", share >= bar
    if case["workload"] == GRAPH_WORKLOAD:
        yield from _graphs(case, MIN_GRAPH_RATIO)


def _graphs(case: dict[str, Any], bar: float) -> Iterator[Line]:
    """One captured step against the other."""
    ours, theirs = (ratio_to_ours(case, name) for name in GRAPHS)
    if ours and theirs:
        ratio = theirs / ours
        yield f"{GRAPHS[1]} / {GRAPHS[0]}", ratio, f">= {bar:g}", ratio >= bar


def _ahead(case: dict[str, Any]) -> Iterator[Line]:
    """Everything else has to be ahead of torch's best."""
    if (ratio := ratio_to_ours(case, "torch-fused")) is not None:
        yield "torch-fused / fusedopt", ratio, "> 1", ratio > 1.0


def compare(cases: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """As in targets.py; a contender that is not installed gives no line."""
    measured: dict[Key, list[Line]] = {}
    for case in cases:
        optimizer, dtype, workload = key = key_of(case)
        if "fusedopt" in case["contenders"]:
            bars = ADAMW.get((dtype, workload)) if optimizer == "AdamW" else None
            measured[key] = list(_ahead(case) if bars is None else _adamw(case, bars))
    promised = [(o, d, w) for o in OPTIMIZERS for d in DTYPES for w in WORKLOADS]
    return report(measured, promised)
