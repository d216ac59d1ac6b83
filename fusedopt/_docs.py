"""Docstrings of optimizers: what is the same for all of them is written once."""

import inspect
import re
from collections.abc import Callable
from typing import TypeVar

from . import _C

# Lines of a docstring: an argument, with its description; all of a state.
ARGUMENT = re.compile(r"^ {8}(\w+) \(.*(?:\n {12}.*)*\n", re.MULTILINE)
STATE = re.compile(r"^ {8}(\w+): .*(?:\n {12}.*)*\n", re.MULTILINE)
DEFAULT = re.compile(r", default (?:\([^)]*\)|[^)]*)\)")
# Which of the arguments need decoupled decay, where that is an option of its own.
OF_DECOUPLED = ("lr_independent_weight_decay", "cautious_weight_decay")
NEEDS = "            Needs ``decoupled_weight_decay``.\n"
OF_CODES = re.compile(r" ``\"q8\"``:.*?have float32\.", re.DOTALL)
WEIGHTS = ("master_param", "param_remainder", "param_remainder8", "ema_param")
OPTIONS = re.compile(r"^    All arguments but ``params``.*(?:\n    \S.*)*\n", re.MULTILINE)
LEFT_OUT = re.compile(r"^    Arguments, attributes and methods that .*\n", re.MULTILINE)
REST = re.compile(r"^    Beside those of ``torch.optim.Optimizer``.*", re.MULTILINE | re.DOTALL)

Class = TypeVar("Class", bound=type)


def described_as(model: type) -> Callable[[Class], Class]:
    """Have the docstring of an optimizer say what it leaves to that of ``model``.

    Arguments that it does not describe, in the order of the signature and with its defaults, the
    states ``step`` and of weights, and what follows: attributes, methods and errors. ``help()``
    then says everything.
    """

    def complete(cls: Class) -> Class:
        has_codes = bool(_C.names_of_scales(cls._row))  # type: ignore[attr-defined]
        if cls.__doc__ is None or model.__doc__ is None:  # python -OO
            return cls
        own = {found[1]: found[0] for found in ARGUMENT.finditer(cls.__doc__)}
        known = {found[1]: found[0] for found in ARGUMENT.finditer(model.__doc__)}
        head, _, rest = cls.__doc__.partition("    Args:\n")
        heading, _, states = rest[rest.index("    State of a parameter") :].partition("\n")
        known_states = {found[1]: found[0] for found in STATE.finditer(model.__doc__)}
        counts = "" if re.search(r"^ {8}step: ", states, re.MULTILINE) else known_states["step"]
        names, models = inspect.signature(cls).parameters, inspect.signature(model).parameters
        if not has_codes:
            known["state_dtype"] = OF_CODES.sub("", known["state_dtype"].replace(', "q8"', ""))
        if "decoupled_weight_decay" in names:
            known |= {name: known[name] + NEEDS for name in OF_DECOUPLED if name in known}
        cls.__doc__ = "".join(
            [
                LEFT_OUT.sub(_options(model), head),
                "    Args:\n",
                *(
                    own.get(name)
                    or _with_default(known[name], names[name].default, models[name].default)
                    for name in names
                ),
                f"\n{heading}\n",
                counts,
                states.rstrip(" "),
                *(
                    known_states[name]
                    for name in WEIGHTS
                    if "ema_decay" in names or name != "ema_param"
                ),
                "\n",
                *REST.findall(model.__doc__),
            ]
        )
        return cls

    return complete


def _with_default(argument: str, default: object, models: object) -> str:
    if default == models:
        return argument
    return DEFAULT.sub(lambda _: f", default {default!r})", argument, count=1)


def _options(model: type) -> str:
    found = OPTIONS.search(model.__doc__ or "")
    return found[0].replace("\\", "\\\\") if found else ""
