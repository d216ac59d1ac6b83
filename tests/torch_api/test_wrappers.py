"""Wrappers that copy an optimizer's ``__dict__`` into a subclass, as Lightning's and Fabric's."""

from typing import Any

import pytest
import torch

import fusedopt
from support.optimizers import step_with
from support.snapshots import refused
from support.tensors import params_with_grads


def wrapped(optimizer: Any) -> Any:
    class Wrapper:
        def __init__(self) -> None:
            self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
            self.inner = optimizer

        def step(self) -> None:
            self.inner.step()

    return type(f"Wrapped{type(optimizer).__name__}", (Wrapper, type(optimizer)), {})()


@pytest.mark.parametrize("when", ["new", "stepped", "loaded"])
def test_wrapper_sees_what_the_latest_step_found_out(when: str) -> None:
    optimizer = fusedopt.AdamW(params_with_grads(dtype=torch.float32), max_grad_norm=1.0)
    if when == "stepped":
        optimizer.step()
    wrapper = wrapped(optimizer)
    if when == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    wrapper.step()
    assert wrapper.grad_norm > 0
    assert wrapper.grad_norm == optimizer.grad_norm
    assert not wrapper.skipped
    optimizer.param_groups[0]["params"][0].grad[0] = float("nan")
    wrapper.step()
    assert wrapper.skipped
    assert wrapper.nonfinite_grads == 1


@pytest.mark.parametrize("who", ["wrapper", "optimizer"])
def test_no_step_while_either_has_swapped(who: str) -> None:
    params = params_with_grads(dtype=torch.float32)
    optimizer = fusedopt.AdamW(params, ema_decay=0.5)
    wrapper = wrapped(optimizer)
    optimizer.step()
    own = [param.detach().clone() for param in params]
    outer, inner = (wrapper, optimizer) if who == "wrapper" else (optimizer, wrapper)
    with outer.swap_ema(), refused(optimizer, RuntimeError, "inside swap_ema"):
        inner.step()
    assert all(torch.equal(a, b) for a, b in zip(params, own, strict=True))
    step_with(optimizer, [torch.ones_like(param) for param in params])
