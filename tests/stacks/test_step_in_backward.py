"""Steps in the backward where several processes train: FSDP2, and what is refused."""

from typing import Any

import pytest
import torch

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)


import fusedopt  # noqa: E402
from support.processes import on_ranks  # noqa: E402
from support.sharded_twins import FSDP2, each_width  # noqa: E402
from support.twins import LR, loss_of, tiny, whole  # noqa: E402

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]


@on_ranks(2)
@each_width
@pytest.mark.parametrize("way", FSDP2)
def test_fsdp2(way: str, width: int) -> None:
    """The same bits as of ordinary steps, with the accumulation of two backwards."""
    found = []
    for in_backward in (False, True):
        model = FSDP2[way](tiny(width))
        optimizer = fusedopt.AdamW(model.parameters(), lr=LR)
        stepping = fusedopt.step_in_backward(model, optimizer, bucket_bytes=800)
        if not in_backward:
            stepping.close()
        for step in range(3):
            with stepping.accumulate():
                loss_of(model, 10 + step, dist.get_rank()).backward()
            loss_of(model, step, dist.get_rank()).backward()
            if in_backward:
                assert sum(param.grad is not None for param in model.parameters()) < 4
            optimizer.step()
            optimizer.zero_grad()
        found.append(whole(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@on_ranks(2)
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("bucket_bytes", [9000, 20_000])
def test_fsdp2_where_ranks_have_more_than_others(bucket_bytes: int, clips: bool) -> None:
    """All of them step the same params together, else they would wait for each other for ever."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(65, 65, bias=False) for _ in range(6)])
    for layer in model:
        torch.distributed.fsdp.fully_shard(layer)
    torch.distributed.fsdp.fully_shard(model)
    optimizer = fusedopt.AdamW(model.parameters(), lr=LR, max_grad_norm=1.0 if clips else None)
    with fusedopt.step_in_backward(
        model, optimizer, bucket_bytes=bucket_bytes, clip_by_previous_norm=clips
    ):
        for _ in range(3):
            model(torch.randn(4, 65)).square().mean().backward()
            optimizer.step()
    assert all(optimizer.state[param]["step"] == 3 for param in model.parameters())


@on_ranks(2)
def test_fsdp2_clips_by_the_previous_norm() -> None:
    """The norm is that of all shards, the same on both ranks."""
    model = FSDP2["plain"](tiny())
    optimizer = fusedopt.AdamW(model.parameters(), lr=LR, max_grad_norm=0.1)
    shards = [param.to_local() for param in model.parameters()]
    assert optimizer.memory()["params"] == sum(shard.nbytes for shard in shards)
    with fusedopt.step_in_backward(
        model, optimizer, bucket_bytes=800, clip_by_previous_norm=True
    ) as stepping:
        for step in range(3):
            with stepping.accumulate():
                loss_of(model, step, dist.get_rank()).backward()
            grads = [param.grad for param in model.parameters()]
            norm = torch.stack([grad.norm() for grad in whole(grads)]).norm()
            optimizer.step()
            assert stepping.grad_norm is not None
            assert float(stepping.grad_norm) == pytest.approx(float(norm), rel=1e-5)


def wrapped(model: Any, way: str) -> Any:
    if way == "DDP":
        return torch.nn.parallel.DistributedDataParallel(model)
    if way == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    return model


@on_ranks(2)
@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("DDP", "DistributedDataParallel brings grads together"),
        ("FSDP1", "FSDP1"),
        ("plain", "several processes and parameters that are plain tensors"),
    ],
)
def test_grads_that_are_not_whole_yet(way: str, words: str) -> None:
    model = wrapped(tiny(), way)
    optimizer = fusedopt.AdamW(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match=words):
        fusedopt.step_in_backward(model, optimizer)


@on_ranks(2)
def test_grads_that_are_said_to_be_whole() -> None:
    model = tiny()
    optimizer = fusedopt.AdamW(model.parameters(), lr=LR)
    with fusedopt.step_in_backward(model, optimizer, bucket_bytes=1, grads_are_whole=True):
        loss_of(model, 0).backward()
        assert len(optimizer.state) == len(list(model.parameters()))
        optimizer.step()
