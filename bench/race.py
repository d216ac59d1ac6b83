"""Rounds in which every entrant runs once, and what they say: bandwidths, ratios."""

from __future__ import annotations

import statistics
import time

import torch
from clocks import Clock, CpuClock, CudaClock, Entrant
from common import MIB, spread

WARM_BYTES = 64 * MIB  # work that fits caches is measured on warm ones: a step before each sample
LARGE_BYTES = 32 * MIB  # from here on memory is the limit, and the probes must not fit caches
PROBE_BYTES = 256 * MIB
CUDA_PROBE_BYTES = 1024 * MIB
MIN_ROUNDS = 5
WARM_UP_ROUNDS = 1


def clock_for(device: torch.device, footprint: int, *, wall_only: bool = False) -> Clock:
    if device.type == "cuda":
        return CudaClock(device, wall_only)
    return CpuClock(footprint <= WARM_BYTES)


def probe_size(device: torch.device, footprint: int) -> int:
    """Bytes of each of the two probe tensors: beyond caches, or as much as the work itself.

    On a GPU always beyond caches: there a small copy shows what a launch costs.
    """
    if device.type == "cuda":
        return CUDA_PROBE_BYTES
    return PROBE_BYTES if footprint >= LARGE_BYTES else max(footprint // 2, 4)


def bandwidth_probes(probe_bytes: int, device: torch.device) -> list[Entrant]:
    """Plain copy and in-place multiply: what this machine's memory, or cache, gives right now."""
    source = torch.rand(probe_bytes // 4, device=device)
    target = source.clone()
    moved = 2 * source.nbytes
    return [
        Entrant("copy", lambda: target.copy_(source), moved),
        Entrant("multiply", lambda: target.mul_(1.0000001), moved),
    ]


def race(clock: Clock, entrants: list[Entrant], rounds: int, budget_s: float) -> None:
    """Rounds of one sample each, the order rotated; fewer than asked if time runs out."""
    for entrant in entrants:
        clock.prepare(entrant)
    start = time.perf_counter()
    for number in range(WARM_UP_ROUNDS + rounds):
        first = number % len(entrants)
        for entrant in entrants[first:] + entrants[:first]:
            times = clock.sample(entrant)
            if number < WARM_UP_ROUNDS:
                entrant.exposed = 0
                continue
            for kind, seconds in times.items():
                entrant.samples[kind].append(seconds)
        measured = number + 1 - WARM_UP_ROUNDS
        if measured >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
            return


def bandwidths(entrant: Entrant, kind: str = "wall") -> list[float]:
    return [entrant.bytes_moved / seconds * 1e-9 for seconds in entrant.samples[kind]]


def bandwidth(entrant: Entrant, kind: str = "wall") -> float:
    return statistics.median(bandwidths(entrant, kind))


def percent(mine: Entrant, theirs: Entrant, kind: str = "wall") -> float:
    """Of their bandwidth; shares and ratios are medians of what each round gave."""
    pairs = zip(bandwidths(mine, kind), bandwidths(theirs, kind), strict=True)
    return 100 * statistics.median(one / other for one, other in pairs)


def ratio(mine: Entrant, base: Entrant, kind: str = "wall") -> dict[str, float]:
    pairs = zip(mine.samples[kind], base.samples[kind], strict=True)
    return spread([one / other for one, other in pairs])
