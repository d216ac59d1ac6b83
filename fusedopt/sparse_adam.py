"""SparseAdam."""

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
class SparseAdam(FusedOptimizer):
    r"""Adam that leaves rows without a grad alone, as ``torch.optim.SparseAdam``, in one pass.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \gamma \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \frac{m}{\sqrt{v} + \epsilon}

    for each row (a slice along the first dim) of a parameter :math:`p` that its grad :math:`g` is
    of, and the parameter's number of steps :math:`t`, this one included. The moments of other rows
    do not decay. Kingma and Ba, "Adam: A Method for Stochastic Optimization" (arXiv 1412.6980).

    A grad is sparse (``torch.sparse_coo``, in its first dim alone; rows that it has twice are
    added up), as that of ``torch.nn.Embedding(..., sparse=True)``; or it is dense, where torch's
    SparseAdam takes none, and is of the rows that are not all zero. To know the rows takes a wait
    for a GPU, so a step cannot be captured into a CUDA graph.

    >>> model = torch.nn.Embedding(100, 8, sparse=True)
    >>> optimizer = fusedopt.SparseAdam(model.parameters())
    >>> model(torch.tensor([3, 14, 15])).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Arguments, attributes and methods that are not described here are those of ``AdamW``.

    Args:
        betas (tuple[float | Tensor, float | Tensor], default (0.9, 0.999)): decay rates
            :math:`\beta_1, \beta_2`, each in [0, 1). Tensors are read as that of ``lr``.
        eps (float | Tensor, default 1e-8): :math:`\epsilon`, at least 0, added to the denominator.
            A tensor is read as that of ``lr``.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        step: float32 (float64 if that is torch's default dtype), one element, on the CPU; on the
            parameter's GPU with options that are tensors there, and where a GradScaler leaves
            unscaling to the step. In state dicts an int, as torch has it.
        exp_avg, exp_avg_sq: the moments :math:`m, v`, of the parameter's dtype unless
            ``state_dtype`` says otherwise.
    """

    _row = "SparseAdam"
    _has_derived_state = True
    _own_options = (*FusedOptimizer._own_options, "fused")

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        maximize: bool = False,
        *,
        fused: bool | None = None,
        state_dtype: torch.dtype | Literal["float32", "bfloat16"] | None = None,
        master_weights: Literal["float32", "split", "split8"] | None = None,
        stochastic_rounding: bool | None = None,
        rounding_seed: int = 0,
        max_grad_norm: float | Tensor | None = None,
        norm_group: NormGroup = None,
        error_if_nonfinite: bool = False,
    ) -> None:
        super().__init__(params, given_options(locals()), norm_group)
        sparse = [
            [at, index]
            for at, group in enumerate(self.param_groups)
            for index, param in enumerate(group["params"])
            if param.layout != torch.strided
        ]
        if sparse:
            raise ValueError(
                f"Sparse params at indices {sparse}: SparseAdam requires dense parameter tensors"
            )

    _option_defaults = option_defaults(__init__)

    def _derived_state(self, _: ParamGroup, step: float, /) -> dict[str, float]:
        return {"step": int(step)}  # with a tensor, torch computes its corrections in float32
