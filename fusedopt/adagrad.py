"""Adagrad."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._docs import described_as
from ._optimizer import FusedOptimizer
from ._options import given_options, notes_given, option_defaults
from ._state import CreatedState
from ._types import NormGroup, Params
from .adam import AdamW


@described_as(AdamW)
class Adagrad(FusedOptimizer):
    r"""Adagrad, as ``torch.optim.Adagrad``, with the whole step in one pass over memory.

    .. math::
        s &\leftarrow s + g^2 \\
        p &\leftarrow p - \frac{\gamma}{1 + (t - 1) \eta} \frac{g}{\sqrt{s} + \epsilon}

    for a parameter :math:`p`, its grad :math:`g` and its number of steps :math:`t`, this one
    included. Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and
    Stochastic Optimization" (2011). Grads are dense. The state is made by the first step, where
    torch makes it with the optimizer.

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.Adagrad(model.parameters())
    >>> model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Arguments, attributes and methods that are not described here are those of ``AdamW``.

    Args:
        lr_decay (float, default 0): :math:`\eta`, at least 0.
        weight_decay (float | Tensor, default 0): :math:`\lambda`, at least 0, an L2 penalty,
            :math:`g \leftarrow g + \lambda p`. A tensor is read as that of ``lr``.
        initial_accumulator_value (float, default 0): what :math:`s` begins with, at least 0.
        eps (float | Tensor, default 1e-10): :math:`\epsilon`, at least 0, added to the denominator.
            A tensor is read as that of ``lr``.
        stochastic_rounding (bool | None, default None): round what is kept in bfloat16 up or down
            with the probabilities that make the mean right, instead of to the nearest. None:
            ``sum``, which to the nearest stands still where a step would change
            it by less than half a unit. True: all states, and parameters without master weights;
            not for float16 parameters. False: nothing, as in torch.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        sum: :math:`s`, of the parameter's dtype unless ``state_dtype`` says otherwise.
    """

    _row = "Adagrad"
    _own_options = (*FusedOptimizer._own_options, "capturable")

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float | Tensor = 0,
        initial_accumulator_value: float = 0,
        eps: float | Tensor = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
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

    def share_memory(self) -> None:
        """Move ``sum`` to shared memory, for processes that step the same parameters.

        As ``torch.optim.Adagrad.share_memory``. States that no step has made yet are made.
        Averages and master weights stay private.
        """
        missing = [
            (at, index)
            for at, group in enumerate(self.param_groups)
            for index, param in enumerate(group["params"])
            if not self.state.get(param)
        ]
        created = CreatedState(self)
        try:
            created.fill(missing, [], steps_on_gpu=False)
        except BaseException:
            created.discard()
            raise
        for state in self.state.values():
            state["sum"].share_memory_()
