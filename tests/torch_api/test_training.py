"""What a training loop does around step(): schedulers, tensor options, GradScaler, clipping."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import fusedopt
from support.api_helpers import (
    CASES,
    MAIN_CASES,
    Case,
    assert_equal,
    assert_same_math,
    by_id,
    make_params,
    params_of,
    set_grads,
    snapshot,
)
from support.device import on_host

EVERY_CASE = pytest.mark.parametrize("case", **by_id(CASES))
MAIN_CASE = pytest.mark.parametrize("case", **by_id(MAIN_CASES))


def compare(case: Case, loop: Callable[[Any], Any], **options: Any) -> None:
    """Runs a loop with both optimizers; parameters and what the loop returns must agree."""
    results = []
    for build in (case.ours, case.torchs):
        optimizer = build(make_params(), **copy.deepcopy(options))
        returned = loop(optimizer)
        results.append((params_of(optimizer), returned))
    assert_same_math(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


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
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 2, mode="exp_range", gamma=0.9),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.5)], opt
    ),
}
# These move momentum, or the first of the betas, too; plain SGD has neither.
CYCLES_MOMENTUM = {"OneCycleLR", "CyclicLR"}


@EVERY_CASE
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(case: Case, name: str) -> None:
    if name in CYCLES_MOMENTUM and case.options.get("momentum", 0) == 0 and case.name == "SGD":
        case = Case("SGD", {"lr": 0.1, "momentum": 0.5})

    def loop(optimizer: Any) -> list[Any]:
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for seed in range(8):
            set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
            scheduler.step()
            group = optimizer.param_groups[0]
            seen.append((group["lr"], group.get("momentum"), group.get("betas")))
        assert len(set(seen)) > 1
        if name in CYCLES_MOMENTUM:
            assert len({entry[1:] for entry in seen}) > 1
        return seen

    compare(case, loop)


@EVERY_CASE
def test_reduce_lr_on_plateau(case: Case) -> None:
    def loop(optimizer: Any) -> list[float]:
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
        for seed, loss in enumerate([1.0, 0.5, 0.7, 0.4, 0.6, 0.6]):
            set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
            scheduler.step(loss)
        return scheduler.get_last_lr()

    compare(case, loop)


@EVERY_CASE
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
@pytest.mark.parametrize("edit", ["in place", "replaced", "by a scheduler"])
def test_tensor_lr(case: Case, shape: tuple[int, ...], edit: str) -> None:
    """What is in the tensor counts at each step, not what was there when the plan was made."""

    def loop(optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5) if edit == "by a scheduler" else None
        for seed in range(4):
            set_grads(group["params"], seed)
            optimizer.step()
            if scheduler:
                scheduler.step()
            elif edit == "in place":
                group["lr"].mul_(0.5)
            else:
                group["lr"] = group["lr"] * 0.5
        assert group["lr"].item() == 0.25 / 16

    compare(case, loop, lr=torch.full(shape, 0.25, dtype=torch.float64, device="cpu"))


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_tensor_betas(name: str) -> None:
    tensors = tuple(on_host(beta, dtype=torch.float64) for beta in (0.8, 0.9))
    results = []
    for betas in ((0.8, 0.9), tensors):
        optimizer = getattr(fusedopt, name)(make_params(), betas=betas)
        for seed in range(4):
            set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
            if betas is tensors and seed == 1:
                tensors[0].fill_(0.5)
            elif seed == 1:
                optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        results.append(params_of(optimizer))
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_tensor_lr_that_requires_grad(name: str) -> None:
    """torch.optim reads it with item(); so must we, without a warning."""
    lr = on_host(0.1, dtype=torch.float64, requires_grad=True)
    torch.set_warn_always(True)  # else torch gives the warning once in a process
    try:
        compare(Case(name), set_grads_and_step, lr=lr)
    finally:
        torch.set_warn_always(False)


def set_grads_and_step(optimizer: Any, seed: int = 0) -> None:
    set_grads(optimizer.param_groups[0]["params"], seed)
    optimizer.step()


@MAIN_CASE
def test_clip_grad_norm(case: Case) -> None:
    def loop(optimizer: Any) -> None:
        for seed in range(3):
            params = optimizer.param_groups[0]["params"]
            set_grads(params, seed)
            torch.nn.utils.clip_grad_norm_(params, 0.1)
            optimizer.step()

    compare(case, loop)


@MAIN_CASE
def test_gradient_accumulation(case: Case) -> None:
    def loop(optimizer: Any) -> None:
        params = optimizer.param_groups[0]["params"]
        for micro in range(6):
            loss = torch.stack([(param * (micro + 1)).square().sum() for param in params]).sum()
            loss.backward()
            if micro % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    compare(case, loop)


@MAIN_CASE
def test_optimizer_in_backward(case: Case) -> None:
    """One optimizer per parameter, stepped by a hook while the backward pass runs."""

    def train_in_backward(build: Callable[..., Any]) -> list[Tensor]:
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
        return [param.detach() for param in params]

    assert_same_math(train_in_backward(case.ours), train_in_backward(case.torchs))


# Where there is a GPU, torch._dynamo.reset() imports code of torch that warns.
COMPILES = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


def compiled_loop(case: Case, ours: bool, compiled: bool) -> list[Tensor]:
    """Five steps of a regression, with step() inside the function that is compiled."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model.double()
    optimizer = (case.ours if ours else case.torchs)(model.parameters())
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
@MAIN_CASE
def test_step_inside_a_compiled_function(case: Case) -> None:
    """Clean means: no warning (they are errors here), no recompilation, the same numbers."""
    torch._dynamo.reset()
    compiled = compiled_loop(case, ours=True, compiled=True)
    assert_equal(compiled, compiled_loop(case, ours=True, compiled=False))
    assert_same_math(compiled, compiled_loop(case, ours=False, compiled=False))


@COMPILES
@MAIN_CASE
def test_compiled_function_is_not_compiled_again(case: Case) -> None:
    """lr, step counts and state change between calls; nothing of it may be guarded on."""
    torch._dynamo.reset()
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = case.ours([param])
    counter = torch._dynamo.testing.CompileCounter()

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


@MAIN_CASE
def test_skipped_training_step_leaves_snapshot(case: Case) -> None:
    """No parameter has a grad: a step does nothing at all."""
    optimizer = case.ours(make_params())
    set_grads_and_step(optimizer)
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.step()
    assert snapshot(optimizer) == before
