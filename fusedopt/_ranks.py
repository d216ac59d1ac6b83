"""Whether processes that step together have the same settings, before their first step.

Otherwise one that clips would wait for ever for those that do not, and ranks with other learning
rates would train on as if nothing were wrong. Which processes step together is known of two kinds:

- the ranks of a DTensor's mesh, of all its dims. They have all params on it and the options of
  their groups in common.
- the processes of ``norm_group``, in whose norm all take part or none. Their params and other
  options are their own: they may be the stages of a pipeline.

Ranks that differ in whether they have a ``norm_group`` at all, or any params on a mesh, cannot find
out: those that have wait for the others. Of plain params without a ``norm_group`` (of DDP, say)
nothing is known, and nothing is compared.
"""

import hashlib
import math
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C

if TYPE_CHECKING:
    from ._optimizer import FusedOptimizer, Shared

WITHOUT_EFFECT = ("foreach", "differentiable")
MAX_DIFFERENCES = 3  # that a message names
MAX_RANKS = 8


def compare_ranks(optimizer: "FusedOptimizer", shared: "Shared", is_norm_given: bool) -> None:
    """Raise ValueError, on all ranks that step together, if they do not have the same settings.

    All of them have to call it, and it waits for them, so it is called once in the life of an
    optimizer. Not after ``add_param_group()`` or ``load_state_dict()``: if one rank alone has done
    that, nobody would come to meet it. Where all learning rates on a mesh are 0, as in the step
    by which torch.distributed.checkpoint sets an optimizer up, they may be in place of others, and
    are looked at once more.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        shared.compares_ranks = False
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    meetings = _meetings(optimizer, is_norm_given)
    if shared.meshes_to_compare is not None:
        meetings = [meeting for meeting in meetings if meeting.key in shared.meshes_to_compare]
    found: str | None = None
    for meeting in meetings:
        found = meeting.compare() or found
    for meeting in meetings:  # ranks that are alike may be about to meet others that are not
        found = meeting.share(found)
    if found is not None:
        raise ValueError(f"ranks that step together differ: {found}; nothing was changed")
    if shared.meshes_to_compare is None:
        shared.meshes_to_compare = {meeting.key for meeting in meetings if meeting.only_sets_up}
        shared.compares_ranks = bool(shared.meshes_to_compare)
    else:
        shared.compares_ranks = False


class _Meeting:
    """Processes that step together, and what of their settings has to be the same."""

    def __init__(self, key: Any, groups: list[Any], device: torch.device) -> None:
        self.key = key
        # One after the other, they reach all: those of the dims of a mesh, for example.
        self.groups = [group for group in groups if torch.distributed.get_world_size(group) > 1]
        self.device = device
        self.facts: dict[str, str] = {}
        self.limit: float | None = None  # of the norm; None fits any
        self.only_sets_up = False

    def compare(self) -> str | None:
        """What differs, in the same words on every rank; None if nothing does."""
        facts = repr(list(self.facts.items())).encode()
        digest = int.from_bytes(hashlib.sha256(facts).digest()[:7], "big")
        low = math.inf if self.limit is None else self.limit
        high = 0.0 if self.limit is None else self.limit
        found = self._smallest(digest, -digest, _bits(low), -_bits(high))
        if found[0] != -found[1]:
            return self._explain()
        low, high = _number(found[2]), _number(-found[3])
        return f"max_grad_norm is {low} on one and {high} on another" if low < high else None

    def share(self, found: str | None) -> str | None:
        """What one of them knows to differ."""
        if self._smallest(0 if found is None else -1) == [0]:
            return None
        texts: list[str] = [text for text in self._gather(found) if text is not None]
        return texts[0]

    def _explain(self) -> str:
        """What differs from the first rank, which sends what it has: few bytes for each rank."""
        first: list[Any] = [torch.distributed.get_rank(), self.facts]
        with self._current():
            for group in self.groups:
                torch.distributed.broadcast_object_list(first, group=group, group_src=0)
        rank, theirs = first
        own = {
            key: self.facts.get(key, "not there")
            for key in {**theirs, **self.facts}
            if theirs.get(key) != self.facts.get(key)
        }
        few = dict(list(own.items())[: MAX_DIFFERENCES + 1])
        differences: dict[str, dict[str, list[int]]] = {}
        gathered = self._gather((torch.distributed.get_rank(), few))
        for other, values in sorted(gathered, key=lambda entry: entry[0]):
            for key, value in values.items():
                differences.setdefault(key, {}).setdefault(value, []).append(other)
        texts = []
        for key, by_value in list(differences.items())[:MAX_DIFFERENCES]:
            others = " and ".join(f"{value} on {_name(who)}" for value, who in by_value.items())
            texts.append(f"{key} is {theirs.get(key, 'not there')} on rank {rank} and {others}")
        return "; ".join(texts) + ("; and more" if len(differences) > MAX_DIFFERENCES else "")

    def _smallest(self, *own: int) -> list[int]:
        """The smallest of each of these numbers that any of them has."""
        tensor = torch.tensor(own, dtype=torch.int64, device=self.device)
        for group in self.groups:
            smallest = torch.distributed.ReduceOp.MIN
            torch.distributed.all_reduce(tensor, op=smallest, group=group)
        found: list[int] = tensor.tolist()
        return found

    def _gather(self, own: Any) -> list[Any]:
        found = [own]
        with self._current():
            for group in self.groups:
                lists: list[Any] = [None] * torch.distributed.get_world_size(group)
                torch.distributed.all_gather_object(lists, found, group=group)
                found = [entry for each in lists for entry in each]
        return found

    def _current(self) -> AbstractContextManager[Any]:
        """Objects travel through the current GPU, whichever that is."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _meetings(optimizer: "FusedOptimizer", is_norm_given: bool) -> list[_Meeting]:
    """In the same order on all ranks, whatever the order of their params: else they would wait for
    each other in a circle.
    """
    groups = optimizer.param_groups
    takes_norm = optimizer._needs_norm()
    errs = optimizer._clips() and any(group.get("error_if_nonfinite") for group in groups)
    norm_facts = {
        "the norm of the grads (for max_grad_norm or fusedopt.GradScaler)": (
            "given to step()" if is_norm_given else "taken" if takes_norm else "not asked for"
        ),
        "error_if_nonfinite of any param group": _text(bool(errs)),
    }
    meetings = _on_meshes(optimizer)
    for meeting in meetings:
        meeting.facts.update(norm_facts)
    if optimizer._norm_processes is not None:
        params = optimizer._params()
        device = params[0].device if params else torch.device("cpu")
        of_norm = _Meeting("norm_group", optimizer._norm_processes.groups(), device)
        of_norm.facts, of_norm.limit = norm_facts, _limit(groups)
        meetings.append(of_norm)
    return [meeting for meeting in meetings if meeting.groups]


def _on_meshes(optimizer: "FusedOptimizer") -> list[_Meeting]:
    """The ranks of each mesh that there are params on."""
    keys: dict[int, Any] = {}  # by the id of a mesh
    on_mesh: dict[Any, dict[int, dict[int, Any]]] = {}  # params by their group and their index
    for at, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            mesh = getattr(param, "device_mesh", None)
            if mesh is None or mesh.get_coordinate() is None:
                continue
            if id(mesh) not in keys:
                names = tuple(mesh.mesh_dim_names or ())
                keys[id(mesh)] = tuple(mesh.mesh.flatten().tolist()), tuple(mesh.shape), names
            on_mesh.setdefault(keys[id(mesh)], {}).setdefault(at, {})[index] = param
    meetings = []
    for key in sorted(on_mesh):
        params = on_mesh[key]
        first = next(iter(next(iter(params.values())).values()))
        mesh = first.device_mesh
        # Not the param's, where that is offloaded to the CPU: the groups may know GPUs only.
        is_there = first.device.type == mesh.device_type
        device = first.device if is_there else torch.device(mesh.device_type)
        meeting = _Meeting(key, [mesh.get_group(dim) for dim in range(mesh.ndim)], device)
        meeting.facts = _params_of(optimizer, params)
        meeting.only_sets_up = True
        for at in params:
            options = _options_of(optimizer, optimizer.param_groups[at])
            meeting.only_sets_up = meeting.only_sets_up and options["lr"] == "0.0"
            for name, value in options.items():
                meeting.facts[f"{name} of param group {at}"] = value
        meetings.append(meeting)
    return meetings


def _params_of(optimizer: "FusedOptimizer", params: dict[int, dict[int, Any]]) -> dict[str, str]:
    """The params of one mesh: how many, what, and where in the groups."""
    facts = {"the number of param groups with params on the mesh": str(len(params))}
    for at, entries in params.items():
        facts[f"the number of params of group {at} on the mesh"] = str(len(entries))
    for at, entries in params.items():
        names = optimizer.param_groups[at].get("param_names") or []
        for index, param in entries.items():
            name = f"{names[index]!r}, " if index < len(names) else ""
            facts[f"the parameter at group {at}, index {index}"] = (
                f"{name}{param.dtype} of shape {tuple(param.shape)}, placed {param.placements}"
            )
    return facts


def _options_of(optimizer: "FusedOptimizer", group: dict[str, Any]) -> dict[str, str]:
    options = {"optimizer": type(optimizer)._row}
    # AdamW has this one, and no argument for it.
    defaults = {"decoupled_weight_decay": False, **optimizer._option_defaults}
    for name, default in defaults.items():
        if name not in WITHOUT_EFFECT:
            value = group.get(name, default)
            if name == "state_dtype":
                value = _C.state_dtype_name(value) or value
            options[name] = _text(value)
    return options


def _limit(groups: list[dict[str, Any]]) -> float | None:
    """What all grads are clipped to. None if that is not one number that the host knows: groups
    may differ, or only measure, and so may processes.
    """
    texts = {_text(group.get("max_grad_norm")) for group in groups}
    try:
        limit = float(texts.pop()) if len(texts) == 1 else math.inf
    except ValueError:
        return None
    return limit if 0 < limit < math.inf else None


def _text(value: Any) -> str:
    """An option's value. Raises for none: the others would wait for a rank that leaves.

    What is on a GPU is not waited for.
    """
    if isinstance(value, Tensor):
        is_known = type(value) in (Tensor, torch.nn.Parameter) and value.device.type == "cpu"
        if not is_known or value.numel() != 1:
            return f"a {type(value).__name__} on {value.device.type}"
        value = value.item()
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_text, value))})"
    if value is None or isinstance(value, (bool, str, torch.dtype)):
        return repr(value)
    try:
        return repr(float(value))
    except Exception:
        return f"a {type(value).__name__}"


def _name(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:MAX_RANKS]))
    others = f" and {len(ranks) - MAX_RANKS} others" if len(ranks) > MAX_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{others}"


def _bits(number: float) -> int:
    """Numbers that are not negative have the order of their bits."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


def _number(bits: int) -> float:
    number: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return number
