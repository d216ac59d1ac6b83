"""The global norm of the grads where it takes more than one device or process to know it."""

from typing import Any, cast

import torch
from torch import Tensor


def new_numbers(device: str, count: int) -> Tensor:
    """``count`` float64 numbers."""
    return torch.empty(count, dtype=torch.float64, device=device)


def classify(params: list[Tensor]) -> tuple[list[int], list[list[Any]]]:
    """Which grads are added up over which processes.

    Returns the class of each parameter, and for each class its process groups: those of the dims of
    the mesh over which a DTensor is sharded. Class 0 is that of what every process has a whole
    copy of.
    """
    classes: dict[Any, int] = {(): 0}
    reductions: list[list[Any]] = [[]]
    found = []
    for param in params:
        sharded = _sharded_dims(param)
        mesh = getattr(param, "device_mesh", None)
        key = (mesh, sharded) if sharded else ()
        if key not in classes:
            classes[key] = len(reductions)
            reductions.append([cast(Any, mesh).get_group(dim) for dim in sharded])
        found.append(classes[key])
    if len(reductions) > 256:
        raise ValueError("params are sharded in more than 255 ways, too many for max_grad_norm")
    return found, reductions


def _sharded_dims(param: Any) -> tuple[int, ...]:
    if not hasattr(param, "device_mesh"):
        return ()
    sizes = param.device_mesh.shape
    return tuple(
        dim
        for dim, placement in enumerate(param.placements)
        if not placement.is_replicate() and sizes[dim] > 1
    )


def combine_totals(totals: list[Tensor], reductions: list[list[Any]] | None) -> list[Tensor]:
    """Add up what devices have summed, [squares, nonfinite] of each class, over processes too.

    Returns the sum over all, [squares, nonfinite], on the device of each of ``totals``. Nothing
    waits for a GPU unless some are on the CPU.
    """
    first = totals[0].device
    total = totals[0].clone()
    for other in totals[1:]:
        total += other.to(first, non_blocking=first.type != "cpu")
    by_class = total.view(-1, 2)
    for index, groups in enumerate(reductions or []):
        for group in groups:
            torch.distributed.all_reduce(by_class[index], group=group)
    combined = by_class.sum(dim=0)
    return [combined.to(other.device, non_blocking=True) for other in totals]
