"""What the optimizers share: one call into the extension per step, state, checkpoints."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias, cast, overload

import torch
from torch import Tensor

from . import _C
from ._config import cpu_isa
from ._state_dict import load_state_dict, to_step

ParamGroup: TypeAlias = dict[str, Any]
Params: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]
State: TypeAlias = dict[str, Any]


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers. A subclass names its row in the extension and its state."""

    _row: ClassVar[str]  # name in the extension's table of optimizers
    _old_options: ClassVar[dict[str, Any]]  # for groups saved before torch had these options

    # torch.amp.GradScaler then leaves unscaling and skipping to step().
    _step_supports_amp_scaling = True

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        _C.check_group(self._row, defaults, 0)
        super().__init__(cast(Any, params), defaults)

    def _state_names(self, group: ParamGroup) -> list[str]:
        """Names of the tensors of a parameter's state, without ``step``."""
        raise NotImplementedError

    _counts_steps: ClassVar[bool]

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a param group, as ``torch.optim.Optimizer.add_param_group`` does.

        Raises ValueError for a parameter that is given twice and for hyper-parameters out of range,
        whether they come from the group or from the defaults. Nothing is added then.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            params = param_group["params"]
            if not isinstance(params, (Tensor, set)):
                param_group["params"] = params = list(params)
                _refuse_duplicates(params, len(self.param_groups))
            _C.check_group(self._row, {**self.defaults, **param_group}, len(self.param_groups))
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator, unused-ignore]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a grad, or change nothing and raise.

        Args:
            closure: re-evaluates the model and returns the loss; called with grad enabled.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            TypeError: a parameter, grad or state is sparse, on the meta device, of an integer dtype
                or of a tensor subclass without memory of its own.
            ValueError: a grad or state does not fit its parameter in shape or device, parameters
                share memory, or a hyper-parameter is NaN or out of range.
            RuntimeError: a parameter is on a device that this build does not step, or ``step`` of
                the same optimizer is running in another thread.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Set by torch.amp.GradScaler: the grads are still scaled, and some may have overflowed.
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            return loss
        grad_scale = getattr(self, "grad_scale", None)
        self._plan().step(
            self.param_groups,
            self.state,
            1.0 if grad_scale is None else float(grad_scale),
            self._create_state,
            torch.get_num_threads(),
        )
        return loss

    def load_state_dict(self, state_dict: State) -> None:
        """Load a state dict of this class or of its twin in ``torch.optim``.

        As ``torch.optim.Optimizer.load_state_dict`` (hooks included), but state tensors keep the
        dtype they were saved with, where torch casts them to the parameter's, and the time is
        linear in the number of parameters.

        Raises:
            ValueError: the groups differ in number or in length from this optimizer's, or a
                hyper-parameter is out of range.
        """
        load_state_dict(self, state_dict, self._check_group)

    def _check_group(self, saved: ParamGroup, index: int) -> None:
        """Raise for hyper-parameters that a param group of a checkpoint must not have."""
        _C.check_group(self._row, {**self._old_options, **saved}, index)

    def __setstate__(self, state: State) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self._old_options.items():
                group.setdefault(name, value)
        for entries in self.state.values():
            if isinstance(entries, dict) and "step" in entries:
                entries["step"] = to_step(entries["step"])

    def _plan(self) -> _C.Plan:
        plan: _C.Plan | None = self.__dict__.get("_plan_")
        if plan is None:
            plan = self._plan_ = _C.Plan(self._row, cpu_isa())
        return plan

    def _create_state(self, missing: list[tuple[int, int]]) -> Callable[[], None]:
        """Fill in what the state of the parameters at these (group, index) lacks.

        Returns a function that undoes it.
        """
        created = []
        for group_index, index in missing:
            group = self.param_groups[group_index]
            param = group["params"][index]
            before = dict(self.state[param]) if param in self.state else None
            created.append((param, before, self._missing_entries(param, group)))
        for param, _, entries in created:
            self.state[param].update(entries)

        def discard() -> None:
            for param, before, _ in created:
                if before is None:
                    del self.state[param]
                else:
                    self.state[param].clear()
                    self.state[param].update(before)

        return discard

    def _missing_entries(self, param: Tensor, group: ParamGroup) -> State:
        present = self.state.get(param, {})
        entries: State = {}
        if self._counts_steps and not isinstance(present.get("step"), Tensor):
            entries["step"] = to_step(present.get("step", 0.0))
        for name in self._state_names(group):
            if present.get(name) is None:
                entries[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return entries


def _refuse_duplicates(params: list[Any], group_index: int) -> None:
    seen: dict[int, int] = {}
    for index, entry in enumerate(params):
        param = entry[1] if isinstance(entry, tuple) else entry
        first = seen.setdefault(id(param), index)
        if first != index:
            name = f"parameter {entry[0]!r}" if isinstance(entry, tuple) else "a parameter"
            raise ValueError(
                f"{name} is in param group {group_index} twice, at index {first} and {index}"
            )
