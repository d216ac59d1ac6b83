"""A GradScaler that leaves the search for infinite grads to the optimizer's step."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim.optimizer import _global_optimizer_pre_hooks

from . import _C
from ._norms import status_field
from ._optimizer import FusedOptimizer, forget_scaling


class GradScaler(torch.amp.GradScaler):
    """As ``torch.amp.GradScaler``, with less traffic for the optimizers of this package.

    torch reads and writes all grads to find out whether any is infinite or NaN, before the step
    reads them again. Here ``step()`` of an optimizer of fusedopt reads them once for that, which
    ``max_grad_norm`` shares, and writes none, whether it was made with ``fused=True`` or not. After
    ``unscale_()``, and for other optimizers (wrappers of ours included), all is as in torch.
    Arguments, methods and errors are those of ``torch.amp.GradScaler``.

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3)
    >>> scaler = fusedopt.GradScaler("cpu")  # was torch.amp.GradScaler
    >>> scaler.scale(model(torch.randn(4, 8)).square().mean()).backward()
    >>> scaler.step(optimizer)
    >>> scaler.update()
    """

    _stepping: FusedOptimizer | None = None  # whose step looks for infinite grads itself

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        if not isinstance(optimizer, FusedOptimizer) or _reads_grads_elsewhere(optimizer):
            if kwargs.get("grad_norm") is not None and self._unscales_before(optimizer):
                kwargs["grad_norm"] = kwargs["grad_norm"] / self._get_scale_async()
            return super().step(optimizer, *args, **kwargs)
        supported = optimizer._step_supports_amp_scaling
        optimizer._step_supports_amp_scaling = True
        self._stepping = optimizer
        try:
            return super().step(optimizer, *args, **kwargs)
        except BaseException:
            forget_scaling(optimizer)
            raise
        finally:
            self._stepping = None
            optimizer._step_supports_amp_scaling = supported
            if optimizer._checks_grads:
                optimizer._checks_grads = False
                status = optimizer._shared.grad_status
                if status is not None:
                    # A copy, for torch adds those of others to it.
                    flag = status_field(status, _C.GRAD_STATUS, "skip").clone()
                    self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {
                        flag.device: flag
                    }

    def _unscales_before(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether torch's ``step()`` is going to unscale the grads, before the optimizer's own."""
        if not self.is_enabled() or getattr(optimizer, "_step_supports_amp_scaling", False):
            return False
        return self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[Any, Tensor]:
        if optimizer is not self._stepping:
            return super()._check_inf_per_device(optimizer)
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        self._stepping._checks_grads = True
        self._stepping._shared.grad_status = None
        none_yet = {scale.device: torch.zeros((), dtype=torch.float32, device=scale.device)}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = none_yet
        return none_yet


def _reads_grads_elsewhere(optimizer: FusedOptimizer) -> bool:
    """Whether code of the user's runs in a step, which expects grads without the scale."""
    # Of the class, or set on the instance; LR schedulers do that with a wrapper, which names ours.
    step: Any = optimizer.step
    own = inspect.unwrap(getattr(step, "__func__", step))
    overridden = own is not inspect.unwrap(FusedOptimizer.step)
    hooks = optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks
    return overridden or bool(hooks)
