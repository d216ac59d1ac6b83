"""ASGD."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._docs import described_as
from ._optimizer import FusedOptimizer
from ._options import given_options, notes_given, option_defaults
from ._types import NormGroup, ParamGroup, Params
from .adam import AdamW


@described_as(AdamW)
class ASGD(FusedOptimizer):
    r"""Averaged SGD, as ``torch.optim.ASGD``, with the whole step in one pass over memory.

    .. math::
        \eta &= \frac{\gamma}{(1 + \lambda \gamma (t - 1))^\alpha}, \quad
            \mu = \frac{1}{\max(1, t - 1 - t_0)} \\
        p &\leftarrow (1 - \lambda \eta) p - \eta g \\
        a &\leftarrow a + \mu (p - a)

    for a parameter :math:`p`, its grad :math:`g` and its number of steps :math:`t`, this one
    included. Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992).
    Where ``lr`` changes between steps, it acts at once; torch's acts a step later.

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.ASGD(model.parameters())
    >>> model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Arguments, attributes and methods that are not described here are those of ``AdamW``.

    Args:
        lambd (float, default 1e-4): :math:`\lambda`, at least 0, a decay.
        alpha (float, default 0.75): :math:`\alpha`, at least 0, the power of the learning rate's
            decay.
        t0 (float, default 1e6): :math:`t_0`, the step from which on params are averaged.
        weight_decay (float | Tensor, default 0): at least 0, an L2 penalty, added to the grad
            :math:`g`. A tensor is read as that of ``lr``.
        stochastic_rounding (bool | None, default None): round what is kept in bfloat16 up or down
            with the probabilities that make the mean right, instead of to the nearest. None: no
            more than weights of 24 bits. True: all states, and parameters without master weights,
            too; not for float16 parameters. False: nothing, as in torch.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        ax: the average :math:`a`, of the parameter's dtype unless ``state_dtype`` says otherwise.
        eta, mu: in state dicts only, for torch: :math:`\eta` and :math:`\mu` of the next step,
            float32, one element. Steps find them from ``step`` and the options.
    """

    _row = "ASGD"
    _has_derived_state = True
    _own_options = (*FusedOptimizer._own_options, "fused")

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float | Tensor = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
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

    def _derived_state(self, group: ParamGroup, step: float, /) -> dict[str, float]:
        lr, lambd, alpha, t0 = (float(group[name]) for name in ("lr", "lambd", "alpha", "t0"))
        eta = lr / (1 + lambd * lr * step) ** alpha
        return {"eta": eta, "mu": 1 / max(1, step - t0)}
