"""What every contender of step.py is made from: the same hyper-parameters, the same update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Groups = list[dict[str, Any]]
Step = Callable[[], object]
Make = Callable[[Groups, str], Step]

_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
HYPER: dict[str, dict[str, Any]] = {
    "AdamW": _ADAM | {"weight_decay": 1e-2},
    "Adam": _ADAM | {"weight_decay": 0.0},
    "SGD": {"lr": 1e-3, "momentum": 0.9},
}
# Memory streams of a one-pass step: param, grad and every state are read, all but grad are written.
STREAMS = {"AdamW": 7, "Adam": 7, "SGD": 5}
STATES = {"AdamW": 2, "Adam": 2, "SGD": 1}


class NotComparableError(Exception):
    """This contender cannot take part in this case; the text says why."""


@dataclass(frozen=True)
class Contender:
    """Something to race: ``make`` gets param groups and an optimizer's name and returns a step."""

    name: str
    make: Make
    note: str = ""  # what a reader must know before comparing


def device_type(groups: Groups) -> str:
    return str(groups[0]["params"][0].device.type)


def reason(error: Exception) -> str:
    """Why a contender is skipped, in one line."""
    if isinstance(error, NotComparableError):
        return str(error)
    first_line = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first_line}"
