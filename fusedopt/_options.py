"""The options of an optimizer: its constructor's signature is the one place with their defaults."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from . import _C
from ._types import ParamGroup

# What optimizers have and ``torch.optim`` lacks.
OWN_OPTIONS = (
    "state_dtype",
    "master_weights",
    "stochastic_rounding",
    "rounding_seed",
    "max_grad_norm",
    "error_if_nonfinite",
    "ema_decay",
    "ema_bias_correction",
    "lr_independent_weight_decay",
    "cautious_update",
    "cautious_weight_decay",
)


# What is given to a constructor beside options: it is the optimizer's, and not saved.
BESIDE_OPTIONS = ("norm_group",)


def option_defaults(init: Callable[..., None]) -> dict[str, Any]:
    """The options of a constructor and their defaults."""
    parameters = inspect.signature(init).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.default is not p.empty and p.name not in BESIDE_OPTIONS
    }


Init = TypeVar("Init", bound=Callable[..., None])


def notes_given(init: Init) -> Init:
    """Has a constructor know which keywords it was called with, for ``given_options()``.

    Where the signature has a default, its body cannot tell; signature and types stay as they are.
    """

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        self._given = frozenset(kwargs)
        init(self, *args, **kwargs)

    return cast(Init, wrapper)


def given_options(names: dict[str, Any]) -> dict[str, Any]:
    """The options of a constructor's call, in the order of its signature, from its ``locals()``.

    Own options that are not given are left out: the param groups are torch's then.
    """
    optimizer = names["self"]
    not_given = set(optimizer._own_options) - optimizer._given
    left_out = {"self", "params", *BESIDE_OPTIONS, "__class__", *not_given}
    return {name: value for name, value in names.items() if name not in left_out}


def name_state_dtype(options: ParamGroup) -> None:
    """Have options hold a ``state_dtype`` by its name.

    torch.distributed.checkpoint gathers and moves numbers, text and tensors, but no torch.dtype.
    """
    name = _C.state_dtype_name(options.get("state_dtype"))
    if name is not None:
        options["state_dtype"] = name
