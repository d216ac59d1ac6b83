"""Cautious updates and cautious weight decay: which elements move, and which decay."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedopt
from support import oracles
from support.equality import bits, same_bits
from support.optimizers import Case, step_with
from support.pairs import in_pairs, together
from support.sides import WORK_DTYPES, Results, Side, on_both_drivers, warmed_up
from support.snapshots import record, results
from support.tensors import by_id, draw, set_grads, some_dtypes, values

UPDATE, DECAY = {"cautious_update": True}, {"cautious_weight_decay": True}
# Decays that show in bfloat16, and updates that lead across 0 as well.
DECOUPLED = {"weight_decay": 0.5, "decoupled_weight_decay": True}
CASES = {
    "sgdw": Case("SGD", {"lr": 0.25, **DECOUPLED}),
    "sgdw-momentum": Case("SGD", {"lr": 0.25, "momentum": 0.9, "dampening": 0.3, **DECOUPLED}),
    "sgdw-nesterov": Case("SGD", {"lr": 0.25, "momentum": 0.9, "nesterov": True, **DECOUPLED}),
    "adam": Case("Adam", {"lr": 0.25, **DECOUPLED}),
    "adamw": Case("AdamW", {"lr": 0.25, "weight_decay": 0.5}),
    "adamw-amsgrad": Case("AdamW", {"lr": 0.25, "weight_decay": 0.5, "amsgrad": True}),
    "adamw-maximize": Case("AdamW", {"lr": 0.25, "weight_decay": 0.5, "maximize": True}),
    "adamw-no-beta1": Case("AdamW", {"lr": 0.25, "weight_decay": 0.5, "betas": (0.0, 0.9)}),
    "adamw-lr-independent": Case(
        "AdamW", {"lr": 0.25, "weight_decay": 0.25, "lr_independent_weight_decay": True}
    ),
    "nadam": Case("NAdam", {"lr": 0.25, **DECOUPLED}),
    "radam": Case("RAdam", {"lr": 0.25, "betas": (0.9, 0.99), **DECOUPLED}),
    "lion": Case("Lion", {"lr": 0.25, "weight_decay": 0.5}),
}
each_case = pytest.mark.parametrize("case", **by_id(CASES))
each_kind = pytest.mark.parametrize(
    "caution", [UPDATE, DECAY, {**UPDATE, **DECAY}], ids=["update", "decay", "both"]
)
REAL = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
each_real_dtype = some_dtypes(*REAL)
OTHERS = ["RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop"]
STEPS = 7  # RAdam divides by the second moment from the sixth on


@each_kind
@each_case
def test_formula(case: Case, caution: dict[str, Any]) -> None:
    param = values(3000, dtype=torch.float64)
    optimizer, oracle = case.ours([param], **caution), case.oracle(param, **caution)
    for seed in range(1, STEPS + 1):
        grad = values(3000, dtype=torch.float64, seed=seed)
        oracle.step(grad)
        step_with(optimizer, [grad])
    found = results(optimizer, param)
    for name, expected in oracle.results().items():
        np.testing.assert_allclose(oracles.exact(found[name]), expected, rtol=1e-12, atol=1e-13)


def last_steps(case: Case, dtype: torch.dtype, *kinds: dict[str, Any]) -> list[Any]:
    """The params before and after a step of each kind, with what else there is; and its grad.

    All of them from the state that steps of no caution have left, so they differ in nothing else.
    """
    case = case.suited_to(dtype).but(stochastic_rounding=False)  # whose draws are the weight's, too
    start = values(2500, dtype=dtype)
    optimizer = case.ours([start])
    step_with(optimizer, [values(2500, dtype=dtype, seed=seed) for seed in range(1, STEPS)])
    saved, grad = optimizer.state_dict(), values(2500, dtype=dtype, seed=STEPS)
    after = []
    for kind in kinds:
        param = start.clone()
        other = case.ours([param])
        other.load_state_dict(copy.deepcopy(saved))
        other.param_groups[0].update(kind)
        step_with(other, [grad])
        after.append(results(other, param))
    return [start, grad, *after]


@each_real_dtype
@each_case
def test_what_goes_with_the_grad_moves_and_the_rest_rests(case: Case, dtype: torch.dtype) -> None:
    """To the bit."""
    no_decay = {"weight_decay": 0.0}
    before, grad, plain, cautious = last_steps(case, dtype, no_decay, {**no_decay, **UPDATE})
    grad = -grad if case.options.get("maximize") else grad
    update = before.double() - plain["param"].double()
    moves = update.sign() == grad.double().sign()
    assert torch.equal(cautious["param"][moves], plain["param"][moves])
    assert torch.equal(cautious["param"][~moves], before[~moves])
    has_momentum = case.optimizer != "SGD" or "momentum" in case.options
    if case.options.get("betas") != (0.0, 0.9) and has_momentum:
        assert 50 < int((~moves).sum()) < 2000
    for state in (plain, cautious):
        del state["param"]
    assert same_bits(plain, cautious)


@each_real_dtype
@each_case
def test_what_leads_away_from_zero_does_not_decay(case: Case, dtype: torch.dtype) -> None:
    """To the bit."""
    before, _, plain, decayed, cautious = last_steps(case, dtype, {"weight_decay": 0.0}, {}, DECAY)
    update = before.double() - plain["param"].double()
    grows = update * before.double() < 0
    assert 50 < int(grows.sum()) < 2450
    assert torch.equal(cautious["param"][grows], plain["param"][grows])
    decays = ~grows & (update != 0)  # of 0 it may be the rounding alone
    assert torch.equal(cautious["param"][decays], decayed["param"][decays])
    assert bool((decayed["param"] != plain["param"]).any())


@each_case
def test_both_at_once(case: Case) -> None:
    """Decay asks where the update leads that is made: where there is none, it decays."""
    before, grad, plain, both = last_steps(
        case, torch.float32, {"weight_decay": 0.0}, {**UPDATE, **DECAY}
    )
    grad = -grad if case.options.get("maximize") else grad
    update = before.double() - plain["param"].double()
    rests = update.sign() != grad.double().sign()
    rate = case.options["weight_decay"]
    if not case.options.get("lr_independent_weight_decay"):
        rate *= case.options["lr"]
    assert torch.equal(both["param"][rests], before[rests] * (1 - rate))
    grows = ~rests & (update * before.double() < 0)
    assert torch.equal(both["param"][grows], plain["param"][grows])


@each_kind
@each_case
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_grads_show(bad: float, case: Case, caution: dict[str, Any]) -> None:
    """NaN is neither with nor against a grad: it must not vanish."""
    found = []
    for kind in ({}, caution):
        param = values(40)
        optimizer = case.ours([param], **kind)
        grad = values(40, seed=1)
        grad[:20] = bad
        step_with(optimizer, [grad])
        found.append(param.isnan())
    assert torch.equal(*found)
    if case.optimizer != "Lion":  # the sign of NaN is 0, as torch has it
        assert bool(found[0].any()) == (bad != bad or case.optimizer in ("Adam", "AdamW", "NAdam"))


@each_case
def test_grads_of_zero_move_nothing(case: Case) -> None:
    param = values(100)
    optimizer = case.ours([param], **UPDATE, weight_decay=0.0)
    step_with(optimizer, [values(100, seed=seed) for seed in (1, 2)])
    before = param.clone()
    step_with(optimizer, [torch.zeros(100, device=param.device)] * 3)
    assert torch.equal(param, before)


def test_signs_of_small_numbers() -> None:
    """Their products would be 0."""
    grad = values(200, seed=1).sign() * 1e-30
    found = []
    for scale in (1.0, 1e-30):
        param = values(200) * scale
        options = {**DECOUPLED, **UPDATE, **DECAY, "lr_independent_weight_decay": True}
        optimizer = fusedopt.SGD([param], lr=0.5 * scale * 1e30, momentum=0.9, **options)
        step_with(optimizer, [grad, grad * values(200, seed=2).sign(), grad])
        found.append(param / scale)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_groups() -> None:
    """Each has its own, and may change it between steps."""
    params = draw([50] * 3, dtype=torch.float64)
    kinds: list[dict[str, Any]] = [{}, UPDATE, DECAY]
    groups = [{"params": [param], **kind} for param, kind in zip(params, kinds, strict=True)]
    optimizer = fusedopt.AdamW(groups, lr=0.1, weight_decay=0.5)
    alone = [param.clone() for param in params]
    others = [
        fusedopt.AdamW([param], lr=0.1, weight_decay=0.5, **kind)
        for param, kind in zip(alone, kinds, strict=True)
    ]
    for seed in range(4):
        if seed == 2:
            for group in (optimizer.param_groups[1], others[1].param_groups[0]):
                group.update(cautious_update=False, cautious_weight_decay=True)
        set_grads(optimizer, seed)
        for mine, its in zip(params, alone, strict=True):
            assert mine.grad is not None
            its.grad = mine.grad.clone()
        for each in (optimizer, *others):
            each.step()
    for mine, its in zip(params, alone, strict=True):
        assert torch.equal(bits(mine), bits(its))


@each_kind
def test_checkpoints(caution: dict[str, Any]) -> None:
    """In groups that were given them; an optimizer that loads them keeps to its own."""
    param = values(60)
    optimizer = fusedopt.AdamW([param], lr=0.1, weight_decay=0.5, **caution)
    step_with(optimizer, [values(60, seed=1)])
    saved = copy.deepcopy(optimizer.state_dict())
    assert caution.items() <= saved["param_groups"][0].items()
    same, plain = param.clone(), param.clone()
    others = [fusedopt.AdamW([same], **caution), fusedopt.AdamW([plain])]
    for each in others:
        each.load_state_dict(copy.deepcopy(saved))
    assert not {*UPDATE, *DECAY} & others[1].state_dict()["param_groups"][0].keys()
    for each in (optimizer, *others):
        step_with(each, [values(60, seed=2)])
    assert torch.equal(bits(param), bits(same))
    assert not torch.equal(param, plain)


@pytest.mark.parametrize("name", OTHERS)
def test_others_have_none(name: str) -> None:
    with pytest.raises(TypeError, match="cautious_update"):
        getattr(fusedopt, name)([values(3)], cautious_update=True)


def masters(dtype: torch.dtype) -> dict[str, Any]:
    return {"master_weights": "split"} if dtype == torch.bfloat16 else {}


@each_kind
@some_dtypes(torch.bfloat16, torch.float16)
@each_case
def test_masters_are_weights_like_others(
    case: Case, dtype: torch.dtype, caution: dict[str, Any]
) -> None:
    """Compared with float32 params whose grads are those of 16 bits."""
    case = case.suited_to(dtype)
    param = values(500, dtype=dtype)
    wide = param.float()
    kind = "split" if dtype == torch.bfloat16 else "float32"
    optimizer = case.ours([param], master_weights=kind, state_dtype=torch.float32, **caution)
    other = case.ours([wide], **caution)
    for seed in range(1, STEPS):
        grad = values(500, dtype=dtype, seed=seed)
        step_with(optimizer, [grad])
        step_with(other, [grad.float()])
    found: list[Tensor] = optimizer.fp32_params()
    assert torch.equal(bits(found[0]), bits(wide))


@in_pairs(
    pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"]),
    some_dtypes(*WORK_DTYPES, torch.float16),
    together(each_kind, each_case),
)
@on_both_drivers
def test_on_both_drivers(
    side: Side, case: Case, caution: Any, dtype: torch.dtype, captured: bool
) -> Results:
    case = case.suited_to(dtype).but(**caution, **masters(dtype))
    optimizer = warmed_up(side, case, dtype)
    step = side.replayable(optimizer.step) if captured else optimizer.step
    for seed in range(2, 5):
        set_grads(optimizer, seed, in_place=True)
        step()
    return record(optimizer)


@each_kind
@each_case
def test_ascending_by_a_negative_lr(case: Case, caution: dict[str, Any]) -> None:
    """As ``maximize``, which turns grads round in place of steps; a group may have one."""
    found = []
    for sign in (1.0, -1.0):
        param = values(600, dtype=torch.float64)
        ascends = bool(case.options.get("maximize", False)) != (sign < 0)
        options = {"maximize": ascends, "lr_independent_weight_decay": True, "weight_decay": 0.25}
        optimizer = case.ours([param], **{**options, **caution})
        optimizer.param_groups[0]["lr"] = sign * case.options["lr"]
        step_with(
            optimizer, [values(600, dtype=torch.float64, seed=seed) for seed in range(1, STEPS + 1)]
        )
        found.append(param)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["sgdw-momentum", "sgdw-nesterov"])
def test_an_infinite_update_rests_too(name: str) -> None:
    """It is not finite, but it goes against the grad: only NaN is no direction at all."""
    param = values(10)
    optimizer = CASES[name].ours([param], **UPDATE, weight_decay=0.0)
    step_with(optimizer, [values(10, seed=1)])
    optimizer.state[param]["momentum_buffer"].fill_(torch.inf)
    before = param.clone()
    step_with(optimizer, [torch.full_like(param, -1.0)])
    assert torch.equal(param, before)


@pytest.mark.parametrize("option", [UPDATE, DECAY], ids=["update", "decay"])
@pytest.mark.parametrize("name", OTHERS)
def test_groups_of_others_have_none(name: str, option: dict[str, bool]) -> None:
    """Not even where decay is decoupled: nothing would come of it."""
    (key,) = option
    group = {"params": [values(3)], **option, "decoupled_weight_decay": True}
    with pytest.raises(ValueError, match=f"{key} is not for {name}"):
        getattr(fusedopt, name)([group])
    optimizer = getattr(fusedopt, name)([values(3)])
    optimizer.param_groups[0].update(option, decoupled_weight_decay=True)
    with pytest.raises(ValueError, match=f"{key} is not for {name}"):
        step_with(optimizer, [values(3)])
