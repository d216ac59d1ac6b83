"""How one entrant of a race is timed: by the wall, and on a GPU in three ways.

``wall``  a loop of steps with one wait at its end: the longer of host and GPU, as training sees it
``host``  handing steps to an idle GPU without waiting for it
``gpu``   the same steps queued behind a kernel that sleeps until the host is done with them
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from common import MIB
from recipes import Step

MIN_SAMPLE_S = 2e-3  # shorter samples repeat the step: timer and scheduler would show otherwise
MIN_CUDA_SAMPLE_S = 10e-3  # here the wait at the end shows too
QUEUE_S, MAX_QUEUED = 0.5e-3, 8  # steps of host and gpu: few, or a full queue makes the host wait
SLOW_S = 0.1  # a step that takes longer than this on a GPU is timed by the wall alone
HIDE_MARGIN_S, MAX_HIDE_S = 50e-6, 0.25
WARM_UP_S = 0.3


@dataclass
class Entrant:
    """Something timed once in every round: a contender or a bandwidth probe."""

    name: str
    step: Step
    bytes_moved: int
    note: str = ""
    inner: int = 1  # steps in a wall sample
    queued: int = 0  # steps in a host and a gpu sample; 0: neither is taken
    hide_s: float = 0.0  # how long the GPU sleeps before a gpu sample
    samples: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    exposed: int = 0  # gpu samples in which the GPU had to wait for the host after all

    @property
    def seconds(self) -> list[float]:
        return self.samples["wall"]


class CpuClock:
    def __init__(self, warm: bool) -> None:
        self.warm = warm  # work that fits caches is measured on warm ones: a step before a sample

    def prepare(self, entrant: Entrant) -> None:
        entrant.step()
        once = min(self._wall(entrant.step, 1) for _ in range(2 if self.warm else 1))
        entrant.inner = max(1, math.ceil(MIN_SAMPLE_S / max(once, 1e-7)))

    def sample(self, entrant: Entrant) -> dict[str, float]:
        if self.warm:
            entrant.step()
        return {"wall": self._wall(entrant.step, entrant.inner)}

    def _wall(self, step: Step, inner: int) -> float:
        start = time.perf_counter()
        for _ in range(inner):
            step()
        return (time.perf_counter() - start) / inner


class CudaClock:
    def __init__(self, device: torch.device, wall_only: bool = False) -> None:
        self.device = device
        self.wall_only = wall_only  # for steps that wait for the GPU: nothing hides behind a sleep
        self._warm_up()
        self.cycles_per_s = max(self._sleep_rate() for _ in range(3))

    def prepare(self, entrant: Entrant) -> None:
        entrant.step()
        once = min(self._wall(entrant.step, 1) for _ in range(2))
        entrant.inner = max(1, math.ceil(MIN_CUDA_SAMPLE_S / max(once, 1e-6)))
        if self.wall_only or once > SLOW_S:
            return
        entrant.queued = max(1, min(MAX_QUEUED, math.ceil(QUEUE_S / max(once, 1e-6))))
        host = max(self._host(entrant) for _ in range(3))
        entrant.hide_s = min(MAX_HIDE_S, 2 * host * entrant.queued + HIDE_MARGIN_S)
        while not self._gpu(entrant)[1] and entrant.hide_s < MAX_HIDE_S:
            entrant.hide_s = min(MAX_HIDE_S, 2 * entrant.hide_s)

    def sample(self, entrant: Entrant) -> dict[str, float]:
        times = {"wall": self._wall(entrant.step, entrant.inner)}
        if entrant.queued:
            times["host"] = self._host(entrant)
            times["gpu"], hidden = self._gpu(entrant)
            entrant.exposed += not hidden
        return times

    def _wall(self, step: Step, inner: int) -> float:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(inner):
            step()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / inner

    def _host(self, entrant: Entrant) -> float:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(entrant.queued):
            entrant.step()
        return (time.perf_counter() - start) / entrant.queued

    def _gpu(self, entrant: Entrant) -> tuple[float, bool]:
        """Seconds of a step, and whether the GPU still slept when the last one was queued."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(entrant.hide_s * self.cycles_per_s))
        begin.record()
        for _ in range(entrant.queued):
            entrant.step()
        end.record()
        hidden = not begin.query()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / entrant.queued, hidden

    def _warm_up(self) -> None:
        """Work until the GPU's clocks are up."""
        source = torch.rand(64 * MIB // 4, device=self.device)
        target = torch.empty_like(source)
        start = time.perf_counter()
        while time.perf_counter() - start < WARM_UP_S:
            target.copy_(source)
            torch.cuda.synchronize(self.device)

    def _sleep_rate(self, cycles: int = 4_000_000) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return cycles / (begin.elapsed_time(end) * 1e-3)


Clock = CpuClock | CudaClock
