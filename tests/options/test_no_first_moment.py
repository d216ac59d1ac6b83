"""Adam with betas[0] == 0: no exp_avg, which would be the grad, and the same results."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.device import STEPS_ON_DEVICE
from support.equality import assert_equal, assert_same_math, same_bits
from support.optimizers import each_adam, step_with, take_step, train
from support.snapshots import copy_params, refused, results, resumed, through_a_file
from support.tensors import by_id, make_params, params_of, some_dtypes, values

Options = dict[str, Any]
NONE: Options = {"betas": (0.0, 0.999), "lr": 0.01}
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


def ours(name: str, params: Any, **options: Any) -> Any:
    return getattr(fusedopt, name)(params, **{**NONE, **options})


def torchs(name: str, params: Any, **options: Any) -> Any:
    return getattr(torch.optim, name)(params, foreach=False, **{**NONE, **options})


@each_adam
@each_combination
def test_the_same_bits_as_with_it(name: str, dtype: torch.dtype, options: Options) -> None:
    """A beta1 that is nearly 0 rounds to it in the step, but keeps exp_avg: then it is the grad."""
    found = []
    for beta1 in (0.0, 1e-300):
        param = values(5, 61, dtype=dtype)
        optimizer = ours(name, [param], betas=(beta1, 0.99), **options)
        step_with(optimizer, [values(5, 61, dtype=dtype, seed=seed) for seed in (1, 2, 3)])
        found.append(results(optimizer, param))
    assert "exp_avg" not in found[0]
    assert "exp_avg" in found[1]
    del found[1]["exp_avg"]
    assert same_bits(*found)


@each_adam
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_same_numbers_as_torch(name: str, amsgrad: bool) -> None:
    made = [build(name, make_params(), amsgrad=amsgrad) for build in (ours, torchs)]
    for optimizer in made:
        train(optimizer, steps=5)
    assert_same_math(*map(params_of, made))
    for param, twin in zip(*map(params_of, made), strict=True):
        state, expected = made[0].state[param], made[1].state[twin]
        assert list(state) == [key for key in expected if key != "exp_avg"]
        assert_same_math(state, {key: expected[key] for key in state})


@some_dtypes(torch.float32, torch.bfloat16)
def test_memory(dtype: torch.dtype) -> None:
    param = values(1000, dtype=dtype)
    optimizer = ours("AdamW", [param])
    step_with(optimizer, [torch.ones_like(param)])
    kept = sum(t.nbytes for t in optimizer.state[param].values())
    assert kept == param.nbytes + optimizer.state[param]["step"].nbytes


@each_adam
@pytest.mark.parametrize("direction", ["from torch", "to torch", "there and back", "ours"])
def test_checkpoints(name: str, direction: str) -> None:
    def mine(params: Any) -> Any:
        return ours(name, params)

    def twin(params: Any) -> Any:
        return torchs(name, params)

    builds = {
        "from torch": [twin, mine],
        "to torch": [mine, twin],
        "there and back": [mine, twin, mine],
        "ours": [mine, mine],
    }[direction]
    reference = twin(make_params())
    train(reference, steps=2 * len(builds))
    optimizer = builds[0](make_params())
    train(optimizer, steps=2)
    for index, build in enumerate(builds[1:], start=1):
        optimizer = resumed(build, optimizer)
        if build is mine:
            assert all("exp_avg" not in entries for entries in optimizer.state.values())
        train(optimizer, steps=2, first=2 * index)
    assert_same_math(params_of(optimizer), params_of(reference))


@each_adam
def test_state_dict_has_all_that_torchs_has(name: str) -> None:
    """And the optimizer has not: the zeros are of the state dict alone."""
    optimizer, twin = ours(name, make_params(torch.float32)), torchs(name, make_params())
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
    optimizer = ours("AdamW", [param], state_dtype=torch.bfloat16)
    assert optimizer.state_dict()["state"] == {}
    step_with(optimizer, [torch.ones(4)])
    assert optimizer.state_dict()["state"][0]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_hooks_of_state_dict_see_it(copies: Any) -> None:
    """In the optimizer and in copies of it; a hook that is there before it, too."""
    optimizer = ours("AdamW", make_params())
    train(optimizer)
    for each in (optimizer, copies(optimizer)):
        seen = []
        each.register_state_dict_post_hook(
            lambda _, saved, seen=seen: seen.append(set(saved["state"][0]))
        )
        each.load_state_dict(each.state_dict())
        each.state_dict()
        assert len(seen) == 2
        assert all("exp_avg" in names for names in seen)


@each_adam
@pytest.mark.parametrize("copies", [None, copy.deepcopy], ids=["itself", "a copy"])
def test_switched_on_and_off(name: str, copies: Any) -> None:
    """Switched on, exp_avg starts from zeros; switched off, it is dropped. All else goes on."""
    optimizer, twin = ours(name, make_params()), torchs(name, make_params())
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
    saved = ours("AdamW", make_params(), betas=(0.9, 0.999))
    train(saved)
    checkpoint = saved.state_dict()
    checkpoint["param_groups"][0]["betas"] = (0, 0.999)
    optimizer = ours("AdamW", copy_params(saved), betas=(0.9, 0.999))
    optimizer.load_state_dict(through_a_file(checkpoint))
    assert all("exp_avg" not in entries for entries in optimizer.state.values())
    train(optimizer)


def test_a_checkpoint_without_it_is_refused_where_it_is_used() -> None:
    optimizer = ours("AdamW", [("w", Parameter(torch.ones(3)))], betas=(0.9, 0.999))
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
    optimizer = ours("AdamW", [("w", Parameter(torch.ones(3)))])
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
        optimizer = ours("AdamW", [param], betas=(beta1, 0.99), capturable=True)
        step_with(optimizer, [values(300, seed=seed) for seed in (1, 2)])
        assert ("exp_avg" in optimizer.state[param]) == isinstance(beta1, Tensor)
        found.append(param)
    assert_equal(*found)
