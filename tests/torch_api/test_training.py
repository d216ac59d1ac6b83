"""What a training loop does around step(): schedulers, tensor options, GradScaler, clipping."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import fusedopt
from support.device import on_host
from support.equality import assert_equal, assert_same_math
from support.optimizers import (
    NAMES,
    Build,
    Case,
    each_adam,
    like_torch,
    main_cases,
    take_step,
    varied_cases,
)
from support.snapshots import snapshot
from support.tensors import make_params, params_of, set_grads


def has_some(optimizer: Any) -> bool:
    """Momentum, in one of the two forms that schedulers know."""
    return not {"momentum", "betas"}.isdisjoint(optimizer.defaults)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda _: 0.9),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=3),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=8),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt, 0.1, total_steps=10, cycle_momentum=has_some(opt)
    ),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(
        opt, 0.01, 0.1, 2, mode="exp_range", gamma=0.9, cycle_momentum=has_some(opt)
    ),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.5)], opt
    ),
}
# These move momentum, or the first of the betas, too; plain SGD has neither yet.
CYCLES_MOMENTUM = {"OneCycleLR", "CyclicLR"}


@varied_cases
@pytest.mark.parametrize("name", SCHEDULERS)
@like_torch
def test_scheduler(build: Build, case: Case, name: str) -> Any:
    has_momentum = case.takes("betas") or "momentum" in case.options
    optimizer = build(make_params())
    if name in CYCLES_MOMENTUM and case.takes("momentum") and not has_momentum:
        optimizer.param_groups[0]["momentum"] = optimizer.defaults["momentum"] = 0.5
    scheduler, seen = SCHEDULERS[name](optimizer), []
    for seed in range(8):
        take_step(optimizer, seed)
        scheduler.step()
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group.get("momentum"), group.get("betas")))
    assert len(set(seen)) > 1
    if name in CYCLES_MOMENTUM and has_some(optimizer):
        assert len({entry[1:] for entry in seen}) > 1
    return params_of(optimizer), seen


@varied_cases
@like_torch
def test_reduce_lr_on_plateau(build: Build) -> Any:
    optimizer = build(make_params())
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    for seed, loss in enumerate([1.0, 0.5, 0.7, 0.4, 0.6, 0.6]):
        take_step(optimizer, seed)
        scheduler.step(loss)
    return params_of(optimizer), scheduler.get_last_lr()


@varied_cases
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
@pytest.mark.parametrize("edit", ["in place", "replaced", "by a scheduler"])
@like_torch
def test_tensor_lr(build: Build, shape: tuple[int, ...], edit: str) -> Any:
    """What is in the tensor counts at each step, not what was there when the plan was made."""
    lr = torch.full(shape, 0.25, dtype=torch.float64, device="cpu")
    optimizer = build(make_params(), lr=lr)
    group = optimizer.param_groups[0]
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5) if edit == "by a scheduler" else None
    for seed in range(4):
        take_step(optimizer, seed)
        if scheduler:
            scheduler.step()
        elif edit == "in place":
            group["lr"].mul_(0.5)
        else:
            group["lr"] = group["lr"] * 0.5
    assert group["lr"].item() == 0.25 / 16
    return params_of(optimizer)


@each_adam
def test_tensor_betas(name: str) -> None:
    tensors = tuple(on_host(beta, dtype=torch.float64) for beta in (0.8, 0.9))
    results = []
    for betas in ((0.8, 0.9), tensors):
        optimizer = getattr(fusedopt, name)(make_params(), betas=betas)
        for seed in range(4):
            take_step(optimizer, seed)
            if betas is tensors and seed == 1:
                tensors[0].fill_(0.5)
            elif seed == 1:
                optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        results.append(params_of(optimizer))
    assert_equal(results[1], results[0])


# torch's Rprop raises TypeError.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "Rprop"])
def test_tensor_lr_that_requires_grad(name: str) -> None:
    """torch.optim reads it with item(); so must we, without a warning."""
    lr = on_host(0.1, dtype=torch.float64, requires_grad=True)
    made = [build(make_params(), lr=lr) for build in (Case(name).ours, Case(name).theirs)]
    torch.set_warn_always(True)  # else torch gives the warning once in a process
    try:
        for optimizer in made:
            take_step(optimizer, 0)
    finally:
        torch.set_warn_always(False)
    assert_same_math(*map(params_of, made))


@main_cases
@like_torch
def test_clip_grad_norm(build: Build) -> Any:
    optimizer = build(make_params())
    for seed in range(3):
        set_grads(optimizer, seed)
        torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)
        optimizer.step()
    return params_of(optimizer)


@main_cases
@like_torch
def test_gradient_accumulation(build: Build) -> Any:
    optimizer = build(make_params())
    for micro in range(6):
        losses = [(param * (micro + 1)).square().sum() for param in params_of(optimizer)]
        torch.stack(losses).sum().backward()
        if micro % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return params_of(optimizer)


@main_cases
@like_torch
def test_optimizer_in_backward(build: Build) -> Any:
    """One optimizer per parameter, stepped by a hook while the backward pass runs."""
    params = make_params()
    optimizers = {param: build([param]) for param in params}

    def step(param: Any) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in params:
        param.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        torch.stack([param.square().sum() for param in params]).sum().backward()
    assert all(param.grad is None for param in params)
    return params


# Where there is a GPU, torch._dynamo.reset() imports code of torch that warns.
COMPILES = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


def compiled_loop(case: Case, ours: bool, compiled: bool) -> list[Tensor]:
    """Five steps of a regression, with step() inside the function that is compiled."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model.double()
    optimizer = (case.ours if ours else case.theirs)(model.parameters())
    inputs, targets = torch.randn(2, 16, 4).double(), torch.randn(2, 16, 1).double()

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        value = loss.detach()  # dynamo itself warns of a non-leaf that lives across a graph break
        loss.backward()
        optimizer.step()
        return value

    run = torch.compile(train_step, backend="eager") if compiled else train_step
    losses = [run(inputs[i % 2], targets[i % 2]) for i in range(5)]
    return [*losses, *(param.detach() for param in model.parameters())]


@COMPILES
@main_cases
def test_step_inside_a_compiled_function(case: Case) -> None:
    """Clean means: no warning (they are errors here), no recompilation, the same numbers."""
    torch._dynamo.reset()
    compiled = compiled_loop(case, ours=True, compiled=True)
    assert_equal(compiled, compiled_loop(case, ours=True, compiled=False))
    assert_same_math(compiled, compiled_loop(case, ours=False, compiled=False))


@COMPILES
@main_cases
def test_compiled_function_is_not_compiled_again(case: Case) -> None:
    """lr, step counts and state change between calls; nothing of it may be guarded on."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = case.ours([param])
    counter = CompileCounter()

    def train_step(x: Tensor) -> None:
        optimizer.zero_grad()
        (param * x).sum().backward()
        optimizer.step()

    run = torch.compile(train_step, backend=counter)
    frames = []
    for step in range(6):
        run(torch.ones(4) * step)
        optimizer.param_groups[0]["lr"] *= 0.9
        frames.append(counter.frame_count)
    assert frames[-1] == frames[1], frames
    torch._dynamo.reset()


@main_cases
def test_skipped_training_step_leaves_snapshot(case: Case) -> None:
    """No parameter has a grad: a step does nothing at all."""
    optimizer = case.ours(make_params())
    take_step(optimizer, 0)
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.step()
    assert snapshot(optimizer) == before
