"""torchtitan: its container of optimizers over FSDP2, its clipping, and checkpoints of the two."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from support.equality import assert_equal
from support.processes import on_ranks
from support.tensors import by_id
from support.twins import LR, clipping, loss_of, step_clipped, tiny, twins, whole

pytest.importorskip("torchtitan", reason="make stacks installs it")

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]


def container(adamw: Any, model: Any, implementation: str = "fused", **options: Any) -> Any:
    """Of two groups."""
    from torchtitan.components.optimizer import ParamGroupConfig

    from fusedopt.integrations.torchtitan import OptimizersContainer

    name = "fusedopt.AdamW" if adamw is fusedopt.AdamW else "AdamW"
    options = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, **options}
    groups = {"norm|bias": {**options, "weight_decay": 0.0}, ".*": options}
    configs = [
        ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs=group)
        for pattern, group in groups.items()
    ]
    config = OptimizersContainer.Config(param_groups=configs, implementation=implementation)
    return config.build(model_parts=[model])


def shard(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def backward(model: Any, step: int) -> None:
    loss_of(model, step, torch.distributed.get_rank()).backward()


@on_ranks(2)
@twins
def test_container(adamw: Any) -> Any:
    """With torchtitan's schedules."""
    from torchtitan.components.optimizer import LRSchedulersContainer

    model = shard(tiny())
    optimizers = container(adamw, model)
    schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(
        optimizers=optimizers, training_steps=20
    )
    for step in range(6):
        optimizers.zero_grad()
        backward(model, step)
        optimizers.step()
        schedulers.step()
    return whole(model.parameters())


@on_ranks(2)
@twins
def test_clips(adamw: Any) -> Any:
    """By the option, or by torchtitan before the step."""
    from torchtitan.distributed.utils import clip_grad_norm_

    model = shard(tiny())
    optimizers = container(adamw, model, **clipping(adamw, 0.3))
    (optimizer,) = optimizers
    norms = []
    for step in range(4):
        optimizers.zero_grad()
        backward(model, step)
        norm = step_clipped(optimizer, lambda: clip_grad_norm_(list(model.parameters()), 0.3))
        norms.append(norm.float())
    assert max(norms) > 0.3
    return [*whole(model.parameters()), *norms]


@on_ranks(2)
@pytest.mark.parametrize(
    "options", **by_id({"plain": {}, "averages": {"ema_decay": 0.9, "max_grad_norm": 1.0}})
)
def test_resumes(options: dict[str, Any], tmp_path: Path) -> None:
    """From a distributed checkpoint, with the bits of a run that was not stopped."""
    import torch.distributed.checkpoint as dcp

    def make() -> tuple[Any, Any]:
        model = shard(tiny(13))
        return model, container(fusedopt.AdamW, model, **options)

    def train(model: Any, optimizers: Any, steps: range) -> list[Any]:
        for step in steps:
            optimizers.zero_grad()
            backward(model, step)
            optimizers.step()
        return whole(model.parameters())

    straight, resumed = make(), make()
    train(*straight, range(3))
    dcp.save({"optimizer": straight[1], "model": straight[0].state_dict()}, checkpoint_id=tmp_path)
    weights = resumed[0].state_dict()
    dcp.load({"optimizer": resumed[1], "model": weights}, checkpoint_id=tmp_path)
    resumed[0].load_state_dict(weights)
    assert_equal(train(*resumed, range(3, 5)), train(*straight, range(3, 5)))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_names(name: str) -> None:
    from fusedopt.integrations.torchtitan import OptimizersContainer

    factory = OptimizersContainer._resolve_optimizer_factory
    assert factory(f"fusedopt.{name}") is getattr(fusedopt, name)
    assert factory("AdamW") is torch.optim.AdamW
    with pytest.raises(NotImplementedError, match=r"fusedopt\.Muon not added"):
        factory("fusedopt.Muon")


def test_states_in_bf16_are_an_option_of_ours() -> None:
    container(torch.optim.AdamW, tiny(), "fused_opt_states_bf16")
    with pytest.raises(ValueError, match="set state_dtype='bfloat16' in optimizer_kwargs"):
        container(fusedopt.AdamW, tiny(), "fused_opt_states_bf16")
