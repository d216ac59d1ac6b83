"""Averages made before the weights were there, by a step that only sets an optimizer up."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import _C
from ._tensors import count_writes, local
from ._types import State

if TYPE_CHECKING:
    from ._optimizer import FusedOptimizer

AVERAGE = _C.WEIGHTS_IN_STATE["average"]
UNKNOWN = -2  # a count of writes that no tensor has
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
    """Those that a step with learning rates of 0 has made, until a step trains their params.

    ``torch.distributed.checkpoint`` makes such a step before it loads. They are what the weights
    happened to be: where a param is written to then and its average is not, as by a checkpoint that
    has none, the average is to begin with what was written.
    """

    def __init__(self, averages: dict[Tensor, Tensor]) -> None:
        """Averages by their params, at least one."""
        self._averages = averages
        self._writes: dict[Tensor, tuple[int, int]] = {}
        self._count_writes(list(averages))

    @staticmethod
    def note(optimizer: "FusedOptimizer", params: list[Tensor]) -> None:
        """A step that trains nothing has made averages for these, if they have any."""
        found = {param: optimizer.state.get(param, {}).get(AVERAGE) for param in params}
        made = {param: average for param, average in found.items() if average is not None}
        earlier = optimizer._shared.initial_averages
        if made and earlier is None:
            optimizer._shared.initial_averages = InitialAverages(made)
        elif made and earlier is not None:
            earlier._averages |= made
            earlier._count_writes(list(made))

    def kept(self, optimizer: "FusedOptimizer") -> dict[Tensor, bool]:
        """For a copy of the optimizer: their params, and whether they are outdated."""
        return {
            param: self.is_outdated(optimizer, param)
            for param in self._averages
            if self._is_initial(optimizer, param)
        }

    @staticmethod
    def restore(optimizer: "FusedOptimizer", kept: dict[Tensor, bool]) -> None:
        """In a copy, whose tensors count their writes anew."""
        found = {param: optimizer.state.get(param, {}).get(AVERAGE) for param in kept}
        averages = {param: average for param, average in found.items() if average is not None}
        if averages:
            restored = optimizer._shared.initial_averages = InitialAverages(averages)
            for param in averages:
                if kept[param]:
                    restored._writes[param] = UNKNOWN, count_writes(averages[param])

    def count_swaps(self, params: list[Tensor]) -> None:
        """These have been written to, and hold their own values again."""
        for param in params:
            if param in self._writes:
                self._writes[param] = count_writes(param), self._writes[param][1]

    def recognise(self, optimizer: "FusedOptimizer") -> None:
        """After a state dict has been loaded: it may hold copies of these averages."""
        for param, average in self._averages.items():
            state = optimizer.state.get(param, {})
            loaded = state.get(AVERAGE)
            if loaded is not None and torch.equal(local(loaded), local(average)):
                state[AVERAGE] = average

    def through(self, optimizer: "FusedOptimizer", step: Callable[[], Result]) -> Result:
        """Make a step, in which those averages are made again that have to be.

        They are there as before if the step is skipped or fails. Params that the optimizer does not
        have, as the rest of those that are stepped in the backward, are left for their own step.
        """
        known = [param for param in optimizer._params() if param in self._averages]
        params = [param for param in known if self._is_initial(optimizer, param)]
        self._forget(optimizer, set(known).difference(params))  # others have been loaded
        trains = not trains_nothing(optimizer)
        dropped: list[tuple[State, Tensor]] = []
        before = _writes_to(params)
        try:
            for param in params:
                if self.is_outdated(optimizer, param):
                    state = optimizer.state[param]
                    dropped.append((state, state[AVERAGE]))
                    del state[AVERAGE]
            return step()
        finally:
            if _writes_to(params) == before:  # it has not run
                try:
                    _put_back(dropped)
                except BaseException:  # Ctrl-C
                    _put_back(dropped)
                    raise
            elif trains:
                self._forget(optimizer, params)
            else:
                self._count_writes(params)

    def is_outdated(self, optimizer: "FusedOptimizer", param: Tensor) -> bool:
        """Whether the param's average is one of these, and the param has been written to since."""
        return self._is_initial(optimizer, param) and count_writes(param) != self._writes[param][0]

    def _is_initial(self, optimizer: "FusedOptimizer", param: Tensor) -> bool:
        """Whether the param's average is one of these still, and nobody has loaded another."""
        average = self._averages.get(param)
        if average is None or optimizer.state.get(param, {}).get(AVERAGE) is not average:
            return False
        return count_writes(average) == self._writes[param][1]

    def _forget(self, optimizer: "FusedOptimizer", params: Iterable[Tensor]) -> None:
        for param in params:
            del self._averages[param], self._writes[param]
        if not self._averages:
            optimizer._shared.initial_averages = None

    def _count_writes(self, params: list[Tensor]) -> None:
        for param in params:
            self._writes[param] = count_writes(param), count_writes(self._averages[param])


def _writes_to(params: list[Tensor]) -> list[int]:
    return [count_writes(param) for param in params]


def _put_back(dropped: list[tuple[State, Tensor]]) -> None:
    for state, average in dropped:
        if state.get(AVERAGE) is None:
            state[AVERAGE] = average
