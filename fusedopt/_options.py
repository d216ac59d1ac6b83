"""What the optimizers offer beyond torch's: the same options for all of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

if TYPE_CHECKING:
    import torch


class Additions(TypedDict, total=False):
    """Keyword arguments, and options of param groups, that ``torch.optim`` lacks.

    All are off, but for the rounding of bfloat16 second moments.

    Precision:
        state_dtype: ``torch.float32`` or ``torch.bfloat16``, the dtype of the states; None: that of
            their parameter.
        master_weights: keeps the weights of 16-bit parameters in float32, so that updates too small
            for their dtype are not lost. ``"float32"``: in ``master_param`` of the state, 4 bytes
            each; wider parameters need none and get none. ``"split"``, for bfloat16 only: the
            parameter and ``param_remainder`` of the state, 2 bytes, are the weight together,
            exactly; the parameter is the nearest bfloat16, with ties away from zero. What is
            written to a parameter between steps is lost, or moved by the remainder:
            ``load_fp32_params()`` writes to both.
        stochastic_rounding: what is rounded up or down with the probabilities that make the mean
            right, instead of to the nearest, of what is kept in bfloat16. None: ``exp_avg_sq``,
            which to the nearest stands still where a step would change it by less than half a
            unit. With a beta2 of 0.999, 1000 steps after grads have fallen to a tenth, its root
            is 1.67 times too large then, and right to half a percent if it is rounded
            stochastically.
            True: all states, and parameters without master weights; not for float16 parameters.
            False: nothing, as in torch.
        rounding_seed: 0 to 2**32 - 1. The draws follow from it, from the step, the element's place
            in its tensor and its new weight: the same in every run and on every device.

    Clipping:
        max_grad_norm: grads are multiplied by ``min(1, max_grad_norm / (norm + 1e-6))``, as
            ``torch.nn.utils.clip_grad_norm_`` does, but ``.grad`` is not written to. The norm is
            the L2 norm of all grads of all groups (and, of DTensors, of all their shards). A group
            with None is not clipped, its grads count; infinity only measures. A step whose norm is
            infinite or NaN is skipped.
        error_if_nonfinite: raise RuntimeError instead of skipping, but not for the overflows that
            ``fusedopt.GradScaler`` looks for, or torch's with ``fused=True``. Waits for the GPU.

    Averaging:
        ema_decay: keeps an exponential moving average of the weights, ``ema_param`` of the state
            (float32 for 16-bit parameters), with this decay in [0, 1); see ``swap_ema()``. The
            first step sets it, as ``torch.optim.swa_utils.AveragedModel`` does. A decay that is
            set later may be 1: the average rests then.
        ema_bias_correction: weigh all steps as if they had been there from the start, with
            ``(1 - decay) / (1 - decay**t)`` in place of ``1 - decay``.

    Weight decay:
        lr_independent_weight_decay: decoupled decay multiplies the weights by
            ``1 - weight_decay`` instead of ``1 - lr * weight_decay``, unless ``lr`` is 0.
    """

    state_dtype: torch.dtype | None
    master_weights: str | None
    stochastic_rounding: bool | None
    rounding_seed: int
    max_grad_norm: float | None
    error_if_nonfinite: bool
    ema_decay: float | None
    ema_bias_correction: bool
    lr_independent_weight_decay: bool


ADDITIONS: dict[str, Any] = {
    "state_dtype": None,
    "master_weights": None,
    "stochastic_rounding": None,
    "rounding_seed": 0,
    "max_grad_norm": None,
    "error_if_nonfinite": False,
    "ema_decay": None,
    "ema_bias_correction": False,
    "lr_independent_weight_decay": False,
}


Init = TypeVar("Init", bound=Callable[..., None])


def takes_additions(init: Init) -> Init:
    """Shows the additions in the signature of an ``__init__`` that takes them as keywords.

    Those that are not given stay out of the param groups, which are torch's then.
    """
    own = inspect.signature(init)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in ADDITIONS.items()
    ]
    shown = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    signature = own.replace(parameters=[*shown, *added])

    @functools.wraps(init)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)  # TypeError for keywords that are not shown
        init(*bound.args, **bound.kwargs)

    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    return cast(Init, wrapper)
