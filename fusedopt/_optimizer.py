"""What the optimizers share: one call into the extension per step, state, checkpoints."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias, cast, overload

import torch
from torch import Tensor

from . import _C
from ._config import cpu_isa
from ._state_dict import load_state_dict
from ._steps import is_on_gpu, place_steps, step_device, to_step

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
            RuntimeError: a parameter is on a device that this build does not step, ``step`` of the
                same optimizer is running in another thread, a CUDA graph is captured although
                ``capturable`` is False or there is no state yet, or CUDA reports an error. Errors
                of kernels come with a later call, as always with CUDA.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Set by torch.amp.GradScaler: the grads are still scaled, and some may have overflowed.
        # What is on a GPU stays there: the kernels look at it.
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not is_on_gpu(found_inf):
            if float(found_inf) > 0:
                return loss
            found_inf = None
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is None:
            grad_scale = 1.0
        self._plan().step(
            self.param_groups,
            self.state,
            grad_scale if is_on_gpu(grad_scale) else float(grad_scale),
            found_inf,
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
        for group in self.param_groups:
            for param in group["params"]:
                entries = self.state.get(param)
                if isinstance(entries, dict) and "step" in entries:
                    entries["step"] = to_step(entries["step"], step_device(param, group))

    def _plan(self) -> _C.Plan:
        plan: _C.Plan | None = self.__dict__.get("_plan_")
        if plan is None:
            plan = self._plan_ = _C.Plan(self._row, cpu_isa())
        return plan

    def _create_state(
        self, missing: list[tuple[int, int]], steps_on_gpu: bool
    ) -> Callable[[], None]:
        """Fill in what the state of the parameters at these (group, index) lacks.

        A ``step`` that is not where it belongs, on the GPU of its parameter or on the CPU, is moved
        there. Returns a function that undoes it all.
        """
        created: list[tuple[Tensor, State | None, State]] = []
        for group_index, index in missing:
            group = self.param_groups[group_index]
            param = group["params"][index]
            before = dict(self.state[param]) if param in self.state else None
            created.append((param, before, {}))
        if self._counts_steps:
            place_steps([(p, before or {}, new) for p, before, new in created], steps_on_gpu)
        for (group_index, _), (param, _, entries) in zip(missing, created, strict=True):
            entries.update(self._missing_entries(param, self.param_groups[group_index]))
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
        return {
            name: torch.zeros_like(param, memory_format=torch.preserve_format)
            for name in self._state_names(group)
            if present.get(name) is None
        }


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
