"""Settings of precision in checkpoints, from one to another and to torch's, and those refused."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.device import DEVICE
from support.equality import bits, both_ways
from support.optimizers import CASES, Case, some_cases, step_with
from support.pairs import covering, in_pairs
from support.settings import (
    EMAS,
    FLOATS,
    ROWS,
    WEIGHTS,
    Row,
    assert_one_step,
    assert_param_is_rounded_weight,
    build,
    each_ema,
    each_row,
    entries,
    nearest_of_24_bits,
    suited,
)
from support.snapshots import COPIES, refused, through_a_file
from support.tensors import BFLOAT16, FLOAT32, by_id, dtype_id, values

SHAPE = (5, 61)
OURS = (  # options that torch lacks: an optimizer keeps its own
    *("state_dtype", "master_weights", "stochastic_rounding", "rounding_seed"),
    *("ema_decay", "ema_bias_correction", "max_grad_norm", "error_if_nonfinite"),
)
main_cases = some_cases("sgd", "momentum-l2", "adam-amsgrad", "adamw", "nadam", "adagrad-initial")


def grads(row: Row, *seeds: int) -> list[Tensor]:
    return [values(*SHAPE, dtype=row[1], seed=seed) for seed in seeds]


def param_of(optimizer: Any) -> Tensor:
    (param,) = optimizer.param_groups[0]["params"]
    return param


def own_options(optimizer: Any) -> dict[str, Any]:
    return {name: optimizer.param_groups[0].get(name) for name in OURS}


def resumed(case: Case, row: Row, saved: Any, **more: Any) -> Any:
    """A new optimizer of a row over a copy of the param, with the other's state from a file."""
    optimizer = build(case, row, [param_of(saved).detach().clone()], **more)
    options = own_options(optimizer)
    optimizer.load_state_dict(through_a_file(saved.state_dict()))
    assert own_options(optimizer) == options
    return optimizer


def everything(optimizer: Any) -> dict[str, Tensor]:
    return {"param": param_of(optimizer), **optimizer.state.get(param_of(optimizer), {})}


def assert_same(first: Any, second: Any) -> None:
    """Bits and dtypes of all there is."""
    ours, theirs = everything(first), everything(second)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(bits(value), bits(theirs[name])), name


@in_pairs(
    some_cases("sgd-l2", "momentum-damped", "adam-amsgrad", "adamw", "rmsprop-all"),
    pytest.mark.parametrize("steps", [0, 2]),
    each_ema,
    each_row,
)
def test_resume_gives_the_same_bits(case: Case, steps: int, ema: Any, row: Row) -> None:
    original = build(case, row, [values(*SHAPE, dtype=row[1])], **ema)
    step_with(original, grads(row, *range(steps)))
    other = resumed(case, row, original, **ema)
    assert_same(other, original)
    for optimizer in (original, other):
        step_with(optimizer, grads(row, 10, 11, 12))
    assert_same(other, original)


@in_pairs(main_cases, each_ema, each_row)
def test_from_torch_and_back(case: Case, ema: dict[str, Any], row: Row) -> None:
    setting, dtype = row
    theirs = suited(case, row).theirs([values(*SHAPE, dtype=dtype)])
    step_with(theirs, grads(row, 1, 2))
    ours = resumed(case, row, theirs, **ema)
    assert torch.equal(param_of(ours), param_of(theirs))
    for name, value in entries(theirs, param_of(theirs)).items():
        if name != "param":
            kept = setting.options.get("state_dtype") or dtype
            assert torch.equal(ours.state[param_of(ours)][name], value.to(kept)), name
    count = 2 if "step" in case.state_names else 0  # torch's SGD does not count
    assert_one_step(ours, case, row, ema, grads(row, 3)[0], count)
    setting.but(**ema).assert_state_of(ours, case, param_of(ours))

    back = suited(case, row).theirs([param_of(ours).detach().clone()])
    back.load_state_dict(through_a_file(ours.state_dict()))
    for name, value in everything(ours).items():
        if name not in (*WEIGHTS, "ema_param", "step"):
            assert torch.equal(everything(back)[name], value.to(dtype)), name
    before = param_of(back).clone()
    step_with(back, grads(row, 4))
    assert "step" not in case.state_names or everything(back)["step"] == 4
    assert param_of(back).isfinite().all()
    assert not torch.equal(param_of(back), before)


@each_row
@some_cases("momentum-l2", "adamw", "adam-no-beta1")
def test_torch_goes_on_in_float32(case: Case, row: Row) -> None:
    """From the weights and states of any setting, as fusedopt does without the setting."""
    dtype = row[1]
    saved = build(case, row, [values(*SHAPE, dtype=dtype)], ema_decay=0.9)
    step_with(saved, grads(row, 1, 2))
    (weight,), wide = saved.fp32_params(), FLOAT32 if dtype.itemsize == 2 else dtype
    ours = suited(case, row).ours([weight.clone()])
    theirs = suited(case, row).theirs([weight.clone()])
    for each in (ours, theirs):
        each.load_state_dict(through_a_file(saved.state_dict()))
    for name, value in entries(saved, param_of(saved)).items():
        if name not in ("param", "ema_param"):
            assert torch.equal(everything(theirs)[name], value.to(wide)), name
            ours.state[param_of(ours)][name] = value.to(wide)
    for seed in (3, 4):
        for each in (ours, theirs):
            step_with(each, [values(*SHAPE, dtype=wide, seed=seed)])
    torch.testing.assert_close(param_of(ours), param_of(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"lr": 0.007}, {"weight_decay": 0.25}, {"maximize": True}])
def test_options_of_torch_are_the_checkpoints(options: dict[str, Any]) -> None:
    theirs = torch.optim.AdamW([torch.ones(3)], **options)
    ours = fusedopt.AdamW([torch.ones(3)], state_dtype=BFLOAT16, ema_decay=0.5)
    ours.load_state_dict(theirs.state_dict())
    assert options.items() <= ours.param_groups[0].items()


# Any two settings for params of one dtype; each of the two with either optimizer, and with all that
# can become of an average.
KINDS = list(itertools.product(("momentum-l2", "adamw"), ("neither", "saved", "wanted", "both")))
PAIRS = [
    (rows[first], rows[second], *KINDS[kind])
    for rows in ([row for row in ROWS if row[1] == dtype] for dtype in FLOATS)
    for first, second, kind in covering([len(rows), len(rows), len(KINDS)])
]
TIES = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 2**-11, -1 - 2**-11])  # of bfloat16 and float16


def tied(optimizer: Any) -> None:
    """Gives the weights halves that the kinds of masters round differently."""
    (weight,) = optimizer.fp32_params()
    weight.view(-1)[: len(TIES)] = TIES
    optimizer.load_fp32_params([weight])


@pytest.mark.unemulated  # loading is no driver's
@pytest.mark.parametrize(
    ("row", "other", "name", "averages"),
    PAIRS,
    ids=[f"{a[0].id}-{b[0].id}-{dtype_id(a[1])}-{name}-{kind}" for a, b, name, kind in PAIRS],
)
def test_from_each_setting_to_each(row: Row, other: Row, name: str, averages: str) -> None:
    case, dtype, ema = CASES[name], row[1], EMAS["ema"]
    saved_ema = ema if averages in ("saved", "both") else {}
    wanted_ema = ema if averages in ("wanted", "both") else {}
    saved = build(case, row, [values(*SHAPE, dtype=dtype)], **saved_ema)
    step_with(saved, grads(row, 1, 2))
    tied(saved)
    loaded = resumed(case, other, saved, **wanted_ema)
    (weight,), masters = loaded.fp32_params(), other[0].masters(dtype)
    assert_param_is_rounded_weight(param_of(loaded), weight, masters)
    if row[0].masters(dtype) and masters:
        expected = saved.fp32_params()[0]
        assert torch.equal(
            weight, nearest_of_24_bits(expected) if masters == "split8" else expected
        )
    else:
        assert torch.equal(param_of(loaded), param_of(saved))
    state, saved_state = loaded.state[param_of(loaded)], saved.state[param_of(saved)]
    states = entries(saved, param_of(saved)).keys() - {"param", "ema_param"}
    kept = row[0].options.get("state_dtype") or dtype
    for name in states:
        wanted = other[0].options.get("state_dtype") or kept
        assert state[name].dtype == wanted
        assert torch.equal(state[name], saved_state[name].to(wanted)), name
    if averages == "both":
        assert torch.equal(state["ema_param"], saved_state["ema_param"])
    assert state.keys() <= other[0].but(**wanted_ema).state_dtypes(case, dtype).keys()
    has_count = saved_state.get("step") is not None  # an SGD that begins to count begins at 1
    assert_one_step(loaded, case, other, wanted_ema, grads(row, 3)[0], 2 if has_count else 0)
    other[0].but(**wanted_ema).assert_state_of(loaded, case, param_of(loaded), kept)


NAN, INF = float("nan"), float("inf")
# What is wrong with the second of two params; the kinds of masters that are saved and wanted.
WRONG: dict[str, tuple[str, str, Any]] = {
    "option": ("float32", "split", None),
    "master-shape": ("float32", "split", torch.ones(5)),
    "master-broadcastable": ("float32", "split", torch.ones(1)),
    "remainder-shape": ("split", "float32", torch.ones(5, dtype=torch.int16)),
    "remainder-broadcastable": ("split", "float32", torch.ones(1, dtype=torch.int16)),
}


@pytest.mark.parametrize(("kind", "wanted", "wrong"), **by_id(WRONG))
def test_a_refused_checkpoint_changes_nothing(kind: str, wanted: str, wrong: Any) -> None:
    # Not even the params that a conversion of masters would set.
    saved, optimizer = (
        fusedopt.AdamW([{"params": [p]} for p in two_params()], master_weights=masters)
        for masters in (kind, wanted)
    )
    for each in (saved, optimizer):
        each.step()
    saved.load_fp32_params([TIES, TIES])
    checkpoint = through_a_file(saved.state_dict())
    if wrong is None:
        checkpoint["param_groups"][1]["lr"] = NAN
    else:
        checkpoint["state"][1]["master_param" if kind == "float32" else "param_remainder"] = wrong
    with refused(optimizer, ValueError, r"param group 1|group 1, index 0"):
        optimizer.load_state_dict(checkpoint)


def two_params(dtype: torch.dtype = BFLOAT16) -> list[Parameter]:
    params = [Parameter(torch.ones(4, dtype=d)) for d in (BFLOAT16, dtype)]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


# Remainders in state dicts.

PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE).view(4, 2**14)


def split_optimizer(param: Tensor | None = None) -> Any:
    """Of one param, in whose remainder any 16 bits are."""
    param = torch.ones_like(PATTERNS, dtype=BFLOAT16) if param is None else param
    optimizer = fusedopt.AdamW([param], master_weights="split", state_dtype="bfloat16")
    step_with(optimizer, [torch.zeros_like(param)])
    remainder_of(optimizer).copy_(PATTERNS)
    return optimizer


def remainder_of(optimizer: Any) -> Tensor:
    return optimizer.state[param_of(optimizer)]["param_remainder"]


def as_int16(saved: dict[str, Any]) -> dict[str, Any]:
    """As state dicts were before they had bfloat16 there."""
    entries = saved["state"][0]
    entries["param_remainder"] = entries["param_remainder"].view(torch.int16)
    return saved


def through_torch(saved: dict[str, Any]) -> dict[str, Any]:
    """Which casts every state to its parameter's dtype."""
    theirs = torch.optim.AdamW([torch.ones_like(PATTERNS, dtype=BFLOAT16)])
    theirs.load_state_dict(saved)
    return theirs.state_dict()


ROUTES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "as it is": lambda saved: saved,
    "file": through_a_file,
    "deepcopy": copy.deepcopy,
    "torch.optim": through_torch,
    "int16": as_int16,
    "file of int16": lambda saved: through_a_file(as_int16(saved)),
}


@pytest.mark.parametrize("route", **by_id(ROUTES))
@pytest.mark.parametrize("transposed", [False, True], ids=["", "into another layout"])
def test_any_bits_of_a_remainder_are_loaded(route: Any, transposed: bool) -> None:
    """Those that are NaN as bfloat16 included: they are never converted."""
    saved = split_optimizer().state_dict()
    assert saved["state"][0]["param_remainder"].dtype == BFLOAT16
    param = torch.zeros_like(PATTERNS.t() if transposed else PATTERNS, dtype=BFLOAT16)
    other = split_optimizer(param.t() if transposed else param)
    remainder_of(other).zero_()
    other.load_state_dict(route(saved))
    assert remainder_of(other).dtype == torch.int16
    assert torch.equal(remainder_of(other), PATTERNS)
    assert remainder_of(other).stride() == param_of(other).stride()


@pytest.mark.parametrize("made_by", **by_id(COPIES))
def test_any_bits_of_a_remainder_are_copied(made_by: Callable[[Any], Any]) -> None:
    copied = made_by(split_optimizer())
    assert remainder_of(copied).dtype == torch.int16
    assert torch.equal(remainder_of(copied), PATTERNS)


def test_a_state_dict_has_the_memory_of_the_remainder() -> None:
    """torch.distributed.checkpoint loads into the tensors of a state dict."""
    optimizer = split_optimizer()
    saved = optimizer.state_dict()["state"][0]["param_remainder"]
    saved.view(torch.int16).copy_(PATTERNS.flip(0))
    assert torch.equal(remainder_of(optimizer), PATTERNS.flip(0))


def test_a_state_dict_has_the_memory_of_sharded_remainders(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    param = distribute_tensor(torch.ones_like(PATTERNS, dtype=BFLOAT16), mesh, [Shard(0)])
    optimizer = fusedopt.AdamW([param], master_weights="split")
    param.grad = torch.zeros_like(param)
    optimizer.step()
    saved = optimizer.state_dict()["state"][0]["param_remainder"]
    assert saved.dtype == BFLOAT16
    assert (saved.placements, saved.shape) == (param.placements, param.shape)
    saved.to_local().view(torch.int16).copy_(PATTERNS)
    assert torch.equal(remainder_of(optimizer).to_local(), PATTERNS)


@both_ways
def test_a_remainder_of_a_state_dict_may_be_put_into_the_state(by_hand: bool) -> Any:
    """torch.distributed.optim.ZeroRedundancyOptimizer does so."""
    optimizer = split_optimizer()
    found = []
    for step in ("step", "load", "step"):
        if by_hand:
            saved = optimizer.state_dict()["state"][0]["param_remainder"]
            optimizer.state[param_of(optimizer)]["param_remainder"] = saved
        if step == "load":
            optimizer.load_fp32_params([weight + 1 for weight in optimizer.fp32_params()])
        else:
            step_with(optimizer, [values(*PATTERNS.shape, dtype=BFLOAT16)])
        found += [param_of(optimizer).clone(), *optimizer.fp32_params()]
    return found


# Names of dtypes in param groups.


@both_ways
def test_a_dtype_or_its_name(by_name: bool) -> Any:
    """Given first, with a group, added, or set later; a state dict has the name in any case."""
    dtypes = [FLOAT32, BFLOAT16]
    given = [dtype_id(dtype) if by_name else dtype for dtype in dtypes]
    params = [values(4, dtype=BFLOAT16) for _ in range(4)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "state_dtype": given[1]}]
    optimizer = fusedopt.AdamW(groups, state_dtype=given[0])
    optimizer.add_param_group({"params": [params[2]], "state_dtype": given[1]})
    optimizer.add_param_group({"params": [params[3]]})
    held = [group["state_dtype"] for group in optimizer.param_groups]
    assert [*held, optimizer.defaults["state_dtype"]] == [
        "float32", "bfloat16", "bfloat16", "float32", "float32"
    ]  # fmt: skip
    assert all(type(name) is str for name in held)
    optimizer.param_groups[3]["state_dtype"] = given[1]
    step_with(optimizer, [values(4, dtype=BFLOAT16, seed=1)] * 4)
    kept = [optimizer.state[param]["exp_avg"].dtype for param in params]
    assert kept == [FLOAT32, BFLOAT16, BFLOAT16, BFLOAT16]
    saved = through_a_file(optimizer.state_dict())
    assert [group["state_dtype"] for group in saved["param_groups"]] == [
        "float32", "bfloat16", "bfloat16", "bfloat16"
    ]  # fmt: skip
    return [params, list(optimizer.state.values())]


def test_a_checkpoint_with_a_dtype_in_its_groups() -> None:
    """As state dicts and pickles were before groups held names."""
    (param,) = params = [values(4)]
    optimizer = fusedopt.AdamW(params, state_dtype="bfloat16")
    step_with(optimizer, [values(4)])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_dtype"] = BFLOAT16
    optimizer.load_state_dict(through_a_file(saved))
    assert optimizer.param_groups[0]["state_dtype"] == "bfloat16"
    optimizer.param_groups[0]["state_dtype"] = BFLOAT16
    for copied in (made_by(optimizer) for made_by in COPIES.values()):
        step_with(copied, [values(4)])
        assert copied.state[param_of(copied)]["exp_avg"].dtype == BFLOAT16
        assert copied.state_dict()["param_groups"][0]["state_dtype"] == "bfloat16"
    assert optimizer.state[param]["exp_avg"].dtype == BFLOAT16


@pytest.mark.parametrize("wrong", ["float16", torch.float16, "fp32", 16], ids=str)
def test_what_a_state_dtype_may_be_is_told(wrong: Any) -> None:
    allowed = "torch.float32, 'float32', torch.bfloat16, 'bfloat16', 'q8', or None"
    with pytest.raises(ValueError, match=rf"state_dtype must be {allowed}, got .*{wrong}"):
        fusedopt.AdamW([values(4)], state_dtype=wrong)
