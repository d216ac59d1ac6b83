"""Weight decay that torch lacks: SGDW, and decay that does not depend on the learning rate."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedopt
from support import oracles
from support.device import on_host
from support.equality import bits, same_bits
from support.optimizers import Case, step_with, train
from support.oracles import TOLERANCES
from support.pairs import in_pairs, together
from support.sides import SIZES, WORK_DTYPES, Results, Side, on_both_drivers, warmed_up
from support.snapshots import record, results
from support.tensors import by_id, draw, params_of, set_grads, some_dtypes, values

DECOUPLED = {"decoupled_weight_decay": True}
MOMENTUM = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, **DECOUPLED}
# Options with decoupled decay; each also runs with the decay independent of lr.
CASES = {
    "sgdw": Case("SGD", {"lr": 0.05, "weight_decay": 0.1, **DECOUPLED}),
    "sgdw-maximize": Case("SGD", {"lr": 0.05, "weight_decay": 0.1, "maximize": True, **DECOUPLED}),
    "sgdw-momentum": Case("SGD", MOMENTUM),
    "sgdw-damped": Case("SGD", {**MOMENTUM, "momentum": 0.8, "dampening": 0.3}),
    "sgdw-nesterov": Case("SGD", {**MOMENTUM, "nesterov": True}),
    "sgdw-strong": Case("SGD", {**MOMENTUM, "weight_decay": 0.9, "maximize": True}),
    "adam-decoupled": Case("Adam", {"lr": 0.01, "weight_decay": 0.1, **DECOUPLED}),
    "adamw": Case("AdamW", {"lr": 0.01, "weight_decay": 0.05}),
    "adamw-amsgrad": Case("AdamW", {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True}),
    "adamw-maximize": Case("AdamW", {"lr": 0.01, "weight_decay": 0.3, "maximize": True}),
    "nadam": Case("NAdam", {"lr": 0.01, "weight_decay": 0.1, **DECOUPLED}),
    "radam": Case("RAdam", {"lr": 0.01, "weight_decay": 0.3, "maximize": True, **DECOUPLED}),
    "lion": Case("Lion", {"lr": 0.01, "weight_decay": 0.3}),
}
each_case = pytest.mark.parametrize("case", **by_id(CASES))
INDEPENDENT = {"lr_independent_weight_decay": True}
each_kind = pytest.mark.parametrize("more", [{}, INDEPENDENT], ids=["times lr", "independent"])
SMALL = [torch.float32, torch.bfloat16, torch.float16, torch.complex64]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=1e-14)


def run_beside(case: Case, more: dict[str, Any], rates: list[float]) -> tuple[Any, Any]:
    """Ours and torch's, with one learning rate after the other."""
    ours = case.ours(draw(SIZES, dtype=torch.float64), **more)
    theirs = case.theirs(draw(SIZES, torch.device("cpu"), torch.float64), **more)
    for seed, lr in enumerate(rates):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = lr
            train(optimizer, 1, seed)
    return ours, theirs


@each_kind
@each_case
def test_formula(case: Case, more: dict[str, Any]) -> None:
    ours, theirs = run_beside(case, more, [case.options["lr"]] * 5)
    assert_close(params_of(ours), params_of(theirs))
    for name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        found, expected = (
            [state[name] for state in optimizer.state.values() if name in state]
            for optimizer in (ours, theirs)
        )
        assert_close(found, expected)


@each_kind
@each_case
def test_learning_rates_that_change(case: Case, more: dict[str, Any]) -> None:
    ours, theirs = run_beside(case, more, [0.1, 0.0, 0.03, 0.5, 0.0])
    assert_close(params_of(ours), params_of(theirs))


@each_kind
@each_case
def test_no_learning_rate(case: Case, more: dict[str, Any]) -> None:
    """Nothing changes: torch.distributed.checkpoint makes such steps to have states created."""
    params = [values(1000, dtype=torch.float64)]
    before = params[0].clone()
    optimizer = case.ours(params, **more)
    optimizer.param_groups[0]["lr"] = 0.0
    step_with(optimizer, [values(1000, dtype=torch.float64, seed=seed) for seed in (1, 2, 3)])
    assert torch.equal(params[0], before)


@each_case
def test_scheduler(case: Case) -> None:
    """With grads of zero only the decay is left: the same for any schedule."""
    found = []
    for schedule in (None, torch.optim.lr_scheduler.ExponentialLR):
        param = values(500, dtype=torch.float64)
        optimizer = case.ours([param], **INDEPENDENT)
        scheduler = schedule(optimizer, 0.1) if schedule else None
        for _ in range(5):
            step_with(optimizer, [torch.zeros_like(param)])
            if scheduler is not None:
                scheduler.step()
        found.append({"param": param})
        expected = values(500, dtype=torch.float64) * (1 - case.options["weight_decay"]) ** 5
        torch.testing.assert_close(param, expected, rtol=1e-13, atol=0)
    assert same_bits(*found)


@each_kind
@some_dtypes(*SMALL)
@each_case
def test_error_is_at_most_that_of_torch(case: Case, dtype: torch.dtype, more: Any) -> None:
    case = case.suited_to(dtype)
    ours, tolerance = values(3, 67, dtype=dtype, seed=1), TOLERANCES[dtype]
    theirs = ours.cpu().clone()
    exact = theirs.to(torch.complex128 if dtype.is_complex else torch.float64)
    fused = case.ours([ours], **more)
    plain, oracle = (case.theirs([param], **more) for param in (theirs, exact))
    for seed in range(8):
        ours.grad = values(3, 67, dtype=dtype, seed=2 + seed)
        theirs.grad, exact.grad = ours.grad.cpu(), ours.grad.cpu().to(exact.dtype)
        for each in (fused, plain, oracle):
            each.step()
    expected = results(oracle, exact)
    honest, found = results(plain, theirs), results(fused, ours)
    for name in expected:
        truth = oracles.exact(expected[name])
        limit = tolerance.factor * np.abs(oracles.exact(honest[name]) - truth).max()
        limit += tolerance.floor * np.abs(truth).max()
        assert np.abs(oracles.exact(found[name]) - truth).max() <= limit, name


@each_kind
@pytest.mark.parametrize("decay", [1e-4, 1e-6])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_small_decay_is_not_lost_in_the_factor(name: str, decay: float, more: Any) -> None:
    """1 - decay as one float32 is off by up to 3e-8, always to the same side."""
    param = values(20000).abs() + 1
    before = oracles.exact(param)
    optimizer = getattr(fusedopt, name)(
        [param], lr=1.0, weight_decay=decay, decoupled_weight_decay=True, **more
    )
    steps = 200
    step_with(optimizer, [torch.zeros_like(param)] * steps)
    shrunk = np.mean(1 - oracles.exact(param) / before)
    assert shrunk == pytest.approx(1 - (1 - decay) ** steps, rel=0.01, abs=1e-7)


def test_groups() -> None:
    """One with torch's L2, one decoupled, one independent, one without any."""
    kinds = [{}, DECOUPLED, {**DECOUPLED, **INDEPENDENT}, {"weight_decay": 0.0}]
    params = draw([50] * 4, dtype=torch.float64)
    theirs = [param.cpu().clone() for param in params]
    groups = [{"params": [param], **kind} for param, kind in zip(params, kinds, strict=True)]
    optimizer = fusedopt.SGD(groups, lr=0.1, weight_decay=0.2, momentum=0.9)
    torchs = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    for seed in range(4):
        set_grads(params, seed)
        set_grads(theirs, seed)
        optimizer.step()
        theirs[0].grad += 0.2 * theirs[0]
        theirs[1].mul_(1 - 0.1 * 0.2)
        theirs[2].mul_(1 - 0.2)
        torchs.step()
    assert_close(params, theirs)


@each_kind
@each_case
def test_params_without_grads_do_not_decay(case: Case, more: dict[str, Any]) -> None:
    params = [values(30), values(30)]
    optimizer = case.ours(params, **more)
    before = params[1].clone()
    for seed in range(2):
        params[0].grad = values(30, seed=seed)
        optimizer.step()
    assert torch.equal(params[1], before)


@pytest.mark.parametrize("options", [{}, DECOUPLED, {**DECOUPLED, **INDEPENDENT}], ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_without_decay_all_kinds_are_one(name: str, options: dict[str, Any]) -> None:
    """Infinite weights included, which a multiplication by 1 - 0 would leave alone, too."""
    found = []
    for each in ({}, options):
        param = values(400)
        param[7] = torch.inf
        optimizer = getattr(fusedopt, name)([param], lr=0.1, weight_decay=0.0, **each)
        step_with(optimizer, [values(400, seed=seed) for seed in (1, 2)])
        found.append(results(optimizer, param))
    assert same_bits(*found)


@each_kind
@each_case
@some_dtypes(torch.float32, torch.float64)
def test_options_as_tensors(case: Case, more: dict[str, Any], dtype: torch.dtype) -> None:
    """Of one element, on the CPU: the same bits as numbers. Those here are exact in both dtypes."""
    found = []
    for wrap in (float, lambda number: on_host(number, dtype=dtype)):
        options = {"lr": wrap(0.0625), "weight_decay": wrap(0.125)}
        if case.takes("betas"):
            options["betas"] = (wrap(0.875), wrap(0.96875))
        param = values(400)
        optimizer = case.ours([param], **options, **more)
        step_with(optimizer, [values(400, seed=seed) for seed in (1, 2, 3)])
        found.append(results(optimizer, param))
    assert same_bits(*found)


@each_kind
@each_case
def test_checkpoints(case: Case, more: dict[str, Any]) -> None:
    """A group of torch's, which knows nothing of it, leaves this optimizer's kind of decay."""
    ours = values(60, dtype=torch.float64)
    theirs = ours.cpu().clone()
    optimizer, plain = case.ours([ours], **more), case.theirs([theirs], **more)
    ours.grad, theirs.grad = (values(60, dtype=torch.float64).to(p.device) for p in (ours, theirs))
    plain.step()
    ours.copy_(theirs)
    saved = copy.deepcopy(plain.state_dict())
    group = saved["param_groups"][0]
    group["weight_decay"] = case.options["weight_decay"]
    if "decoupled_weight_decay" in group:  # torch's Adam has it, its SGD has not
        group["decoupled_weight_decay"] = True
    optimizer.load_state_dict(saved)
    for each in (optimizer, plain):
        each.step()
    assert_close([ours], [theirs])
    again = case.ours([ours.clone()], **more)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (again, optimizer):
        step_with(each, [values(60, dtype=torch.float64, seed=3)])
    assert torch.equal(bits(params_of(again)[0]), bits(ours))


@in_pairs(
    pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"]),
    some_dtypes(*WORK_DTYPES, torch.float16),
    together(each_kind, each_case),
)
@on_both_drivers
def test_on_both_drivers(
    side: Side, case: Case, more: Any, dtype: torch.dtype, captured: bool
) -> Results:
    case = case.suited_to(dtype).but(**more)
    optimizer = warmed_up(side, case, dtype)
    step = side.replayable(optimizer.step) if captured else optimizer.step
    for seed in range(2, 5):
        set_grads(optimizer, seed, in_place=True)
        step()
    return record(optimizer)


@each_kind
@each_case
@on_both_drivers
def test_numbers_on_the_gpu(side: Side, case: Case, more: dict[str, Any]) -> Results:
    """lr and decay that are tensors there change between replays."""
    numbers = {"lr": side.tensor(0.0625), "weight_decay": side.tensor(0.125)}
    at_first = numbers if side.is_gpu else {"lr": 0.0625, "weight_decay": 0.125}
    optimizer = warmed_up(side, case.but(**more, **at_first))
    step = side.replayable(optimizer.step)
    for seed, (lr, decay) in enumerate([(0.5, 0.25), (0.0, 0.5), (0.125, 0.0625)], 2):
        numbers["lr"].fill_(lr)
        numbers["weight_decay"].fill_(decay)
        if not side.is_gpu:
            optimizer.param_groups[0].update({"lr": lr, "weight_decay": decay})
        set_grads(optimizer, seed, in_place=True)
        step()
    return record(optimizer)
