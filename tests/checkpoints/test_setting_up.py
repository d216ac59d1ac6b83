"""The step with a learning rate of 0 that sets an optimizer up before a checkpoint is loaded.

torch.distributed.checkpoint makes it with grads of zeros, on weights that are still random.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt
from support.device import STEPS_ON_DEVICE
from support.equality import bits
from support.optimizers import ALL_NAMES, Case
from support.tensors import BFLOAT16, FLOAT32, by_id, params_of, set_grads

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

checkpoint = pytest.importorskip("torch.distributed.checkpoint")
state_dicts = pytest.importorskip("torch.distributed.checkpoint.state_dict")

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32-masters": {"master_weights": "float32"},
    "split-masters": {"master_weights": "split"},
    "split8-masters": {"master_weights": "split8"},
    "averages": {"ema_decay": 0.9},
    "corrected-averages": {"ema_decay": 0.9, "ema_bias_correction": True},
    "masters-and-averages": {"master_weights": "float32", "ema_decay": 0.9},
    "rounded": {"stochastic_rounding": True},
    "independent-decay": {"weight_decay": 0.1, "lr_independent_weight_decay": True},
    "cautious": {"weight_decay": 0.1, "cautious_update": True, "cautious_weight_decay": True},
}
each_setting = pytest.mark.parametrize("options", **by_id(SETTINGS))


def model_with(seed: int, options: dict[str, Any], name: str = "AdamW") -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(BFLOAT16)
    if "weight_decay" in options and Case(name).takes("decoupled_weight_decay"):
        options = {**options, "decoupled_weight_decay": True}
    return model, getattr(fusedopt, name)(model.parameters(), lr=1e-2, **options)


def train(optimizer: Any, *seeds: int) -> None:
    for seed in seeds:
        set_grads(optimizer, seed)
        optimizer.step()
        optimizer.zero_grad()


def averages(optimizer: Any) -> list[Tensor]:
    return [optimizer.state[param]["ema_param"] for param in params_of(optimizer)]


@pytest.mark.parametrize(
    ("name", "options"),
    **by_id(
        {
            f"{name} {key}": (name, options)
            for name in ALL_NAMES
            for key, options in SETTINGS.items()
            if all(Case(name).takes(option) for option in options)
        }
    ),
)
def test_it_changes_nothing(name: str, options: dict[str, Any]) -> None:
    model, optimizer = model_with(0, options, name)
    before = [param.detach().clone() for param in model.parameters()]
    state_dicts.get_optimizer_state_dict(model, optimizer)
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(bits(param.detach()), bits(old))
    for weight, old in zip(optimizer.fp32_params(), before, strict=True):
        assert torch.equal(weight, old.to(FLOAT32))
    if "ema_decay" in options:
        for average, old in zip(averages(optimizer), before, strict=True):
            assert torch.equal(average, old.to(FLOAT32))


def through_files(model: Any, optimizer: Any, other: Any, its: Any, folder: Path) -> None:
    """Written in place by torch.distributed.checkpoint; what the checkpoint lacks stays."""

    def content(model: Any, optimizer: Any) -> dict[str, Any]:
        return {
            "model": state_dicts.get_model_state_dict(model),
            "optimizer": state_dicts.get_optimizer_state_dict(model, optimizer),
        }

    checkpoint.save(content(model, optimizer), checkpoint_id=folder)
    loaded = content(other, its)
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=True)
    checkpoint.load(loaded, checkpoint_id=folder, planner=planner)
    state_dicts.set_model_state_dict(other, loaded["model"])
    state_dicts.set_optimizer_state_dict(other, its, loaded["optimizer"])


def through_copies(model: Any, optimizer: Any, other: Any, its: Any, _: Path) -> None:
    """As through files, but what stays is a copy of what the optimizer has."""
    saved = state_dicts.get_optimizer_state_dict(model, optimizer)
    loaded = copy.deepcopy(state_dicts.get_optimizer_state_dict(other, its))
    for name, entries in loaded["state"].items():
        entries |= copy.deepcopy(saved["state"][name])
    other.load_state_dict(model.state_dict())
    state_dicts.set_optimizer_state_dict(other, its, loaded)


def model_alone(model: Any, _: Any, other: Any, its: Any, __: Path) -> None:
    state_dicts.get_optimizer_state_dict(other, its)
    other.load_state_dict(model.state_dict())


LOADS: dict[str, Callable[..., None]] = {
    "files": through_files,
    "copies": through_copies,
    "model-alone": model_alone,
}
each_load = pytest.mark.parametrize("load", **by_id(LOADS))


@each_load
@pytest.mark.parametrize("new", ["averages", "masters-and-averages", "float32-masters"])
@pytest.mark.parametrize("old", ["plain", "split-masters"])
def test_what_a_checkpoint_lacks_begins_with_its_weights(
    old: str, new: str, load: Callable[..., None], tmp_path: Path
) -> None:
    """And not with the random ones of the new model."""
    model, optimizer = model_with(0, SETTINGS[old])
    train(optimizer, 1, 2, 3)
    trained = [param.detach().to(FLOAT32) for param in model.parameters()]
    if load is through_copies and "master_weights" in SETTINGS[new]:  # converted, if there are any
        trained = optimizer.fp32_params()
    other, its = model_with(9, SETTINGS[new])
    load(model, optimizer, other, its, tmp_path)
    its.param_groups[0]["lr"] = 1e-7
    train(its, 4)
    for weight, want in zip(its.fp32_params(), trained, strict=True):
        torch.testing.assert_close(weight, want, rtol=1e-5, atol=1e-5)
    if "ema_decay" in SETTINGS[new]:
        for average, want in zip(averages(its), trained, strict=True):
            torch.testing.assert_close(average, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("load", [through_files, through_copies])
@each_setting
def test_what_a_checkpoint_has_is_kept(
    options: dict[str, Any], load: Callable[..., None], tmp_path: Path
) -> None:
    """Bit for bit: going on is as if nothing had been saved."""
    model, optimizer = model_with(0, options)
    train(optimizer, 1, 2, 3)
    other, its = model_with(9, options)
    load(model, optimizer, other, its, tmp_path)
    for each in (optimizer, its):
        train(each, 4, 5)
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(bits(param.detach()), bits(twin.detach()))
        mine, theirs = optimizer.state[param], its.state[twin]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(bits(value), bits(theirs[key])), key


def test_averages_stay_where_training_begins_at_once() -> None:
    _, optimizer = model_with(0, SETTINGS["averages"])
    state_dicts._init_optim_state(optimizer)
    before = averages(optimizer)
    train(optimizer, 1)
    assert all(a is b for a, b in zip(averages(optimizer), before, strict=True))


def test_averages_of_training_are_not_taken_for_initial_ones() -> None:
    """Where a step with a learning rate of 0, as of a warm-up, makes other state."""
    _, optimizer = model_with(0, SETTINGS["masters-and-averages"])
    train(optimizer, 1, 2)
    optimizer.reset_masters()
    before = averages(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, 3, 4)
    optimizer.param_groups[0]["lr"] = 1e-2
    train(optimizer, 5)
    assert all(a is b for a, b in zip(averages(optimizer), before, strict=True))


def test_several_steps_set_up() -> None:
    """A warm-up may begin with some: their writes to params are the optimizer's own."""
    _, optimizer = model_with(0, SETTINGS["averages"])
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, 1, 2, 3)
    before = averages(optimizer)
    optimizer.param_groups[0]["lr"] = 1e-2
    train(optimizer, 4)
    assert all(a is b for a, b in zip(averages(optimizer), before, strict=True))


def write(model: nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)


def set_up_and_write(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Returns the averages, which are of the weights before."""
    state_dicts._init_optim_state(optimizer)
    write(model)
    set_grads(optimizer, 1)
    return averages(optimizer)


def assert_averages_begin_with_the_weights(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = 1e-7
    train(optimizer, 1)
    for average, weight in zip(averages(optimizer), optimizer.fp32_params(), strict=True):
        torch.testing.assert_close(average, weight, rtol=1e-3, atol=1e-3)


def test_a_step_that_is_skipped_leaves_the_averages() -> None:
    model, optimizer = model_with(0, {"ema_decay": 0.9, "max_grad_norm": 1.0})
    before = set_up_and_write(model, optimizer)
    params_of(optimizer)[0].grad[0] = float("inf")
    optimizer.step()
    assert optimizer.skipped
    if not STEPS_ON_DEVICE:  # it alone knows that it skips
        assert all(a is b for a, b in zip(averages(optimizer), before, strict=True))
    assert_averages_begin_with_the_weights(optimizer)


def test_a_step_that_fails_leaves_the_averages() -> None:
    model, optimizer = model_with(0, SETTINGS["averages"])
    before = set_up_and_write(model, optimizer)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step()
    assert all(a is b for a, b in zip(averages(optimizer), before, strict=True))
    assert_averages_begin_with_the_weights(optimizer)


def test_evaluation_before_training_does_not_take_initial_averages() -> None:
    """They are of weights that nobody has any more: averages will begin with those there are."""
    model, optimizer = model_with(0, SETTINGS["averages"])
    set_up_and_write(model, optimizer)
    written = [param.detach().clone() for param in model.parameters()]
    with optimizer.swap_ema():
        assert all(map(torch.equal, model.parameters(), written))
    with torch.no_grad():
        averages(optimizer)[0].add_(2.0)  # loaded, say
    before = [param.detach().clone() for param in model.parameters()]
    with optimizer.swap_ema():
        shown = [param.detach().clone() for param in model.parameters()]
    assert not torch.equal(shown[0], before[0])
    assert all(map(torch.equal, shown[1:], before[1:]))
    assert all(map(torch.equal, [param.detach() for param in model.parameters()], before))


def test_averages_of_a_warm_up_step_can_be_shown_again_and_again() -> None:
    """A warm-up from 0 begins with a step that trains nothing, and a swap is no write."""
    model, optimizer = model_with(0, SETTINGS["averages"])
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, 1)
    before = [param.detach().clone() for param in model.parameters()]
    for _ in range(2):
        with optimizer.swap_ema():
            assert all(map(torch.equal, model.parameters(), before))
        initial = optimizer._shared.initial_averages
        assert not any(initial.is_outdated(optimizer, param) for param in model.parameters())
    with torch.no_grad():
        for param in model.parameters():
            param.clamp_(-9, 9)
    with optimizer.swap_ema():
        assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_know_initial_averages(copied: str, is_written: bool) -> None:
    """What is loaded after a copy, or was before it, is where averages begin."""
    model, optimizer = model_with(0, SETTINGS["averages"])
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, 1)
    if is_written:
        write(model)
    both = (model, optimizer)
    others = copy.deepcopy(both) if copied == "deepcopy" else pickle.loads(pickle.dumps(both))
    found = []
    for one, its_optimizer in (both, others):
        if not is_written:
            write(one)
        its_optimizer.param_groups[0]["lr"] = 0.1
        train(its_optimizer, 2)
        found.append(averages(its_optimizer))
    assert all(map(torch.equal, *found))


MEANWHILE: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda optimizer: optimizer,
    "a swap": lambda optimizer: swap_once(optimizer),
    "a copy": lambda optimizer: copy.deepcopy(optimizer),
    "a second warm-up step": lambda optimizer: train(optimizer, 3) or optimizer,
}


def swap_once(optimizer: Any) -> Any:
    with optimizer.swap_ema():
        pass
    return optimizer


@pytest.mark.parametrize("meanwhile", **by_id(MEANWHILE))
@pytest.mark.parametrize("how", ["in place", "state dict"])
def test_loaded_averages_stay(how: str, meanwhile: Callable[[Any], Any]) -> None:
    """They are no initial ones any more, whatever is done before the first step that trains."""
    _, optimizer = model_with(0, SETTINGS["averages"])
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, 1)
    with torch.no_grad():
        for average in averages(optimizer):
            average.fill_(5.0)
    if how == "state dict":
        saved = copy.deepcopy(optimizer.state_dict())
        _, optimizer = model_with(0, SETTINGS["averages"])
        optimizer.param_groups[0]["lr"] = 0.0
        train(optimizer, 1)
        optimizer.load_state_dict(saved)
    optimizer = meanwhile(optimizer)
    with torch.no_grad():
        for param in params_of(optimizer):
            param.fill_(1.0)
    optimizer.param_groups[0]["lr"] = 1e-6
    train(optimizer, 2)
    for average in averages(optimizer):
        assert (average > 3.5).all()


def test_without_averages_nothing_is_remembered() -> None:
    _, optimizer = model_with(0, {})
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, 1)
    assert optimizer._shared.initial_averages is None


MASTERS = ("float32", "split", "split8")


@pytest.mark.parametrize("is_full", [False, True], ids=["sharded", "full"])
@pytest.mark.parametrize(
    ("old", "new"), [(old, new) for old in MASTERS for new in MASTERS if old != new]
)
def test_masters_of_another_kind_are_converted(old: str, new: str, is_full: bool) -> None:
    """torch fills a full state dict up with the masters that the step has made."""
    options = state_dicts.StateDictOptions(full_state_dict=is_full)
    model, optimizer = model_with(0, {"master_weights": old})
    train(optimizer, 1, 2, 3)
    saved = copy.deepcopy(state_dicts.get_optimizer_state_dict(model, optimizer, options=options))
    other, its = model_with(9, {"master_weights": new})
    state_dicts.set_model_state_dict(other, model.state_dict())
    state_dicts.set_optimizer_state_dict(other, its, saved, options=options)
    assert len(its.state) == 4
    off = 2.0**-16 if new == "split8" else 0.0
    for weight, want in zip(its.fp32_params(), optimizer.fp32_params(), strict=True):
        torch.testing.assert_close(weight, want, rtol=off, atol=0.0)
