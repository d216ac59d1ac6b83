"""What ``state_dict()`` returns: torch's, with what torch's twin and others can take."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C
from ._codes import has_state
from ._norms import are_marked
from ._options import name_state_dtype
from ._state import Specs, new_entry
from ._steps import number_dtype
from ._types import ParamGroup
from ._weights import OF_8_BITS, SAVED, with_remainder_as

if TYPE_CHECKING:
    from ._optimizer import FusedOptimizer


EXPORT = "fusedopt"  # beside torch's hooks, whose keys are numbers


def export_all_states(optimizer: "FusedOptimizer") -> None:
    """Have ``state_dict()`` return what all can take, before any of the user's hooks see it."""
    hooks: Any = optimizer._optimizer_state_dict_post_hooks
    hooks[EXPORT] = _make_portable
    hooks.move_to_end(EXPORT, last=False)


def _make_portable(optimizer: "FusedOptimizer", state_dict: dict[str, Any]) -> None:
    """Put in what torch's twin and torch.distributed.checkpoint can take.

    Names of dtypes in place of dtypes, remainders with another, and zeros in place of states that
    are left out here, but that torch's twin reads.
    """
    state = state_dict["state"]
    specs = Specs(optimizer, is_strict=False)
    derived = DerivedStates(optimizer)
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        name_state_dtype(packed)
        for param, key in zip(group["params"], packed["params"], strict=True):
            if key in state:
                state[key] = with_remainder_as(SAVED, state[key])
                if are_marked([param]):
                    state[key] = _without_integers(state[key])
                state[key] = derived.added_to(state[key], group)
            entries = state.get(key)
            spec = specs.of(param, group) if entries else None
            if spec is None or not spec.omissible:
                continue
            omissible = {name for name, *_ in spec.omissible}
            needed = [name for name, kind, _ in spec.entries if kind == "state"]
            if all(has_state(name, entries, spec) or name in omissible for name in needed):
                zeros = {
                    name: new_entry(name, kind, dtype, param.detach(), {}, spec)
                    for name, kind, dtype in spec.omissible
                    if not has_state(name, entries, spec)
                }
                if zeros:
                    state[key] = {**entries, **zeros}


def _without_integers(entries: Any) -> Any:
    """The entries of a state as FSDP1 takes them: a remainder of 8 bits as bfloat16 numbers."""
    name = _C.WEIGHTS_IN_STATE["remainder8"]
    remainder = entries.get(name) if isinstance(entries, Mapping) else None
    if not isinstance(remainder, Tensor) or remainder.dtype != OF_8_BITS:
        return entries
    return {**entries, name: remainder.to(torch.bfloat16)}  # exactly


class DerivedStates:
    """What torch's twin keeps in a state, and here follows from ``step`` and the options."""

    def __init__(self, optimizer: "FusedOptimizer") -> None:
        self._optimizer = optimizer
        self._known: dict[tuple[int, float], dict[str, float]] = {}

    def added_to(self, entries: Any, group: ParamGroup) -> Any:
        """A param's state with them: whole numbers, and others in tensors that lie as ``step``."""
        step = entries.get("step")
        if step is None or not type(self._optimizer)._has_derived_state:
            return entries
        key = id(group), float(step)
        if key not in self._known:
            self._known[key] = self._optimizer._derived_state(group, key[1])
        found = self._known[key].items()
        kind = {"dtype": number_dtype(), "device": step.device}
        as_kept = {
            name: value if isinstance(value, int) else torch.tensor(value, **kind)
            for name, value in found
        }
        return {**entries, **as_kept}
