"""The optimizers that step.py compares, each set to do the same update with the same numbers.

A baseline is one function: it gets parameter groups and the name of the optimizer and returns what
to call for a step. A captured CUDA graph (its replay) and another package are one more row of
BASELINES each; a package that is not installed says so.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lib.cases import HYPER, Groups
from lib.report import reason
from lib.timing import Step

Make = Callable[[Groups, str], Step]
Create = Callable[[Groups, str], torch.optim.Optimizer]
Options = Callable[[str, torch.dtype], dict[str, Any]]  # what an optimizer needs besides

GRAPH_WARM_UP_STEPS = 3  # on a side stream, as torch's notes on CUDA graphs ask for


@dataclass(frozen=True)
class Baseline:
    name: str
    make: Make
    note: str = ""  # what a reader must know before comparing
    keeps_grads: bool = False  # its grads cannot be replaced


class NotComparableError(Exception):
    """This baseline cannot take part in this case; the text says why."""


def _create(library: str, **options: bool) -> Create:
    def create(groups: Groups, optimizer: str) -> torch.optim.Optimizer:
        cls = getattr(importlib.import_module(library), optimizer)
        known = inspect.signature(cls).parameters
        if missing := [name for name in ("fused", "foreach") if options.get(name, False)
                       and name not in known]:  # fmt: skip
            raise NotComparableError(f"{library} has no {missing[0]} {optimizer}")
        # torch's SGD is not capturable: its lr is what it was at the capture.
        kept = {name: value for name, value in options.items() if name in known}
        return cls(groups, **HYPER[optimizer], **kept)

    return create


def _step_of(create: Create) -> Make:
    return lambda groups, optimizer: create(groups, optimizer).step


def _device_type(groups: Groups) -> str:
    return str(groups[0]["params"][0].device.type)


def _captured(create: Create) -> Make:
    """Make the optimizer, capture one step and go back to the start, as if no step had been."""

    def make(groups: Groups, optimizer: str) -> Step:
        if _device_type(groups) != "cuda":
            raise NotComparableError("runs on cuda only")
        params = [param for group in groups for param in group["params"]]
        before = [param.detach().clone() for param in params]
        made = create(groups, optimizer)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARM_UP_STEPS):
                made.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made.step()
        with torch.no_grad():  # in place, since the graph holds addresses
            for param, value in zip(params, before, strict=True):
                param.copy_(value)
                for entry in made.state[param].values():  # all start as zeros, step counts too
                    if isinstance(entry, torch.Tensor):
                        entry.zero_()

        def replay(_keep: object = made) -> None:  # its states must live as long as the graph
            graph.replay()

        return replay

    return make


def _package(
    module: str, classes: dict[str, str], options: Options = lambda *_: {},
    only_on: str | None = None,
) -> Make:  # fmt: skip
    """From an optional package; ``classes`` maps our optimizer's name to theirs."""

    def make(groups: Groups, optimizer: str) -> Step:
        if optimizer not in classes:
            raise NotComparableError(f"{module} has no comparable {optimizer}")
        if only_on not in (None, _device_type(groups)):
            raise NotComparableError(f"runs on {only_on} only")
        try:
            cls = getattr(importlib.import_module(module), classes[optimizer])
        except ModuleNotFoundError as error:
            raise NotComparableError(f"not installed ({error})") from error
        more = options(optimizer, groups[0]["params"][0].dtype)
        return cls(groups, **HYPER[optimizer], **more).step

    return make


def _apex(optimizer: str, _: torch.dtype) -> dict[str, Any]:
    return {} if optimizer == "SGD" else {"adam_w_mode": optimizer == "AdamW"}


def _te(optimizer: str, dtype: torch.dtype) -> dict[str, Any]:
    has_states = optimizer != "SGD" and dtype == torch.bfloat16
    states = dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16)
    return _apex(optimizer, dtype) | (states if has_states else {})


def _deepspeed(optimizer: str, _: torch.dtype) -> dict[str, Any]:
    return {"adamw_mode": optimizer == "AdamW", "fp32_optimizer_states": False}


SAME = {name: name for name in HYPER}
FUSED = {"AdamW": "FusedAdam", "Adam": "FusedAdam", "SGD": "FusedSGD"}
FLASH = {name: f"Flash{name}" for name in HYPER}
DEEPSPEED = dict.fromkeys(("AdamW", "Adam"), "DeepSpeedCPUAdam")
BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("fusedopt", _step_of(_create("fusedopt"))),
        Baseline("torch-fused", _step_of(_create("torch.optim", fused=True))),
        Baseline("torch-foreach", _step_of(_create("torch.optim", foreach=True))),
        Baseline("torch-loop", _step_of(_create("torch.optim", foreach=False, fused=False))),
        Baseline("fusedopt-graph", _captured(_create("fusedopt", capturable=True)),
                 "CUDA graph", keeps_grads=True),
        Baseline("torch-graph", _captured(_create("torch.optim", fused=True, capturable=True)),
                 "CUDA graph of fused", keeps_grads=True),
        Baseline("apex", _package("apex.optimizers", FUSED, _apex, only_on="cuda"),
                 "its Adam has 32-bit states whatever the dtype"),
        Baseline("te", _package("transformer_engine.pytorch.optimizers", FUSED, _te,
                                only_on="cuda"), "TransformerEngine"),
        Baseline("flashoptim",
                 _package("flashoptim", FLASH, lambda *_: {"quantize": False,
                          "master_weight_bits": None}, only_on="cuda"),
                 "without its low-bit states"),
        Baseline("deepspeed", _package("deepspeed.ops.adam", DEEPSPEED, _deepspeed, only_on="cpu"),
                 "DeepSpeedCPUAdam"),
        Baseline("optimi", _package("optimi", SAME, lambda *_: {"kahan_sum": False})),
        Baseline("torchao", _package("torchao.optim", {"AdamW": "_AdamW"}),
                 "its AdamW without low-bit states, compiled for each shape"),
        Baseline("bitsandbytes", _package("bitsandbytes.optim", SAME),
                 "32-bit states whatever the dtype of the params"),
    )
}  # fmt: skip


def _difference(
    baseline: Baseline, optimizer: str, dtype: torch.dtype, device: torch.device
) -> str:
    """Why the baseline's update is not the optimizer's, or nothing if it is.

    A step that leaves work out looks fast. So three steps on one tensor, longer than any SIMD
    block, are compared with torch in float64. The bar is loose (1 % of the update, or 8 times
    the error of unfused torch in this dtype): it looks for another update, not for rounding.
    """

    def after_three_steps(which: Baseline, at: torch.dtype) -> torch.Tensor:
        param = (start / 8).to(dtype).to(at).requires_grad_()
        grad = (start.flip(0) / 4).to(dtype).to(at)
        param.grad = grad.to_sparse() if optimizer == "SparseAdam" else grad
        step = which.make([{"params": [param], "lr": 0.05}], optimizer)
        for _ in range(3):
            step()
        return param.detach().double()

    start = torch.randn(4099, generator=torch.Generator().manual_seed(1)).to(device)
    exact = after_three_steps(BASELINES["torch-loop"], torch.float64)
    honest = (after_three_steps(BASELINES["torch-loop"], dtype) - exact).abs().max().item()
    update = (exact - (start / 8).to(dtype).double()).abs().max().item()
    error = (after_three_steps(baseline, dtype) - exact).abs().max().item()
    if error <= max(8 * honest, 0.01 * update):
        return ""
    return f"NOT the same update: off by {error / update:.0%} of it"


def who_can_take_part(
    baselines: list[Baseline], optimizer: str, dtype: torch.dtype, device: torch.device
) -> tuple[dict[Baseline, str], dict[str, str]]:
    """Who can take part, with a note, and who cannot, with the reason: tried on a small tensor."""
    notes, skipped = {}, {}
    for baseline in baselines:
        try:
            difference = _difference(baseline, optimizer, dtype, device)
        except Exception as error:  # other people's packages may raise anything
            skipped[baseline.name] = reason(error, NotComparableError)
        else:
            notes[baseline] = "; ".join(filter(None, (baseline.note, difference)))
    return notes, skipped
