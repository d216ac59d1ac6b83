"""Momentum SGD."""

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
class SGD(FusedOptimizer):
    r"""Stochastic gradient descent with momentum, as ``torch.optim.SGD``, in one pass over memory.

    .. math::
        g &\leftarrow g + \lambda p \\
        v &\leftarrow \mu v + (1 - \tau) g \quad (v \leftarrow g \text{ on the first step}) \\
        p &\leftarrow p - \gamma v \quad (\gamma (g + \mu v) \text{ with nesterov})

    for a parameter :math:`p` and its grad :math:`g`. The form, in which lr scales the buffer when
    it is applied, is that of Sutskever et al., "On the importance of initialization and momentum in
    deep learning" (2013), modified as in torch.

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    >>> model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Arguments, attributes and methods that are not described here are those of ``AdamW``.

    Args:
        momentum (float | Tensor, default 0): momentum factor :math:`\mu`, at least 0; 0: no buffer
            is kept. A tensor is read as that of ``lr``, where torch's fused step reads on the host.
        dampening (float | Tensor, default 0): dampening :math:`\tau` of what the grad adds to the
            momentum, any finite number. No effect without momentum. A tensor is read as that of
            ``lr``, where torch's fused step reads on the host.
        weight_decay (float | Tensor, default 0): :math:`\lambda`, at least 0, an L2 penalty unless
            ``decoupled_weight_decay``. A tensor is read as that of ``lr``, where torch's fused step
            reads on the host.
        nesterov (bool, default False): use Nesterov momentum; needs a momentum and no dampening
            when the optimizer is made.
        decoupled_weight_decay (bool, default False): decay the parameter instead of adding to the
            grad: :math:`p \leftarrow (1 - \gamma \lambda) p` before the update (SGDW: Loshchilov
            and Hutter, arXiv 1711.05101). torch's groups have no such key, nor these unless it is
            True.
        stochastic_rounding (bool | None, default None): round what is kept in bfloat16 up or down
            with the probabilities that make the mean right, instead of to the nearest. None: no
            more than weights of 24 bits. True: all states, and parameters without master weights,
            too; not for float16 parameters. False: nothing, as in torch.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        momentum_buffer: :math:`v`, of the parameter's dtype unless ``state_dtype`` says otherwise,
            if there is momentum.
        step: float32 (float64 if that is torch's default dtype), one element, with ``ema_decay``,
            ``stochastic_rounding=True`` or ``master_weights="split8"``. On the CPU; on the
            parameter's GPU with ``capturable``, with options that are tensors there, and where a
            GradScaler leaves unscaling to the step.
    """

    _row = "SGD"
    _own_options = (*FusedOptimizer._own_options, "capturable", "decoupled_weight_decay")

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float | Tensor = 0,
        dampening: float | Tensor = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
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
        defaults = given_options(locals())
        if not decoupled_weight_decay:  # torch's groups have no such key
            defaults.pop("decoupled_weight_decay", None)
        super().__init__(params, defaults, norm_group)

    _option_defaults = option_defaults(__init__)
