"""The global norm of the grads where it takes more than one device or process to know it."""

import math
import numbers
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from ._types import NormGroup


class NormProcesses:
    """The processes of an optimizer's ``norm_group``, whose sums of grads are added up.

    Copies of an optimizer share them: a process group is no value that could be copied.
    """

    def __init__(self, given: NormGroup) -> None:
        self._is_world = isinstance(given, str) and given == "world"
        several: Any = given if isinstance(given, (list, tuple)) else [given]
        self._groups: list[Any] = [] if self._is_world else list(several)
        wrong = [_name(group) for group in self._groups if not _is_process_group(group)]
        if wrong or not (self._is_world or self._groups):
            got = ", ".join(wrong) or "none"
            raise ValueError(f"norm_group must be 'world' or process groups, got {got}")
        _refuse_overlap(self._groups)

    def groups(self) -> list[Any]:
        """The process groups. A program that has begun none is alone in the world."""
        has_begun = torch.distributed.is_available() and torch.distributed.is_initialized()
        return [torch.distributed.group.WORLD] if self._is_world and has_begun else self._groups

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
    is_available = torch.distributed.is_available()
    return is_available and isinstance(group, torch.distributed.ProcessGroup)


def _name(group: Any) -> str:
    is_available = torch.distributed.is_available()
    is_outside = is_available and group is torch.distributed.GroupMember.NON_GROUP_MEMBER
    return "a group that this process is not in" if is_outside else repr(group)


def _refuse_overlap(norm_groups: list[Any], sharded_over: Iterable[Any] = ()) -> None:
    """Raise if a sum would have the grads of another process twice."""

    def others(group: Any) -> set[int]:
        ranks = set(torch.distributed.get_process_group_ranks(group))
        return ranks - {torch.distributed.get_rank()}

    known = set().union(*map(others, sharded_over))
    for group in norm_groups:
        if twice := known & others(group):
            raise ValueError(
                f"norm_group adds up what the processes {sorted(twice)} have twice: they are in "
                "another of its groups, or the parameters are DTensors that are sharded over them, "
                "which is known without it"
            )
        known |= others(group)


def are_marked(params: list[Any]) -> bool:
    """Whether FSDP1 has to do with some of them."""
    return any(getattr(param, "_fsdp_flattened", False) is True for param in params)


def are_shards(params: list[Any]) -> bool:
    """Whether there are parts of an FSDP1 module's parameters, which are plain tensors.

    They are of one dim. FSDP1 marks whole parameters too, where it shards nothing.
    """
    marked = [param for param in params if are_marked([param])]
    if not marked or torch.distributed.get_world_size() == 1:
        return False
    sizes = [getattr(param, "_unpadded_unsharded_size", None) for param in marked]
    is_whole = [
        param.dim() > 1 or (size is not None and size.numel() <= param.numel())
        for param, size in zip(marked, sizes, strict=True)
    ]
    return not any(is_whole)


def refuse_shards() -> None:
    """Raise for a norm that would be this process's alone."""
    raise ValueError(
        "the parameters are shards of FSDP1 (FullyShardedDataParallel), of which this optimizer "
        "sees its process's alone, so it cannot know the norm of the grads or whether all of them "
        "are finite: set norm_group= to the process group that they are sharded over ('world' if "
        "that is all processes), or leave max_grad_norm out and call the model's clip_grad_norm_()"
    )


def new_numbers(device: str, count: int) -> Tensor:
    """``count`` int64 numbers."""
    return torch.empty(count, dtype=torch.int64, device=device)


def given_norm(norm: Any, name: str = "grad_norm") -> float | Tensor:
    """A norm of grads that is given to a step, whole if it is a DTensor. Raises for what is none.

    torch.nn.utils.clip_grad_norm_ returns a DTensor of the shards' norms for params of FSDP2.
    """
    if not isinstance(norm, Tensor):
        if isinstance(norm, bool) or not isinstance(norm, numbers.Real):
            raise TypeError(f"{name} must be a real number or a tensor, got {norm!r}")
        return _refuse_negative(float(norm), name)
    norm = norm.detach()
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if norm.numel() != 1 or norm.is_complex():
        kind = f"{norm.dtype} of shape {tuple(norm.shape)}"
        raise ValueError(f"{name} must be one real number, got a tensor of {kind}")
    whole: Tensor = norm.reshape(())
    if not whole.is_cuda:
        _refuse_negative(whole.item(), name)
    return whole


def _refuse_negative(norm: float, name: str) -> float:
    if norm < 0:
        raise ValueError(f"{name} must not be negative, got {norm}")
    return norm


def new_status(
    device: str,
    count: int,
    fields: dict[str, tuple[int, str]],
    norm: float | Tensor,
    scale: float | Tensor,
    found_inf: Tensor | None,
) -> Tensor:
    """``new_numbers()`` that begin with the extension's ``GradStatus`` of a norm that is known.

    It is that of grads multiplied by ``scale``; a negative one counts as NaN. Nothing waits for a
    GPU unless it is asked from the CPU.
    """
    status = torch.zeros(count, dtype=torch.int64, device=device)
    if not isinstance(norm, Tensor):
        norm = torch.full((), norm, dtype=torch.float64, device=device)
    elif status.is_cuda and not norm.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "grad_norm is a tensor on the CPU, which a CUDA graph cannot read when it is replayed: "
            f"give one on {device}"
        )
    norm = norm.to(device, torch.float64, non_blocking=status.is_cuda)
    norm = torch.where(norm >= 0, norm, math.nan)
    skips = ~norm.isfinite()
    if found_inf is not None:
        skips = skips | (found_inf.to(device) > 0).any()
    if isinstance(scale, Tensor):
        scale = scale.to(device, torch.float64).reshape(())
    norm = norm / scale
    status_field(status, fields, "grad_norm").copy_(norm)
    status_field(status, fields, "skip").copy_(skips)
    return status


def status_field(status: Tensor, fields: dict[str, tuple[int, str]], name: str) -> Tensor:
    """One field of the extension's ``GradStatus``, which the memory of ``status`` begins with."""
    offset, dtype = fields[name]
    wanted: torch.dtype = getattr(torch, dtype)
    return status.view(wanted)[offset // wanted.itemsize]


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


def combine_sums(
    sums: list[Tensor],
    reductions: list[list[Any]] | None,
    norm_groups: list[Any],
    param: Tensor | None,
) -> list[Tensor]:
    """Add up what devices have summed, the extension's ``NormSums`` of each class, in int64.

    ``reductions`` are those of ``classify()``; the sum of all classes is then added up over
    ``norm_groups``. Processes meet on the device of ``param``, the optimizer's first, whatever has
    grads on each. Returns the sum over all, one ``NormSums``, on the device of each of ``sums``.
    Nothing waits for a GPU unless some are on the CPU.
    """
    reductions = reductions or [[]]
    sharded_over = {id(group): group for groups in reductions for group in groups}
    if norm_groups and sharded_over:
        _refuse_overlap(norm_groups, sharded_over.values())
    first = sums[0].device if param is None else param.device
    total = sums[0].to(first, copy=True)
    for other in sums[1:]:
        total += other.to(first, non_blocking=first.type != "cpu")
    by_class = total.view(len(reductions), -1)
    for index, groups in enumerate(reductions):
        for group in groups:
            torch.distributed.all_reduce(by_class[index], group=group)
    combined = by_class.sum(dim=0)
    for group in norm_groups:
        torch.distributed.all_reduce(combined, group=group)
    # To the CPU it has to be there: the host reads it next.
    return [combined.to(other.device, non_blocking=other.is_cuda) for other in sums]
