"""Adam and AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ._optimizer import FusedOptimizer, ParamGroup, Params, State
from ._options import Additions, takes_additions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adam(FusedOptimizer):
    r"""Adam, as ``torch.optim.Adam``.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \gamma \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Kingma and Ba, "Adam: A Method for Stochastic Optimization" (arXiv 1412.6980). ``weight_decay``
    is an L2 penalty, :math:`g \leftarrow g + \lambda p`, unless ``decoupled_weight_decay``:
    then :math:`p \leftarrow (1 - \gamma \lambda) p` first, which is AdamW.

    Args:
        params: parameters, (name, parameter) pairs or param groups. Dense tensors of float32,
            float64, bfloat16, float16 or complex dtype, of any shape and strides.
        lr: learning rate :math:`\gamma`, a number or a tensor of one element. A tensor on the
            parameters' GPU is read there, in the step; its value is then not checked.
        betas: decay rates :math:`\beta_1, \beta_2` of the moments, each in [0, 1). A
            :math:`\beta_2` of 1 set later keeps the second moment as it is; where that is above 0,
            the params then change by their decay only.
        eps: :math:`\epsilon`, added to the denominator. If it is above 0, the denominator is, too.
        weight_decay: :math:`\lambda`.
        amsgrad: divide by the largest second moment so far (Reddi et al., "On the Convergence of
            Adam and Beyond", 2018).
        foreach, fused: accepted for torch's sake; every step is fused. ``fused=True`` lets
            ``torch.amp.GradScaler`` leave unscaling and skipping to ``step()``, and excludes
            ``foreach=True``.
        maximize: ascend instead of descend.
        capturable: allow ``step()`` to be captured into a CUDA graph: ``step`` then lies on the
            GPU. Options that are tensors on the GPU may change between replays. It makes no
            difference on the CPU.
        differentiable: must be False.
        decoupled_weight_decay: decay the parameter instead of adding to the grad.
        additions: what torch lacks: precision, clipping, averaging; see
            ``help(fusedopt.Additions)``.

    State of a parameter: ``step`` (float32, one element), ``exp_avg``, ``exp_avg_sq`` and, with
    amsgrad, ``max_exp_avg_sq``, of its shape and, unless ``state_dtype`` says otherwise, dtype.
    Where :math:`\beta_1` is the number 0, ``exp_avg`` would be the grad: there is none, a step
    reads and writes less, and ``state_dict()`` has zeros for it. Where that changes, it starts from
    zeros.

    Raises:
        ValueError: a hyper-parameter is NaN, infinite or out of range, a parameter is given twice,
            or ``differentiable`` is True. What param groups set for themselves, and what is set
            later, may leave torch's ranges as long as a step can compute with it.
        RuntimeError: ``fused`` and ``foreach`` are both True.
    """

    _row = "Adam"
    _old_options: ClassVar[dict[str, Any]] = {
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": False,
    }

    @takes_additions
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **additions: Unpack[Additions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            **additions,
        }
        super().__init__(params, defaults)


class AdamW(Adam):
    r"""Adam with decoupled weight decay, as ``torch.optim.AdamW``.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101):
    :math:`p \leftarrow (1 - \gamma \lambda) p` before Adam's update. Arguments, state and errors
    are those of :class:`Adam`, with a default ``weight_decay`` of 1e-2.
    """

    @takes_additions
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **additions: Unpack[Additions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **additions,
        )

    def _completed(self, saved: ParamGroup) -> ParamGroup:
        return {**super()._completed(saved), "decoupled_weight_decay": True}

    def __setstate__(self, state: State) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # saved by an Adam, or by a torch without the option
            group["decoupled_weight_decay"] = True
