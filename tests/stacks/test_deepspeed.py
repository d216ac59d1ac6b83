"""DeepSpeed: its ZeRO stages around an optimizer that it does not know."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from support.equality import assert_equal
from support.processes import on_ranks
from support.twins import LR, batch, mixed_twins, tiny, twins

pytest.importorskip("deepspeed", reason="make stacks installs it")

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

each_stage = pytest.mark.parametrize("stage", [0, 1, 2, 3])


def engine(
    adamw: Any,
    stage: int,
    bf16: bool = False,
    known: bool = True,
    clip: float = 0.0,
    **options: Any,
) -> Any:
    import deepspeed

    # Else its own collectives through shared memory are compiled first, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = tiny()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": known,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": clip,
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    optimizer = adamw(model.parameters(), lr=LR, **options)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )[0]


def train(engine: Any, steps: range) -> list[Any]:
    import deepspeed

    params = list(engine.module.parameters())
    for step in steps:
        x, y = batch(step, torch.distributed.get_rank())
        prediction = engine(x.to(params[0].dtype)).float()
        engine.backward(torch.nn.functional.mse_loss(prediction, y))
        engine.step()
    with deepspeed.zero.GatheredParameters(params):
        return [param.detach().clone() for param in params]


@on_ranks(2)
@each_stage
@pytest.mark.parametrize("clip", [0.0, 0.3], ids=["plain", "clipped"])
@twins
def test_zero(adamw: Any, stage: int, clip: float) -> Any:
    return train(engine(adamw, stage, clip=clip), range(4))


@on_ranks(2)
@each_stage
@mixed_twins
def test_zero_in_bf16(adamw: Any, stage: int) -> Any:
    return [param.float() for param in train(engine(adamw, stage, bf16=True), range(4))]


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_resumes(stage: int, tmp_path: Path) -> None:
    """With the bits of a run that was not stopped."""
    straight = engine(fusedopt.AdamW, stage, bf16=True)
    train(straight, range(3))
    straight.save_checkpoint(str(tmp_path), tag="saved")
    resumed = engine(fusedopt.AdamW, stage, bf16=True)
    resumed.load_checkpoint(str(tmp_path), tag="saved")
    assert_equal(train(resumed, range(3, 5)), train(straight, range(3, 5)))


@on_ranks(2)
def test_must_be_allowed() -> None:
    with pytest.raises(AssertionError, match="zero_allow_untested_optimizer"):
        engine(fusedopt.AdamW, 1, known=False)
