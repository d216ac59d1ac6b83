"""What the optimizers share: one call into the extension per step, state, checkpoints."""

import functools
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Optional, cast, overload

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from . import _C
from ._config import cpu_isa
from ._initial_averages import AVERAGE, InitialAverages, trains_nothing, without_average
from ._load_state_dict import load_state_dict
from ._norms import (
    NormProcesses,
    are_marked,
    are_shards,
    given_norm,
    refuse_shards,
    status_field,
)
from ._options import OWN_OPTIONS, name_state_dtype
from ._ranks import compare_ranks
from ._state import CreatedState, Specs, drop_unused, new_entry, place_of
from ._state_dict import export_all_states
from ._steps import step_device, to_step
from ._tensors import bytes_of, memory_of
from ._types import NormGroup, ParamGroup, Params, State
from ._weights import MASTERS, Swap, check_weight, check_written, read_weight, write_weight

if TYPE_CHECKING:
    from ._step_in_backward import StepInBackward


class Shared:
    """What an optimizer shares with those that are made from its ``__dict__``.

    These are wrappers (Lightning's, Fabric's), and the parts that are stepped in the backward.
    """

    # What the latest step found out: tensors, on a GPU if the params are there.
    grad_status: Tensor | None = None
    counts_nonfinite = True  # in grad_status
    found_inf: Tensor | None = None

    is_swapped = False  # swap_ema() is open
    compares_ranks = True  # in the next step; see _ranks.py
    meshes_to_compare: set[Any] | None = None  # None: all
    initial_averages: InitialAverages | None = None  # until a step trains


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers. A subclass names its row in the extension's table."""

    _row: ClassVar[str]  # name in the extension's table of optimizers
    _option_defaults: ClassVar[dict[str, Any]]  # as its constructor's signature has them
    _own_options: ClassVar[tuple[str, ...]] = OWN_OPTIONS  # torch's twin has none of these
    _fixed_options: ClassVar[dict[str, Any]] = {}  # what groups have whatever a checkpoint says

    _checks_grads = False  # set by fusedopt.GradScaler for its steps

    # Whether torch.amp.GradScaler is to leave unscaling and skipping to step(). As in torch, that
    # is so for optimizers made with fused=True: what stands between a scaler and its optimizer
    # (a wrapper, a trainer) often knows the usual way only.
    _step_supports_amp_scaling = False

    _in_backward: Optional["StepInBackward"] = None  # while that is what steps

    # Over which processes the norm of the grads is taken, beside those that DTensors name.
    _norm_processes: NormProcesses | None = None
    _has_shards = False  # of FSDP1

    def __init__(
        self, params: Params, defaults: dict[str, Any], norm_group: NormGroup = None
    ) -> None:
        if defaults.get("fused") and defaults.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        _C.check_group(self._row, defaults, 0, is_construction=True)
        self._shared_ = Shared()
        if norm_group is not None:
            self._norm_processes = NormProcesses(norm_group)
        name_state_dtype(defaults)
        super().__init__(cast(Any, params), defaults)
        self._step_supports_amp_scaling = bool(defaults.get("fused"))
        export_all_states(self)

    @property
    def _shared(self) -> Shared:
        found: Shared | None = self.__dict__.get("_shared_")
        return self.__dict__.setdefault("_shared_", Shared()) if found is None else found

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """As torch's, which wraps ``step`` to call its hooks; a step that fails leaves no scaling.

        torch.amp.GradScaler hands its scale over in attributes, and leaves them on the optimizer if
        the step or a hook raises, Ctrl-C included. The next step would obey them.
        """
        hooked = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(hooked)
        def step(self: "FusedOptimizer", *args: Any, **kwargs: Any) -> Any:
            try:
                return hooked(self, *args, **kwargs)
            except BaseException:
                forget_scaling(self)
                raise

        return step

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a param group, as ``torch.optim.Optimizer.add_param_group`` does.

        Raises ValueError for a parameter that is given twice and for hyper-parameters that are NaN,
        infinite or make no sense. The ranges of torch hold for the defaults only, as in torch: a
        group may ascend with a negative ``lr``. Nothing is added if it raises.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            params = param_group["params"]
            if not isinstance(params, (Tensor, set)):
                param_group["params"] = params = list(params)
                _refuse_duplicates(params, len(self.param_groups))
            _C.check_group(self._row, {**self.defaults, **param_group}, len(self.param_groups))
            # ZeroRedundancyOptimizer enters all arguments there.
            norm_group = param_group.get("norm_group")
            if norm_group is not None and NormProcesses(norm_group) != self._norm_processes:
                raise ValueError("norm_group is for the whole optimizer, not for a param group")
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        added.pop("norm_group", None)
        name_state_dtype(added)
        if are_marked(added["params"]):
            self._note_shards()

    @overload
    def step(self, closure: None = None, *, grad_norm: float | Tensor | None = None) -> None: ...

    @overload
    def step(
        self, closure: Callable[[], float], *, grad_norm: float | Tensor | None = None
    ) -> float: ...

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator, unused-ignore]
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_norm: float | Tensor | None = None,
    ) -> float | None:
        """Update every parameter that has a grad, or change nothing and raise.

        Args:
            closure: re-evaluates the model and returns the loss; called with grad enabled.
            grad_norm: L2 norm of all grads, for those who know it (of all parts of a model, say):
                of the grads as they are in ``.grad`` when the step is called, with the scale of a
                GradScaler that has not unscaled them. ``max_grad_norm`` clips by it, and the grads
                are not read first. A number, or a tensor of one element, of any device; a DTensor,
                as ``torch.nn.utils.get_total_norm`` may return, is made whole. Infinity and NaN
                skip the step, or raise with ``error_if_nonfinite``; so does a negative tensor on a
                GPU, which nobody waits for.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            TypeError: a parameter, grad or state is sparse, on the meta device, of an integer dtype
                or of a tensor subclass without memory of its own.
            ValueError: a grad or state does not fit its parameter in shape or device, a state is
                incomplete, parameters share memory with each other or with a grad that is not
                exactly theirs, a hyper-parameter is NaN or infinite or makes no sense, or
                ``grad_norm`` is negative, is not one real number, or no group has
                ``max_grad_norm``. In a first step, on all ranks of the meshes of DTensors and of
                ``norm_group``: their settings, or their params on a mesh, are not the same.
            RuntimeError: a parameter is on a device that this build does not step, ``step`` of the
                same optimizer is running in another thread or inside ``swap_ema()``, grads are
                infinite or NaN and ``error_if_nonfinite`` is True, a CUDA graph is captured
                although ``capturable`` is False or there is no state yet, or CUDA reports an
                error. Errors of kernels come with a later call, as always with CUDA.
        """
        self._refuse_swapped("step()")
        shared = self._shared
        if shared.compares_ranks:
            self._note_shards()  # FSDP1 may have wrapped the model since the params were added
            compare_ranks(self, shared, grad_norm is not None)
        if grad_norm is not None:
            grad_norm = given_norm(grad_norm)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is not None:
            is_scaled = hasattr(self, "found_inf") or self._checks_grads
            self._in_backward.finish(grad_norm, is_scaled)
            return loss
        # Set by torch.amp.GradScaler: the grads are still scaled, and some may have overflowed.
        # What is on a GPU stays there: the kernels look at it.
        found_inf = getattr(self, "found_inf", None)
        shared.found_inf, shared.grad_status = found_inf, None
        shared.counts_nonfinite = grad_norm is None
        if found_inf is not None and not _C.is_on_gpu(found_inf):
            if float(found_inf) > 0:
                return loss
            found_inf = None
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is None:
            grad_scale = 1.0
        elif not _C.is_on_gpu(grad_scale):
            grad_scale = float(grad_scale)
        if self._has_shards and grad_norm is None:
            self._refuse_norm_of_shards()
        self._step_with(grad_scale, found_inf, grad_norm)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``."""
        super().zero_grad(set_to_none)
        if self._in_backward is not None:
            self._in_backward.restart()

    def _step_with(
        self,
        grad_scale: float | Tensor,
        found_inf: Tensor | None,
        grad_norm: float | Tensor | None,
    ) -> None:
        """The step, but for what a closure, a scaler and other ranks have to do with it."""
        initial = self._shared.initial_averages
        if initial is None:
            changed = self._run(grad_scale, found_inf, grad_norm)
        else:
            run = functools.partial(self._run, grad_scale, found_inf, grad_norm)
            changed = initial.through(self, run)
        if changed:
            drop_unused(self, changed)

    def _run(
        self,
        grad_scale: float | Tensor,
        found_inf: Tensor | None,
        grad_norm: float | Tensor | None,
    ) -> list[tuple[int, int]] | None:
        """One call into the extension, or two.

        Returns where parameters have come to use less state, if any have.
        """
        plan, processes = self._plan(), self._norm_processes
        norm_groups = [] if processes is None else processes.groups()
        threads = torch.get_num_threads()
        found: _C.PendingStep | list[tuple[int, int]] | None = None
        try:
            found = plan.step(
                self.param_groups, self.state, grad_scale, found_inf, threads, self._checks_grads,
                norm_groups, grad_norm,
            )  # fmt: skip
            return self._create_and_run(found) if isinstance(found, _C.PendingStep) else found
        finally:
            if isinstance(found, _C.PendingStep):
                found.close()
            self._shared.grad_status = plan.grad_status

    def _create_and_run(self, step: _C.PendingStep) -> list[tuple[int, int]] | None:
        """The rest of a step that has found state missing; without it, none is created."""
        new_averages = without_average(self, step.missing) if trains_nothing(self) else []
        created = CreatedState(self)
        try:
            created.fill(step.missing, step.maybe_written, step.counts_on_gpu)
            changed = step.run()
            if step.has_run and new_averages:
                InitialAverages.note(self, new_averages)
            return changed
        finally:
            if not step.has_run:
                try:
                    created.discard()
                except BaseException:  # Ctrl-C, before it has begun
                    created.discard()
                    raise

    @property
    def grad_norm(self) -> Tensor | None:
        """L2 norm of all grads of the latest step, before clipping and without ``grad_scale``.

        A float64 tensor of one element on the parameters' device, so that reading it is what waits
        for a GPU; None if the step did not read the grads first: without ``max_grad_norm`` and
        ``fusedopt.GradScaler``.
        """
        status = self._shared.grad_status  # once: another thread may be stepping
        return None if status is None else status_field(status, _C.GRAD_STATUS, "grad_norm")

    @property
    def nonfinite_grads(self) -> Tensor | None:
        """How many elements of the latest step's grads were infinite or NaN.

        An int64 tensor of one element on the parameters' device; None as ``grad_norm``, and after
        a step that was given the norm.
        """
        shared = self._shared
        status = shared.grad_status if shared.counts_nonfinite else None
        return None if status is None else status_field(status, _C.GRAD_STATUS, "nonfinite")

    @property
    def skipped(self) -> Tensor:
        """Whether the latest step changed nothing, because grads were infinite or NaN.

        A bool tensor of one element; on the parameters' device if that is what knows.
        """
        status, found_inf = self._shared.grad_status, self._shared.found_inf
        if status is not None:
            return status_field(status, _C.GRAD_STATUS, "skip") > 0
        if isinstance(found_inf, Tensor):
            return found_inf.sum() > 0
        return torch.tensor(False, device="cpu")

    def memory(self, group: int | None = None) -> dict[str, int]:
        """Bytes that the parameters and what belongs to them take now, in this process.

        Of DTensors, shards; of grads, those that are there.

        Args:
            group: of this param group, an index into ``param_groups``; None: of all.

        Returns:
            Bytes of ``params``, ``grads``, ``states`` (moments, momentum buffers, step counts ...),
            ``scales`` (of states that are codes of 8 bits), ``masters`` (``master_param``,
            ``param_remainder``, ``param_remainder8``) and ``averages`` (``ema_param``), and their
            ``total``.
        """
        names = _C.WEIGHTS_IN_STATE
        kinds = {names[kind]: "masters" for kind in MASTERS} | {names["average"]: "averages"}
        kinds |= dict.fromkeys(_C.names_of_scales(self._row), "scales")
        found = dict.fromkeys(("params", "grads", "states", "scales", "masters", "averages"), 0)
        for each in self.param_groups if group is None else [self.param_groups[group]]:
            for param in each["params"]:
                found["params"] += bytes_of(param)
                found["grads"] += 0 if param.grad is None else bytes_of(param.grad)
                for name, entry in self._own_entries(param).items():
                    if isinstance(entry, Tensor):
                        found[kinds.get(name, "states")] += bytes_of(entry)
        return {**found, "total": sum(found.values())}

    def _own_entries(self, param: Tensor) -> State:
        """Those of a param's state that have memory of their own."""
        entries: State = self.state.get(param, {})
        return entries

    def fp32_params(self) -> list[Tensor]:
        """Copies of all weights, in the order of the param groups.

        In float32 where parameters are narrower: from the master weights if there are any, where
        the parameters still are what these round to.
        """
        self._refuse_swapped("fp32_params()")
        specs = Specs(self, is_strict=False)
        return [
            read_weight(param, self.state.get(param, {}), specs.of(param, group))
            for group in self.param_groups
            for param in group["params"]
        ]

    @torch.inference_mode(False)  # which new masters outlive, as other state does
    @torch.no_grad()
    def load_fp32_params(self, weights: Iterable[Tensor]) -> None:
        """Set all weights, as ``fp32_params()`` gives them: parameters and their master weights.

        With ``master_weights="split8"`` these are the nearest of 24 bits.
        Averages stay as they are. Raises ValueError if number, shapes or complex numbers do not
        fit, or parameters cannot be written to, TypeError for what is no tensor or has no values to
        read (sparse tensors, those on the meta device), or where of a tensor and its parameter one
        is a DTensor; nothing is changed then.
        """
        self._refuse_swapped("load_fp32_params()")
        entries = [(param, group) for group in self.param_groups for param in group["params"]]
        weights = list(weights)
        if len(weights) != len(entries):
            raise ValueError(f"{len(weights)} tensors for {len(entries)} parameters")
        places = [
            place_of(group, at, index)
            for at, group in enumerate(self.param_groups)
            for index in range(len(group["params"]))
        ]
        for index, ((param, _), weight) in enumerate(zip(entries, weights, strict=True)):
            check_weight(weight, param, f"tensor {index} (for {places[index]})")
        # Those that steps would refuse are refused here, too; frozen ones are in nobody's way.
        trained, frozen = Specs(self), Specs(self, is_strict=False)
        all_specs = [
            (trained if param.requires_grad else frozen).of(param, group)
            for param, group in entries
        ]
        written: set[int] = set()
        for (param, _), spec, place in zip(entries, all_specs, places, strict=True):
            targets = check_written(param, self.state.get(param, {}), spec, place)
            written.update(map(memory_of, targets))
        weights = [each.clone() if memory_of(each) in written else each for each in weights]
        for (param, _), weight, spec in zip(entries, weights, all_specs, strict=True):
            for name, kind, dtype in spec.entries:
                if kind in MASTERS and self.state.get(param, {}).get(name) is None:
                    self.state[param][name] = new_entry(name, kind, dtype, param, {}, spec)
            write_weight(param, weight, self.state.get(param, {}), spec)

    def reset_masters(self) -> None:
        """Let the parameters be the weights: the next step makes master weights from them.

        For what was written to parameters unnoticed, through ``.data`` say. No effect without
        ``master_weights``.
        """
        self._refuse_swapped("reset_masters()")
        self._forget(*MASTERS)

    def reset_ema(self) -> None:
        """Forget the averages: the next step begins them with the weights that it finds."""
        self._refuse_swapped("reset_ema()")
        self._forget("average")

    def _forget(self, *kinds: str) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                for kind in kinds:
                    if param in self.state:
                        self.state[param].pop(_C.WEIGHTS_IN_STATE[kind], None)

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Inside, the parameters of groups with ``ema_decay`` hold the average of their weights.

        For evaluation. Rounded to the parameters' dtype; afterwards they hold exactly what they
        held before. Parameters that were never stepped stay as they are, as do those whose weights
        were loaded after steps with a learning rate of 0 alone, with which their averages will
        begin. Raises RuntimeError if there is no average yet, or inside another ``swap_ema()``.
        FSDP2 does not notice that its shards have changed, and may go on with what it has gathered
        before: ``fusedopt.integrations.swap_ema(optimizer, model)`` has it gather anew.
        """
        self._refuse_swapped("swap_ema()")
        pairs = self._averages()
        if not pairs:
            raise RuntimeError("there is no average yet: set ema_decay and make a step")
        initial = self._shared.initial_averages
        if initial is not None:
            pairs = [pair for pair in pairs if not initial.is_outdated(self, pair[0])]
        swap = Swap(pairs)

        def end() -> None:
            swap.put_back()
            if initial is not None:
                initial.count_swaps([param for param, _ in pairs])
            self._shared.is_swapped = False

        try:
            self._shared.is_swapped = True
            swap.put_in()
            yield
        finally:
            try:
                end()
            except BaseException:  # Ctrl-C, after which params may hold averages
                end()
                raise

    def _averages(self) -> list[tuple[Tensor, Tensor]]:
        """Params and the averages of their weights, where there are any."""
        return [
            (param, self.state[param][AVERAGE])
            for group in self.param_groups
            for param in group["params"]
            if group.get("ema_decay") is not None and AVERAGE in self.state.get(param, {})
        ]

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _clips(self) -> bool:
        """Whether it measures its grads and clips some of them itself."""
        return any(group.get("max_grad_norm") is not None for group in self.param_groups)

    def _needs_norm(self) -> bool:
        return self._clips() or self._checks_grads

    def _note_shards(self) -> None:
        self._has_shards = are_shards(self._params())

    def _refuse_norm_of_shards(self) -> None:
        if self._norm_processes is None and self._needs_norm():
            refuse_shards()

    def _refuse_swapped(self, what: str) -> None:
        if self._shared.is_swapped:
            raise RuntimeError(
                f"{what} inside swap_ema(), where the parameters hold averages and not their values"
            )

    def __getstate__(self) -> State:
        self._refuse_swapped("a copy")
        state = super().__getstate__()
        if self._norm_processes is not None:
            state["_norm_processes"] = self._norm_processes
        if self._shared.initial_averages is not None:
            state["_initial_averages"] = self._shared.initial_averages.kept(self)
        return state

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator, unused-ignore]
    def state_dict(self) -> State:
        """As ``torch.optim.Optimizer.state_dict``; RuntimeError inside ``swap_ema()``.

        Where ``betas[0]`` is 0 and there is no ``exp_avg``, one of zeros stands in for it, so that
        ``torch.optim`` can load what is returned. The bits of ``param_remainder`` are seen as
        bfloat16, in the same memory, which gloo and NCCL can send as they cannot int16. Param
        groups have the name of ``state_dtype``. So ``torch.distributed.checkpoint`` can gather,
        offload and broadcast all of it.
        """
        self._refuse_swapped("state_dict()")
        return super().state_dict()

    def register_state_dict_post_hook(
        self,
        hook: Callable[[torch.optim.Optimizer, State], State | None],
        prepend: bool = False,
    ) -> RemovableHandle:
        """As ``torch.optim.Optimizer.register_state_dict_post_hook``."""
        handle = super().register_state_dict_post_hook(hook, prepend)
        export_all_states(self)  # before a hook that is put before all others, too
        return handle

    def load_state_dict(self, state_dict: State) -> None:
        """Load a state dict of this class or of its twin in ``torch.optim``.

        As ``torch.optim.Optimizer.load_state_dict`` (hooks included), but

        - state tensors get the group's ``state_dtype``, or keep the dtype they were saved with if
          that is None, where torch casts them to the parameter's;
        - of the options, those of torch are loaded, those that torch lacks stay as they are set
          here. Master weights of another kind are converted together with the parameters (load
          the model first), for ``"split8"`` to the nearest weights of 24 bits; without any, the
          next step makes them from the parameters, as it does averages. A float32 master counts
          only where the parameter is what it rounds to, so load the model, too. What the options
          have no use for is dropped;
        - the state of a parameter is there as a whole or not at all. Only what an option needs that
          was switched on since may be missing, and is made by the next step: ``max_exp_avg_sq``
          (from zeros), ``momentum_buffer``, a master weight, ``ema_param`` and SGD's ``step``.
          ``exp_avg`` is dropped where ``betas[0]`` is 0;
        - states take on the strides of their parameter (those of channels_last, say), with which
          steps are fastest;
        - the bits of ``param_remainder`` may be seen as bfloat16, as ``state_dict()`` has them, or
          as int16;
        - a ``step`` of any number type, numpy's too, becomes a floating-point tensor;
        - the time is linear in the number of parameters.

        Raises:
            TypeError: what has to be a dict, a list, a tensor or a number is none, or a tensor has
                no values that steps can use: integers, complex numbers of a real parameter, sparse
                tensors, those on the meta device.
            ValueError: the groups differ in number or in length from this optimizer's, a
                hyper-parameter is NaN or infinite or makes no sense, the state of a parameter is
                incomplete or another optimizer's or of another shape, a ``step`` is not one whole
                number that is not negative, or a parameter cannot be written to that should be.
            RuntimeError: inside ``swap_ema()``.

        Nothing is changed then.
        """
        self._refuse_swapped("load_state_dict()")
        load_state_dict(self, state_dict)

    _has_derived_state: ClassVar[bool] = False

    def _derived_state(self, group: ParamGroup, step: float, /) -> dict[str, float]:
        """Numbers that torch's twin has in a state after so many steps, for state dicts."""
        raise NotImplementedError

    def _with_defaults(self, saved: ParamGroup) -> ParamGroup:
        """A param group of a checkpoint with the options that it may lack."""
        return {**self._switches(), **saved, **self._fixed_options}

    def _switches(self) -> dict[str, Any]:
        """Options of torch that are off by default: groups saved by an older one may lack them."""
        return {
            name: value
            for name, value in self._option_defaults.items()
            if name not in self._own_options and (value is None or value is False)
        }

    def __setstate__(self, state: State) -> None:
        kept = state.get("_initial_averages")
        super().__setstate__({k: v for k, v in state.items() if k != "_initial_averages"})
        if kept is not None:
            InitialAverages.restore(self, kept)
        self._note_shards()
        is_fused = bool(self.defaults.get("fused"))
        self._step_supports_amp_scaling = is_fused or self._in_backward is not None
        export_all_states(self)
        for group in self.param_groups:
            for name, value in self._switches().items():
                group.setdefault(name, value)
            group.update(self._fixed_options)
        for group in self.param_groups:
            for param in group["params"]:
                entries = self.state.get(param)
                if isinstance(entries, (dict, MutableMapping)) and "step" in entries:
                    entries["step"] = to_step(entries["step"], step_device(param, group))

    def _plan(self) -> _C.Plan:
        plan: _C.Plan | None = self.__dict__.get("_plan_")
        if plan is None:
            # Two threads in their first step get the same one, which refuses one of them.
            plan = self.__dict__.setdefault("_plan_", _C.Plan(self._row, cpu_isa()))
        return plan


def forget_scaling(optimizer: torch.optim.Optimizer) -> None:
    """Take off what torch.amp.GradScaler has handed over for one step."""
    for name in ("grad_scale", "found_inf"):
        optimizer.__dict__.pop(name, None)


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
