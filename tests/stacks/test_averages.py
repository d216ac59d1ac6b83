"""fusedopt.integrations.swap_ema: averages in a model, whatever is between it and the optimizer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt.integrations import swap_ema
from support.equality import assert_equal
from support.processes import on_ranks
from support.twins import LR, loss_of, tiny, whole

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]


def trained(**options: Any) -> tuple[Any, Any]:
    model = tiny()
    optimizer = fusedopt.AdamW(model.parameters(), lr=LR, **options)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def averages(model: Any, optimizer: Any) -> list[Any]:
    return whole(optimizer.state[param]["ema_param"] for param in model.parameters())


def test_through_wrappers() -> None:
    model, optimizer = trained(ema_decay=0.5)
    weights, expected = whole(model.parameters()), averages(model, optimizer)
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    with swap_ema(wrapped, model):
        assert_equal(whole(model.parameters()), expected)
        with swap_ema(optimizer, model):  # does nothing
            assert_equal(whole(model.parameters()), expected)
        assert_equal(whole(model.parameters()), expected)
        with pytest.raises(RuntimeError, match="inside swap_ema"):
            optimizer.step()
    assert_equal(whole(model.parameters()), weights)
    with pytest.raises(ArithmeticError), swap_ema(wrapped, model):
        raise ArithmeticError
    assert_equal(whole(model.parameters()), weights)


def test_without_averages() -> None:
    model, optimizer = trained()
    fresh = fusedopt.AdamW(model.parameters(), ema_decay=0.5)
    weights = whole(model.parameters())
    for each in (optimizer, fresh, torch.optim.AdamW(model.parameters()), None):
        with swap_ema(each, model):
            assert_equal(whole(model.parameters()), weights)


def evaluate(model: Any) -> Any:
    with torch.no_grad():
        return loss_of(model, 99)


@on_ranks(2)
@pytest.mark.parametrize("keep", [False, True], ids=["resharded", "kept gathered"])
def test_fsdp2(keep: bool) -> None:
    """Whose root keeps what a forward has gathered until a backward, and trains with it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def run(evaluates: bool) -> list[Any]:
        model = tiny()
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=not keep)
        fully_shard(model, mesh=mesh)
        optimizer = fusedopt.AdamW(model.parameters(), lr=LR, ema_decay=0.5)
        for step in range(4):
            loss_of(model, step, torch.distributed.get_rank()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluates:
                plain = tiny()
                with torch.no_grad():
                    for param, value in zip(
                        plain.parameters(), averages(model, optimizer), strict=True
                    ):
                        param.copy_(value)
                evaluate(model)  # with the weights, which it gathers
                with swap_ema(optimizer, model):
                    found = evaluate(model)
                torch.testing.assert_close(found, evaluate(plain))
        return whole(model.parameters())

    assert_equal(run(evaluates=True), run(evaluates=False))
