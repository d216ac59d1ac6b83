"""Docstrings of optimizers: what is the same for all of them is written once."""

import inspect
import re
from collections.abc import Callable
from typing import TypeVar

# Lines of a docstring: an argument, with its description; all of a state.
ARGUMENT = re.compile(r"^ {8}(\w+) \(.*(?:\n {12}.*)*\n", re.MULTILINE)
WEIGHTS = re.compile(
    r"^ {8}(?:master_param|param_remainder|ema_param): .*(?:\n {12}.*)*\n", re.MULTILINE
)
OPTIONS = re.compile(r"^    All arguments but ``params``.*(?:\n    \S.*)*\n", re.MULTILINE)
LEFT_OUT = re.compile(r"^    Arguments, attributes and methods that .*\n", re.MULTILINE)
REST = re.compile(r"^    Beside those of ``torch.optim.Optimizer``.*", re.MULTILINE | re.DOTALL)

Class = TypeVar("Class", bound=type)


def described_as(model: type) -> Callable[[Class], Class]:
    """Have the docstring of an optimizer say what it leaves to that of ``model``.

    Arguments that it does not describe, in the order of the signature, the states of weights, and
    what follows: attributes, methods and errors. ``help()`` then says everything.
    """

    def complete(cls: Class) -> Class:
        if cls.__doc__ is None or model.__doc__ is None:  # python -OO
            return cls
        own = {found[1]: found[0] for found in ARGUMENT.finditer(cls.__doc__)}
        known = {found[1]: found[0] for found in ARGUMENT.finditer(model.__doc__)}
        head, _, rest = cls.__doc__.partition("    Args:\n")
        states = rest[rest.index("    State of a parameter") :].rstrip(" ")
        names = inspect.signature(cls).parameters
        cls.__doc__ = "".join(
            [
                LEFT_OUT.sub(_options(model), head),
                "    Args:\n",
                *(own.get(name) or known[name] for name in names),
                "\n",
                states,
                *(found[0] for found in WEIGHTS.finditer(model.__doc__)),
                "\n",
                *REST.findall(model.__doc__),
            ]
        )
        return cls

    return complete


def _options(model: type) -> str:
    found = OPTIONS.search(model.__doc__ or "")
    return found[0].replace("\\", "\\\\") if found else ""
