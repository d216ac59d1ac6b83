"""NAdam."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from ._docs import described_as
from ._optimizer import FusedOptimizer
from ._options import given_options, notes_given, option_defaults
from ._types import NormGroup, ParamGroup, Params
from .adam import AdamW


@described_as(AdamW)
class NAdam(FusedOptimizer):
    r"""NAdam, as ``torch.optim.NAdam``, with the whole step in one pass over memory.

    .. math::
        \mu_t &= \beta_1 (1 - 0.96^{t \psi} / 2) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \hat{m} &= \frac{\mu_{t+1} m}{1 - \mu_1 \cdots \mu_{t+1}}
            + \frac{(1 - \mu_t) g}{1 - \mu_1 \cdots \mu_t} \\
        p &\leftarrow p - \gamma \frac{\hat{m}}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    for a parameter :math:`p`, its grad :math:`g` and its number of steps :math:`t`, this one
    included. Dozat, "Incorporating Nesterov Momentum into Adam" (2016).

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.NAdam(model.parameters())
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
        momentum_decay (float, default 4e-3): :math:`\psi`, at least 0.
        decoupled_weight_decay (bool, default False): decay the parameter instead of adding to the
            grad: :math:`p \leftarrow (1 - \gamma \lambda) p` before the update.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        exp_avg, exp_avg_sq: the moments :math:`m, v`, of the parameter's dtype unless
            ``state_dtype`` says otherwise.
        mu_product: in state dicts only, for torch: the product of all :math:`\mu` so far, float32,
            one element. Steps find it from ``step``, ``betas`` and ``momentum_decay``.
    """

    _row = "NAdam"
    _has_derived_state = True
    _own_options = (*FusedOptimizer._own_options, "fused")

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        momentum_decay: float = 4e-3,
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

    def _derived_state(self, group: ParamGroup, step: float, /) -> dict[str, float]:
        beta1, decay = float(group["betas"][0]), float(group["momentum_decay"])
        return {"mu_product": _product_of_momenta(beta1, decay, max(int(step), 0))}


@functools.lru_cache
def _product_of_momenta(beta1: float, decay: float, steps: int) -> float:
    """Of as many momenta as steps, or 0 if it is as good as that."""
    if 0 <= beta1 < 1 and decay >= 0 and beta1**steps < 1e-31:
        return 0.0  # as below: no momentum is larger than beta1
    product, end, part = 1.0, steps + 1, 1 << 16
    for first in range(1, end, part):
        upto = min(first + part, end)
        numbers = torch.arange(first, upto, dtype=torch.float64, device="cpu")
        product *= float((beta1 * (1 - 0.5 * 0.96 ** (numbers * decay))).prod())
        if abs(product) < 1e-30:  # 0 beside 1, as csrc/core/rules/nadam.h has it
            return 0.0
    return product
