"""Interleaved runs: rounds in which every candidate is timed once, in rotated order.

On a machine that does other work too, two runs one after the other compare the weather. Here what
disturbs a round disturbs all candidates, and ratios are medians of the rounds' ratios. A CPU is
timed by the wall clock alone, a GPU in three ways:

``wall``  until the GPU has done the steps: the longer of host and GPU, as training sees it
``host``  handing steps to an idle GPU without waiting for it
``gpu``   the same steps queued behind a kernel that sleeps until the host is done with them
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Step = Callable[[], object]
Spread = dict[str, float]  # median, p10, p90

MIB = 2**20
MIN_ROUNDS, WARM_UP_ROUNDS = 5, 1
MIN_SAMPLE_S = 2e-3  # shorter samples repeat the step: timer and scheduler would show otherwise
MIN_CUDA_SAMPLE_S = 10e-3  # here the wait at the end shows too
QUEUE_S, MAX_QUEUED = 0.5e-3, 8  # steps of host and gpu: few, or a full queue makes the host wait
SLOW_S = 0.1  # a step that takes longer than this on a GPU is timed by the wall alone
HIDE_MARGIN_S, MAX_HIDE_S = 50e-6, 0.25
CLOCK_WARM_UP_S = 0.1  # three times

CACHED_BYTES = 64 * MIB  # work that fits caches is measured on warm ones: a step before each sample
FLUSH_BYTES, MAX_COLD_STEPS = 192 * MIB, 3
LARGE_BYTES = 32 * MIB  # from here on memory is the limit, and the probes must not fit caches
PROBE_BYTES, CUDA_PROBE_BYTES = 256 * MIB, 1024 * MIB

BUSY_LOOP = "while True: sum(range(1000))"  # plain Python: one thread, next to no memory
SETTLE_S = 0.5


def spread(values: Sequence[float]) -> Spread:
    """Median and the range that holds 80 % of the values: robust on a machine with other work."""
    if len(values) < 2:
        return dict.fromkeys(("median", "p10", "p90"), values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}


@dataclass
class Candidate:
    """Something timed once in every round: an optimizer's step or a bandwidth probe."""

    name: str
    step: Step
    bytes_moved: int
    tensors: int = 1
    note: str = ""
    before: Step = lambda: None  # untimed, before every step
    inner: int = 1  # steps in a wall sample
    queued: int = 0  # steps in a host and a gpu sample; 0: neither is taken
    hide_s: float = 0.0  # how long the GPU sleeps before a gpu sample
    samples: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    exposed: int = 0  # gpu samples in which the GPU had to wait for the host after all

    def ms(self, kind: str = "wall") -> Spread:
        return spread([1e3 * seconds for seconds in self.samples[kind]])

    def gb_per_s(self, kind: str = "wall") -> float:
        return 1e-6 * self.bytes_moved / self.ms(kind)["median"]

    def time_ratio(self, other: Candidate, kind: str = "wall", scale: float = 1) -> Spread:
        pairs = zip(self.samples[kind], other.samples[kind], strict=True)
        return spread([scale * mine / theirs for mine, theirs in pairs])

    def bandwidth_ratio(self, other: Candidate, kind: str = "wall") -> Spread:
        return other.time_ratio(self, kind, self.bytes_moved / other.bytes_moved)

    def percent_of(self, other: Candidate, kind: str = "wall") -> float:
        return 100 * self.bandwidth_ratio(other, kind)["median"]

    def figures(self, base: Candidate, copy: Candidate, multiply: Candidate) -> dict[str, Any]:
        ms = self.ms()
        found = {
            "ms": ms, "us_per_tensor": 1e3 * ms["median"] / self.tensors,
            "gb_per_s": self.gb_per_s(), "percent_of_copy": self.percent_of(copy),
            "percent_of_multiply": self.percent_of(multiply), "ratio": self.time_ratio(base),
            "inner": self.inner, "note": self.note,
        }  # fmt: skip
        if self.queued:
            host = 1e3 * self.ms("host")["median"]
            found["host"] = {"us": host, "us_per_tensor": host / self.tensors}
            found["gpu"] = {
                "ms": self.ms("gpu"), "gb_per_s": self.gb_per_s("gpu"),
                "percent_of_copy": self.percent_of(copy, "gpu"),
                "ratio": self.time_ratio(base, "gpu") if base.queued else None,
                "steps": self.queued,
                "waited_for_host": self.exposed,  # samples; in these the time is too long
            }  # fmt: skip
        return found


class Clock:
    """``footprint``: bytes of params, grads and states; ``grads``, ``cache``: the options.

    On a GPU whose host waits for each step, what comes before the next one is not timed; if nothing
    does, one wait ends all steps of a wall sample, and the host runs ahead of the GPU.
    """

    def __init__(
        self, device: torch.device, footprint: int, grads: str, cache: str, wall_only: bool = False
    ) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.flush = _cache_flush(device) if cache == "cold" else None
        self.warms = not self.on_gpu and cache == "warm" and footprint <= CACHED_BYTES
        self.separate = not self.on_gpu or grads == "fresh" or cache == "cold"
        # For steps that wait for the GPU: nothing hides behind a sleep.
        self.wall_only = wall_only or not self.on_gpu
        if self.on_gpu:
            self.cycles_per_s = max(self._sleep_rate() for _ in range(3))

    def begin(self, candidate: Candidate) -> None:
        candidate.step()
        tries = 2 if self.warms or self.on_gpu else 1
        once = max(min(self._wall(candidate) for _ in range(tries)), 1e-7)
        candidate.inner = math.ceil((MIN_CUDA_SAMPLE_S if self.on_gpu else MIN_SAMPLE_S) / once)
        if self.flush:
            candidate.inner = min(candidate.inner, MAX_COLD_STEPS)
        if self.wall_only or once > SLOW_S:
            return
        candidate.queued = 1 if self.flush else min(MAX_QUEUED, math.ceil(QUEUE_S / once))
        host = max(self._host(candidate) for _ in range(3))
        candidate.hide_s = min(MAX_HIDE_S, 2 * host * candidate.queued + HIDE_MARGIN_S)
        while not self._gpu(candidate)[1] and candidate.hide_s < MAX_HIDE_S:
            candidate.hide_s = min(MAX_HIDE_S, 2 * candidate.hide_s)

    def sample(self, candidate: Candidate) -> dict[str, float]:
        if self.warms:
            candidate.step()
        times = {"wall": self._wall(candidate)}
        if candidate.queued:
            times["host"] = self._host(candidate)
            times["gpu"], hidden = self._gpu(candidate)
            candidate.exposed += not hidden
        return times

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _before(self, candidate: Candidate) -> None:
        candidate.before()
        if self.flush:
            self.flush()
        self._wait()

    def _wall(self, candidate: Candidate) -> float:
        together = 1 if self.separate else candidate.inner
        seconds = 0.0
        for _ in range(candidate.inner // together):
            self._before(candidate)
            start = time.perf_counter()
            for _ in range(together):
                candidate.step()
            self._wait()
            seconds += time.perf_counter() - start
        return seconds / candidate.inner

    def _host(self, candidate: Candidate) -> float:
        self._before(candidate)
        seconds = 0.0
        for _ in range(candidate.queued):
            start = time.perf_counter()
            candidate.step()
            seconds += time.perf_counter() - start
            candidate.before()
        return seconds / candidate.queued

    def _gpu(self, candidate: Candidate) -> tuple[float, bool]:
        """Seconds of a step, and whether the GPU still slept when the last one was queued."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._before(candidate)
        torch.cuda._sleep(int(candidate.hide_s * self.cycles_per_s))
        begin.record()
        for _ in range(candidate.queued):
            candidate.step()
            candidate.before()
        end.record()
        hidden = not begin.query()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / candidate.queued, hidden

    def _sleep_rate(self, cycles: int = 4_000_000) -> float:
        """Of a GPU whose clocks are up, after some work."""
        work = torch.rand(64 * MIB // 4, device=self.device)
        start = time.perf_counter()
        while time.perf_counter() - start < CLOCK_WARM_UP_S:
            work.mul_(1)
            self._wait()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return cycles / (begin.elapsed_time(end) * 1e-3)


def _cache_flush(device: torch.device) -> Step:
    """Reads so much other memory that nothing of a step stays in any cache."""
    other = torch.ones(FLUSH_BYTES // 4, device=device)
    return lambda: other.sum().item()


def fresh_grads(params: Sequence[torch.Tensor]) -> Step:
    """What zero_grad() and a backward leave: new tensor objects, in memory used before."""

    def renew() -> None:
        for param in params:
            if param.grad is not None:
                param.grad = param.grad.detach()

    return renew


def probe_size(device: torch.device, footprint: int) -> int:
    """Bytes of each of the two probe tensors: beyond caches, or as much as the work itself.

    On a GPU always beyond caches: there a small copy shows what a launch costs.
    """
    if device.type == "cuda":
        return CUDA_PROBE_BYTES
    return PROBE_BYTES if footprint >= LARGE_BYTES else max(footprint // 2, 4)


def bandwidth_probes(device: torch.device, footprint: int) -> list[Candidate]:
    """Plain copy and in-place multiply: what this machine's memory, or cache, gives right now."""
    source = torch.rand(probe_size(device, footprint) // 4, device=device)
    target = source.clone()
    moved = 2 * source.nbytes
    return [
        Candidate("copy", lambda: target.copy_(source), moved),
        Candidate("multiply", lambda: target.mul_(1.0000001), moved),
    ]


def run_interleaved(
    clock: Clock, candidates: list[Candidate], rounds: int, budget_s: float
) -> None:
    """Rounds of one sample each, the order rotated; fewer than asked if time runs out."""
    for candidate in candidates:
        clock.begin(candidate)
    start = time.perf_counter()
    for number in range(WARM_UP_ROUNDS + rounds):
        first = number % len(candidates)
        for candidate in candidates[first:] + candidates[:first]:
            times = clock.sample(candidate)
            if number < WARM_UP_ROUNDS:
                candidate.exposed = 0
                continue
            for kind, seconds in times.items():
                candidate.samples[kind].append(seconds)
        measured = number + 1 - WARM_UP_ROUNDS
        if measured >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
            return


def measure(
    candidates: list[Candidate], device: torch.device, footprint: int, args: argparse.Namespace,
    wall_only: bool = False, more: int = 1,
) -> tuple[dict[str, Candidate], dict[str, Any]]:  # fmt: skip
    """All that were timed, by their names, and the figures that go into the JSON file."""
    probes = bandwidth_probes(device, footprint)
    clock = Clock(device, footprint, args.grads, args.cache, wall_only)
    gc.disable()
    try:
        run_interleaved(clock, candidates + probes, more * args.repeats, more * args.budget)
    finally:
        gc.enable()
    named = {candidate.name: candidate for candidate in candidates + probes}
    base = named.get("fusedopt", (candidates + probes)[0])
    return named, {
        "rounds": len(probes[0].samples["wall"]),
        "base": base.name,
        "candidates": {each.name: each.figures(base, *probes) for each in candidates},
        "probes": {probe.name: probe.gb_per_s() for probe in probes},
    }


@contextlib.contextmanager
def background_load() -> Iterator[None]:
    """Another process that keeps a core busy, as the workers of a data loader do.

    Pinned to no core: where it runs is the operating system's choice, as in training.
    """
    with subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) as process:
        try:
            time.sleep(SETTLE_S)
            yield
            if process.poll() is not None:
                raise RuntimeError(f"the busy process ended by itself: {process.returncode}")
        finally:
            process.kill()
