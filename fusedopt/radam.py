"""RAdam."""

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
class RAdam(FusedOptimizer):
    r"""RAdam, as ``torch.optim.RAdam``, with the whole step in one pass over memory.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \rho_\infty &= 2 / (1 - \beta_2) - 1 \\
        \rho &= \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t) \\
        r &= \sqrt{\frac{(\rho - 4) (\rho - 2) \rho_\infty}
            {(\rho_\infty - 4) (\rho_\infty - 2) \rho}} \\
        p &\leftarrow p - \frac{\gamma m}{1 - \beta_1^t}
            \frac{r \sqrt{1 - \beta_2^t}}{\sqrt{v} + \epsilon}

    for a parameter :math:`p`, its grad :math:`g` and its number of steps :math:`t`, this one
    included; as long as :math:`\rho` is at most 5, without the last factor. Liu et al., "On the
    Variance of the Adaptive Learning Rate and Beyond" (arXiv 1908.03265).

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.RAdam(model.parameters())
    >>> model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Arguments, attributes and methods that are not described here are those of ``AdamW``.

    Args:
        betas (tuple[float | Tensor, float | Tensor], default (0.9, 0.999)): decay rates
            :math:`\beta_1, \beta_2`, each in [0, 1). Tensors are read as that of ``lr``.
        eps (float | Tensor, default 1e-8): :math:`\epsilon`, at least 0, added to the denominator.
            A tensor is read as that of ``lr``.
        weight_decay (float | Tensor, default 0): :math:`\lambda`, at least 0, an L2 penalty,
            :math:`g \leftarrow g + \lambda p`, unless ``decoupled_weight_decay``. A tensor is read
            as that of ``lr``.
        decoupled_weight_decay (bool, default False): decay the parameter instead of adding to the
            grad: :math:`p \leftarrow (1 - \gamma \lambda) p` before the update.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        exp_avg, exp_avg_sq: the moments :math:`m, v`, of the parameter's dtype unless
            ``state_dtype`` says otherwise.
    """

    _row = "RAdam"
    _own_options = (*FusedOptimizer._own_options, "fused")

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
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
        super().__init__(params, given_options(locals()), norm_group)

    _option_defaults = option_defaults(__init__)
