"""What the readers of other optimizers' state dicts have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._load_state_dict import check_groups
from .._optimizer import FusedOptimizer
from .._state import place_of
from .._steps import to_step, whole_count
from .._types import ParamGroup, State
from ._drop_in import NO_UNCORRECTED, refuse

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SavedState:
    """The state of one parameter as another optimizer has saved it."""

    entries: Mapping[str, Any]
    param: Tensor
    place: str  # for messages

    def check_names(self, *required: str, optional: tuple[str, ...] = ()) -> None:
        """Raise for what is missing, and for what is not of this layout."""
        missing = [name for name in required if self.entries.get(name) is None]
        if missing:
            raise ValueError(f"{self._of(missing[0])} is missing; there is {self._found()}")
        unknown = [name for name in self.entries if name not in (*required, *optional)]
        if unknown:
            raise ValueError(f"{self._of(unknown[0])} is not known; there is {self._found()}")

    def tensor(self, name: str, *dtypes: torch.dtype, shape: torch.Size | None = None) -> Tensor:
        """An entry, after a look at its type, dtype and shape (else that of the parameter)."""
        value = self.entries[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"{self._of(name)} is {value!r}, but must be a tensor")
        if value.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{self._of(name)} is {value.dtype}, but must be {wanted}")
        shape = self.param.shape if shape is None else shape
        if value.shape != shape:
            raise ValueError(
                f"{self._of(name)} is of shape {tuple(value.shape)}, but must be of {tuple(shape)}"
            )
        return value.detach()

    def count(self, name: str) -> int:
        """An entry that counts steps."""
        return whole_count(self.entries[name], self._of(name))

    def fail(self, name: str, why: str) -> ValueError:
        return ValueError(f"{self._of(name)} {why}")

    def _of(self, name: str) -> str:
        return f"{name} of {self.place}"

    def _found(self) -> str:
        return ", ".join(str(name) for name in self.entries) or "nothing"


def with_count(state: State) -> State:
    """The state with a tensor for a ``step`` that is an int, by which it is known as fusedopt's."""
    if not isinstance(state.get("step"), int):
        return state
    return {**state, "step": to_step(state["step"], torch.device("cpu"))}


def group_count(group: ParamGroup, index: int) -> int | None:
    """The step count that apex, TransformerEngine and DeepSpeed keep in a param group."""
    step = group.get("step")
    return None if step is None else whole_count(step, f"step of group {index}")


def convert(
    state_dict: State,
    optimizer: FusedOptimizer,
    row: str,
    read: Callable[[SavedState, int | None], State],
    unused: tuple[str, ...] = ("step", "bias_correction"),
    passes_own: bool = True,
) -> State:
    """The state dict of another optimizer in the form of fusedopt's, or raise.

    ``read`` makes the state of one parameter of what was saved for it and of its group's step
    count, if it has one. States with a tensor ``step``, as torch and fusedopt have it, are passed
    on as they are if ``passes_own``. Of the param groups, the ``unused`` keys are left out, which
    no optimizer of fusedopt knows. What is given is not written to.
    """
    if not isinstance(optimizer, FusedOptimizer) or optimizer._row != row:
        raise TypeError(f"the state is for a fusedopt.{row}, not for a {type(optimizer).__name__}")
    missing = {"state", "param_groups"} - set(state_dict)
    if missing:
        raise ValueError(f"{min(missing)} is missing: this is no state dict of an optimizer")
    saved_groups = state_dict["param_groups"]
    check_groups(optimizer.param_groups, saved_groups)
    state = dict(state_dict["state"])
    groups = []
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        where = f"bias_correction=False in group {index} of the state dict"
        refuse(not saved.get("bias_correction", True), where, NO_UNCORRECTED)
        steps = group_count(saved, index)
        groups.append({key: value for key, value in saved.items() if key not in unused})
        for at, (param, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            entries = state.get(key, {})
            place = place_of(group, index, at)
            if not isinstance(entries, Mapping):
                raise TypeError(f"the state of {place} is {entries!r}, but must be a dict")
            if not entries:
                continue
            if not (passes_own and isinstance(entries.get("step"), Tensor)):
                state[key] = with_count(read(SavedState(entries, param, place), steps))
    return {**state_dict, "state": state, "param_groups": groups}
