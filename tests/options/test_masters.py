"""Master weights: the float32 weights of 16-bit params, whole or as what the param's bits lack."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.device import DEVICE
from support.equality import bits
from support.optimizers import Case, some_cases, step_with
from support.pairs import in_pairs
from support.plans import each_isa, require
from support.settings import assert_param_is_rounded_weight, nearest_ties_away
from support.snapshots import refused
from support.tensors import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, by_id, params_of, values

# How a 16-bit param's weight can be kept.
KINDS: dict[str, tuple[str, torch.dtype]] = {
    "split": ("split", BFLOAT16),
    "float32-of-bfloat16": ("float32", BFLOAT16),
    "float32-of-float16": ("float32", FLOAT16),
}
each_exact_kind = pytest.mark.parametrize(("kind", "dtype"), **by_id(KINDS))
# "split8" keeps the upper 24 bits.
each_kind = pytest.mark.parametrize(
    ("kind", "dtype"), **by_id({**KINDS, "split8": ("split8", BFLOAT16)})
)


def as_kept(weight: Tensor, kind: str) -> Tensor:
    """Numbers that such a master weight holds exactly."""
    if kind != "split8":
        return weight
    return torch.where(weight.isnan(), weight, (weight.view(torch.int32) & -256).view(FLOAT32))


# Zeros, subnormals, ones, the largest finite numbers, infinities and NaNs of every kind.
HIGH = (
    *(0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81),
    *(0x7F7E, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF),
)
LOW = (0x0000, 0x0001, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF)


def numbers(high: Tensor, low: Tensor) -> Tensor:
    """The float32 of every pair of upper and lower halves."""
    both = (high.to(torch.int64)[:, None] << 16) | low
    return both.reshape(-1).to(torch.int32).view(FLOAT32)


HALVES = torch.arange(65536)
NUMBERS: dict[str, Callable[[], Tensor]] = {
    "all-lower-halves": lambda: numbers(torch.tensor([*HIGH, *(h | 0x8000 for h in HIGH)]), HALVES),
    "all-upper-halves": lambda: numbers(HALVES, torch.tensor(LOW)),
}
each_number = pytest.mark.parametrize("make", **by_id(NUMBERS))


def loaded(kind: str, dtype: torch.dtype, weight: Tensor, **more: Any) -> tuple[Any, Parameter]:
    param = Parameter(torch.zeros(weight.shape, dtype=dtype))
    param.grad_dtype = FLOAT32
    optimizer = fusedopt.SGD([param], lr=1.0, master_weights=kind, **more)
    optimizer.load_fp32_params([weight])
    return optimizer, param


def assert_weight(optimizer: Any, weight: Tensor, kind: str) -> None:
    """Bit for bit, and NaN in both readings."""
    (param,), (found,) = params_of(optimizer), optimizer.fp32_params()
    assert found.dtype == FLOAT32
    assert torch.equal(bits(found), bits(weight))
    assert_param_is_rounded_weight(param, weight, kind)


@each_number
@each_kind
def test_every_number_is_kept(kind: str, dtype: torch.dtype, make: Callable[[], Tensor]) -> None:
    weight = as_kept(make(), kind)
    optimizer, param = loaded(kind, dtype, weight)
    assert_weight(optimizer, weight, kind)
    param.grad = torch.zeros_like(weight)
    is_subnormal = weight.abs() < torch.finfo(FLOAT32).tiny  # which counts as zero in a step
    weight = torch.where(is_subnormal, torch.zeros(()).copysign(weight), weight)
    for _ in range(2):
        optimizer.step()
        assert_weight(optimizer, weight, kind)


@pytest.mark.cpu_only
@each_isa
@each_number
@pytest.mark.parametrize("kind", ["split", "split8"])
def test_every_number_in_each_instruction_set(
    isa: str, make: Callable[[], Tensor], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(isa)
    monkeypatch.setenv("FUSEDOPT_ISA", isa)
    test_every_number_is_kept(kind, BFLOAT16, make)


def test_the_reference_rounds_as_said() -> None:
    # A tie between 1 and 1 + 2^-7 goes up, and down where torch's nearest-even does, too.
    weight = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 2**-8 - 2**-20, 1.0, torch.inf])
    rounded = torch.tensor([1 + 2**-7, -1 - 2**-7, 1.0, 1.0, torch.inf])
    assert torch.equal(nearest_ties_away(weight).float(), rounded)


STEPS = 2000
EDGES = (0.0, -0.0, 1e-45, -3e-39, 1e-20, 3e38, -3e38, 1 + 2**-8, -1 - 2**-8)


@pytest.mark.unemulated
@pytest.mark.unsanitized  # no other accesses than in fewer steps
@in_pairs(
    pytest.mark.parametrize(
        ("ema_decay", "grad_dtype"), [(None, FLOAT32), (0.99, BFLOAT16)], ids=["wide-grads", "ema"]
    ),
    each_exact_kind,
    some_cases(
        *("sgd-l2", "momentum-l2", "momentum-damped", "nesterov", "sgdw-momentum"),
        *("adam", "adam-amsgrad-l2", "adamw", "adamw-lr-independent"),
        *("rmsprop-all", "adagrad-l2", "adadelta", "adamax-l2", "nadam", "radam", "asgd-averaged"),
        *("rprop", "lion-decay"),
    ),
)
def test_2000_steps_are_those_of_float32(
    case: Case, kind: str, dtype: torch.dtype, ema_decay: float | None, grad_dtype: torch.dtype
) -> None:
    start = values(77)
    start[: len(EDGES)] = torch.tensor(EDGES)
    low, full = Parameter(torch.zeros(77, dtype=dtype)), Parameter(start.clone())
    low.grad_dtype = None  # any
    options = {"ema_decay": ema_decay, "state_dtype": FLOAT32}
    ours: Any = case.ours([low], master_weights=kind, **options)
    theirs: Any = case.ours([full], **options)
    ours.load_fp32_params([start])
    grads = values(STEPS, 77, dtype=grad_dtype, seed=1)
    for step, (grad, wide) in enumerate(zip(grads, grads.float(), strict=True)):
        low.grad, full.grad = grad, wide
        ours.step()
        theirs.step()
        if step % 100 == 0 or step == STEPS - 1:
            assert_weight(ours, full.detach(), kind)
    for name, expected in theirs.state[full].items():
        assert torch.equal(ours.state[low][name], expected), name


# A thousandth of what bfloat16 can tell from 1, a thousand times.
@pytest.mark.parametrize("kind", [None, "float32", "split"])
@some_cases("sgd", "momentum", "adamw", "asgd", "lion-decay")
def test_tiny_updates_are_kept(case: Case, kind: str | None) -> None:
    param = torch.ones(40, dtype=BFLOAT16)
    optimizer: Any = case.ours([param], master_weights=kind, state_dtype=FLOAT32)
    optimizer.param_groups[0].update(lr=4e-6, weight_decay=0)
    step_with(optimizer, [torch.ones_like(param)] * 1000)
    (weight,) = optimizer.fp32_params()
    if kind is None:
        assert (param == 1).all()
    else:
        assert (param < 1).all()
        moved = 1000 * 4e-6 * (10 if "momentum" in case.options else 1)
        assert torch.allclose(1 - weight, torch.tensor(moved), rtol=0.02)


def test_weights_are_copies_in_the_order_of_the_params() -> None:
    dtypes = [BFLOAT16, FLOAT32, FLOAT64, FLOAT16, BFLOAT16]
    params = [Parameter(values(3, 4, dtype=dtype, seed=i)) for i, dtype in enumerate(dtypes)]
    groups = [{"params": params[:2]}, {"params": params[2:4]}, {"params": params[4:]}]
    groups[2]["master_weights"] = "split"  # type: ignore[assignment]
    optimizer = fusedopt.AdamW(groups, master_weights="float32")
    weights = [values(3, 4, dtype=FLOAT64, seed=10 + i) for i in range(5)]
    weights = [w if d == FLOAT64 else w.float() for w, d in zip(weights, dtypes, strict=True)]
    optimizer.load_fp32_params(weights)
    for found, weight in zip(optimizer.fp32_params(), weights, strict=True):
        assert found.dtype == weight.dtype
        assert torch.equal(found, weight)
        found.zero_()
        weight.add_(0)
    for found, weight, param in zip(optimizer.fp32_params(), weights, params, strict=True):
        assert torch.equal(found, weight)
        assert torch.equal(param, weight.to(param.dtype))  # random: no ties


@pytest.mark.parametrize("kind", [None, "float32", "split"])
def test_weights_before_the_first_step_are_the_params(kind: str | None) -> None:
    params = [Parameter(values(7, dtype=BFLOAT16, seed=seed)) for seed in (1, 2)]
    optimizer = fusedopt.Adam(params, master_weights=kind)
    for found, param in zip(optimizer.fp32_params(), params, strict=True):
        assert torch.equal(found, param.float())


WRONG_WEIGHTS: dict[str, Callable[[], list[Tensor]]] = {
    "too-few": lambda: [torch.ones(3)],
    "too-many": lambda: [torch.ones(3), torch.ones(4), torch.ones(4)],
    "shape": lambda: [torch.ones(3), torch.ones(2, 2)],
    "broadcastable": lambda: [torch.ones(3), torch.ones(())],
    "swapped": lambda: [torch.ones(4), torch.ones(3)],
}


@pytest.mark.parametrize("stepped", [False, True], ids=["new", "stepped"])
@pytest.mark.parametrize("wrong", **by_id(WRONG_WEIGHTS))
@each_kind
def test_wrong_weights(kind: str, dtype: torch.dtype, wrong: Any, stepped: bool) -> None:
    params = [Parameter(values(size, dtype=dtype)) for size in (3, 4)]
    optimizer = fusedopt.AdamW(params, master_weights=kind)
    if stepped:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    with refused(optimizer, ValueError, r"fp32|weights|tensors|shape"):
        optimizer.load_fp32_params(wrong())


def step_with_ones(optimizer: Any) -> None:
    for param in params_of(optimizer):
        param.grad = torch.ones_like(param)
    optimizer.step()


def emptied(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor.cpu(), 0.1, 0, torch.qint8)


def written_in_inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


UNREADABLE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda four: four.to_sparse(), "sparse"),
    "meta": (lambda four: four.to("meta"), "on the meta device"),
    "emptied": (emptied, "without memory"),
    "quantized": (quantized, "quantized"),
}
UNWRITABLE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "emptied": (emptied, "without memory"),
    "expanded": (lambda four: four[:1].clone().expand(4), "expanded"),
    "inference": (written_in_inference, "inference tensor"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("unreadable", "message"), **by_id(UNREADABLE))
@each_kind
def test_weights_that_cannot_be_read(
    kind: str, dtype: torch.dtype, unreadable: Callable[[Tensor], Tensor], message: str
) -> None:
    params = [Parameter(values(size, dtype=dtype)) for size in (3, 4)]
    optimizer = fusedopt.AdamW(params, master_weights=kind)
    step_with_ones(optimizer)
    with refused(optimizer, TypeError, rf"tensor 1 \(for .*\) is {message}"):
        optimizer.load_fp32_params([torch.ones(3), unreadable(torch.ones(4))])


@pytest.mark.parametrize(("unwritable", "message"), **by_id(UNWRITABLE))
@each_kind
def test_params_that_cannot_be_written(
    kind: str, dtype: torch.dtype, unwritable: Callable[[Tensor], Tensor], message: str
) -> None:
    """By load_fp32_params, and by a state dict with other masters: nothing is, then."""
    first, second = (values(size, dtype=dtype).detach() for size in (3, 4))
    other_kind = "float32" if kind != "float32" else "split" if dtype == BFLOAT16 else None
    copies = [Parameter(each.clone()) for each in (first, second)]
    others = fusedopt.AdamW(copies, master_weights=other_kind)
    step_with_ones(others)
    other = Parameter(unwritable(second), requires_grad=False)
    optimizer = fusedopt.AdamW([("first", Parameter(first)), ("second", other)],
                               master_weights=kind)  # fmt: skip
    before = first.clone()
    loads = [lambda: optimizer.load_fp32_params([torch.ones(3), torch.ones(4)])]
    if other_kind is not None:
        loads.append(lambda: optimizer.load_state_dict(others.state_dict()))
    for load in loads:
        with pytest.raises(ValueError, match=f"'second' .*{message}"):
            load()
        assert torch.equal(first, before)
        assert not optimizer.state


def test_masters_that_cannot_be_written() -> None:
    params = [Parameter(values(size, dtype=BFLOAT16)) for size in (3, 4)]
    optimizer = fusedopt.AdamW(params, master_weights="split")
    step_with_ones(optimizer)
    state = optimizer.state[params[1]]
    for wrong, error in (("x", TypeError), (torch.ones(5, dtype=torch.int16), ValueError),
                         (torch.ones(4), ValueError)):  # fmt: skip
        state["param_remainder"] = wrong
        with pytest.raises(error, match=r"param_remainder of .*index 1"):
            optimizer.load_fp32_params([torch.full((3,), 5.0), torch.ones(4)])
        assert not (params[0] == 5.0).any()
    state["param_remainder"] = None  # as a step takes it: there is none
    assert torch.equal(optimizer.fp32_params()[1], params[1].detach().float())
    optimizer.load_fp32_params([torch.ones(3), torch.full((4,), 1.001)])
    assert torch.equal(optimizer.fp32_params()[1], torch.full_like(params[1], 1.001, dtype=FLOAT32))


def test_params_themselves_can_be_loaded() -> None:
    one, two = Parameter(torch.full((3,), 1.0)), Parameter(torch.full((3,), 2.0))
    fusedopt.SGD([one, two]).load_fp32_params([two, one])
    assert one[0] == 2.0
    assert two[0] == 1.0
    params = [Parameter(torch.full((3,), size, dtype=BFLOAT16)) for size in (1.0, 2.0)]
    optimizer = fusedopt.AdamW(params, master_weights="float32")
    step_with_ones(optimizer)
    masters = [optimizer.state[param]["master_param"] for param in params]
    expected = [masters[1].clone(), masters[0].clone()]
    optimizer.load_fp32_params(reversed(masters))
    assert all(map(torch.equal, optimizer.fp32_params(), expected))


@pytest.mark.parametrize("kind", ["split", "split8"])
@pytest.mark.parametrize("other", [FLOAT16, FLOAT32], ids=["float16", "float32"])
def test_split_weights_of_others_cannot_be_loaded(kind: str, other: torch.dtype) -> None:
    params = [Parameter(torch.ones(3, dtype=dtype)) for dtype in (BFLOAT16, other)]
    optimizer = fusedopt.Adam(params, master_weights=kind)  # type: ignore[arg-type]
    with refused(optimizer, ValueError, f"'{kind}' is for torch.bfloat16"):
        optimizer.load_fp32_params([torch.ones(3), torch.ones(3)])


@each_kind
def test_masters_switched_off_and_on(kind: str, dtype: torch.dtype) -> None:
    # What was the weight before is not the weight any more; a step of lr 0 shows what is.
    param = Parameter(torch.full((5,), 1.1, dtype=dtype))
    optimizer = fusedopt.AdamW([param], master_weights=kind)
    for now, lr in ((kind, 0.1), (None, 0.1), (kind, 0.0)):
        optimizer.param_groups[0].update(master_weights=now, lr=lr)
        before = param.detach().clone()
        step_with(optimizer, [torch.ones_like(param)] * 4)
        assert torch.equal(param, before) == (lr == 0)


def test_writes_to_inference_tensors_count() -> None:
    # torch does not count writes to these.
    with torch.inference_mode():
        param = torch.ones(5, dtype=BFLOAT16)
        optimizer = fusedopt.SGD([param], lr=0.5, master_weights="float32")
        step_with(optimizer, [torch.ones_like(param)])
        param.fill_(100)
        step_with(optimizer, [torch.zeros_like(param)])
    assert (param == 100).all()


# SGD without momentum needs no state, and has to look for what is left of it all the same.
LEFT_IN_STATE: dict[str, dict[str, Any]] = {
    "ema": {"ema_decay": 0.9},
    "float32": {"master_weights": "float32"},
    "split": {"master_weights": "split"},
}


@pytest.mark.parametrize("options", **by_id(LEFT_IN_STATE))
def test_state_that_a_copy_does_not_need_is_dropped(options: dict[str, Any]) -> None:
    param = Parameter(torch.ones(5, dtype=BFLOAT16))
    optimizer = fusedopt.SGD([param], lr=0.1, **options)
    step_with(optimizer, [torch.ones_like(param)] * 2)
    copy = deepcopy(optimizer)
    (group,) = copy.param_groups
    group.update(dict.fromkeys(options))
    step_with(copy, [torch.ones_like(param)])
    assert not any(copy.state.values())


# What a user might put there by hand, for a param of four elements.
BY_HAND: dict[str, tuple[str, Callable[[], Any]]] = {
    "master-of-16-bits": ("master_param", lambda: torch.ones(4, dtype=BFLOAT16)),
    "master-of-64-bits": ("master_param", lambda: torch.ones(4, dtype=FLOAT64)),
    "master-of-integers": ("master_param", lambda: torch.ones(4, dtype=torch.int32)),
    "master-of-another-shape": ("master_param", lambda: torch.ones(5)),
    "master-transposed": ("master_param", lambda: torch.ones(1, 4)),
    "master-on-meta": ("master_param", lambda: torch.ones(4, device="meta")),
    "master-is-a-list": ("master_param", lambda: [1.0] * 4),
    "remainder-of-32-bits": ("param_remainder", lambda: torch.ones(4, dtype=torch.int32)),
    "remainder-of-floats": ("param_remainder", lambda: torch.ones(4, dtype=FLOAT16)),
    "remainder-unsigned": ("param_remainder", lambda: torch.ones(4, dtype=torch.uint16)),
    "remainder-of-another-shape": ("param_remainder", lambda: torch.ones(3, dtype=torch.int16)),
    "remainder-of-8-bits": ("param_remainder", lambda: torch.ones(4, dtype=torch.int8)),
}


@pytest.mark.parametrize(("name", "make"), **by_id(BY_HAND))
@some_cases("sgd", "momentum", "adamw")
def test_wrong_masters_by_hand(case: Case, name: str, make: Callable[[], Any]) -> None:
    kind = "float32" if name == "master_param" else "split"
    params = [Parameter(torch.ones(4, dtype=BFLOAT16, device=DEVICE)) for _ in range(2)]
    optimizer = case.ours([("a", params[0]), ("b", params[1])], master_weights=kind)
    step_with(optimizer, [torch.ones_like(params[0])])
    assert name in optimizer.state[params[1]]
    optimizer.state[params[1]][name] = make()
    with refused(optimizer, (ValueError, TypeError), f"'b'.*{name}|{name}.*'b'"):
        optimizer.step()


@pytest.mark.parametrize("frozen", [FLOAT32, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["split", "split8"])
def test_weights_beside_frozen_params(kind: Any, frozen: torch.dtype) -> None:
    """What is frozen needs no master, so it may be of a dtype that cannot have one."""
    trained = Parameter(torch.ones(3, dtype=BFLOAT16))
    rests = Parameter(torch.ones(4).to(frozen), requires_grad=False)
    optimizer = fusedopt.AdamW([trained, rests], master_weights=kind)
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    weights = optimizer.fp32_params()
    optimizer.load_fp32_params([weights[0] * 2, torch.full((4,), 3.0)])
    assert torch.equal(optimizer.fp32_params()[0], weights[0] * 2)
    assert torch.equal(rests, torch.full((4,), 3.0).to(frozen))


@each_kind
def test_masters_of_a_step_in_inference_mode(kind: str, dtype: torch.dtype) -> None:
    """They are to be written to where it has ended, too."""
    param = Parameter(torch.ones(3, dtype=dtype))
    optimizer = fusedopt.AdamW([param], master_weights=kind)
    param.grad = torch.ones_like(param)
    with torch.inference_mode():
        optimizer.step()
    assert not any(entry.is_inference() for entry in optimizer.state[param].values())
    optimizer.load_fp32_params([torch.full((3,), 1.5)])
    assert torch.equal(optimizer.fp32_params()[0], torch.full((3,), 1.5))


@each_kind
def test_masters_that_are_loaded_in_inference_mode(kind: str, dtype: torch.dtype) -> None:
    param = Parameter(torch.ones(3, dtype=dtype))
    optimizer = fusedopt.AdamW([param], master_weights=kind)
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = 1
    with torch.inference_mode():
        optimizer.load_state_dict(saved)
    assert not any(entry.is_inference() for entry in optimizer.state[param].values())
    resumed = fusedopt.AdamW([param], master_weights=kind)
    with torch.inference_mode():
        resumed.load_fp32_params(optimizer.fp32_params())
    assert not any(entry.is_inference() for entry in resumed.state[param].values())
    resumed.load_fp32_params([torch.full((3,), 1.5)])
    assert torch.equal(resumed.fp32_params()[0], torch.full((3,), 1.5))
