"""Rprop."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._docs import described_as
from ._optimizer import FusedOptimizer
from ._options import given_options, notes_given, option_defaults
from ._types import NormGroup, Params
from .adam import AdamW


@described_as(AdamW)
class Rprop(FusedOptimizer):
    r"""Rprop, as ``torch.optim.Rprop``, with the whole step in one pass over memory.

    .. math::
        s &\leftarrow \begin{cases}
            \min(\eta_+ s, s_{\max}) & \text{if } g g' > 0 \\
            \max(\eta_- s, s_{\min}) & \text{if } g g' < 0, \text{ and then } g \leftarrow 0
            \end{cases} \\
        p &\leftarrow p - s \operatorname{sign}(g), \quad g' \leftarrow g

    for a parameter :math:`p` and its grad :math:`g`. Riedmiller and Braun, "A direct adaptive
    method for faster backpropagation learning: The RPROP algorithm" (1993). For full batches: only
    the signs of grads count.

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.Rprop(model.parameters())
    >>> model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Arguments, attributes and methods that are not described here are those of ``AdamW``.

    Args:
        lr (float | Tensor, default 1e-2): what all step sizes :math:`s` begin with, at least 0. A
            tensor has one element. It has no effect later.
        etas (tuple[float, float], default (0.5, 1.2)): :math:`\eta_-` in (0, 1) and :math:`\eta_+`
            above 1.
        step_sizes (tuple[float, float], default (1e-6, 50)): :math:`s_{\min}` and
            :math:`s_{\max}`, at least 0.
        stochastic_rounding (bool | None, default None): round what is kept in bfloat16 up or down
            with the probabilities that make the mean right, instead of to the nearest. None: no
            more than weights of 24 bits. True: all states, and parameters without master weights,
            too; not for float16 parameters. False: nothing, as in torch.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        prev: the grad :math:`g'` of the step before, of the parameter's dtype unless
            ``state_dtype`` says otherwise.
        step_size: :math:`s`, as ``prev``.
    """

    _row = "Rprop"
    _own_options = (*FusedOptimizer._own_options, "fused")

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | Literal["float32", "bfloat16"] | None = None,
        master_weights: Literal["float32", "split", "split8"] | None = None,
        stochastic_rounding: bool | None = None,
        rounding_seed: int = 0,
        max_grad_norm: float | Tensor | None = None,
        norm_group: NormGroup = None,
        error_if_nonfinite: bool = False,
        ema_decay: float | Tensor | None = None,
        ema_bias_correction: bool = False,
    ) -> None:
        super().__init__(params, given_options(locals()), norm_group)

    _option_defaults = option_defaults(__init__)
