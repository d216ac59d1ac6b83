"""Adam with betas[0] == 0: no exp_avg, which would be the grad, and the same results."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from support.device import STEPS_ON_DEVICE
from support.equality import assert_equal, assert_same_math, same_bits
from support.optimizers import Build, Case, like_torch, step_with, take_step, train
from support.snapshots import copy_params, record, refused, results, resumed, through_a_file
from support.tensors import by_id, make_params, params_of, some_dtypes, values

Options = dict[str, Any]
WITHOUT = {name: Case(name, {"betas": (0.0, 0.999), "lr": 0.01}) for name in ("Adam", "AdamW")}
each_without = pytest.mark.parametrize("case", **by_id(WITHOUT))
ADAMW = WITHOUT["AdamW"]
# What may be combined with it, and the dtypes of the param.
COMBINED: dict[str, tuple[torch.dtype, Options]] = {
    "float64": (torch.float64, {}),
    "float32": (torch.float32, {"weight_decay": 0.1}),
    "bfloat16": (torch.bfloat16, {"stochastic_rounding": True}),
    "float16": (torch.float16, {"state_dtype": torch.float32}),
    "complex": (torch.complex64, {}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
    "average": (torch.float32, {"ema_decay": 0.9}),
    "masters": (torch.bfloat16, {"master_weights": "float32"}),
    "all": (
        torch.bfloat16,
        {"master_weights": "split", "state_dtype": torch.bfloat16, "amsgrad": True,
         "ema_decay": 0.9, "max_grad_norm": 1.0, "maximize": True},
    ),
}  # fmt: skip
each_combination = pytest.mark.parametrize(("dtype", "options"), **by_id(COMBINED))


@each_without
@each_combination
def test_the_same_bits_as_with_it(case: Case, dtype: torch.dtype, options: Options) -> None:
    """A beta1 that is nearly 0 rounds to it in the step, but keeps exp_avg: then it is the grad."""
    found = []
    for beta1 in (0.0, 1e-300):
        param = values(5, 61, dtype=dtype)
        optimizer = case.ours([param], betas=(beta1, 0.99), **options)
        step_with(optimizer, [values(5, 61, dtype=dtype, seed=seed) for seed in (1, 2, 3)])
        found.append(results(optimizer, param))
    assert "exp_avg" not in found[0]
    assert "exp_avg" in found[1]
    del found[1]["exp_avg"]
    assert same_bits(*found)


@each_without
@pytest.mark.parametrize("amsgrad", [False, True])
@like_torch
def test_the_same_numbers_as_torch(build: Build, case: Case, amsgrad: bool) -> Any:
    optimizer = build(make_params(), amsgrad=amsgrad)
    train(optimizer, steps=5)
    if build == case.theirs:
        for entries in optimizer.state.values():
            del entries["exp_avg"]
    return record(optimizer), [list(entries) for entries in optimizer.state.values()]


@some_dtypes(torch.float32, torch.bfloat16)
def test_memory(dtype: torch.dtype) -> None:
    param = values(1000, dtype=dtype)
    optimizer = ADAMW.ours([param])
    step_with(optimizer, [torch.ones_like(param)])
    kept = sum(t.nbytes for t in optimizer.state[param].values())
    assert kept == param.nbytes + optimizer.state[param]["step"].nbytes


CHAINS: dict[str, Callable[[Case], list[Build]]] = {
    "from torch": lambda case: [case.theirs, case.ours],
    "to torch": lambda case: [case.ours, case.theirs],
    "there and back": lambda case: [case.ours, case.theirs, case.ours],
    "ours": lambda case: [case.ours, case.ours],
}


@each_without
@pytest.mark.parametrize("direction", CHAINS)
def test_checkpoints(case: Case, direction: str) -> None:
    first, *others = CHAINS[direction](case)
    optimizer = first(make_params())
    train(optimizer, steps=2)
    for index, build in enumerate(others, start=1):
        optimizer = resumed(build, optimizer)
        if build == case.ours:
            assert all("exp_avg" not in entries for entries in optimizer.state.values())
        train(optimizer, steps=2, first=2 * index)
    reference = case.theirs(make_params())
    train(reference, steps=2 * len(others) + 2)
    assert_same_math(params_of(optimizer), params_of(reference))


@each_without
def test_state_dict_has_all_that_torchs_has(case: Case) -> None:
    """And the optimizer has not: the zeros are of the state dict alone."""
    optimizer, twin = case.ours(make_params(torch.float32)), case.theirs(make_params())
    for each in (optimizer, twin):
        each.param_groups[0]["params"][1].requires_grad_(False)
        take_step(each, 0)
        assert each.state[each.param_groups[0]["params"][1]] is not None
    found, expected = optimizer.state_dict()["state"], twin.state_dict()["state"]
    assert {at: set(entries) for at, entries in found.items()} == {
        at: set(entries) for at, entries in expected.items()
    }
    for at, param in enumerate(optimizer.param_groups[0]["params"]):
        zeros = found[at]["exp_avg"]
        assert zeros.shape == param.shape
        assert zeros.dtype == param.dtype
        assert not zeros.any()
        assert "exp_avg" not in optimizer.state[param]


def test_zeros_of_the_state_dict_have_the_state_dtype() -> None:
    param = values(4, dtype=torch.float32)
    optimizer = ADAMW.ours([param], state_dtype=torch.bfloat16)
    assert optimizer.state_dict()["state"] == {}
    step_with(optimizer, [torch.ones(4)])
    assert optimizer.state_dict()["state"][0]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("copies", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_hooks_of_state_dict_see_it(copies: Any, prepend: bool) -> None:
    """In the optimizer and in copies of it; a hook that is put before all others, too."""
    optimizer = ADAMW.ours(make_params())
    train(optimizer)
    for each in (optimizer, copies(optimizer)):
        seen = []
        each.register_state_dict_post_hook(
            lambda _, saved, seen=seen: seen.append(set(saved["state"][0])), prepend=prepend
        )
        each.load_state_dict(each.state_dict())
        each.state_dict()
        assert len(seen) == 2
        assert all("exp_avg" in names for names in seen)


@each_without
@pytest.mark.parametrize("copies", [None, copy.deepcopy], ids=["itself", "a copy"])
def test_switched_on_and_off(case: Case, copies: Any) -> None:
    """Switched on, exp_avg starts from zeros; switched off, it is dropped. All else goes on."""
    optimizer, twin = case.ours(make_params()), case.theirs(make_params())
    for seed, beta1 in enumerate((0.0, 0.0, 0.9, 0.9, 0.0, 0.9)):
        if copies is not None:
            optimizer = copies(optimizer)
        for each in (optimizer, twin):
            each.param_groups[0]["betas"] = (beta1, 0.999)
        if beta1 > 0 and "exp_avg" not in optimizer.state[optimizer.param_groups[0]["params"][0]]:
            for entries in twin.state.values():
                entries["exp_avg"].zero_()
        for each in (optimizer, twin):
            take_step(each, seed)
        assert_same_math(params_of(optimizer), params_of(twin))
        for entries in optimizer.state.values():
            assert ("exp_avg" in entries) == (beta1 > 0)
            assert float(entries["step"]) == seed + 1


def test_switched_off_in_the_checkpoint() -> None:
    """The options of torch are loaded, so that the loaded betas decide."""
    saved = ADAMW.ours(make_params(), betas=(0.9, 0.999))
    train(saved)
    checkpoint = saved.state_dict()
    checkpoint["param_groups"][0]["betas"] = (0, 0.999)
    optimizer = ADAMW.ours(copy_params(saved), betas=(0.9, 0.999))
    optimizer.load_state_dict(through_a_file(checkpoint))
    assert all("exp_avg" not in entries for entries in optimizer.state.values())
    train(optimizer)


def test_a_checkpoint_without_it_is_refused_where_it_is_used() -> None:
    optimizer = ADAMW.ours([("w", Parameter(torch.ones(3)))], betas=(0.9, 0.999))
    train(optimizer)
    checkpoint = optimizer.state_dict()
    checkpoint["state"] = {at: dict(entries) for at, entries in checkpoint["state"].items()}
    del checkpoint["state"][0]["exp_avg"]
    with refused(optimizer, ValueError, r"'w' .*has no 'exp_avg'"):
        optimizer.load_state_dict(checkpoint)
    checkpoint["param_groups"][0]["betas"] = (0.0, 0.999)
    optimizer.load_state_dict(checkpoint)


@pytest.mark.parametrize("missing", ["exp_avg_sq", "step"])
def test_all_else_is_required_still(missing: str) -> None:
    optimizer = ADAMW.ours([("w", Parameter(torch.ones(3)))])
    train(optimizer)
    checkpoint = optimizer.state_dict()
    checkpoint["state"] = {at: dict(entries) for at, entries in checkpoint["state"].items()}
    del checkpoint["state"][0][missing]
    (param,) = params_of(optimizer)
    with pytest.raises(ValueError, match=f"'w' .*has no '{missing}'"):
        optimizer.load_state_dict(checkpoint)
    del optimizer.state[optimizer.param_groups[0]["params"][0]][missing]
    before = param.clone()
    with pytest.raises(ValueError, match=f"'w' .*has no '{missing}'"):
        train(optimizer)
    assert torch.equal(param, before)


@pytest.mark.skipif(not STEPS_ON_DEVICE, reason="betas on a GPU, which the host does not know")
def test_a_beta1_that_only_the_gpu_knows_keeps_it() -> None:
    found = []
    for beta1 in (torch.tensor(0.0), 0.0):
        param = values(300)
        optimizer = ADAMW.ours([param], betas=(beta1, 0.99), capturable=True)
        step_with(optimizer, [values(300, seed=seed) for seed in (1, 2)])
        assert ("exp_avg" in optimizer.state[param]) == isinstance(beta1, Tensor)
        found.append(param)
    assert_equal(*found)


@each_without
def test_what_rests_while_it_is_switched_on_is_saved_with_it(case: Case) -> None:
    """Its next step makes one of zeros, and so do state dicts."""
    params = [values(9), values(9, seed=1)]
    optimizer = case.ours(params)
    step_with(optimizer, [values(9, seed=2)] * 2)
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    params[1].grad = None
    params[0].grad = values(9, seed=3)
    optimizer.step()
    assert "exp_avg" not in optimizer.state[params[1]]
    saved = optimizer.state_dict()
    assert not saved["state"][1]["exp_avg"].any()
    other = case.ours([param.detach().clone().requires_grad_() for param in params])
    other.load_state_dict(copy.deepcopy(saved))
    for each in (optimizer, other):
        step_with(each, [values(9, seed=4)] * 2)
    assert same_bits(record(optimizer), record(other))
