"""Momentum SGD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ._optimizer import FusedOptimizer, Params
from ._options import Additions, takes_additions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SGD(FusedOptimizer):
    r"""Stochastic gradient descent with momentum, as ``torch.optim.SGD``.

    .. math::
        g &\leftarrow g + \lambda p \\
        v &\leftarrow \mu v + (1 - \tau) g \quad (v \leftarrow g \text{ on the first step}) \\
        p &\leftarrow p - \gamma v \quad (\gamma (g + \mu v) \text{ with nesterov})

    The form, in which lr scales the buffer when it is applied, is that of Sutskever et al., "On the
    importance of initialization and momentum in deep learning" (2013), modified as in torch.

    Args:
        params: parameters, (name, parameter) pairs or param groups. Dense tensors of float32,
            float64, bfloat16, float16 or complex dtype, of any shape and strides.
        lr: learning rate :math:`\gamma`, a number or a tensor of one element. A tensor on the
            parameters' GPU is read there, in the step; its value is then not checked.
        momentum: momentum factor :math:`\mu`.
        dampening: dampening :math:`\tau` of what the grad adds to the momentum.
        weight_decay: L2 penalty :math:`\lambda`; with ``decoupled_weight_decay`` the decay.
        nesterov: use Nesterov momentum; needs a momentum and no dampening when the optimizer is
            made.
        maximize: ascend instead of descend.
        foreach, fused: accepted for torch's sake; every step is fused. ``fused=True`` lets
            ``torch.amp.GradScaler`` leave unscaling and skipping to ``step()``, and excludes
            ``foreach=True``.
        differentiable: must be False.
        capturable: allow ``step()`` to be captured into a CUDA graph. Options that are tensors on
            the GPU may then change between replays.
        decoupled_weight_decay: :math:`p \leftarrow (1 - \gamma \lambda) p` before the update and
            no penalty (SGDW: Loshchilov and Hutter, arXiv 1711.05101).
        additions: what torch lacks: precision, clipping, averaging; see
            ``help(fusedopt.Additions)``.

    State of a parameter: ``momentum_buffer``, of its shape and, unless ``state_dtype`` says
    otherwise, dtype, if there is momentum; ``step`` (float32, one element) if there is an average
    or ``stochastic_rounding=True``.

    Raises:
        ValueError: a hyper-parameter is NaN, infinite or out of range, a parameter is given twice,
            or ``differentiable`` is True. What param groups set for themselves, and what is set
            later, may leave torch's ranges as long as a step can compute with it.
        RuntimeError: ``fused`` and ``foreach`` are both True.
    """

    _row = "SGD"
    _own_options = (*FusedOptimizer._own_options, "decoupled_weight_decay")
    _old_options: ClassVar[dict[str, Any]] = {
        "nesterov": False,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
        "capturable": False,
    }

    @takes_additions
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        **additions: Unpack[Additions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "capturable": capturable,
            **additions,
        }
        if decoupled_weight_decay:  # torch's groups have no such key
            defaults["decoupled_weight_decay"] = True
        super().__init__(params, defaults)
