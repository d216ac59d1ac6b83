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
    counts_steps = True  # in an entry of its state, beside those of results()

    def __init__(
        self,
        param: Tensor,
        lr: float,
        weight_decay: float = 0,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        lr_independent_weight_decay: bool = False,
        cautious_update: bool = False,
        cautious_weight_decay: bool = False,
        ema_decay: float | None = None,
        ema_bias_correction: bool = False,
    ) -> None:
        self.param = exact(param)
        self.steps = 0
        self.lr, self.weight_decay, self.maximize = lr, weight_decay, maximize
        self.decoupled, self.lr_independent = decoupled_weight_decay, lr_independent_weight_decay
        self.cautious_update, self.cautious_weight_decay = cautious_update, cautious_weight_decay
        self.ema_decay, self.ema_bias_correction = ema_decay, ema_bias_correction

    def step(self, grad: Tensor) -> None:
        self.steps += 1
        self._update(self._decay(-exact(grad) if self.maximize else exact(grad)))
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

    def _zeros(self) -> Array:
        return np.zeros_like(self.param)

    def _update(self, g: Array) -> None:
        raise NotImplementedError

    def _states(self) -> dict[str, Array]:
        raise NotImplementedError

    def _decay(self, g: Array) -> Array:
        """The grad with an L2 penalty; or the decay of the param.

        Loshchilov and Hutter (2017), equation 12: as there, or with lr as torch has it.
        """
        if self.weight_decay == 0:
            return g
        if not self.decoupled:
            return g + self.weight_decay * self.param
        if not self.cautious_weight_decay:
            self.param = (1 - self._decay_rate()) * self.param
        return g

    def _decay_rate(self) -> float:
        return self.weight_decay if self.lr_independent else self.lr * self.weight_decay

    def _move(self, update: Array, g: Array) -> None:
        """p <- p - update; or as the cautious have it.

        Liang et al. (2024), algorithm 1, whose mask is not scaled here; Chen et al. (2025),
        "Cautious Weight Decay", equation 1.
        """
        if self.cautious_update:
            update = np.where(update * g > 0, update, 0)
        if self.cautious_weight_decay and self.decoupled:
            decays = update * self.param >= 0
            self.param = np.where(decays, 1 - self._decay_rate(), 1) * self.param
        self.param = self.param - update


class SgdOracle(Oracle):
    """v <- momentum v + (1 - dampening) g; p <- p - lr v (Sutskever et al., 2013, as in torch)."""

    counts_steps = False

    def __init__(
        self,
        param: Tensor,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        nesterov: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(param, lr, **more)
        self.momentum_buffer: Array | None = None
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov

    def _update(self, g: Array) -> None:
        if self.momentum != 0:
            if self.momentum_buffer is None:
                self.momentum_buffer = g
            else:
                self.momentum_buffer = (
                    self.momentum * self.momentum_buffer + (1 - self.dampening) * g
                )
            v = self.momentum_buffer
            self._move(self.lr * (g + self.momentum * v if self.nesterov else v), g)
        else:
            self._move(self.lr * g, g)

    def _states(self) -> dict[str, Array]:
        if self.momentum_buffer is None:
            return {}
        return {"momentum_buffer": self.momentum_buffer}


class MomentsOracle(Oracle):
    """What has Adam's two averages: of the grads, and of their squares."""

    def __init__(
        self,
        param: Tensor,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **more: Any,
    ) -> None:
        super().__init__(param, lr, **more)
        self.exp_avg, self.exp_avg_sq = self._zeros(), self._zeros()
        (self.beta1, self.beta2), self.eps = betas, eps

    def _update_moments(self, g: Array) -> None:
        self.exp_avg = self.beta1 * self.exp_avg + (1 - self.beta1) * g
        self.exp_avg_sq = self.beta2 * self.exp_avg_sq + (1 - self.beta2) * g * g

    def _states(self) -> dict[str, Array]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class AdamOracle(MomentsOracle):
    """Algorithm 1 of Kingma and Ba (2014); AMSGrad as torch has it; decay as L2 or decoupled."""

    def __init__(self, param: Tensor, lr: float, amsgrad: bool = False, **more: Any) -> None:
        super().__init__(param, lr, **more)
        self.max_exp_avg_sq, self.amsgrad = self._zeros(), amsgrad

    def _update(self, g: Array) -> None:
        self._update_moments(g)
        self.max_exp_avg_sq = np.maximum(self.max_exp_avg_sq, self.exp_avg_sq)
        second = self.max_exp_avg_sq if self.amsgrad else self.exp_avg_sq
        m_hat = self.exp_avg / (1 - self.beta1**self.steps)
        v_hat = second / (1 - self.beta2**self.steps)
        self._move(self.lr * m_hat / (np.sqrt(v_hat) + self.eps), g)

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
        **options,
    )


class RmspropOracle(Oracle):
    """Tieleman and Hinton (2012), with torch's momentum; centered as in Graves (2013)."""

    def __init__(
        self,
        param: Tensor,
        lr: float,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0,
        centered: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(param, lr, **more)
        self.square_avg, self.grad_avg, self.momentum_buffer = (self._zeros() for _ in range(3))
        self.alpha, self.eps, self.momentum, self.centered = alpha, eps, momentum, centered

    def _update(self, g: Array) -> None:
        self.square_avg = self.alpha * self.square_avg + (1 - self.alpha) * g * g
        second = self.square_avg
        if self.centered:
            self.grad_avg = self.alpha * self.grad_avg + (1 - self.alpha) * g
            second = np.maximum(second - self.grad_avg**2, 0)  # but for rounding it is not below
        update = g / (np.sqrt(second) + self.eps)
        if self.momentum != 0:
            self.momentum_buffer = self.momentum * self.momentum_buffer + update
            update = self.momentum_buffer
        self.param = self.param - self.lr * update

    def _states(self) -> dict[str, Array]:
        found = {"square_avg": self.square_avg}
        if self.momentum != 0:
            found["momentum_buffer"] = self.momentum_buffer
        return {**found, "grad_avg": self.grad_avg} if self.centered else found


class AdagradOracle(Oracle):
    """Duchi, Hazan and Singer (2011) with the diagonal alone, and torch's decay of lr."""

    def __init__(
        self,
        param: Tensor,
        lr: float,
        lr_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        **more: Any,
    ) -> None:
        super().__init__(param, lr, **more)
        self.sum = np.full_like(self.param, initial_accumulator_value)
        self.lr_decay, self.eps = lr_decay, eps

    def _update(self, g: Array) -> None:
        self.sum = self.sum + g * g
        lr = self.lr / (1 + (self.steps - 1) * self.lr_decay)
        self.param = self.param - lr * g / (np.sqrt(self.sum) + self.eps)

    def _states(self) -> dict[str, Array]:
        return {"sum": self.sum}


class AdadeltaOracle(Oracle):
    """Algorithm 1 of Zeiler (2012), with a learning rate as torch has it."""

    def __init__(
        self, param: Tensor, lr: float = 1.0, rho: float = 0.9, eps: float = 1e-6, **more: Any
    ) -> None:
        super().__init__(param, lr, **more)
        self.square_avg, self.acc_delta = self._zeros(), self._zeros()
        self.rho, self.eps = rho, eps

    def _update(self, g: Array) -> None:
        self.square_avg = self.rho * self.square_avg + (1 - self.rho) * g * g
        delta = np.sqrt(self.acc_delta + self.eps) / np.sqrt(self.square_avg + self.eps) * g
        self.acc_delta = self.rho * self.acc_delta + (1 - self.rho) * delta * delta
        self.param = self.param - self.lr * delta

    def _states(self) -> dict[str, Array]:
        return {"square_avg": self.square_avg, "acc_delta": self.acc_delta}


class AdamaxOracle(Oracle):
    """Algorithm 2 of Kingma and Ba (2014), with torch's eps."""

    def __init__(
        self,
        param: Tensor,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **more: Any,
    ) -> None:
        super().__init__(param, lr, **more)
        self.exp_avg, self.exp_inf = self._zeros(), self._zeros()
        (self.beta1, self.beta2), self.eps = betas, eps

    def _update(self, g: Array) -> None:
        self.exp_avg = self.beta1 * self.exp_avg + (1 - self.beta1) * g
        self.exp_inf = np.maximum(self.beta2 * self.exp_inf, np.abs(g) + self.eps)
        m_hat = self.exp_avg / (1 - self.beta1**self.steps)
        self.param = self.param - self.lr * m_hat / self.exp_inf

    def _states(self) -> dict[str, Array]:
        return {"exp_avg": self.exp_avg, "exp_inf": self.exp_inf}


class NadamOracle(MomentsOracle):
    """Dozat (2016), with torch's momentum_decay in the momenta."""

    def __init__(self, param: Tensor, lr: float, momentum_decay: float = 4e-3, **more: Any) -> None:
        super().__init__(param, lr, **more)
        self.momentum_decay = momentum_decay

    def momenta(self, steps: Any) -> Any:
        return self.beta1 * (1 - 0.5 * 0.96 ** (steps * self.momentum_decay))

    def _update(self, g: Array) -> None:
        self._update_moments(g)
        product = np.prod(self.momenta(np.arange(1, self.steps + 1)))
        now, following = self.momenta(self.steps), self.momenta(self.steps + 1)
        m_hat = following * self.exp_avg / (1 - product * following) + (1 - now) * g / (1 - product)
        v_hat = self.exp_avg_sq / (1 - self.beta2**self.steps)
        self._move(self.lr * m_hat / (np.sqrt(v_hat) + self.eps), g)


class RadamOracle(MomentsOracle):
    """Algorithm 2 of Liu et al. (2019), with torch's eps, and with its limit of 5, not 4."""

    def _update(self, g: Array) -> None:
        self._update_moments(g)
        m_hat = self.exp_avg / (1 - self.beta1**self.steps)
        decay = self.beta2**self.steps
        limit = 2 / (1 - self.beta2) - 1
        length = limit - 2 * self.steps * decay / (1 - decay)
        if length > 5:
            rectification = ((length - 4) * (length - 2) * limit) / (
                (limit - 4) * (limit - 2) * length
            )
            adaptive = np.sqrt(1 - decay) / (np.sqrt(self.exp_avg_sq) + self.eps)
            m_hat = m_hat * np.sqrt(rectification) * adaptive
        self._move(self.lr * m_hat, g)


class AsgdOracle(Oracle):
    """Polyak and Juditsky (1992), with torch's schedules of the two rates."""

    def __init__(
        self,
        param: Tensor,
        lr: float,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        **more: Any,
    ) -> None:
        super().__init__(param, lr, **more)
        self.ax = self._zeros()
        self.lambd, self.alpha, self.t0 = lambd, alpha, t0

    def _update(self, g: Array) -> None:
        done = self.steps - 1
        eta = self.lr / (1 + self.lambd * self.lr * done) ** self.alpha
        mu = 1 / max(1, done - self.t0) if done else 1
        self.param = (1 - self.lambd * eta) * self.param - eta * g
        self.ax = self.ax + mu * (self.param - self.ax)

    def _states(self) -> dict[str, Array]:
        return {"ax": self.ax}


class RpropOracle(Oracle):
    """Riedmiller and Braun (1993); where the sign changes, the grad counts as 0, as in torch."""

    def __init__(
        self,
        param: Tensor,
        lr: float,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        **more: Any,
    ) -> None:
        super().__init__(param, lr, **more)
        self.prev, self.step_size = self._zeros(), np.full_like(self.param, lr)
        self.etas, self.step_sizes = etas, step_sizes

    def _update(self, g: Array) -> None:
        smaller, larger = self.etas
        turned = g * self.prev < 0
        factor = np.where(turned, smaller, np.where(g * self.prev > 0, larger, 1))
        self.step_size = np.clip(self.step_size * factor, *self.step_sizes)
        self.prev = np.where(turned, 0, g)
        self.param = self.param - np.sign(self.prev) * self.step_size

    def _states(self) -> dict[str, Array]:
        return {"prev": self.prev, "step_size": self.step_size}


class LionOracle(Oracle):
    """Algorithm 2 of Chen et al. (2023)."""

    counts_steps = False

    def __init__(
        self, param: Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.99), **more: Any
    ) -> None:
        super().__init__(param, lr, decoupled_weight_decay=True, **more)
        self.exp_avg = self._zeros()
        self.beta1, self.beta2 = betas

    def _update(self, g: Array) -> None:
        self._move(self.lr * np.sign(self.beta1 * self.exp_avg + (1 - self.beta1) * g), g)
        self.exp_avg = self.beta2 * self.exp_avg + (1 - self.beta2) * g

    def _states(self) -> dict[str, Array]:
        return {"exp_avg": self.exp_avg}


BY_NAME: dict[str, Callable[..., Oracle]] = {
    "SGD": SgdOracle,
    "Adam": AdamOracle,
    "AdamW": adamw_oracle,
    "RMSprop": RmspropOracle,
    "Adagrad": AdagradOracle,
    "Adadelta": AdadeltaOracle,
    "Adamax": AdamaxOracle,
    "NAdam": NadamOracle,
    "RAdam": RadamOracle,
    "ASGD": AsgdOracle,
    "Rprop": RpropOracle,
    "Lion": LionOracle,
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


def assert_rounded_once(
    value: Tensor, expected: Array, units: float = 0.5, eps: float | None = None
) -> None:
    """Half a unit in the last place of the storage format, and what computing cost before that.

    Stochastic rounding may be off by one unit. The unit of 1 is ``eps``, or as the dtype has it.
    """
    finfo = torch.finfo(value.dtype)
    compute = 2 * min(finfo.eps, torch.finfo(torch.float32).eps) * np.abs(expected).max(initial=0)
    rounding = (
        units
        * (finfo.eps if eps is None else eps)
        * np.maximum(np.abs(expected), finfo.smallest_normal)
    )
    assert (np.abs(exact(value) - expected) <= rounding + compute).all()
