"""For those who come from NVIDIA's TransformerEngine: ``optimizers.FusedAdam``, in Megatron too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _C
from .._optimizer import FusedOptimizer
from .._state import Specs, drop_unused, new_entry, place_of
from .._steps import step_device, to_step, whole_count
from .._tensors import local, why_unreadable
from .._types import ParamGroup, Params, State
from .._weights import join, split
from ..adam import Adam
from ._drop_in import NO_AMSGRAD, NO_UNCORRECTED, DropIn, put_rates_on_device, refuse
from ._reader import SavedState, convert, group_count

MASTER, REMAINDER = _C.WEIGHTS_IN_STATE["master"], _C.WEIGHTS_IN_STATE["remainder"]
SAME_DTYPES = "the moments have one dtype, torch.float32 or torch.bfloat16 for both"


def convert_state_dict(state_dict: State, optimizer: FusedOptimizer) -> State:
    """What ``state_dict()`` of TransformerEngine's FusedAdam returned, for ``load_state_dict()``.

    ``optimizer`` is a ``fusedopt.Adam`` or ``AdamW`` over the same parameters in the same order.
    TransformerEngine counts the steps of a param group, here each of its parameters has that count.
    Its ``master_param`` is float32, or int16: of a weight, that is the upper half of the bits,
    rounded, in the bfloat16 parameter, and the lower half, which are the two parts of
    ``master_weights="split"``, too. So it is kept bit for bit; load the model, too. States in
    float16 and FP8 are float32 in TransformerEngine's state dict, which multiplies them by their
    scales; those without are refused. Other state dicts, of fusedopt and torch, are returned
    unchanged, but for the counts: where a group has one that no parameter has, it is that of all of
    the group's parameters. Megatron-Core saves it and not theirs.

    Raises TypeError or ValueError, which name the parameter, where the state is of another kind.
    """
    states = state_dict.get("state", {}).values()
    counts = [entries.get("step") for entries in states if isinstance(entries, dict)]
    known = {float(count) for count in counts if isinstance(count, Tensor) and count.numel() == 1}

    def read(saved: SavedState, steps: int | None) -> State:
        own = saved.entries.get("step")
        is_of_group = own is None or (steps is not None and steps not in known)
        step = {"step": (steps or 0) if is_of_group else own}
        if isinstance(own, Tensor):
            return {**saved.entries, **step}
        saved.check_names("exp_avg", "exp_avg_sq", optional=(MASTER,))
        moments = {
            name: saved.tensor(name, torch.float32, torch.bfloat16)
            for name in ("exp_avg", "exp_avg_sq")
        }
        return {**step, **moments, **_master(saved)}

    return convert(state_dict, optimizer, "Adam", read, passes_own=False)


def _master(saved: SavedState) -> State:
    if saved.entries.get(MASTER) is None:
        return {}
    master = saved.tensor(MASTER, torch.float32, torch.int16)
    if master.dtype == torch.int16 and saved.param.dtype != torch.bfloat16:
        raise saved.fail(MASTER, f"is int16, but the parameter {saved.param.dtype}, not bfloat16")
    return {MASTER if master.dtype == torch.float32 else REMAINDER: master}


class FusedAdam(DropIn, Adam):
    """``fusedopt.Adam`` with the signature of TransformerEngine's ``FusedAdam``.

    Args:
        params, lr, betas, eps, weight_decay: as ``fusedopt.Adam``'s.
        amsgrad (bool, default False): must be False, as there.
        bias_correction (bool, default True): must be True, in param groups as well.
        adam_w_mode (bool, default True): decoupled decay, as AdamW has it; False: L2.
        capturable (bool, default False): as ``fusedopt.Adam``'s, with remainders, too. ``lr`` of
            the groups is a float32 tensor on the parameters' device then, and GradScalers leave
            unscaling to the step.
        master_weights (bool, default False): keep float32 weights of 16-bit parameters,
            ``master_weights="float32"``. It may be set later, as an attribute.
        master_weight_dtype (torch.dtype, default torch.float32): must be that, with masters.
        exp_avg_dtype, exp_avg_sq_dtype (torch.dtype, default torch.float32): dtype of the moments
            (``state_dtype``), torch.float32 or torch.bfloat16 for both. A bfloat16 ``exp_avg_sq``
            is rounded stochastically, which keeps it from standing still; groups with
            ``stochastic_rounding=False`` have it rounded to the nearest, as there.
        use_decoupled_grad (bool, default False): steps and ``zero_grad()`` take the parameters'
            ``decoupled_grad``, of any dtype, for their ``grad``. It may be set later.
        store_param_remainders (bool, default False): of bfloat16 parameters with master weights,
            keep the 16 bits that they lack (``master_weights="split"``), in groups of nothing else.
        set_grad_none (bool | None, default None): what ``zero_grad()`` does; None: drop grads.

    What the groups have of ``step`` is how many steps were made, as there. Each parameter counts
    its own, as in torch: one that is unfrozen later begins with 1. ``master_param`` of the states
    is there for all parameters if there are master weights: those, the remainders (then it is
    ``param_remainder`` under its other name) or the float32 parameter itself.

    For Megatron-Core there are, beside TransformerEngine's ``get_unscaled_state()``,
    ``set_scaled_state()`` and ``initialize_state()``, state dicts in which groups have ``step``.
    ``load_state_dict()`` takes what TransformerEngine has saved.

    Raises:
        ValueError: an argument asks for what is said above not to be there; and as
            ``fusedopt.Adam``. FP8 parameters are refused by the step.
    """

    _convert = staticmethod(convert_state_dict)
    _attributes = (*DropIn._attributes, "use_decoupled_grad", "store_param_remainders")

    use_decoupled_grad = False
    store_param_remainders = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        refuse(not bias_correction, "bias_correction=False", NO_UNCORRECTED)
        refuse(amsgrad, "amsgrad=True", NO_AMSGRAD)
        dtypes = f"exp_avg_dtype={exp_avg_dtype} with exp_avg_sq_dtype={exp_avg_sq_dtype}"
        refuse(exp_avg_dtype != exp_avg_sq_dtype, dtypes, SAME_DTYPES)
        refuse(exp_avg_dtype not in (torch.float32, torch.bfloat16), dtypes, SAME_DTYPES)
        refuse(
            master_weights and master_weight_dtype != torch.float32,
            f"master_weight_dtype={master_weight_dtype}",
            "master weights are float32; with store_param_remainders they take 16 bits",
        )
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = store_param_remainders
        self._set_grad_none = set_grad_none is not False
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            capturable=capturable,
            fused=capturable or None,
            decoupled_weight_decay=bool(adam_w_mode),
            state_dtype=exp_avg_dtype,
            master_weights=self._kind(master_weights, []),
        )
        if capturable:
            put_rates_on_device(self)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As ``fusedopt.Adam``'s; remainders are for groups of nothing but bfloat16."""
        if isinstance(param_group, dict) and param_group.get("master_weights") == "split8":
            raise ValueError("TransformerEngine's FusedAdam has no weights of 24 bits")
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        if added.get("master_weights") == "split":
            added["master_weights"] = self._kind(True, added["params"])

    def _kind(self, wanted: bool, params: list[Tensor]) -> Literal["float32", "split"] | None:
        """The option of a group with these params."""
        are_all_bfloat16 = all(param.dtype == torch.bfloat16 for param in params)
        splits = self.store_param_remainders and are_all_bfloat16
        return None if not wanted else "split" if splits else "float32"

    @property
    def master_weights(self) -> bool:
        """Whether there are master weights. Megatron-FSDP has its own, and sets it to False."""
        return self.defaults["master_weights"] is not None

    @master_weights.setter
    def master_weights(self, wanted: bool) -> None:
        self.defaults["master_weights"] = self._kind(wanted, [])
        for group in self.param_groups:
            group["master_weights"] = self._kind(wanted, group["params"])
        self._name_all_masters()

    def _forget(self, *kinds: str) -> None:
        super()._forget(*kinds)
        self._name_all_masters()

    def load_fp32_params(self, weights: Iterable[Tensor]) -> None:
        """As ``fusedopt.Adam``'s."""
        super().load_fp32_params(weights)  # which makes remainders that are missing
        self._name_all_masters()

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop the grads, or fill them with zeros; None: as the constructor was told."""
        if not self.use_decoupled_grad:
            super().zero_grad(set_to_none)
            return
        param: Any
        for param in self._params():
            grad = getattr(param, "decoupled_grad", None)
            if grad is not None:
                if self._set_grad_none if set_to_none is None else set_to_none:
                    param.decoupled_grad = None
                else:
                    grad.zero_()

    def _run(
        self,
        grad_scale: float | Tensor,
        found_inf: Tensor | None,
        grad_norm: float | Tensor | None,
    ) -> list[tuple[int, int]] | None:
        counts = [group.get("step", 0) for group in self.param_groups]
        for index, count in enumerate(counts):
            if _C.is_on_gpu(count) and count.numel() == 1:
                continue  # nothing waits for its value
            counts[index] = whole_count(count, f"step of param group {index}")
        grads = decoupled_grads(self.param_groups) if self.use_decoupled_grad else nullcontext()
        with grads:
            changed = super()._run(grad_scale, found_inf, grad_norm)
        for group, count in zip(self.param_groups, counts, strict=True):
            group["step"] = count + 1
        if changed:
            drop_unused(self, changed)
            self._name_masters(changed)
        return None

    def _create_and_run(self, step: _C.PendingStep) -> list[tuple[int, int]] | None:
        try:
            return super()._create_and_run(step)
        finally:
            if step.has_run:  # even if Ctrl-C has come since
                try:
                    self._name_masters(step.missing)
                except BaseException:  # Ctrl-C
                    self._name_masters(step.missing)
                    raise

    def __setstate__(self, state: State) -> None:
        super().__setstate__(state)
        self._name_all_masters()

    def _name_all_masters(self) -> None:
        for param in self._params():
            self._name_master(param)

    def _name_masters(self, at: list[tuple[int, int]]) -> None:
        for group_index, index in at:
            self._name_master(self.param_groups[group_index]["params"][index])

    def _name_master(self, param: Tensor) -> None:
        """Have the state of a param hold its weight, or its remainder, as TransformerEngine's."""
        state = self.state.get(param)
        if not state or not self.master_weights:
            return
        if REMAINDER in state:
            state[MASTER] = state[REMAINDER]
        elif param.dtype == torch.float32:
            state[MASTER] = param.detach()

    def _own_entries(self, param: Tensor) -> State:
        entries = super()._own_entries(param)
        if MASTER not in entries:
            return entries
        others = (param, entries.get(REMAINDER))
        if all(not is_same_memory(entries[MASTER], other) for other in others):
            return entries
        return {name: entry for name, entry in entries.items() if name != MASTER}

    def _state_of(self, param: Tensor, name: str) -> Tensor:
        is_master = name == MASTER and param.dtype == torch.float32
        if is_master:
            return param.detach()
        if name == MASTER:
            self._name_master(param)  # a step that was interrupted may not have done so
        state = self.state.get(param, {}).get(name)
        if not isinstance(state, Tensor):
            raise ValueError(f"there is no {name!r} in the state of this tensor")
        return state

    def initialize_state(self, param: Tensor, store_param_remainders: bool | None = None) -> None:  # noqa: ARG002
        """Make the state of a parameter anew, as before its first step.

        What is kept of the weight is for the param group to say, not for the second argument.
        """
        group = next((g for g in self.param_groups if any(param is p for p in g["params"])), None)
        if group is None:
            raise ValueError("the tensor is not a parameter of this optimizer")
        spec = Specs(self).of(param, group)
        state: State = {"step": to_step(0.0, step_device(param, group))}
        for name, kind, dtype in spec.entries:
            state[name] = new_entry(name, kind, dtype, param.detach(), state, spec)
        self.state[param] = state
        self._name_master(param)

    def get_unscaled_state(
        self, param: Tensor, state_name: str, skip_unscale: bool = False
    ) -> Tensor:
        """A state of a parameter, of a DTensor this process's shard.

        A copy in float32 of what is bfloat16, unless ``skip_unscale``; else the state itself:
        remainders are int16 and float32 is float32.
        """
        value = local(self._state_of(param, state_name))
        return value if skip_unscale or value.dtype != torch.bfloat16 else value.float()

    @torch.no_grad()
    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Set one of the states of a parameter, which are made if there are none.

        ``master_param`` may be a float32 weight, or an int16 remainder to the bfloat16 parameter,
        whichever the state has. TypeError for what is no tensor or has no values to read,
        ValueError if shape or dtype do not fit; then nothing is changed.
        """
        if not isinstance(unscaled_state, Tensor):
            raise TypeError(f"{state_name} must be a tensor, got {unscaled_state!r}")
        if (why := why_unreadable(unscaled_state)) is not None:
            raise TypeError(f"{state_name} is {why}")
        before = self.state.get(param)
        if before:
            return self._set_state(param, state_name, unscaled_state)
        self.initialize_state(param)
        try:
            self._set_state(param, state_name, unscaled_state)
        except BaseException:
            del self.state[param]
            if before is not None:
                self.state[param] = before
            raise

    def _set_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        value, own = local(unscaled_state.detach()), local(param.detach())
        state = local(self._state_of(param, state_name))
        if value.shape != state.shape:
            raise ValueError(
                f"{state_name} is of shape {tuple(value.shape)}, not {tuple(state.shape)}"
            )
        is_remainder = state_name == MASTER and own.dtype == torch.bfloat16
        if not (value.is_floating_point() or (value.dtype == torch.int16 and is_remainder)):
            raise ValueError(f"{state_name} of a {own.dtype} parameter cannot be {value.dtype}")
        if value.dtype == torch.int16 and state.dtype != torch.int16:
            value = join(own, value)
        elif value.dtype != torch.int16 and state.dtype == torch.int16:
            rounded, value = split(value.float(), torch.int16)
            own.copy_(rounded)
        state.copy_(value)

    def state_dict(self) -> State:
        """As ``fusedopt.Adam``'s; its groups have ``step``, the number of steps made."""
        found = super().state_dict()
        specs, count = Specs(self, is_strict=False), self._count_steps()
        for group, packed in zip(self.param_groups, found["param_groups"], strict=True):
            if count is not None:
                packed["step"] = count
            for param, key in zip(group["params"], packed["params"], strict=True):
                entries = found["state"].get(key, {})
                if MASTER in entries and MASTER in specs.of(param, group).unused:
                    found["state"][key] = {k: v for k, v in entries.items() if k != MASTER}
        return found

    def _count_steps(self) -> int | None:
        """What the parameters say, which know of skipped steps and replays of CUDA graphs."""
        counts = [state["step"] for state in self.state.values() if "step" in state]
        if counts:
            return int(max(float(count) for count in counts))
        known = [count for i, g in enumerate(self.param_groups) if (count := group_count(g, i))]
        return max(known, default=None)

    def load_state_dict(self, state_dict: State) -> None:
        """As ``fusedopt.Adam``'s; takes state dicts of TransformerEngine, too."""
        super().load_state_dict(state_dict)
        count = self._count_steps()
        for index, (group, saved) in enumerate(
            zip(self.param_groups, state_dict["param_groups"], strict=True)
        ):
            steps = group_count(saved, index) if count is None else count
            if steps is not None:
                group["step"] = steps


def is_same_memory(first: Any, second: Any) -> bool:
    """Whether both are tensors that begin in the same place."""
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    return local(first).data_ptr() == local(second).data_ptr()


@contextmanager
def decoupled_grads(groups: list[ParamGroup]) -> Iterator[None]:
    """Inside, ``grad`` of each parameter is its ``decoupled_grad``, or None if it has none.

    Afterwards it is what it was, whatever happens. Raises ValueError for one that does not fit.
    """
    kept: list[tuple[Any, Tensor | None, torch.dtype | None]] = []

    def replace(param: Any, grad: Tensor | None) -> None:
        kept.append((param, param.grad, param.grad_dtype))
        param.grad = None
        param.grad_dtype = None  # any
        param.grad = grad

    def restore() -> None:
        for param, grad, dtype in kept:
            param.grad = None
            param.grad_dtype = dtype
            param.grad = grad

    try:
        for index, group in enumerate(groups):
            for at, param in enumerate(group["params"]):
                grad = getattr(param, "decoupled_grad", None)
                if grad is None and param.grad is None:
                    continue
                try:
                    replace(param, grad)
                except (RuntimeError, TypeError) as error:  # torch's, of shapes and devices
                    place = place_of(group, index, at)
                    raise ValueError(f"decoupled_grad of {place} does not fit: {error}") from error
        yield
    finally:
        try:
            restore()
        except BaseException:  # Ctrl-C
            restore()
            raise
