"""Optimizers of other packages as contenders; one that is not installed says so."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from recipes import HYPER, Groups, Make, NotComparableError, Step, device_type

SAME_NAMES = {name: name for name in HYPER}
FUSED_NAMES = {"AdamW": "FusedAdam", "Adam": "FusedAdam", "SGD": "FusedSGD"}


def package(
    module: str,
    classes: dict[str, str],
    options: dict[str, Any] | None = None,
    only_on: str | None = None,
) -> Make:
    """A contender from an optional package; ``classes`` maps our optimizer's name to theirs."""

    def make(groups: Groups, optimizer: str) -> Step:
        if optimizer not in classes:
            raise NotComparableError(f"{module} has no comparable {optimizer}")
        if only_on not in (None, device_type(groups)):
            raise NotComparableError(f"runs on {only_on} only")
        try:
            cls = getattr(importlib.import_module(module), classes[optimizer])
        except ModuleNotFoundError as error:
            raise NotComparableError(f"not installed ({error})") from error
        return cls(groups, **HYPER[optimizer], **(options or {})).step

    return make


def deepspeed(groups: Groups, optimizer: str) -> Step:
    classes = dict.fromkeys(("AdamW", "Adam"), "DeepSpeedCPUAdam")
    options = {"adamw_mode": optimizer == "AdamW", "fp32_optimizer_states": False}
    return package("deepspeed.ops.adam", classes, options, only_on="cpu")(groups, optimizer)


def apex(groups: Groups, optimizer: str) -> Step:
    options = {} if optimizer == "SGD" else {"adam_w_mode": optimizer == "AdamW"}
    return package("apex.optimizers", FUSED_NAMES, options, only_on="cuda")(groups, optimizer)


def transformer_engine(groups: Groups, optimizer: str) -> Step:
    options: dict[str, Any] = {}
    if optimizer != "SGD":
        options["adam_w_mode"] = optimizer == "AdamW"
        if groups[0]["params"][0].dtype == torch.bfloat16:
            options |= dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16)
    module = "transformer_engine.pytorch.optimizers"
    return package(module, FUSED_NAMES, options, only_on="cuda")(groups, optimizer)


def flashoptim(groups: Groups, optimizer: str) -> Step:
    classes = {name: f"Flash{name}" for name in HYPER}
    options = {"quantize": False, "master_weight_bits": None}
    return package("flashoptim", classes, options, only_on="cuda")(groups, optimizer)
