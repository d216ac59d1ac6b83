"""The optimizers in float64 numpy, straight from the textbooks' formulas.

Nothing is rearranged for speed or accuracy, so that a slip in csrc/ cannot be repeated here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def exact(tensor: Tensor) -> Array:
    """The tensor's numbers in float64; a complex number becomes a last dim of two."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.to(torch.float64).numpy(force=True).copy()


def ema_rate(step: int, decay: float, bias_correction: bool) -> float:
    """How far the average moves towards the weight, in step 1, 2, ..., of which the first sets it.

    With bias correction it is Adam's: the average of all weights so far, weighted by decay^age.
    """
    if step == 1:
        return 1.0
    return (1 - decay) / (1 - decay**step) if bias_correction else 1 - decay


class Oracle:
    """One parameter and its states. `step` takes a grad; `results` names them as torch does."""

    param: Array
    ema_param: Array
    counts_steps = False  # in an entry of its state, beside those of results()

    def __init__(
        self, param: Tensor, ema_decay: float | None = None, ema_bias_correction: bool = False
    ) -> None:
        self.param = exact(param)
        self.steps = 0
        self.ema_decay, self.ema_bias_correction = ema_decay, ema_bias_correction

    def step(self, grad: Tensor) -> None:
        self.steps += 1
        self._update(exact(grad))
        if self.ema_decay is not None:
            self._average(self.param)

    def results(self) -> dict[str, Array]:
        average = {} if self.ema_decay is None else {"ema_param": self.ema_param}
        return {"param": self.param, **self._states(), **average}

    def average_anew(self, before: Array, weight: Array) -> None:
        """The latest step's average once more, of the weight as it was stored."""
        self.ema_param = before
        self._average(weight)

    def _average(self, weight: Array) -> None:
        assert self.ema_decay is not None
        if self.steps == 1:
            self.ema_param = weight
            return
        rate = ema_rate(self.steps, self.ema_decay, self.ema_bias_correction)
        self.ema_param = (1 - rate) * self.ema_param + rate * weight

    def _update(self, g: Array) -> None:
        raise NotImplementedError

    def _states(self) -> dict[str, Array]:
        raise NotImplementedError

    def _decay(self, weight_decay: float, lr: float, lr_independent: bool) -> None:
        """Loshchilov and Hutter (2017), equation 12; as there, or with lr as torch has it."""
        self.param = (1 - (weight_decay if lr_independent else lr * weight_decay)) * self.param


class SgdOracle(Oracle):
    """v <- momentum v + (1 - dampening) g; p <- p - lr v (Sutskever et al., 2013, as in torch)."""

    def __init__(
        self,
        param: Tensor,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        lr_independent_weight_decay: bool = False,
        **ema: Any,
    ) -> None:
        super().__init__(param, **ema)
        self.momentum_buffer: Array | None = None
        self.lr, self.momentum, self.dampening = lr, momentum, dampening
        self.weight_decay, self.nesterov, self.maximize = weight_decay, nesterov, maximize
        self.decoupled, self.lr_independent = decoupled_weight_decay, lr_independent_weight_decay

    def _update(self, g: Array) -> None:
        g = -g if self.maximize else g
        if self.weight_decay != 0 and self.decoupled:
            self._decay(self.weight_decay, self.lr, self.lr_independent)
        elif self.weight_decay != 0:
            g = g + self.weight_decay * self.param
        if self.momentum != 0:
            if self.momentum_buffer is None:
                self.momentum_buffer = g
            else:
                self.momentum_buffer = (
                    self.momentum * self.momentum_buffer + (1 - self.dampening) * g
                )
            g = g + self.momentum * self.momentum_buffer if self.nesterov else self.momentum_buffer
        self.param = self.param - self.lr * g

    def _states(self) -> dict[str, Array]:
        if self.momentum_buffer is None:
            return {}
        return {"momentum_buffer": self.momentum_buffer}


class AdamOracle(Oracle):
    """Algorithm 1 of Kingma and Ba (2014); AMSGrad as torch has it; decay as L2 or decoupled."""

    counts_steps = True

    def __init__(
        self,
        param: Tensor,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        lr_independent_weight_decay: bool = False,
        **ema: Any,
    ) -> None:
        super().__init__(param, **ema)
        self.exp_avg = np.zeros_like(self.param)
        self.exp_avg_sq = np.zeros_like(self.param)
        self.max_exp_avg_sq = np.zeros_like(self.param)
        self.lr, (self.beta1, self.beta2), self.eps = lr, betas, eps
        self.weight_decay, self.amsgrad, self.maximize = weight_decay, amsgrad, maximize
        self.decoupled, self.lr_independent = decoupled_weight_decay, lr_independent_weight_decay

    def _update(self, g: Array) -> None:
        g = -g if self.maximize else g
        if self.weight_decay != 0 and self.decoupled:
            self._decay(self.weight_decay, self.lr, self.lr_independent)
        elif self.weight_decay != 0:
            g = g + self.weight_decay * self.param
        self.exp_avg = self.beta1 * self.exp_avg + (1 - self.beta1) * g
        self.exp_avg_sq = self.beta2 * self.exp_avg_sq + (1 - self.beta2) * g * g
        self.max_exp_avg_sq = np.maximum(self.max_exp_avg_sq, self.exp_avg_sq)
        second = self.max_exp_avg_sq if self.amsgrad else self.exp_avg_sq
        m_hat = self.exp_avg / (1 - self.beta1**self.steps)
        v_hat = second / (1 - self.beta2**self.steps)
        self.param = self.param - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)

    def _states(self) -> dict[str, Array]:
        # Without beta1 the average of the grads is the grad, and not kept.
        found = {} if self.beta1 == 0 else {"exp_avg": self.exp_avg}
        found["exp_avg_sq"] = self.exp_avg_sq
        return {**found, "max_exp_avg_sq": self.max_exp_avg_sq} if self.amsgrad else found


def adamw_oracle(param: Tensor, lr: float, weight_decay: float = 1e-2, **options: object) -> Oracle:
    """Loshchilov and Hutter (2017): Adam with decoupled decay, 0.01 unless said."""
    return AdamOracle(
        param,
        lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=True,
        **options,  # type: ignore[arg-type]
    )


BY_NAME: dict[str, Callable[..., Oracle]] = {
    "SGD": SgdOracle,
    "Adam": AdamOracle,
    "AdamW": adamw_oracle,
}


@dataclass(frozen=True)
class Tolerance:
    """Against float64 an error may be `factor` times unfused torch's, plus `floor`."""

    factor: float
    floor: float


TOLERANCES = {
    torch.float32: Tolerance(1.5, 2 * 2.0**-24),
    torch.float64: Tolerance(1.5, 8 * 2.0**-53),
    torch.bfloat16: Tolerance(2, 2.0**-9),
    torch.float16: Tolerance(2, 2.0**-12),
    torch.complex64: Tolerance(1.5, 2 * 2.0**-24),
    torch.complex128: Tolerance(1.5, 8 * 2.0**-53),
}


def assert_rounded_once(value: Tensor, expected: Array, units: float = 0.5) -> None:
    """Half a unit in the last place of the storage format, and what computing cost before that.

    Stochastic rounding may be off by one unit.
    """
    finfo = torch.finfo(value.dtype)
    compute = 2 * min(finfo.eps, torch.finfo(torch.float32).eps) * np.abs(expected).max(initial=0)
    rounding = units * finfo.eps * np.maximum(np.abs(expected), finfo.smallest_normal)
    assert (np.abs(exact(value) - expected) <= rounding + compute).all()
