"""One case of step.py: every contender in lockstep, the memory bandwidth measured in between.

On a machine that does other work too, two runs one after the other compare the weather. Here every
round times every contender once, so what disturbs a round disturbs all, and ratios are taken
within rounds.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import MIB, available_memory, spread
from contenders import STATES, STREAMS, Contender, Groups, Step, qualify, reason
from workloads import Workload

MIN_SAMPLE_S = 2e-3  # shorter samples repeat the step: timer and scheduler would show otherwise
WARM_BYTES = 64 * MIB  # work that fits caches is measured on warm ones: a step before each sample
LARGE_BYTES = 32 * MIB  # from here on memory is the limit, and the probes must not fit caches
PROBE_BYTES = 256 * MIB
MIN_ROUNDS = 5
WARM_UP_ROUNDS = 1


@dataclass(frozen=True)
class Case:
    optimizer: str
    dtype: torch.dtype
    workload: Workload
    device: torch.device

    @property
    def bytes_per_element(self) -> int:
        return STREAMS[self.optimizer] * self.dtype.itemsize

    @property
    def title(self) -> str:
        return f"{self.optimizer} {str(self.dtype).removeprefix('torch.')} {self.workload.name}"

    def memory(self, contenders: int, shared: bool) -> int:
        """Bytes allocated: params and grads (and the template they are cloned from), states."""
        copies = 1 if shared else contenders + 1
        tensors = 2 * copies + STATES[self.optimizer] * contenders
        return tensors * self.workload.elements * self.dtype.itemsize + 2 * self.probe_bytes

    @property
    def footprint(self) -> int:
        streams = 2 + STATES[self.optimizer]
        return streams * self.workload.elements * self.dtype.itemsize

    @property
    def probe_bytes(self) -> int:
        """Of each of the two probe tensors: beyond caches, or as much as the work itself."""
        large = self.footprint >= LARGE_BYTES
        return PROBE_BYTES if large else max(self.footprint // 2, 4)


@dataclass
class Entrant:
    """Something timed once in every round: a contender or a bandwidth probe."""

    name: str
    step: Step
    bytes_moved: int
    note: str = ""
    inner: int = 1
    seconds: list[float] = field(default_factory=list)


def timer(device: torch.device) -> Callable[[Step, int], float]:
    """A function that gives the seconds of one call, averaged over ``inner`` calls."""

    def on_cpu(step: Step, inner: int) -> float:
        start = time.perf_counter()
        for _ in range(inner):
            step()
        return (time.perf_counter() - start) / inner

    def on_cuda(step: Step, inner: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(inner):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / inner

    return on_cuda if device.type == "cuda" else on_cpu


def _template(case: Case) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(param, grad) values for all contenders; grads are of a size that float16 can square."""
    generator = torch.Generator(case.device).manual_seed(0)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.float32, device=case.device)
        return empty.uniform_(0.05, 0.1, generator=generator).to(case.dtype)

    return [[(values(shape), values(shape)) for shape in group] for group in case.workload.groups]


def _param_groups(template: list[list[tuple[torch.Tensor, torch.Tensor]]], share: bool) -> Groups:
    groups = []
    for pairs in template:
        params = []
        for value, grad in pairs:
            param = (value if share else value.clone()).requires_grad_()
            param.grad = grad if share else grad.clone()
            params.append(param)
        groups.append({"params": params})
    return groups


def _probes(case: Case) -> list[Entrant]:
    """Plain copy and in-place multiply: what this machine's memory, or cache, gives right now."""
    source = torch.ones(case.probe_bytes // 4, device=case.device)
    target = torch.ones_like(source)
    moved = 2 * source.nbytes
    return [
        Entrant("copy", lambda: target.copy_(source), moved),
        Entrant("multiply", lambda: target.mul_(1.0000001), moved),
    ]


def _enter(
    case: Case, notes: dict[Contender, str], shared: bool
) -> tuple[list[Entrant], dict[str, str]]:
    """Give all who take part their tensors and make their first step."""
    template = _template(case)
    moved = case.bytes_per_element * case.workload.elements
    entrants, skipped = [], {}
    for contender, note in notes.items():
        try:
            step = contender.make(_param_groups(template, shared), case.optimizer)
            step()  # creates the states, builds caches, compiles
        except Exception as error:
            skipped[contender.name] = reason(error)
        else:
            entrants.append(Entrant(contender.name, step, moved, note))
    return entrants, skipped


def _race(case: Case, entrants: list[Entrant], rounds: int, budget_s: float) -> None:
    """Rounds of one sample each, the order rotated; fewer than asked if time runs out."""
    timed = timer(case.device)
    warm = case.footprint <= WARM_BYTES
    for entrant in entrants:
        entrant.step()
        once = min(timed(entrant.step, 1) for _ in range(2 if warm else 1))
        entrant.inner = max(1, math.ceil(MIN_SAMPLE_S / max(once, 1e-7)))
    start = time.perf_counter()
    for number in range(WARM_UP_ROUNDS + rounds):
        first = number % len(entrants)
        for entrant in entrants[first:] + entrants[:first]:
            if warm:
                entrant.step()
            seconds = timed(entrant.step, entrant.inner)
            if number >= WARM_UP_ROUNDS:
                entrant.seconds.append(seconds)
        measured = number + 1 - WARM_UP_ROUNDS
        if measured >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
            return


def _bandwidths(entrant: Entrant) -> list[float]:
    return [entrant.bytes_moved / seconds * 1e-9 for seconds in entrant.seconds]


def _figures(case: Case, entrants: dict[str, Entrant], name: str, base: str) -> dict[str, Any]:
    """All numbers of one contender; shares and ratios are medians of what each round gave."""
    entrant = entrants[name]
    bandwidth = _bandwidths(entrant)

    def percent_of(probe: str) -> float:
        pairs = zip(bandwidth, _bandwidths(entrants[probe]), strict=True)
        return 100 * statistics.median(mine / theirs for mine, theirs in pairs)

    times = zip(entrant.seconds, entrants[base].seconds, strict=True)
    return {
        "ms": spread([1e3 * seconds for seconds in entrant.seconds]),
        "us_per_tensor": 1e6 * statistics.median(entrant.seconds) / case.workload.tensors,
        "gb_per_s": statistics.median(bandwidth),
        "percent_of_copy": percent_of("copy"),
        "percent_of_multiply": percent_of("multiply"),
        "ratio": spread([mine / theirs for mine, theirs in times]),
        "inner": entrant.inner,
        "note": entrant.note,
    }


def run_case(
    case: Case, contenders: list[Contender], rounds: int, budget_s: float
) -> dict[str, Any]:
    """Measure one case; the result is what goes into the JSON file."""
    gc.collect()  # what the last case left
    notes, skipped = qualify(contenders, case.optimizer, case.dtype, case.device)
    free = available_memory(case.device) * 0.8
    shared = case.memory(len(notes), shared=False) > free
    needed = case.memory(len(notes), shared)
    result: dict[str, Any] = {
        "optimizer": case.optimizer,
        "dtype": str(case.dtype).removeprefix("torch."),
        "workload": case.workload.name,
        "tensors": case.workload.tensors,
        "groups": len(case.workload.groups),
        "elements": case.workload.elements,
        "bytes_per_element": case.bytes_per_element,
        "memory_mib": needed // MIB,
        "shared_params": shared,
        "rounds": 0,
        "contenders": {},
        "probes": {},
        "skipped": skipped,
    }
    if needed > free:
        why = f"needs {needed // MIB} MiB, {int(free) // MIB} MiB may be used"
        return result | {"skipped": skipped | {contender.name: why for contender in notes}}
    racing, failed = _enter(case, notes, shared)
    probes = _probes(case)
    gc.disable()
    try:
        _race(case, racing + probes, rounds, budget_s)
    finally:
        gc.enable()
    entrants = {entrant.name: entrant for entrant in racing + probes}
    base = "fusedopt" if "fusedopt" in entrants else racing[0].name if racing else ""
    return result | {
        "rounds": len(probes[0].seconds),
        "base": base,
        "contenders": {e.name: _figures(case, entrants, e.name, base) for e in racing},
        "probes": {probe.name: statistics.median(_bandwidths(probe)) for probe in probes},
        "skipped": skipped | failed,
    }
