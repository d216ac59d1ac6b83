"""DistributedDataParallel, and optimizer state shared out by ZeroRedundancyOptimizer."""

import copy
from typing import Any

import pytest
import torch

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import fusedopt  # noqa: E402
from support.equality import assert_equal  # noqa: E402
from support.processes import on_ranks  # noqa: E402
from support.tensors import by_id  # noqa: E402
from support.twins import LR, clipping, loss_of, step_clipped, tiny, twins, whole  # noqa: E402

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]


def replicate(model: Any, **options: Any) -> Any:
    """With buckets that are small enough for several."""
    return DistributedDataParallel(model, bucket_cap_mb=0.005, **options)


def share_out(adamw: Any, model: Any, **options: Any) -> Any:
    """An optimizer that keeps the state of a part of the params on each rank."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = model.parameters()
    return ZeroRedundancyOptimizer(params, optimizer_class=adamw, lr=LR, **options)


def assert_same_on_ranks(params: Any) -> None:
    ours = torch.cat([param.detach().flatten() for param in params])
    first = ours.clone()
    dist.broadcast(first, 0)
    assert torch.equal(ours, first)


DDP: dict[str, Any] = {
    "grads of their own": {"gradient_as_bucket_view": False},
    "grads in buckets": {"gradient_as_bucket_view": True},
    "static graph": {"gradient_as_bucket_view": True, "static_graph": True},
}


@on_ranks(2)
@pytest.mark.parametrize("set_to_none", [True, False], ids=["new grads", "zeroed grads"])
@pytest.mark.parametrize("options", **by_id(DDP))
@twins
def test_ddp(adamw: Any, options: dict[str, Any], set_to_none: bool) -> Any:
    model = tiny()
    parallel = replicate(model, **options)
    optimizer = adamw(model.parameters(), lr=LR)
    for step in range(5):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(parallel, step, dist.get_rank()).backward()
        optimizer.step()
    assert_same_on_ranks(model.parameters())
    return whole(model.parameters())


@on_ranks(2)
@twins
def test_ddp_accumulates_with_no_sync(adamw: Any) -> Any:
    model = tiny()
    parallel = replicate(model, gradient_as_bucket_view=True)
    optimizer = adamw(model.parameters(), lr=LR)
    for step in range(4):
        with parallel.no_sync():
            loss_of(parallel, 2 * step, dist.get_rank()).backward()
        loss_of(parallel, 2 * step + 1, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_on_ranks(model.parameters())
    return whole(model.parameters())


@on_ranks(2)
@twins
def test_ddp_clips(adamw: Any) -> Any:
    model = tiny()
    parallel = replicate(model, gradient_as_bucket_view=True)
    optimizer = adamw(model.parameters(), lr=LR, **clipping(adamw, 0.3))
    norms = []
    for step in range(5):
        loss_of(parallel, step, dist.get_rank()).backward()
        norms.append(
            step_clipped(
                optimizer, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            ).float()
        )
        optimizer.zero_grad()
    assert max(norms) > 0.3
    assert_same_on_ranks(model.parameters())
    return [*whole(model.parameters()), *norms]


@on_ranks(2)
@pytest.mark.parametrize("view", [False, True], ids=["params of their own", "params in buckets"])
@twins
def test_zero_redundancy_optimizer(adamw: Any, view: bool) -> Any:
    model = tiny()
    parallel = replicate(model, gradient_as_bucket_view=True)
    optimizer = share_out(adamw, model, parameters_as_bucket_view=view)
    for step in range(5):
        loss_of(parallel, step, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_on_ranks(model.parameters())
    return whole(model.parameters())


@on_ranks(2)
@twins
def test_ranks_with_unequal_numbers_of_batches(adamw: Any) -> Any:
    from torch.distributed.algorithms.join import Join

    model = tiny()
    parallel = replicate(model)
    optimizer = share_out(adamw, model)
    with Join([parallel, optimizer]):
        for step in range(3 + 2 * dist.get_rank()):
            loss_of(parallel, step, dist.get_rank()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_on_ranks(model.parameters())
    return whole(model.parameters())


@on_ranks(2)
@pytest.mark.parametrize("options", **by_id({"plain": {}, "averages": {"ema_decay": 0.9}}))
def test_zero_redundancy_optimizer_resumes(options: dict[str, Any]) -> None:
    def make(model: Any) -> tuple[Any, Any]:
        return replicate(model), share_out(fusedopt.AdamW, model, **options)

    def train(parallel: Any, optimizer: Any, steps: range) -> list[Any]:
        for step in steps:
            loss_of(parallel, step, dist.get_rank()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return whole(parallel.module.parameters())

    model = tiny()
    parallel, optimizer = make(model)
    train(parallel, optimizer, range(3))
    optimizer.consolidate_state_dict(0)
    saved = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    resumed = make(copy.deepcopy(model))
    resumed[1].load_state_dict(saved[0])
    assert_equal(train(*resumed, range(3, 6)), train(parallel, optimizer, range(3, 6)))
