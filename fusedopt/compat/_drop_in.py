"""What the stand-ins have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .._optimizer import FusedOptimizer
from .._types import ParamGroup, State

NO_AMSGRAD = "fusedopt.Adam(amsgrad=True) and fusedopt.AdamW(amsgrad=True) have it"
NO_UNCORRECTED = (
    "the moments are always corrected for the bias of the first steps; an lr that is multiplied by "
    "(1 - beta1**t) / (1 - beta2**t)**0.5 in step t takes that back, but for eps and weight_decay"
)


def refuse(wrong: bool, what: str, instead: str) -> None:
    """Raise ValueError for an argument that would train something else than it does elsewhere."""
    if wrong:
        raise ValueError(f"{what} is not supported by this stand-in: {instead}")


class DropIn(FusedOptimizer):
    """A stand-in's ``zero_grad()``, param groups and ``load_state_dict()``."""

    _convert: ClassVar[staticmethod[[State, FusedOptimizer], State]]

    _set_grad_none = True  # what zero_grad() does unless it is told
    _attributes: ClassVar[tuple[str, ...]] = ("_set_grad_none",)  # that copies have, too

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As ``fusedopt.Adam``'s; ValueError for a ``bias_correction`` that is False."""
        if isinstance(param_group, dict):
            refuse(not param_group.get("bias_correction", True), "bias_correction=False",
                   NO_UNCORRECTED)  # fmt: skip
            param_group.pop("bias_correction", None)
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop the grads, or fill them with zeros; None: as the constructor was told."""
        super().zero_grad(self._set_grad_none if set_to_none is None else set_to_none)

    def load_state_dict(self, state_dict: State) -> None:
        """As ``fusedopt.Adam``'s; takes state dicts of the origin, too."""
        super().load_state_dict(self._convert(state_dict, self))

    def __getstate__(self) -> State:
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in self._attributes},
        }


def put_rates_on_device(optimizer: torch.optim.Optimizer) -> None:
    """Make each group's ``lr`` a float32 tensor of its own where the group's params are."""
    for group in optimizer.param_groups:
        rate: Any = group["lr"]
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        if isinstance(rate, Tensor):
            group["lr"] = rate.to(device, torch.float32, copy=True)
        else:
            group["lr"] = torch.tensor(rate, dtype=torch.float32, device=device)
