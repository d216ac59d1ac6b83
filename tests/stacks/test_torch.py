"""What else of torch has to do with an optimizer or its params: schedulers, averages, parametrized
and functional models, processes that share their params."""

from typing import Any

import pytest
import torch
from torch import nn

import fusedopt
from support.tensors import BFLOAT16, by_id
from support.twins import LR, batch, loss_of, tiny, twins, whole

schedulers = torch.optim.lr_scheduler
pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1 * LR, LR, 2),  # beta1, too
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, LR, total_steps=6),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("lr", [LR, torch.tensor(LR)], ids=["number", "tensor"])
@pytest.mark.parametrize("make", **by_id(SCHEDULERS))
@twins
def test_schedulers(adamw: Any, make: Any, lr: Any) -> Any:
    model = tiny()
    optimizer = adamw(model.parameters(), lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
    scheduler = make(optimizer)
    lrs = []
    for step in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        metrics = [1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []
        scheduler.step(*metrics)
        lrs.append(float(optimizer.param_groups[0]["lr"]))
    assert len(set(lrs)) > 1
    return [*whole(model.parameters()), torch.tensor(lrs)]


@twins
def test_stochastic_weight_averaging(adamw: Any) -> Any:
    model = tiny()
    optimizer = adamw(model.parameters(), lr=LR)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=LR / 2, anneal_epochs=2)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        averaged.update_parameters(model)
        scheduler.step()
    return whole(averaged.parameters())


def normalized(model: Any) -> Any:
    parametrizations = nn.utils.parametrizations
    parametrizations.weight_norm(model.inp)
    parametrizations.spectral_norm(model.blocks[0].up)
    parametrizations.orthogonal(model.blocks[1].down)
    return model


@twins
def test_parametrized(adamw: Any) -> Any:
    """Weight and spectral normalization, orthogonal weights."""
    model = normalized(tiny())
    optimizer = adamw(model.parameters(), lr=LR)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return whole(model.parameters())


@twins
def test_ensemble(adamw: Any) -> Any:
    """Stacked params, under torch.func.vmap, grad and functional_call."""
    models = [tiny() for _ in range(3)]
    for index, model in enumerate(models):
        torch.manual_seed(index)
        nn.init.normal_(model.inp.weight)
    params, buffers = torch.func.stack_module_state(models)

    def loss(params: Any, buffers: Any, x: Any, y: Any) -> Any:
        return nn.functional.mse_loss(
            torch.func.functional_call(models[0], (params, buffers), (x,)), y
        )

    optimizer = adamw(params.values(), lr=LR)
    for step in range(4):
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0, None, None))
        for name, grad in each(params, buffers, *batch(step)).items():
            params[name].grad = grad
        optimizer.step()
    return whole(params.values())


dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from support.processes import on_ranks  # noqa: E402


def averaging(adamw: Any, model: Any, **options: Any) -> Any:
    """An optimizer whose params are averaged over the ranks after every second step."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    averager = PeriodicModelAverager(period=2, warmup_steps=0)
    return PostLocalSGDOptimizer(adamw(model.parameters(), lr=LR, **options), averager)


@on_ranks(2)
@twins
def test_post_local_sgd(adamw: Any) -> Any:
    model = tiny()
    optimizer = averaging(adamw, model)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
    return whole(model.parameters())


@on_ranks(2)
def test_post_local_sgd_with_masters() -> None:
    """Averages are written through ``.data``, which nobody counts: reset_masters() takes them."""
    model = tiny().to(BFLOAT16)
    optimizer = averaging(fusedopt.AdamW, model, master_weights="float32")
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(step, dist.get_rank())
        nn.functional.mse_loss(model(x.to(BFLOAT16)).float(), y).backward()
        optimizer.step()
        optimizer.optim.reset_masters()
    for param in model.parameters():  # the last step was one that averages
        average = param.detach().clone()
        dist.all_reduce(average)
        assert torch.equal(average / 2, param)
    before = whole(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 1e-30
    optimizer.optim.step()
    assert all(map(torch.equal, whole(model.parameters()), before))


@on_ranks(2)
def test_registered_with_ddp() -> None:
    """A private way of DDP's is refused, by torch."""
    model = nn.parallel.DistributedDataParallel(tiny())
    with pytest.raises(ValueError, match="does not have a functional counterpart"):
        model._register_fused_optim(fusedopt.AdamW, LR)


@pytest.fixture
def shared() -> Any:
    model = tiny()
    model.share_memory()
    return model


@on_ranks(2)
def test_hogwild(shared: Any) -> None:
    """Processes step the same params, whenever they have a grad."""
    optimizer = fusedopt.AdamW(shared.parameters(), lr=LR)
    first = loss_of(shared, 0).item()
    dist.barrier()
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(shared, 0).backward()
        optimizer.step()
    dist.barrier()
    assert loss_of(shared, 0).item() < 0.9 * first
    mine = torch.cat([param.detach().flatten() for param in shared.parameters()])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs)
