"""Adadelta."""

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
class Adadelta(FusedOptimizer):
    r"""Adadelta, as ``torch.optim.Adadelta``, with the whole step in one pass over memory.

    .. math::
        v &\leftarrow \rho v + (1 - \rho) g^2 \\
        \delta &= \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}} g \\
        u &\leftarrow \rho u + (1 - \rho) \delta^2 \\
        p &\leftarrow p - \gamma \delta

    for a parameter :math:`p` and its grad :math:`g`. Zeiler, "ADADELTA: An Adaptive Learning Rate
    Method" (arXiv 1212.5701).

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.Adadelta(model.parameters())
    >>> model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Arguments, attributes and methods that are not described here are those of ``AdamW``.

    Args:
        rho (float, default 0.9): decay rate :math:`\rho` of the averages, in [0, 1].
        eps (float | Tensor, default 1e-6): :math:`\epsilon`, at least 0, added to what roots are
            taken of. A tensor is read as that of ``lr``.
        weight_decay (float | Tensor, default 0): :math:`\lambda`, at least 0, an L2 penalty,
            :math:`g \leftarrow g + \lambda p`. A tensor is read as that of ``lr``.
        stochastic_rounding (bool | None, default None): round what is kept in bfloat16 up or down
            with the probabilities that make the mean right, instead of to the nearest. None:
            both states, which to the nearest stand still where a step would change
            them by less than half a unit. True: all states, and parameters without master weights;
            not for float16 parameters. False: nothing, as in torch.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        square_avg, acc_delta: the averages :math:`v, u`, of the parameter's dtype unless
            ``state_dtype`` says otherwise.
    """

    _row = "Adadelta"
    _own_options = (*FusedOptimizer._own_options, "fused")

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float | Tensor = 1e-6,
        weight_decay: float | Tensor = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | Literal["float32", "bfloat16", "q8"] | None = None,
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
