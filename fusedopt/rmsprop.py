"""RMSprop."""

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
class RMSprop(FusedOptimizer):
    r"""RMSprop, as ``torch.optim.RMSprop``, with the whole step in one pass over memory.

    .. math::
        v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
        p &\leftarrow p - \gamma \frac{g}{\sqrt{v} + \epsilon}

    for a parameter :math:`p` and its grad :math:`g`. Tieleman and Hinton, "Lecture 6.5 - rmsprop"
    (2012); centered as in Graves, "Generating Sequences With Recurrent Neural Networks" (arXiv
    1308.0850).

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.RMSprop(model.parameters())
    >>> model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Arguments, attributes and methods that are not described here are those of ``AdamW``.

    Args:
        alpha (float, default 0.99): decay rate :math:`\alpha` of the averages, in [0, 1].
        eps (float | Tensor, default 1e-8): :math:`\epsilon`, at least 0, added to the denominator.
            A tensor is read as that of ``lr``.
        weight_decay (float | Tensor, default 0): :math:`\lambda`, at least 0, an L2 penalty,
            :math:`g \leftarrow g + \lambda p`. A tensor is read as that of ``lr``.
        momentum (float | Tensor, default 0): momentum factor :math:`\mu`, at least 0. Above 0,
            what is subtracted is :math:`\gamma b` with :math:`b \leftarrow \mu b + g /
            (\sqrt{v} + \epsilon)`. A tensor is read as that of ``lr``.
        centered (bool, default False): divide by the root of the variance, :math:`v` less the
            square of the average of the grads, which is one more state. Where rounding makes the
            variance negative it counts as 0, where torch's root is NaN.
        stochastic_rounding (bool | None, default None): round what is kept in bfloat16 up or down
            with the probabilities that make the mean right, instead of to the nearest. None:
            ``square_avg``, which to the nearest stands still where a step would change
            it by less than half a unit. True: all states, and parameters without master weights;
            not for float16 parameters. False: nothing, as in torch.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        square_avg: :math:`v`, of the parameter's dtype unless ``state_dtype`` says otherwise.
        momentum_buffer: :math:`b`, as ``square_avg``, with ``momentum``.
        grad_avg: the average of the grads, as ``square_avg``, with ``centered``.
    """

    _row = "RMSprop"
    _own_options = (*FusedOptimizer._own_options, "fused")

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        momentum: float | Tensor = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
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

    def _switches(self) -> ParamGroup:
        return {**super()._switches(), "momentum": 0}
