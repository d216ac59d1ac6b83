"""Checkpoints: to and from torch.optim, through files, from old torch versions, of any dtype."""

import copy
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

import fusedopt
from fusedopt.nadam import _product_of_momenta
from support.device import DEVICE, on_host
from support.equality import assert_close, assert_equal, assert_same_math
from support.optimizers import (
    Build,
    Case,
    like_torch,
    main_cases,
    some_cases,
    step_with,
    take_step,
    train,
    varied_cases,
)
from support.snapshots import DERIVED, copy_params, record, refused, resumed, through_a_file
from support.tensors import by_id, make_params, params_of, set_grads, values

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@varied_cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_resume_gives_the_same_bits(case: Case, dtype: torch.dtype, steps: int) -> None:
    original = case.ours(make_params(dtype))
    train(original, steps=steps)
    other = resumed(case.ours, original)
    for optimizer in (original, other):
        train(optimizer, first=steps)
    assert_equal(record(other), record(original))


@varied_cases
def test_same_dict_as_torch(case: Case) -> None:
    dicts = []
    for build in (case.ours, case.theirs):
        optimizer = build([(f"p{i}", param) for i, param in enumerate(make_params())])
        train(optimizer)
        dicts.append(optimizer.state_dict())
    ours, theirs = dicts
    theirs["param_groups"][0]["foreach"] = None
    assert list(ours) == list(theirs)
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == list(theirs["state"])
    for entries in (*ours["state"].values(), *theirs["state"].values()):
        for name in DERIVED:
            entries.pop(name, None)
    assert_same_math(ours["state"], theirs["state"])


@some_cases("nadam", "nadam-l2", "nadam-lr-independent", "asgd", "asgd-averaged", "asgd-l2")
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 60])
def test_what_torch_alone_keeps(case: Case, steps: int) -> None:
    """A float32 each, as torch's own class has it: no reference of these tests."""
    options = {k: v for k, v in case.options.items() if not k.startswith("lr_independent")}
    dicts = []
    for make in (case.ours, functools.partial(getattr(torch.optim, case.optimizer), **options)):
        optimizer = make([Parameter(torch.ones(3)), Parameter(torch.ones(2))])
        train(optimizer, steps=steps)
        params_of(optimizer)[1].grad = None
        set_grads(params_of(optimizer)[:1], 0)
        optimizer.step()
        dicts.append(optimizer.state_dict()["state"])
    for ours, theirs in zip(*(each.values() for each in dicts), strict=True):
        assert ours.keys() == theirs.keys()
        derived = theirs.keys() & set(DERIVED)
        assert derived
        for name in derived | {"step"}:
            expected = theirs[name]
            if case.optimizer == "ASGD":  # torch's lie beside the param in any case
                expected = expected.to(ours[name].device)
            torch.testing.assert_close(ours[name], expected, rtol=2e-6, atol=0)


@varied_cases
@pytest.mark.parametrize("direction", ["from torch", "to torch", "there and back"])
def test_moves_between_us_and_torch(case: Case, direction: str) -> None:
    first, *others = {
        "from torch": [case.theirs, case.ours],
        "to torch": [case.ours, case.theirs],
        "there and back": [case.ours, case.theirs, case.ours],
    }[direction]
    reference = case.theirs(make_params())
    train(reference, steps=6)
    optimizer = first(make_params())
    train(optimizer, steps=2)
    for seed, build in enumerate(others):
        optimizer = resumed(build, optimizer)
        train(optimizer, steps=2, first=2 + 2 * seed)
    train(optimizer, steps=4 - 2 * len(others), first=2 + 2 * len(others))
    if direction != "from torch" and case.optimizer in ("NAdam", "ASGD"):
        # What torch alone keeps is saved in float32, as torch has it.
        assert_close(record(optimizer), record(reference), rtol=1e-7, atol=1e-9)
    else:
        assert_same_math(record(optimizer), record(reference))


def test_an_adam_checkpoint_makes_no_l2_penalty_of_adamws_decay() -> None:
    """AdamW is decoupled whatever the checkpoint says, and may hold an option that needs it."""
    theirs = torch.optim.Adam(make_params(), foreach=False)
    train(theirs)
    ours = fusedopt.AdamW(copy_params(theirs), lr_independent_weight_decay=True)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert ours.param_groups[0]["decoupled_weight_decay"]
    train(ours)


def test_an_adam_checkpoint_makes_no_l2_penalty_of_lions_decay() -> None:
    """Its groups, without states: of params that have not been stepped."""
    theirs = torch.optim.Adam(make_params(), foreach=False)
    ours = fusedopt.Lion(copy_params(theirs), cautious_weight_decay=True)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert ours.param_groups[0]["decoupled_weight_decay"]
    train(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_numbers_beside_the_step_have_torchs_dtype(name: str, dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        theirs = getattr(torch.optim, name)(make_params(), foreach=False)
        ours = getattr(fusedopt, name)(copy_params(theirs))
        for optimizer in (theirs, ours):
            train(optimizer, steps=3)
        found, expected = (each.state_dict()["state"][0] for each in (ours, theirs))
        assert {key: entry.dtype for key, entry in found.items()} == {
            key: entry.dtype for key, entry in expected.items()
        }
    finally:
        torch.set_default_dtype(before)


def test_the_product_of_many_momenta_is_found_quickly() -> None:
    """It is the product of as many numbers as steps, or as make it 0."""
    param = torch.zeros(1, device=DEVICE)
    options = {"betas": (0.99999, 0.999), "momentum_decay": 100.0}
    optimizer = fusedopt.NAdam([param], **options)
    step_with(optimizer, [torch.ones_like(param)])
    optimizer.state[param]["step"].fill_(1e6)
    start = time.process_time()
    product = float(optimizer.state_dict()["state"][0]["mu_product"])
    assert time.process_time() - start < 2
    # 0.96^100 is 0.017: from the tenth step on, all momenta are beta1.
    first = math.prod(1 - 0.5 * 0.96 ** (100 * step) for step in range(1, 10))
    assert product == pytest.approx(first * 0.99999**1e6, rel=1e-6)


def test_after_more_steps_than_memory_has_room_for() -> None:
    param = torch.zeros(1, device=DEVICE)
    optimizer = fusedopt.NAdam([param])
    step_with(optimizer, [torch.ones_like(param)])
    optimizer.state[param]["step"].fill_(1e12)
    assert optimizer.state_dict()["state"][0]["mu_product"] == 0


class CountedMomenta(TorchFunctionMode):
    """How many numbers ``torch.arange`` makes inside, by calls."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.arange:
            self.sizes.append(found.numel())
        return found


@pytest.mark.parametrize(
    ("beta1", "steps", "sizes"),
    [(0.9, 300, [300]), (0.9, 1e5, []), (0.9999, 65537, [65536, 1]), (0.0, 1, [])],
)
def test_groups_share_the_product_of_their_momenta(
    beta1: float, steps: float, sizes: list[int]
) -> None:
    """Numbers are made once, and none where the power of ``beta1`` says that it is 0."""
    params = [torch.zeros(1, device=DEVICE) for _ in range(200)]
    options: dict[str, Any] = {"betas": (beta1, 0.999), "momentum_decay": 1.23}
    optimizer = fusedopt.NAdam([{"params": [param]} for param in params], **options)
    step_with(optimizer, [torch.ones_like(params[0])])
    for param in params:
        optimizer.state[param]["step"].fill_(steps)
    _product_of_momenta.cache_clear()
    with CountedMomenta() as counted:
        states = optimizer.state_dict()["state"].values()
    assert counted.sizes == sizes
    momenta = [beta1 * (1 - 0.5 * 0.96 ** (t * 1.23)) for t in range(1, int(steps) + 1)]
    expected = pytest.approx(math.prod(momenta), rel=1e-6, abs=1e-30)
    assert [float(entries["mu_product"]) for entries in states] == [expected] * 200


@pytest.mark.filterwarnings("error")
def test_what_follows_from_options_that_are_tensors() -> None:
    found = []
    for kind in (float, torch.tensor):
        options: dict[str, Any] = {"lr": kind(0.1), "lambd": kind(0.5), "alpha": kind(0.75)}
        param = torch.ones(1, device=DEVICE)
        optimizer = fusedopt.ASGD([param], **options, t0=kind(1.0))
        step_with(optimizer, [torch.ones_like(param)] * 3)
        found.append(optimizer.state_dict()["state"][0])
    for name in ("eta", "mu"):
        assert float(found[0][name]) == pytest.approx(float(found[1][name]), rel=1e-6)


@main_cases
def test_fewer_names_than_params(case: Case) -> None:
    """They are for messages; torch looks at none of them either."""
    params = make_params()
    optimizer = case.ours([(f"p{index}", param) for index, param in enumerate(params)])
    take_step(optimizer, 0)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = ["p0"]
    optimizer.load_state_dict(saved)
    take_step(optimizer, 1)


# torch.optim's implementations write different things (devices and dtypes of step, None buffers).
@main_cases
@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}], ids=str)
def test_from_either_implementation(case: Case, options: dict[str, bool]) -> None:
    theirs = case.theirs(make_params(), **options)
    train(theirs, steps=2)
    ours = resumed(case.ours, theirs)
    for optimizer in (ours, theirs):
        train(optimizer, first=2)
    assert_same_math(record(ours), record(theirs))


def strip(optimizer: Any, group_keys: list[str], step: Callable[[float], Any]) -> dict[str, Any]:
    """The state dict as an old torch wrote it."""
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in group_keys:
            del group[key]
    for entries in saved["state"].values():
        if "step" in entries:
            entries["step"] = step(entries["step"].item())
    return saved


# What groups lacked and how step was kept: torch 1.4 to 1.11, 1.12, 1.13 to 2.5.
SINCE_113 = ["differentiable", "fused", "decoupled_weight_decay"]
SINCE_112 = ["maximize", "foreach", "capturable", *SINCE_113]
SINCE_112_OF_NADAM = [key for key in SINCE_112 if key != "fused"]
OLD: dict[str, tuple[Case, list[str], Callable[[float], Any]]] = {
    "Adam int step": (Case("Adam", {"weight_decay": 0.1}), SINCE_112, int),
    "Adam without amsgrad": (Case("Adam"), ["amsgrad", *SINCE_112], int),
    "Adam float step": (Case("Adam", {"amsgrad": True}), ["capturable", *SINCE_113], float),
    "AdamW int tensor step": (
        Case("AdamW", {"weight_decay": 0.1}),
        SINCE_113,
        lambda step: torch.tensor(int(step)),
    ),
    "AdamW 1-dim step": (
        Case("AdamW", {"weight_decay": 0.1}),
        SINCE_113[2:],
        lambda step: torch.tensor([step]),
    ),
    "RMSprop int step": (
        Case("RMSprop", {"momentum": 0.9, "centered": True}),
        ["maximize", "foreach", "capturable", "differentiable"],
        int,
    ),
    "RMSprop without momentum": (
        Case("RMSprop"),
        ["momentum", "centered", "maximize", "foreach", "capturable", "differentiable"],
        int,
    ),
    "Adagrad float step": (
        Case("Adagrad", {"lr_decay": 0.1}),
        ["maximize", "foreach", "differentiable", "fused"],
        float,
    ),
    "NAdam int step": (Case("NAdam", {"weight_decay": 0.1}), SINCE_112_OF_NADAM, int),
    "ASGD float step": (
        Case("ASGD", {"t0": 0}),
        ["maximize", "foreach", "differentiable", "capturable"],
        float,
    ),
    "SGD": (
        Case("SGD", {"momentum": 0.9, "lr": 0.1}),
        ["nesterov", "maximize", "foreach", "differentiable", "fused"],
        int,
    ),
}


@pytest.mark.parametrize(("case", "group_keys", "step"), **by_id(OLD))
def test_old_state_dicts(case: Case, group_keys: list[str], step: Any) -> None:
    original = case.ours(make_params())
    train(original, steps=2)
    optimizer = case.ours(copy_params(original))
    optimizer.load_state_dict(through_a_file(strip(original, group_keys, step)))
    for group in optimizer.param_groups:
        assert group.keys() == original.param_groups[0].keys()
    for entries in optimizer.state.values():
        assert "step" not in entries or isinstance(entries["step"], Tensor)
    for each in (original, optimizer):
        train(each, first=2)
    assert_same_math(params_of(optimizer), params_of(original))


def test_old_sgd_without_momentum_has_none_buffers() -> None:
    """Up to torch 2.2 plain SGD wrote momentum_buffer: None; momentum may be switched on later."""
    params = make_params()
    saved = fusedopt.SGD(params, lr=0.1).state_dict()
    saved["state"] = {index: {"momentum_buffer": None} for index in range(len(params))}
    ours, theirs = fusedopt.SGD(params, lr=0.1), torch.optim.SGD(make_params(), lr=0.1)
    ours.load_state_dict(saved)
    for optimizer in (ours, theirs):
        take_step(optimizer, 0)
        optimizer.param_groups[0]["momentum"] = 0.9
        train(optimizer, first=1)
    assert_same_math(params_of(ours), params_of(theirs))


def test_adamw_stays_adamw() -> None:
    """Whatever the dict says: it may come from an Adam, or from before the option existed."""
    saved = fusedopt.Adam(make_params(), weight_decay=0.1).state_dict()
    assert saved["param_groups"][0]["decoupled_weight_decay"] is False
    optimizer = fusedopt.AdamW(make_params())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


@main_cases
@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_load_keeps_the_dtypes_of_the_state(case: Case, param_dtype: torch.dtype) -> None:
    """torch casts them to the parameter's; peers then read them with the old width (DESIGN, 4)."""
    original = case.ours(make_params(param_dtype))
    take_step(original, 0)
    for entries in original.state.values():
        for key in entries.keys() - {"step"}:
            entries[key] = entries[key].float() + 1e-6  # not a number of 16 bits
    other = resumed(case.ours, original)
    for ours, theirs in zip(other.state.values(), original.state.values(), strict=True):
        assert {t.dtype for t in ours.values()} == {torch.float32}
        assert_equal(ours, theirs)
    for optimizer in (original, other):
        train(optimizer, first=1)
    assert_equal(record(other), record(original))


@main_cases
def test_float32_state_of_a_16_bit_param_is_used_in_full(case: Case) -> None:
    """Its update is that of a float32 parameter of the same values, rounded once a step."""
    grads = torch.linspace(-1, 1, 40)
    low = Parameter(torch.linspace(-2, 2, 40).bfloat16())
    high = Parameter(low.detach().float())
    optimizers = [case.ours([low]), case.ours([high])]
    for param in (low, high):
        param.grad = grads.bfloat16().to(param.dtype)
    for optimizer in optimizers:
        optimizer.step()
    loaded = case.ours([low])
    saved = optimizers[0].state_dict()
    saved["state"] = optimizers[1].state_dict()["state"]
    loaded.load_state_dict(copy.deepcopy(saved))
    with torch.no_grad():
        high.copy_(low)
    loaded.step()
    optimizers[1].step()
    assert_equal(low.detach(), high.detach().bfloat16())
    assert_equal(list(loaded.state.values()), list(optimizers[1].state.values()))


@main_cases
@pytest.mark.parametrize(
    ("counts", "message"),
    [([6, 1], "number of parameter groups"), ([6], "size of"), ([8], "size of")],
    ids=["more groups", "fewer params", "more params"],
)
def test_wrong_sizes(case: Case, counts: list[int], message: str) -> None:
    params = [*make_params(), *make_params(seed=1)]
    groups = [{"params": [params.pop() for _ in range(count)]} for count in counts]
    optimizer = case.ours(make_params())
    take_step(optimizer, 0)
    with refused(optimizer, ValueError, message):
        optimizer.load_state_dict(case.ours(groups).state_dict())


@main_cases
@pytest.mark.parametrize(
    "options", [{"lr": math.inf}, {"lr": math.nan}, {"weight_decay": -math.inf}], ids=str
)
def test_bad_options_are_refused(case: Case, options: dict[str, Any]) -> None:
    saved = case.ours(make_params()).state_dict()
    saved["param_groups"][0].update(options)
    optimizer = case.ours(make_params())
    take_step(optimizer, 0)
    with refused(optimizer, ValueError, "param group 0"):
        optimizer.load_state_dict(saved)


@varied_cases
def test_unknown_entries_are_kept(case: Case) -> None:
    """Of groups, of parameters and of nobody. (torch turns text in nested state into nonsense.)"""
    optimizer, plain = case.ours(make_params()), case.ours(make_params())
    train(optimizer, steps=2)
    saved = optimizer.state_dict()
    saved["state"].setdefault(0, {})["note"] = {"inner": [torch.ones(2), "text"], "n": 3}
    saved["state"]["of nobody"] = {"x": torch.ones(3)}
    saved["param_groups"][0]["mine"] = "kept"
    optimizer.load_state_dict(through_a_file(saved))
    assert optimizer.state["of nobody"]["x"].tolist() == [1, 1, 1]
    note = optimizer.state[optimizer.param_groups[0]["params"][0]]["note"]
    assert (note["inner"][0].tolist(), note["inner"][1], note["n"]) == ([1, 1], "text", 3)
    assert optimizer.param_groups[0]["mine"] == "kept"
    train(optimizer, first=2)
    train(plain, steps=5)
    assert_equal(params_of(optimizer), params_of(plain))


@main_cases
@pytest.mark.parametrize("saved_named", [False, True], ids=["saved unnamed", "saved named"])
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@like_torch
def test_param_names(build: Build, saved_named: bool, named: bool) -> Any:
    def made(prefix: str, with_names: bool) -> Any:
        params = make_params()
        named = [(f"{prefix}{index}", param) for index, param in enumerate(params)]
        return build(named if with_names else params)

    optimizer = made("own", named)
    optimizer.load_state_dict(made("saved", saved_named).state_dict())
    names = optimizer.param_groups[0].get("param_names")
    assert (names is not None) == (saved_named or named)
    return names


@varied_cases
@like_torch
def test_hooks(build: Build) -> Any:
    """All four kinds, in torch's order and with torch's rights to replace the dict."""
    log: list[Any] = []
    optimizer = build(make_params())
    take_step(optimizer, 0)

    def replace(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        log.append(("load pre", list(saved)))
        return {**saved, "param_groups": [{**saved["param_groups"][0], "lr": 0.75}]}

    def save_post(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        log.append(("save post", list(saved)))
        return {**saved, "extra": 1}

    def load_post(optimizer: Any) -> None:
        log.append(("load post", optimizer.param_groups[0]["lr"]))

    optimizer.register_state_dict_pre_hook(lambda _: log.append("save pre"))
    optimizer.register_state_dict_post_hook(save_post)
    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_post_hook(load_post)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert [entry[0] for entry in log[1:4]] == ["save post", "load pre", "load post"]
    assert log[3][1] == 0.75
    return log, saved["extra"], saved["param_groups"][0]["lr"]


@main_cases
@like_torch
def test_prepended_hook_may_return_anything(build: Build) -> Any:
    """A hook that comes before those that are there may leave nothing of torch's form."""
    optimizer = build(make_params())
    take_step(optimizer, 0)
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "hooks": ["first"]})
    optimizer.register_state_dict_post_hook(
        lambda _, saved: {f"number of {key}": len(saved[key]) for key in saved},
        prepend=True,
    )
    return optimizer.state_dict()


@main_cases
def test_loading_leaves_the_dict_alone(case: Case) -> None:
    """Neither loading nor later steps with other options change what was loaded from."""
    original = case.ours(make_params(), lr=on_host(0.1))
    take_step(original, 0)
    saved = copy.deepcopy(original.state_dict())
    groups, keys = copy.deepcopy(saved["param_groups"]), list(saved["state"])
    optimizer = case.ours(make_params())
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    train(optimizer, first=1)
    assert saved["param_groups"] == groups
    assert list(saved["state"]) == keys


@pytest.mark.unsanitized  # sanitizers take half of the time
@pytest.mark.cpu_only  # a default device slows down every call of torch
def test_loading_is_linear() -> None:
    """Four times the parameters take about four times as long; torch's walk over all ids for each
    parameter would take sixteen."""

    def seconds_to_load(count: int) -> float:
        params = [Parameter(torch.ones(2)) for _ in range(count)]
        optimizer = fusedopt.AdamW(params)
        for param in params:
            param.grad = torch.ones(2)
        optimizer.step()
        saved = optimizer.state_dict()
        times = []
        for _ in range(4):
            start = time.thread_time()  # other tests may run at the same time
            optimizer.load_state_dict(saved)
            times.append(time.thread_time() - start)
        assert len(optimizer.state) == count
        set_grads(params[:1], 0)
        optimizer.step()
        assert optimizer.state[params[-1]]["step"].item() == 2
        return min(times)

    assert seconds_to_load(8000) < 8 * seconds_to_load(2000)


@main_cases
def test_distributed_checkpoint_state_dict(case: Case) -> None:
    """torch.distributed.checkpoint names the state by parameter; it needs no process group."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)) for _ in range(2)]
    first, second = (case.ours(model.parameters()) for model in models)
    train(first, steps=2)
    saved = dcp.get_optimizer_state_dict(models[0], first)
    assert set(saved["state"]) == {name for name, _ in models[0].named_parameters()}
    models[1].load_state_dict(models[0].state_dict())
    dcp.set_optimizer_state_dict(models[1], second, through_a_file(saved))
    assert_equal(record(second), record(first))
    for optimizer in (first, second):
        train(optimizer, first=2)
    assert_equal(record(second), record(first))


def test_saved_although_no_step_could_be_made() -> None:
    """Options that do not fit the params any longer are no reason to lose a checkpoint."""
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = fusedopt.AdamW(model.parameters(), master_weights="split", betas=(0.0, 0.9))
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    model.float()
    optimizer.param_groups[0]["lr"] = math.nan
    saved = optimizer.state_dict()["state"]
    assert all("param_remainder" in entries for entries in saved.values())
    assert [weight.dtype for weight in optimizer.fp32_params()] == [torch.float32] * 2
    set_grads(list(model.parameters()), 1)
    with pytest.raises(ValueError, match=r"learning rate|split"):
        optimizer.step()


def test_momentum_that_was_loaded_is_not_new() -> None:
    """A checkpoint of torch has a momentum_buffer and no step: its next step is not the first."""
    saved = values(6)
    twin = torch.optim.SGD([saved], lr=0.1, momentum=0.5, dampening=0.5)
    ours = values(6)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "dampening": 0.5}
    optimizer = fusedopt.SGD([ours], **options, ema_decay=0.9, max_grad_norm=torch.inf)
    saved.grad = values(6, seed=1)
    twin.step()
    ours.copy_(saved)
    optimizer.load_state_dict(twin.state_dict())
    for param, stepped in ((saved, twin), (ours, optimizer)):
        param.grad = values(6, seed=2)
        stepped.step()
    expected = twin.state[saved]["momentum_buffer"]
    torch.testing.assert_close(optimizer.state[ours]["momentum_buffer"], expected)
