"""Adamax."""

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
class Adamax(FusedOptimizer):
    r"""Adamax, as ``torch.optim.Adamax``, with the whole step in one pass over memory.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        u &\leftarrow \max(\beta_2 u, |g| + \epsilon) \\
        p &\leftarrow p - \frac{\gamma}{1 - \beta_1^t} \frac{m}{u}

    for a parameter :math:`p`, its grad :math:`g` and its number of steps :math:`t`, this one
    included. Kingma and Ba, "Adam: A Method for Stochastic Optimization" (arXiv 1412.6980),
    algorithm 2.

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.Adamax(model.parameters())
    >>> model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Arguments, attributes and methods that are not described here are those of ``AdamW``.

    Args:
        betas (tuple[float | Tensor, float | Tensor], default (0.9, 0.999)): decay rates
            :math:`\beta_1, \beta_2`, each in [0, 1). Tensors are read as that of ``lr``.
        eps (float | Tensor, default 1e-8): :math:`\epsilon`, at least 0. A tensor is read as that
            of ``lr``.
        weight_decay (float | Tensor, default 0): :math:`\lambda`, at least 0, an L2 penalty,
            :math:`g \leftarrow g + \lambda p`. A tensor is read as that of ``lr``.
        stochastic_rounding (bool | None, default None): round what is kept in bfloat16 up or down
            with the probabilities that make the mean right, instead of to the nearest. None:
            ``exp_inf``, which to the nearest stands still where a step would change
            it by less than half a unit. True: all states, and parameters without master weights;
            not for float16 parameters. False: nothing, as in torch.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        exp_avg, exp_inf: :math:`m, u`, of the parameter's dtype unless ``state_dtype`` says
            otherwise.
    """

    _row = "Adamax"
    _own_options = (*FusedOptimizer._own_options, "fused")

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
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
