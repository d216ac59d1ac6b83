"""Averages made before the weights were there, by a step that only sets an optimizer up."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import _C
from ._tensors import count_writes, local
from ._types import State

if TYPE_CHECKING:
    from ._optimizer import FusedOptimizer

AVERAGE = _C.WEIGHTS_IN_STATE["average"]
Result = TypeVar("Result")


def trains_nothing(optimizer: "FusedOptimizer") -> bool:
    """Whether all learning rates are 0, as far as the host knows."""
    rates: list[Any] = [group["lr"] for group in optimizer.param_groups]
    return all(not (isinstance(rate, Tensor) and rate.is_cuda) and rate == 0 for rate in rates)


def without_average(optimizer: "FusedOptimizer", at: list[tuple[int, int]]) -> list[Tensor]:
    """Of the params at these (group, index): those whose state has no average yet."""
    params = [optimizer.param_groups[group]["params"][index] for group, index in at]
    return [param for param in params if optimizer.state.get(param, {}).get(AVERAGE) is None]


class InitialAverages:
    """Those that a step with learning rates of 0 has made, until a step trains.

    ``torch.distributed.checkpoint`` makes such a step before it loads. They are what the weights
    happened to be: where a param is written to then and its average is not, as by a checkpoint that
    has none, the average is to begin with what was written.
    """

    def __init__(self, optimizer: "FusedOptimizer", params: list[Tensor]) -> None:
        """What a step has made for these, beside what earlier ones have."""
        earlier = optimizer._initial_averages
        self._averages: dict[Tensor, Tensor] = {} if earlier is None else dict(earlier._averages)
        for param in params:
            average = optimizer.state.get(param, {}).get(AVERAGE)
            if average is not None:
                self._averages[param] = average
        self._count_writes()

    def recognise(self, optimizer: "FusedOptimizer") -> None:
        """After a state dict has been loaded: it may hold copies of these averages."""
        for param, average in self._averages.items():
            state = optimizer.state.get(param, {})
            loaded = state.get(AVERAGE)
            if loaded is not None and torch.equal(local(loaded), local(average)):
                state[AVERAGE] = average

    def through(self, optimizer: "FusedOptimizer", step: Callable[[], Result]) -> Result:
        """Make a step: if it trains, those averages are made again that have to be.

        They are there as before if the step is skipped or fails.
        """
        trains = not trains_nothing(optimizer)
        dropped: list[tuple[State, Tensor]] = []
        before = self._own_writes()
        try:
            if trains:
                self._drop_outdated(optimizer, dropped)
            return step()
        finally:
            if self._own_writes() == before:  # it has not run
                try:
                    _put_back(dropped)
                except BaseException:  # Ctrl-C
                    _put_back(dropped)
                    raise
            elif trains:
                optimizer._initial_averages = None
            else:
                self._count_writes()

    def _drop_outdated(
        self, optimizer: "FusedOptimizer", dropped: list[tuple[State, Tensor]]
    ) -> None:
        for param, (of_param, of_average) in self._writes.items():
            state, average = optimizer.state.get(param, {}), self._averages[param]
            is_left = state.get(AVERAGE) is average and count_writes(average) == of_average
            if is_left and count_writes(param) != of_param:
                dropped.append((state, average))
                del state[AVERAGE]

    def _own_writes(self) -> list[int]:
        return [count_writes(param) for param in self._averages]

    def _count_writes(self) -> None:
        self._writes = {
            param: (count_writes(param), count_writes(average))
            for param, average in self._averages.items()
        }


def _put_back(dropped: list[tuple[State, Tensor]]) -> None:
    for state, average in dropped:
        if state.get(AVERAGE) is None:
            state[AVERAGE] = average
