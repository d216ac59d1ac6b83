"""One case of step.py: every contender in lockstep, the memory bandwidth measured in between.

On a machine that does other work too, two runs one after the other compare the weather. Here every
round times every contender once, so what disturbs a round disturbs all, and ratios are taken
within rounds.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from clocks import Entrant
from common import MIB, available_memory, spread
from contenders import qualify
from race import bandwidth, bandwidth_probes, clock_for, percent, probe_size, race, ratio
from recipes import STATES, STREAMS, Contender, Groups, reason
from workloads import Workload


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
        return probe_size(self.device, self.footprint)


def values_for(case: Case) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(param, grad) values for all contenders; grads are of a size that float16 can square."""
    generator = torch.Generator(case.device).manual_seed(0)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.float32, device=case.device)
        return empty.uniform_(0.05, 0.1, generator=generator).to(case.dtype)

    return [[(values(shape), values(shape)) for shape in group] for group in case.workload.groups]


def param_groups(
    case: Case, template: list[list[tuple[torch.Tensor, torch.Tensor]]], share: bool
) -> Groups:
    groups = []
    for pairs, options in zip(template, case.workload.group_options(), strict=True):
        params = []
        for value, grad in pairs:
            param = (value if share else value.clone()).requires_grad_()
            param.grad = grad if share else grad.clone()
            params.append(param)
        groups.append({"params": params, **options})
    return groups


def _enter(
    case: Case, notes: dict[Contender, str], shared: bool
) -> tuple[list[Entrant], dict[str, str]]:
    """Give all who take part their tensors and make their first step."""
    values = values_for(case)
    moved = case.bytes_per_element * case.workload.elements
    entrants, skipped = [], {}
    for contender, note in notes.items():
        try:
            step = contender.make(param_groups(case, values, shared), case.optimizer)
            step()  # creates the states, builds caches, compiles
        except Exception as error:
            skipped[contender.name] = reason(error)
        else:
            entrants.append(Entrant(contender.name, step, moved, note))
    return entrants, skipped


def _figures(case: Case, entrants: dict[str, Entrant], name: str, base: str) -> dict[str, Any]:
    """All numbers of one contender."""
    entrant = entrants[name]
    figures = {
        "ms": spread([1e3 * seconds for seconds in entrant.seconds]),
        "us_per_tensor": 1e6 * statistics.median(entrant.seconds) / case.workload.tensors,
        "gb_per_s": bandwidth(entrant),
        "percent_of_copy": percent(entrant, entrants["copy"]),
        "percent_of_multiply": percent(entrant, entrants["multiply"]),
        "ratio": ratio(entrant, entrants[base]),
        "inner": entrant.inner,
        "note": entrant.note,
    }
    if entrant.queued:
        host = 1e6 * statistics.median(entrant.samples["host"])
        figures["host"] = {"us": host, "us_per_tensor": host / case.workload.tensors}
        figures["gpu"] = {
            "ms": spread([1e3 * seconds for seconds in entrant.samples["gpu"]]),
            "gb_per_s": bandwidth(entrant, "gpu"),
            "percent_of_copy": percent(entrant, entrants["copy"], "gpu"),
            "ratio": ratio(entrant, entrants[base], "gpu") if entrants[base].queued else None,
            "steps": entrant.queued,
            "waited_for_host": entrant.exposed,  # samples; in these the time is too long
        }
    return figures


def _cache(case: Case) -> dict[str, Any]:
    """Repeated steps on little data read it from the GPU's cache, where training would not."""
    if case.device.type != "cuda":
        return {}
    size = torch.cuda.get_device_properties(case.device).L2_cache_size
    return {"l2_mib": size // MIB, "may_sit_in_l2": case.footprint <= size}


def run_case(
    case: Case, contenders: list[Contender], rounds: int, budget_s: float
) -> dict[str, Any]:
    """Measure one case; the result is what goes into the JSON file."""
    gc.collect()  # what the last case left
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
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
        **_cache(case),
    }
    if needed > free:
        why = f"needs {needed // MIB} MiB, {int(free) // MIB} MiB may be used"
        return result | {"skipped": skipped | {contender.name: why for contender in notes}}
    racing, failed = _enter(case, notes, shared)
    probes = bandwidth_probes(case.probe_bytes, case.device)
    gc.disable()
    try:
        race(clock_for(case.device, case.footprint), racing + probes, rounds, budget_s)
    except torch.OutOfMemoryError as error:  # of a GPU: temporaries, which nobody can foresee
        return result | {"skipped": skipped | {e.name: reason(error) for e in racing}}
    finally:
        gc.enable()
    entrants = {entrant.name: entrant for entrant in racing + probes}
    base = "fusedopt" if "fusedopt" in entrants else racing[0].name if racing else ""
    return result | {
        "rounds": len(probes[0].seconds),
        "base": base,
        "contenders": {e.name: _figures(case, entrants, e.name, base) for e in racing},
        "probes": {probe.name: bandwidth(probe) for probe in probes},
        "skipped": skipped | failed,
    }
