"""Lion."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ._docs import described_as
from ._optimizer import FusedOptimizer
from ._options import given_options, notes_given, option_defaults
from ._types import NormGroup, ParamGroup, Params
from .adam import AdamW


@described_as(AdamW)
class Lion(FusedOptimizer):
    r"""Lion, with the whole step in one pass over memory. ``torch.optim`` has none.

    .. math::
        p &\leftarrow (1 - \gamma \lambda) p
            - \gamma \operatorname{sign}(\beta_1 m + (1 - \beta_1) g) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g

    for a parameter :math:`p` and its grad :math:`g`. Chen et al., "Symbolic Discovery of
    Optimization Algorithms" (arXiv 2302.06675), where learning rates are 3 to 10 times lower than
    AdamW's, and weight decays as much higher.

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.Lion(model.parameters())
    >>> model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Arguments, attributes and methods that are not described here are those of ``AdamW``.

    Args:
        betas (tuple[float | Tensor, float | Tensor], default (0.9, 0.99)): :math:`\beta_1` of the
            update and :math:`\beta_2` of the average, each in [0, 1). Tensors are read as that of
            ``lr``.
        weight_decay (float | Tensor, default 0): :math:`\lambda`, at least 0, decoupled. A tensor
            is read as that of ``lr``.
        stochastic_rounding (bool | None, default None): round what is kept in bfloat16 up or down
            with the probabilities that make the mean right, instead of to the nearest. None: no
            more than weights of 24 bits. True: all states, and parameters without master weights,
            too; not for float16 parameters. False: nothing, as in torch.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        exp_avg: :math:`m`, of the parameter's dtype unless ``state_dtype`` says otherwise.
        step: float32 (float64 if that is torch's default dtype), one element, with ``ema_decay``,
            ``stochastic_rounding=True`` or ``master_weights="split8"``. On the CPU; on the
            parameter's GPU with ``capturable``, with options that are tensors there, and where a
            GradScaler leaves unscaling to the step.
    """

    _row = "Lion"
    _fixed_options: ClassVar[ParamGroup] = {"decoupled_weight_decay": True}

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
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
        lr_independent_weight_decay: bool = False,
        cautious_update: bool = False,
        cautious_weight_decay: bool = False,
    ) -> None:
        options = {**given_options(locals()), "decoupled_weight_decay": True}
        super().__init__(params, options, norm_group)

    _option_defaults = option_defaults(__init__)
