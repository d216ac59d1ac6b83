"""Models of support.twins as FSDP2 shards them, for the processes of a test."""

from typing import Any

import pytest
import torch.distributed as dist

EVEN, UNEVEN = 12, 13
each_width = pytest.mark.parametrize("width", [EVEN, UNEVEN], ids=["even", "uneven"])


def mesh_of(*sizes: int, names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def shard(model: Any, mesh: Any = None, **options: Any) -> Any:
    """FSDP2, block by block. The last layer's weight is one row, which one rank has alone."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or mesh_of(dist.get_world_size())
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


FSDP2: dict[str, Any] = {
    "plain": lambda model: shard(model),
    "kept gathered": lambda model: shard(model, reshard_after_forward=False),
    "offloaded": lambda model: shard(model, offload_policy=offload()),
}


def offload() -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return CPUOffloadPolicy(pin_memory=False)  # there is nothing to pin it for
