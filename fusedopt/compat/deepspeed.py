"""For those who come from DeepSpeed: ``ops.adam``'s optimizers, universal checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._optimizer import FusedOptimizer
from .._steps import whole_count
from .._types import Params, State
from ..adam import Adam
from ._drop_in import NO_AMSGRAD, NO_UNCORRECTED, DropIn, refuse
from ._reader import FLOATS, SavedState, convert, with_count

MOMENTS = ("exp_avg", "exp_avg_sq")
NO_AMSGRAD_THERE = f"DeepSpeed ignores it; {NO_AMSGRAD}"


def convert_state_dict(state_dict: State, optimizer: FusedOptimizer) -> State:
    """What ``state_dict()`` of DeepSpeed's two Adams returned, for ``load_state_dict()``.

    ``optimizer`` is a ``fusedopt.Adam`` or ``AdamW`` over the same parameters in the same order.
    For ZeRO's partitions, see ``universal_state_dict()``. FusedAdam counts the steps in the state
    of a group's last parameter only (its groups have a ``step``, too, which stays 0): here that is
    the count of each of them. Other state dicts, of fusedopt and torch, are returned unchanged.

    Raises TypeError or ValueError, which name the parameter, where the state is of another kind.
    """
    states = state_dict.get("state", {})
    groups = []
    for index, group in enumerate(state_dict.get("param_groups", [])):
        if group.get("step") is not None:
            saved = [states.get(key) or {} for key in group["params"]]
            counts = [group["step"], *(entries.get("step", 0) for entries in saved)]
            latest = max(whole_count(count, f"a step of group {index}") for count in counts)
            group = {**group, "step": latest}
        groups.append(group)
    if groups:
        state_dict = {**state_dict, "param_groups": groups}
    return convert(state_dict, optimizer, "Adam", _read)


def _read(saved: SavedState, steps: int | None) -> State:
    saved.check_names("step", *MOMENTS)
    return {
        "step": saved.count("step") if steps is None else steps,
        **{name: saved.tensor(name, *FLOATS) for name in MOMENTS},
    }


def universal_state_dict(
    folder: str | Path,
    optimizer: FusedOptimizer,
    names: Iterable[str] | None = None,
    step: int | None = None,
) -> State:
    """What DeepSpeed's ``ds_to_universal.py`` has written of a ZeRO checkpoint, to be loaded.

    Of each parameter there are ``zero/NAME/fp32.pt``, ``exp_avg.pt`` and ``exp_avg_sq.pt`` in the
    folder: whole tensors in float32, in a dict or (of stage 3) in one dim. Returned is a state dict
    for ``optimizer.load_state_dict()``, with ``master_param``, from which parameters with split
    masters are set; load the model, too. For the weights alone, ``zero_to_fp32.py`` writes a dict
    whose values, in the order of the parameters, ``load_fp32_params()`` takes.

    Args:
        folder (str | Path): what was ``--output_folder`` of the script.
        optimizer (FusedOptimizer): a ``fusedopt.Adam`` or ``AdamW``, whose options it keeps.
        names (Iterable[str] | None, default None): the parameters' names in the model, in the order
            of the param groups; None: those with which the optimizer was made.
        step (int | None, default None): number of steps, where there is no ``step.pt``.

    Raises:
        ValueError: names are not known or not as many as parameters, a tensor does not fit, or a
            number of steps is missing.
        FileNotFoundError: there is no file for a parameter.
    """
    found = optimizer.state_dict()
    params = optimizer._params()
    keys = [key for group in found["param_groups"] for key in group["params"]]
    names = _names(optimizer) if names is None else list(names)
    if len(names) != len(params):
        raise ValueError(f"{len(names)} names for {len(params)} parameters")
    state = {
        key: _read_folder(Path(folder) / "zero" / name, name, param, step)
        for key, name, param in zip(keys, names, params, strict=True)
    }
    return {**found, "state": state}


def _names(optimizer: FusedOptimizer) -> list[str]:
    if any("param_names" not in group for group in optimizer.param_groups):
        raise ValueError("the optimizer was made without names of its parameters: give names=")
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def _read_folder(folder: Path, name: str, param: Tensor, step: int | None) -> State:
    place = f"parameter {name!r}"
    entries: dict[str, Any] = {}
    for entry, file in (("master_param", "fp32"), *((each, each) for each in MOMENTS)):
        saved = torch.load(folder / f"{file}.pt", map_location="cpu", weights_only=True)
        value = saved.get("param") if isinstance(saved, dict) else saved
        if isinstance(value, Tensor) and value.shape == (param.numel(),):
            value = value.view(param.shape)
        entries[entry] = value
    read = SavedState(entries, param, place)
    states: State = {entry: read.tensor(entry, torch.float32) for entry in entries}
    counted = folder / "step.pt"
    if counted.exists():
        step = torch.load(counted, map_location="cpu", weights_only=True)
    if step is None:
        raise ValueError(f"there is no step.pt of {place}: give step=")
    return with_count({"step": whole_count(step, f"step of {place}"), **states})


class DeepSpeedCPUAdam(DropIn, Adam):
    """``fusedopt.Adam`` with the signature of ``deepspeed.ops.adam.DeepSpeedCPUAdam``.

    Args:
        model_params: ``params`` of ``fusedopt.Adam``; they may be on a GPU, too.
        lr, betas, eps, weight_decay: as ``fusedopt.Adam``'s.
        bias_correction (bool, default True): must be True, in param groups as well.
        amsgrad (bool, default False): must be False; DeepSpeed ignores it.
        adamw_mode (bool, default True): decoupled decay, as AdamW has it; False: L2.
        fp32_optimizer_states (bool, default True): moments in float32 whatever the dtype of the
            parameters (``state_dtype="float32"``); False: in that of their parameter.

    For ``deepspeed.initialize(optimizer=...)`` with ``zero_allow_untested_optimizer``; what calls
    ``step_subgroup()`` of DeepSpeed's does not find it here. ``load_state_dict()`` takes what
    DeepSpeed's has saved.

    Raises:
        ValueError: ``amsgrad``, or ``bias_correction`` that is False; and as ``fusedopt.Adam``.
    """

    _convert = staticmethod(convert_state_dict)

    def __init__(
        self,
        model_params: Params,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        refuse(not bias_correction, "bias_correction=False", NO_UNCORRECTED)
        refuse(amsgrad, "amsgrad=True", NO_AMSGRAD_THERE)
        super().__init__(
            model_params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay=bool(adamw_mode),
            state_dtype="float32" if fp32_optimizer_states else None,
        )


class FusedAdam(DropIn, Adam):
    """``fusedopt.Adam`` with the signature of ``deepspeed.ops.adam.FusedAdam``.

    Args:
        params, lr, betas, eps, weight_decay: as ``fusedopt.Adam``'s.
        bias_correction (bool, default True): must be True, in param groups as well.
        adam_w_mode (bool, default True): decoupled decay, as AdamW has it; False: L2.
        amsgrad (bool, default False): must be False, as there.
        set_grad_none (bool, default True): what ``zero_grad()`` does; False: fill with zeros.

    ``load_state_dict()`` takes what DeepSpeed's has saved.

    Raises:
        ValueError: ``amsgrad``, or ``bias_correction`` that is False; and as ``fusedopt.Adam``.
    """

    _convert = staticmethod(convert_state_dict)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        refuse(not bias_correction, "bias_correction=False", NO_UNCORRECTED)
        refuse(amsgrad, "amsgrad=True", NO_AMSGRAD)
        super().__init__(
            params, lr, betas, eps, weight_decay, decoupled_weight_decay=bool(adam_w_mode)
        )
        self._set_grad_none = set_grad_none
