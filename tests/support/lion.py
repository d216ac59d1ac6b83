"""Lion as a plain optimizer of torch, which has none of its own: what ours is compared with."""

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. (2023), "Symbolic Discovery of Optimization Algorithms".

    Options are in the order of ours; those of implementations mean nothing.
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
        lr_independent_weight_decay: bool = False,
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
        self.lr_independent = lr_independent_weight_decay
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

    def _update(self, param: Any, grad: Any, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        exp_avg, lr, (beta1, beta2) = state["exp_avg"], float(group["lr"]), group["betas"]
        if param.is_complex():
            param, grad, exp_avg = (torch.view_as_real(t) for t in (param, grad, exp_avg))
        direction = exp_avg.lerp(grad, 1 - beta1).sign()
        rate = (lr != 0) if self.lr_independent else lr
        param.mul_(1 - rate * group["weight_decay"]).add_(direction, alpha=-lr)
        exp_avg.lerp_(grad, 1 - beta2)
