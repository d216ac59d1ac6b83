"""The CUDA driver's bits once more: works too large, too far apart or too close together."""

import pytest
import torch

from support.device import needs_driver
from support.files import constant
from support.optimizers import Case, some_cases
from support.sides import Results, Side, assert_same_on_both, on_both_drivers
from support.snapshots import record
from support.tensors import draw, each_dtype, set_grads, values

pytestmark = needs_driver


@some_cases("momentum")
@on_both_drivers
def test_more_than_enough_chunks(side: Side, case: Case) -> Results:
    """From here on chunks are larger than the smallest."""
    chunks = constant("cuda/tuning.h", "kEnoughChunks")
    enough = chunks * constant("cuda/tuning.h", "kMinChunkElements")
    sizes = [300, enough // 2 + 700, 7, enough // 2 - 999, 1025, 512]
    numbers = values(9973, dtype=torch.bfloat16).to(side.device)
    params = [numbers.repeat(size // 9973 + 1)[:size] for size in sizes]
    optimizer = case.ours(params)
    for param in params:
        param.grad = -param.roll(5)
    optimizer.step()
    return record(optimizer)


@each_dtype
@some_cases("nesterov-l2", "adam")
@on_both_drivers
def test_buckets(side: Side, case: Case, dtype: torch.dtype) -> Results:
    """As DDP and FSDP have it: params are parts of one buffer, grads of another."""
    sizes = [3, 1030, 1, 257, 0, 513, 64]
    params = list(values(sum(sizes), dtype=dtype).to(side.device).split(sizes))
    bucket = torch.empty(sum(sizes) + 1, dtype=dtype).to(side.device)
    for param, grad in zip(params, bucket[1:].split(sizes), strict=True):
        param.grad = grad
    optimizer = case.ours(params)
    for seed in range(4):
        bucket.copy_(values(sum(sizes) + 1, dtype=dtype, seed=seed))
        optimizer.step()
    return record(optimizer)


def far_apart(side: Side, case: Case) -> Results:
    """Elements more than 2^31 apart; only the pages that hold them are ever touched."""
    stride = 2**31 + 5
    storage = torch.empty(2 * stride + 1, dtype=torch.float16, device=side.device)
    param = storage.as_strided((3,), (stride,)).copy_(values(3).half())
    optimizer = case.ours([param, *draw([5], side.device, torch.float16)])
    for seed in range(2):
        set_grads([param], seed)
        optimizer.step()
    return record(optimizer)


@some_cases("momentum", "adam")
def test_offsets_beyond_31_bits(case: Case) -> None:
    try:
        assert_same_on_both(lambda side: far_apart(side, case))
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        pytest.skip(f"no 9 GB to reserve: {error}")
