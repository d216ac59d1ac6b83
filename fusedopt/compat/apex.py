"""For those who come from NVIDIA's apex: ``apex.optimizers.FusedAdam`` and ``FusedSGD``."""

from __future__ import annotations

from torch import Tensor

from .._optimizer import FusedOptimizer
from .._types import Params, State
from ..adam import Adam
from ..sgd import SGD
from ._drop_in import NO_AMSGRAD, NO_UNCORRECTED, DropIn, put_rates_on_device, refuse
from ._reader import FLOATS, SavedState, convert


def convert_state_dict(state_dict: State, optimizer: FusedOptimizer) -> State:
    """What ``state_dict()`` of apex's FusedAdam or FusedSGD returned, for ``load_state_dict()``.

    ``optimizer`` is a ``fusedopt.Adam``, ``AdamW`` or ``SGD`` over the same parameters in the same
    order. apex counts the steps of a param group, here each of its parameters has that count. The
    master weights of apex are in no state dict of its FusedAdam. ``FP16_Optimizer`` has the one of
    the optimizer in its ``"optimizer_state_dict"``, and the weights in ``"fp32_groups"``, which
    ``load_fp32_params()`` takes. Other state dicts, of fusedopt and torch, are returned unchanged.

    Raises TypeError or ValueError, which name the parameter, where the state is not apex's.
    """
    if isinstance(optimizer, SGD):
        return convert(state_dict, optimizer, "SGD", _read_sgd)
    return convert(state_dict, optimizer, "Adam", _read_adam)


def _read_adam(saved: SavedState, steps: int | None) -> State:
    saved.check_names("exp_avg", "exp_avg_sq")
    if steps is None:
        raise saved.fail("step", "is missing: the param groups of apex's FusedAdam have it")
    return {"step": steps, **{name: saved.tensor(name, *FLOATS) for name in saved.entries}}


def _read_sgd(saved: SavedState, _: int | None) -> State:
    return dict(saved.entries)  # as torch's


class FusedAdam(DropIn, Adam):
    """``fusedopt.Adam`` with the signature of ``apex.optimizers.FusedAdam``.

    The moments are float32 whatever the dtype of the parameters (``state_dtype="float32"``).

    Args:
        params, lr, betas, eps, weight_decay: as ``fusedopt.Adam``'s.
        bias_correction (bool, default True): must be True, in param groups as well.
        adam_w_mode (bool, default True): decoupled decay, as AdamW has it; False: L2.
        amsgrad (bool, default False): must be False, as in apex.
        set_grad_none (bool, default True): what ``zero_grad()`` does; False: fill with zeros.
        capturable (bool, default False): as ``fusedopt.Adam``'s. ``lr`` of the groups is a float32
            tensor on the parameters' device then, and GradScalers leave unscaling to the step.
        master_weights (bool, default False): float32 weights of all 16-bit parameters, where apex
            keeps those of float16 only, and with ``capturable`` only; here they are saved, too.

    ``step()`` takes a closure only; ``torch.amp.GradScaler`` needs no ``grad_scaler`` argument.
    Each parameter counts its own steps, as in torch, where apex counts those of a group.
    ``load_state_dict()`` takes what apex has saved.

    Raises:
        ValueError: ``amsgrad``, or ``bias_correction`` that is False; and as ``fusedopt.Adam``.
    """

    _convert = staticmethod(convert_state_dict)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        refuse(not bias_correction, "bias_correction=False", NO_UNCORRECTED)
        refuse(amsgrad, "amsgrad=True", NO_AMSGRAD)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            capturable=capturable,
            fused=capturable or None,
            decoupled_weight_decay=bool(adam_w_mode),
            state_dtype="float32",
            master_weights="float32" if master_weights else None,
        )
        self._set_grad_none = set_grad_none
        if capturable:
            put_rates_on_device(self)


class FusedSGD(DropIn, SGD):
    """``fusedopt.SGD`` with the signature of ``apex.optimizers.FusedSGD``.

    Args:
        params, momentum, dampening, weight_decay, nesterov: as ``fusedopt.SGD``'s.
        lr (float | Tensor): as ``fusedopt.SGD``'s; there is no default.
        wd_after_momentum (bool, default False): add the decay to what the momentum has made of the
            grad, which is ``decoupled_weight_decay``.
        materialize_master_grads (bool, default True): no effect: it is about apex.amp, which apex
            has no longer.
        set_grad_none (bool, default False): what ``zero_grad()`` does; False: fill with zeros.

    ``load_state_dict()`` takes what apex has saved. Raises as ``fusedopt.SGD``.
    """

    _convert = staticmethod(convert_state_dict)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,  # noqa: ARG002
        set_grad_none: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            decoupled_weight_decay=bool(wd_after_momentum),
        )
        self._set_grad_none = set_grad_none
