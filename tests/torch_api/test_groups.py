"""param_groups edited between steps: options switched on, off and moved, as torch allows."""

from typing import Any

import pytest

from support.equality import assert_equal
from support.optimizers import Build, Case, each_adam, like_torch, take_step, train
from support.snapshots import record
from support.tensors import by_id, make_params, params_of

# Optimizer, its options, and what is edited after two steps and after four.
EDITS: dict[str, tuple[Case, dict[str, Any], dict[str, Any]]] = {
    "SGD lr": (Case("SGD"), {"lr": 0.3}, {"lr": 0.0}),
    "SGD momentum on": (Case("SGD"), {"momentum": 0.9}, {"momentum": 0.5}),
    "SGD momentum off and on": (Case("SGD", {"momentum": 0.9}), {"momentum": 0}, {"momentum": 0.9}),
    "SGD momentum on with dampening": (
        Case("SGD", {"dampening": 0.4}),
        {"momentum": 0.9},
        {"dampening": 0},
    ),
    "SGD nesterov": (Case("SGD", {"momentum": 0.9}), {"nesterov": True}, {"nesterov": False}),
    "SGD weight_decay": (Case("SGD"), {"weight_decay": 0.1}, {"weight_decay": 0}),
    "SGD maximize": (Case("SGD", {"momentum": 0.9}), {"maximize": True}, {"maximize": False}),
    "Adam betas": (Case("Adam"), {"betas": (0.5, 0.9)}, {"betas": (0.95, 0.99)}),
    "Adam eps": (Case("Adam"), {"eps": 1e-2}, {"eps": 1e-12}),
    "Adam weight_decay": (Case("Adam"), {"weight_decay": 0.1}, {"weight_decay": 0}),
    "Adam decoupled": (
        Case("Adam", {"weight_decay": 0.1}),
        {"decoupled_weight_decay": True},
        {"decoupled_weight_decay": False},
    ),
    "Adam amsgrad off and on": (
        Case("Adam", {"amsgrad": True}),
        {"amsgrad": False},
        {"amsgrad": True},
    ),
    "AdamW weight_decay": (Case("AdamW"), {"weight_decay": 0.0}, {"weight_decay": 0.5}),
    "AdamW maximize": (Case("AdamW"), {"maximize": True}, {"maximize": False}),
    "RMSprop alpha": (Case("RMSprop"), {"alpha": 0.5}, {"alpha": 1.0, "eps": 1e-2}),
    "RMSprop momentum off and on": (
        Case("RMSprop", {"momentum": 0.9}),
        {"momentum": 0},
        {"momentum": 0.5, "weight_decay": 0.1},
    ),
    "RMSprop centered off and on": (
        Case("RMSprop", {"centered": True}),
        {"centered": False},
        {"centered": True},
    ),
    "Adagrad lr_decay": (Case("Adagrad"), {"lr_decay": 0.5}, {"lr_decay": 0, "lr": 0.5}),
    "Adagrad weight_decay": (Case("Adagrad"), {"weight_decay": 0.1}, {"weight_decay": 0}),
    "Adadelta rho": (Case("Adadelta"), {"rho": 0.5}, {"rho": 0.95, "eps": 1e-2}),
    "Adamax betas": (Case("Adamax"), {"betas": (0.5, 0.9)}, {"betas": (0.95, 0.99)}),
    "NAdam lr": (Case("NAdam", {"weight_decay": 0.1}), {"lr": 0.3}, {"lr": 0.0}),
    "NAdam decoupled": (
        Case("NAdam", {"weight_decay": 0.1}),
        {"decoupled_weight_decay": True},
        {"decoupled_weight_decay": False},
    ),
    "NAdam momentum_decay": (Case("NAdam"), {"momentum_decay": 1.0}, {"momentum_decay": 0}),
    "RAdam betas": (Case("RAdam"), {"betas": (0.5, 0.5)}, {"betas": (0.95, 0.9)}),
    "RAdam decoupled": (
        Case("RAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        {"decoupled_weight_decay": False},
        {"decoupled_weight_decay": True},
    ),
    "ASGD lr": (Case("ASGD", {"lambd": 0.5}), {"lr": 0.3}, {"lr": 0.0}),
    "ASGD t0": (Case("ASGD", {"t0": 0}), {"t0": 1e6}, {"t0": 2}),
    "ASGD lambd": (Case("ASGD"), {"lambd": 0.5}, {"alpha": 2.0, "weight_decay": 0.1}),
    "Rprop lr": (Case("Rprop"), {"lr": 5.0}, {"lr": 0.0}),
    "Rprop etas": (Case("Rprop"), {"etas": (0.1, 3.0)}, {"step_sizes": (0.02, 0.03)}),
    "Rprop maximize": (Case("Rprop"), {"maximize": True}, {"maximize": False}),
    "Lion betas": (Case("Lion"), {"betas": (0.2, 0.6)}, {"betas": (0.95, 0.98)}),
    "Lion weight_decay": (Case("Lion"), {"weight_decay": 0.1}, {"weight_decay": 0, "lr": 0.1}),
}
LOW_BETAS = {"betas": (0.7, 0.8)}
# What one group may have beside lr, maximize and weight_decay.
MORE: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Adam": {**LOW_BETAS, "amsgrad": True},
    "AdamW": {**LOW_BETAS, "amsgrad": True},
    "RMSprop": {"alpha": 0.7, "momentum": 0.5, "centered": True, "eps": 1e-3},
    "Adagrad": {"lr_decay": 0.5, "eps": 1e-3},
    "Adadelta": {"rho": 0.5, "eps": 1e-3},
    "Adamax": LOW_BETAS,
    "NAdam": {**LOW_BETAS, "momentum_decay": 0.1},
    "RAdam": LOW_BETAS,
    "ASGD": {"lambd": 0.5, "alpha": 0.5, "t0": 1},
    "Rprop": {"etas": (0.3, 1.1), "step_sizes": (0.02, 0.03)},
    "Lion": LOW_BETAS,
}

each_plain_case = pytest.mark.parametrize("case", **by_id({name: Case(name) for name in MORE}))


@pytest.mark.parametrize(("case", "first", "second"), **by_id(EDITS))
@like_torch
def test_edit(build: Build, first: dict[str, Any], second: dict[str, Any]) -> Any:
    optimizer = build(make_params())
    for seed, edit in ((0, first), (2, second), (4, {})):
        train(optimizer, steps=2, first=seed)
        optimizer.param_groups[0].update(edit)
    return record(optimizer)


@each_adam
def test_amsgrad_switched_on_later(name: str) -> None:
    """torch raises KeyError here. Ours starts the maximum at the moment it is switched on."""
    optimizer, plain = (Case(name).ours(make_params()) for _ in range(2))
    train(optimizer, steps=2)
    train(plain, steps=2)
    optimizer.param_groups[0]["amsgrad"] = True
    take_step(optimizer, 2)
    take_step(plain, 2)
    assert_equal(params_of(optimizer), params_of(plain))
    for ours, theirs in zip(optimizer.state.values(), plain.state.values(), strict=True):
        assert_equal(ours["max_exp_avg_sq"], ours["exp_avg_sq"])
        assert_equal(ours["exp_avg_sq"], theirs["exp_avg_sq"])
        assert ours["step"].item() == 3


@each_plain_case
@like_torch
def test_each_group_has_its_own_options(build: Build, case: Case) -> Any:
    """lr, decay, betas and others per group, several of them, some without any parameter."""
    params = make_params()
    decay = {"weight_decay": 0.3} if case.takes("weight_decay") else {}
    optimizer = build(
        [
            {"params": params[:2], "lr": 0.1},
            {"params": []},
            {"params": params[2:4], "maximize": True, **decay},
            {"params": params[4:], **MORE[case.optimizer]},
        ]
    )
    train(optimizer)
    return record(optimizer)


@each_plain_case
def test_unknown_group_keys_are_kept(case: Case) -> None:
    """Schedulers and frameworks leave their own entries in groups."""
    optimizer = case.ours([{"params": make_params(), "note": "mine"}])
    optimizer.param_groups[0]["initial_lr"] = 0.1
    train(optimizer)
    assert optimizer.param_groups[0]["note"] == "mine"
    assert optimizer.state_dict()["param_groups"][0]["initial_lr"] == 0.1
