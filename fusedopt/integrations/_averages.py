"""The optimizer in a trainer's wrappers, and its averages in a trainer's model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._optimizer import FusedOptimizer

MOST_WRAPPERS = 8  # around each other


def fused_optimizer(optimizer: Any) -> FusedOptimizer | None:
    """The optimizer of fusedopt that this is, or that wrappers hold as ``.optimizer``, or None."""
    for _ in range(MOST_WRAPPERS):
        if isinstance(optimizer, FusedOptimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def clips(optimizer: FusedOptimizer) -> bool:
    """Whether the optimizer itself measures its grads and clips some of them."""
    return optimizer._clips()


def keeps_averages(optimizer: FusedOptimizer) -> bool:
    """Whether it is told to; there may be none yet."""
    return any(group.get("ema_decay") is not None for group in optimizer.param_groups)


@contextmanager
def swap_ema(optimizer: Any, model: nn.Module) -> Iterator[None]:
    """Inside, the params of a model hold their averages, as in ``optimizer.swap_ema()``.

    Beside that

    - the optimizer may be in wrappers (accelerate's, Lightning's);
    - params stay as they are where there are no averages: without ``ema_decay``, before the first
      step, or with an optimizer of another package. So it can stand around any evaluation;
    - one may be inside another, which does nothing then;
    - FSDP2 gathers the params anew at both ends. Its root (any module with
      ``reshard_after_forward=False``) keeps what it has gathered until a backward: after an
      evaluation the next forward would train with the averages.

    Args:
        optimizer: one of fusedopt's, or what wraps it.
        model: the module whose forward is to use the averages.
    """
    fused = fused_optimizer(optimizer)
    if fused is None or fused._shared.is_swapped or not has_averages(fused):
        yield
        return
    _forget_gathered(model)
    try:
        with fused.swap_ema():
            yield
    finally:
        _forget_gathered(model)


def has_averages(optimizer: FusedOptimizer) -> bool:
    return bool(optimizer._averages())


def _forget_gathered(model: nn.Module) -> None:
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
