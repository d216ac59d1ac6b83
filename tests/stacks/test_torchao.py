"""torchao: weights that are trained in float8, which FSDP2 gathers so, and its other wrappers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt._tensors import WEIGHTS_OF
from support.processes import on_ranks
from support.sharded_twins import FSDP2
from support.tensors import values
from support.twins import LR, loss_of, mixed_twins, tiny, whole

pytest.importorskip("torchao", reason="make stacks installs it")

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.unsanitized,
    pytest.mark.filterwarnings("ignore"),  # of torchao, about where it runs
]


@on_ranks(2)
@pytest.mark.parametrize("way", FSDP2)
@mixed_twins
def test_float8_all_gather(adamw: Any, way: str) -> Any:
    """The losses are returned as well: what is gathered is what was stepped."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    model = tiny(16)
    convert_to_float8_training(model.blocks, config=config)
    model = FSDP2[way](model)
    assert type(model.blocks[0].up.weight._local_tensor).__name__ in str(list(WEIGHTS_OF))
    optimizer = adamw(model.parameters(), lr=LR)
    losses = []
    for step in range(4):
        loss = loss_of(model, step, torch.distributed.get_rank())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *whole(model.parameters())]


def of_float8(weight: Tensor) -> Any:
    from torchao.float8.float8_training_tensor import LinearMMConfig
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    return WeightWithDynamicFloat8CastTensor(weight, LinearMMConfig(), torch.float8_e4m3fn)


def of_experts(weight: Tensor) -> Any:
    from torchao.prototype.moe_training.config import Float8TrainingOpConfig
    from torchao.prototype.moe_training.tensor import Float8TrainingWeightWrapperTensor

    return Float8TrainingWeightWrapperTensor(weight, Float8TrainingOpConfig())


def of_bitnet(weight: Tensor) -> Any:
    from torchao.prototype.quantized_training.bitnet import BitNetTrainingLinearWeight

    return BitNetTrainingLinearWeight(weight)


def of_int8(weight: Tensor) -> Any:
    from torchao.prototype.quantized_training import int8_mixed_precision as int8

    config = int8.Int8MixedPrecisionTrainingConfig()
    return int8.Int8MixedPrecisionTrainingLinearWeight(weight, config)


@pytest.mark.parametrize("wrap", [of_float8, of_experts, of_bitnet, of_int8])
def test_wrappers(wrap: Callable[[Tensor], Any]) -> None:
    results = []
    for each in (wrap, lambda weight: weight):
        weight = values(64, 64, dtype=torch.bfloat16, seed=0)
        param = torch.nn.Parameter(each(weight))
        optimizer = fusedopt.AdamW([param], lr=LR, master_weights="split8", state_dtype="q8")
        for seed in (1, 2):
            param.grad = values(64, 64, dtype=torch.bfloat16, seed=seed)
            optimizer.step()
        results.append((weight, optimizer.fp32_params()[0]))
    assert all(map(torch.equal, *results))
