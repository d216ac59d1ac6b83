"""The state of parameters: what it holds is the extension's to say; made and dropped here."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C
from ._codes import has_state, new_codes, shape_of_scales
from ._steps import place_steps
from ._tensors import without_wrapper
from ._types import ParamGroup, State
from ._weights import are_rewritten, overwrite, read_weight, weight_of

if TYPE_CHECKING:
    from ._optimizer import FusedOptimizer


def place_of(group: ParamGroup, group_index: int, index: int) -> str:
    """A parameter, as messages of a step have it."""
    names = group.get("param_names")
    where = f"group {group_index}, index {index}"
    if isinstance(names, list) and index < len(names):
        return f"parameter {names[index]!r} ({where})"
    return f"the parameter at {where}"


class Specs:
    """What the states of an optimizer's parameters hold, asked once for each group and dtype.

    Raises ValueError for a parameter that cannot have the master weight or the ``state_dtype``
    which its group asks for; that does not matter, and it has none, without ``is_strict``.
    """

    def __init__(self, optimizer: "FusedOptimizer", is_strict: bool = True) -> None:
        self._optimizer = optimizer
        self._row = optimizer._row
        self._is_strict = is_strict
        self._known: dict[tuple[int, torch.dtype], _C.StateSpec] = {}
        self._groups: list[ParamGroup] = []  # alive, so that their ids stay theirs

    def of(self, param: Tensor, group: ParamGroup) -> _C.StateSpec:
        key = id(group), param.dtype
        if key not in self._known:
            try:
                self._known[key] = _C.state_spec(self._row, group, param.dtype, self._is_strict)
            except ValueError as error:
                if not str(error).endswith(str(param.dtype)):
                    raise
                raise ValueError(f"{error}, which {self._place(param)} is") from None
            self._groups.append(group)
        return self._known[key]

    def _place(self, param: Tensor) -> str:
        for at, group in enumerate(self._optimizer.param_groups):
            for index, each in enumerate(group["params"]):
                if each is param:
                    return place_of(group, at, index)
        return "a parameter of no group"


def new_entry(
    name: str, kind: str, dtype: torch.dtype, param: Tensor, state: State, spec: _C.StateSpec
) -> Tensor:
    """A tensor of a state that is not there yet, as ``_C.StateSpec.entries`` describes it."""
    param = without_wrapper(param)
    kwargs: dict[str, Any] = {"dtype": dtype, "memory_format": torch.preserve_format}
    if kind in ("master", "average"):
        # In the param's layout: to() would keep it only where it is dense.
        entry = torch.empty_like(param, **kwargs)
        return entry.copy_(param if kind == "master" else read_weight(param, state, spec))
    start = spec.starts.get(name, 0.0)
    if start == 0:
        return torch.zeros_like(param, **kwargs)
    # As torch: both parts of a complex number.
    return torch.full_like(param, complex(start, start) if param.is_complex() else start, **kwargs)


def new_entries(
    name: str, kind: str, dtype: torch.dtype, param: Tensor, state: State, spec: _C.StateSpec
) -> State:
    """The same under its name, or codes and scales under theirs."""
    shape = shape_of_scales(param) if spec.wants_codes and name in spec.codes else None
    if shape is None:
        return {name: new_entry(name, kind, dtype, param, state, spec)}
    code_name, code_dtype, scale_name = spec.codes[name]
    codes = new_codes(without_wrapper(param), code_dtype, shape)
    return dict(zip((code_name, scale_name), codes, strict=True))


class CreatedState:
    """What is created for a step, and taken away again if that is not made."""

    def __init__(self, optimizer: "FusedOptimizer") -> None:
        self._optimizer = optimizer
        # Params with their states before and what is new in them; masters with their values before.
        self._entries: list[tuple[Tensor, State | None, State]] = []
        self._masters: list[tuple[Tensor, Tensor]] = []

    # State outlives an inference_mode() around the step, beyond which nobody could write to it.
    @torch.inference_mode(False)
    def fill(
        self,
        missing: list[tuple[int, int]],
        maybe_written: list[tuple[int, int]],
        steps_on_gpu: bool,
    ) -> None:
        """Fill in what the state of the parameters at these (group, index) lacks.

        Those of ``maybe_written`` have a float32 master: where the parameter is not what it rounds
        to, somebody has written to the parameter, and the master follows, in its memory. A ``step``
        that is not where it belongs, on the GPU of its parameter or on the CPU, is moved there.
        """
        optimizer = self._optimizer
        groups = {at: optimizer.param_groups[at] for at, _ in missing + maybe_written}
        params = {at: tuple(group["params"]) for at, group in groups.items()}
        specs = Specs(optimizer)
        created: list[tuple[Tensor, State | None, State, _C.StateSpec]] = []
        for group_index, index in missing:
            param = params[group_index][index]
            before = _entries(optimizer.state[param]) if param in optimizer.state else None
            created.append((param, before, {}, specs.of(param, groups[group_index])))
        place_steps(
            [(param, before or {}, new) for param, before, new, spec in created
             if spec.counts_steps],
            steps_on_gpu,
        )  # fmt: skip
        with torch.no_grad():
            written = _written_masters(
                [(params[at][index], groups[at]) for at, index in maybe_written],
                optimizer.state,
                specs,
            )
            # On a GPU, a CUDA graph may hold the memory of the masters: it stays theirs.
            masters = [(master, master.clone()) for _, master in written]
            for param, before, new, spec in created:
                present = before or {}
                for name, kind, dtype in spec.entries:
                    if not has_state(name, present, spec):
                        new |= new_entries(name, kind, dtype, param, present, spec)
        # From here on, it is seen.
        self._masters, self._entries = masters, [entry[:3] for entry in created]
        for param, master in written:
            overwrite(master, weight_of(param, master))
        for param, _, new in self._entries:
            optimizer.state.setdefault(param, {}).update(new)

    def discard(self) -> None:
        """Let the state be what it was. Can be done again, if it was interrupted."""
        states = self._optimizer.state
        for param, before, _ in self._entries:
            if before is None:
                states.pop(param, None)
            elif param in states:
                states[param].clear()
                states[param].update(before)
        for master, old in self._masters:
            overwrite(master, old)


def _written_masters(
    entries: list[tuple[Tensor, ParamGroup]], states: Any, specs: Specs
) -> list[tuple[Tensor, Tensor]]:
    """Of these params, (param, float32 master) where the param is not what the master rounds to."""
    pairs = [
        (param.detach(), states[param][name])
        for param, group in entries
        for name, kind, _ in specs.of(param, group).entries
        if kind == "master"
    ]
    return [pair for pair, is_so in zip(pairs, are_rewritten(pairs), strict=True) if is_so]


def drop_unused(optimizer: "FusedOptimizer", changed: list[tuple[int, int]]) -> None:
    """Of parameters whose settings have changed: what is no longer kept up to date."""
    params = [tuple(group["params"]) for group in optimizer.param_groups]
    specs = Specs(optimizer)
    for group_index, index in changed:
        if group_index >= len(params) or index >= len(params[group_index]):
            continue  # since then, they have been replaced
        param = params[group_index][index]
        if param in optimizer.state:
            state = optimizer.state[param]
            for name in specs.of(param, optimizer.param_groups[group_index]).unused:
                state.pop(name, None)


def _entries(state: Any) -> State:
    """The entries of a parameter's state, whatever mapping it is, in a dict."""
    return {name: state[name] for name in state}
