"""The global norm of the grads where it takes more than one device or process to know it."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ._types import NormGroup


class NormProcesses:
    """The processes of an optimizer's ``norm_group``, whose sums of grads are added up.

    Copies of an optimizer share them: a process group is no value that could be copied.
    """

    def __init__(self, given: NormGroup) -> None:
        self._is_world = isinstance(given, str)
        if isinstance(given, str):
            if given != "world":
                raise ValueError(f"norm_group must be 'world' or process groups, got {given!r}")
            given = []
        self._groups = list(given) if isinstance(given, Sequence) else [given]
        for group in self._groups:
            if not torch.distributed.is_available() or not _is_process_group(group):
                is_outside = group is torch.distributed.GroupMember.NON_GROUP_MEMBER
                what = "a group that this process is not in" if is_outside else repr(group)
                raise ValueError(f"norm_group must be 'world' or process groups, got {what}")

    def groups(self) -> list[Any]:
        """The process groups. A program that has begun none is alone in the world."""
        if self._is_world and torch.distributed.is_available():
            return [torch.distributed.group.WORLD] if torch.distributed.is_initialized() else []
        return self._groups

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NormProcesses) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self._is_world, *map(id, self._groups)))

    def __deepcopy__(self, memo: dict[int, Any]) -> "NormProcesses":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._is_world:
            raise TypeError(
                "an optimizer with process groups in norm_group cannot be pickled: they are of "
                "one process; norm_group='world' can"
            )
        return NormProcesses, ("world",)


def _is_process_group(group: Any) -> bool:
    return isinstance(group, torch.distributed.ProcessGroup)


def is_shard(param: Any) -> bool:
    """Whether that is a part of an FSDP1 module's parameters, though a plain tensor."""
    return getattr(param, "_fsdp_flattened", False) is True


def refuse_shards() -> None:
    """Raise for a norm that would be this process's alone."""
    raise ValueError(
        "the parameters are shards of FSDP1 (FullyShardedDataParallel), of which this optimizer "
        "sees its process's alone, so it cannot know the norm of the grads or whether all of them "
        "are finite: set norm_group= to the process group that they are sharded over ('world' for "
        "all), or leave max_grad_norm out and call the model's clip_grad_norm_()"
    )


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


def combine_totals(
    totals: list[Tensor], reductions: list[list[Any]] | None, norm_groups: Sequence[Any] = ()
) -> list[Tensor]:
    """Add up what devices have summed, [squares, nonfinite] of each class, over processes too.

    ``reductions`` are those of ``classify()``; the sum of all classes is then added up over
    ``norm_groups``. Returns the sum over all, [squares, nonfinite], on the device of each of
    ``totals``. Nothing waits for a GPU unless some are on the CPU.
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
    for group in norm_groups:
        torch.distributed.all_reduce(combined, group=group)
    return [combined.to(other.device, non_blocking=True) for other in totals]
