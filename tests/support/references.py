"""What ours are compared with where it is not torch's own class as it is."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor


@contextmanager
def double_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _InDouble(torch.optim.Optimizer):
    """Keeps in float64 what torch keeps in float32 beside the step count, and computes with."""

    torchs: ClassVar[type[torch.optim.Optimizer]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with double_by_default(), torch.device("cpu"):  # torch counts on the default device
            for group in self.param_groups:
                for state in self._states(group):
                    self._refresh(state, group, float(state["step"]))
            inspect.unwrap(self.torchs.step)(self)  # hooks are called for this step, not for that
        for group in self.param_groups:
            for state in self._states(group):
                state["step"] = state["step"].float()
                if not group["capturable"]:  # torch's ASGD always counts beside the param
                    state["step"] = state["step"].cpu()
        return loss

    def _states(self, group: dict[str, Any]) -> list[Any]:
        states = [self.state[param] for param in group["params"] if param in self.state]
        return [state for state in states if "step" in state]

    def _refresh(self, state: Any, group: dict[str, Any], done: float) -> None:
        """Computes anew what follows from the options and the steps done."""
        raise NotImplementedError


class NAdam(_InDouble, torch.optim.NAdam):
    """``mu_product`` in float64; with other betas in a step, it is that of these from the start."""

    torchs = torch.optim.NAdam

    def _refresh(self, state: Any, group: dict[str, Any], done: float) -> None:
        beta1 = float(group["betas"][0])
        steps = torch.arange(1, int(done) + 1, dtype=torch.float64)
        momenta = beta1 * (1 - 0.5 * 0.96 ** (steps * group["momentum_decay"]))
        state["mu_product"] = momenta.prod().to(state["step"].device)


class ASGD(_InDouble, torch.optim.ASGD):
    """``eta`` and ``mu`` in float64, and of the options of this step, not of the one before."""

    torchs = torch.optim.ASGD

    def _refresh(self, state: Any, group: dict[str, Any], done: float) -> None:
        lr = float(group["lr"])
        eta = lr / (1 + group["lambd"] * lr * done) ** group["alpha"]
        mu = 1 / max(1, done - group["t0"])
        kind = {"dtype": torch.float64, "device": state["ax"].device}
        state["eta"], state["mu"] = (torch.tensor(x, **kind) for x in (eta, mu))


class Adagrad(torch.optim.Adagrad):
    """States are made by the first step, as other optimizers' are.

    As torch's constructor makes them, since the step of torch 2.11 makes none.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.state.clear()

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        for param in group["params"]:
            if param.grad is not None and not self.state[param]:
                start = self.defaults["initial_accumulator_value"]
                made = torch.optim.Adagrad([param], initial_accumulator_value=start)
                self.state[param] = made.state[param]
        return super()._init_group(group, *lists)


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. (2023), "Symbolic Discovery of Optimization Algorithms".

    With averages as torch's Adam has them. Options are in the order of ours; those of
    implementations mean nothing.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, -param.grad if group["maximize"] else param.grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        exp_avg, lr = state["exp_avg"], float(group["lr"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        if param.is_complex():
            param, grad, exp_avg = (torch.view_as_real(t) for t in (param, grad, exp_avg))
        direction = exp_avg.lerp(grad, 1 - beta1).sign()
        if group["weight_decay"] != 0:
            param.mul_(1 - lr * group["weight_decay"])
        param.add_(direction, alpha=-lr)
        exp_avg.lerp_(grad, 1 - beta2)
