"""States in 8 bits: codes and the scales of 64 elements."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt import _C, _codes
from support.codes import (
    CASE,
    CODED_SHAPES,
    FLAT,
    GROUP,
    MANY_DIMS,
    ROWS,
    SHAPES,
    SMALL,
    VECTOR,
    assert_codes_of,
    coded_names,
    each_coded_case,
    each_narrow,
    few_coded_cases,
    grads_for,
    numbers_of,
    of_q8,
    one_step,
    trained,
)
from support.device import DEVICE
from support.equality import bits
from support.optimizers import Case, each_of_all_names, step_with
from support.pairs import in_pairs
from support.plans import MANY, best_isa, each_isa, require, use_plan
from support.snapshots import record, refused
from support.tensors import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    draw,
    params_of,
    some_dtypes,
    values,
)


def test_which_params_have_codes() -> None:
    optimizer = trained(CASE, FLOAT32)
    shapes = {
        ROWS: (40, 2),
        FLAT: (68,),  # 61 * 71 elements, the last group short
        MANY_DIMS: (8, 10),
        VECTOR: None,
        SMALL: None,
    }
    for param, expected in zip(params_of(optimizer), shapes.values(), strict=True):
        entries = optimizer.state[param]
        if expected is None:
            assert {k: v.dtype for k, v in entries.items()} == dict.fromkeys(
                ("step", "exp_avg", "exp_avg_sq"), FLOAT32
            )
            continue
        assert {k: (v.dtype, tuple(v.shape)) for k, v in entries.items()} == {
            "step": (FLOAT32, ()),
            "exp_avg_q8": (torch.int8, tuple(param.shape)),
            "exp_avg_sq_q8": (torch.uint8, tuple(param.shape)),
            "exp_avg_scale": (FLOAT32, expected),
            "exp_avg_sq_scale": (FLOAT32, expected),
        }


@in_pairs(
    each_coded_case,
    each_narrow,
    pytest.mark.parametrize("rounding", [None, False, True]),
    pytest.mark.parametrize("masters", [None, "float32", "split", "split8"]),
    pytest.mark.parametrize("in_double", [False, True]),
)
def test_a_step_is_that_of_numbers(
    case: Case, dtype: torch.dtype, rounding: bool | None, masters: str | None, in_double: bool
) -> None:
    """From what the codes stand for; then each new state is rounded to a code beside it."""
    if masters in ("split", "split8") and dtype != BFLOAT16:
        masters = "float32"
    more: dict[str, Any] = {"stochastic_rounding": rounding, "master_weights": masters}
    if rounding and dtype == FLOAT16:
        more["stochastic_rounding"] = None
    optimizer = trained(case, dtype, **more)
    params = params_of(optimizer)
    weights = optimizer.fp32_params()
    case = case.suited_to(dtype)
    plain = case.ours([Parameter(weight.clone()) for weight in weights], stochastic_rounding=False)
    for param, copied in zip(params, params_of(plain), strict=True):
        entries = numbers_of(optimizer.state[param])
        ours = {"param_remainder", "param_remainder8", "master_param"}
        plain.state[copied] = {k: v.clone().float() for k, v in entries.items() if k not in ours}
    grads = grads_for(params, 7)
    one_step(optimizer, [grad.double() for grad in grads] if in_double else grads)
    one_step(plain, [grad.double() if in_double else grad.float() for grad in grads])
    for param, copied in zip(params, params_of(plain), strict=True):
        entries, expected = optimizer.state[param], plain.state[copied]
        assert bool(coded_names(entries)) == (
            param.shape in CODED_SHAPES and bool(expected.keys() - {"step"})
        )
        for name in coded_names(entries):
            units = 0.5 if rounding is False else 1
            assert_codes_of(entries, name, expected[name].cpu(), units)
    # Weights before they are rounded are those of float32 states, as the numbers are the same.
    wide = masters is not None or dtype == FLOAT32
    for ours, theirs in zip(optimizer.fp32_params(), params_of(plain), strict=True):
        assert ours.shape == theirs.shape
        if wide and masters != "split8":
            torch.testing.assert_close(ours, theirs.detach(), rtol=2e-6, atol=1e-7)


@in_pairs(
    few_coded_cases,
    some_dtypes(FLOAT32, BFLOAT16),
    each_isa,
    pytest.mark.parametrize("chunk_elements", [64, 1000, MANY]),
    pytest.mark.parametrize("threads", [1, 2]),
    pytest.mark.parametrize("in_double", [False, True]),
)
@pytest.mark.cpu_only
def test_bits_depend_on_nothing_else(
    case: Case, dtype: torch.dtype, isa: str, chunk_elements: int, threads: int, in_double: bool
) -> None:
    require(isa)
    runs = []
    for plan in ((best_isa(), MANY, 1), (isa, chunk_elements, threads)):
        torch.set_num_threads(plan[2])
        params = draw([*SHAPES, (300, 256)], dtype=dtype)
        optimizer = of_q8(case, params, stochastic_rounding=True)
        use_plan(optimizer, *plan[:2])
        for step in range(3):
            grads = grads_for(params, step)
            one_step(optimizer, [grad.double() for grad in grads] if in_double else grads)
        runs.append(record(optimizer))
    for name, value in runs[0].items():
        assert torch.equal(bits(value), bits(runs[1][name])), name


LAYOUTS = {
    "channels-last": ((8, 16, 5, 8), (640, 1, 128, 16)),
    "transposed": ((96, 64), (1, 96)),
    "rows-with-gaps": ((40, 128), (150, 1)),
    "columns-with-gaps": ((61, 71), (142, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@few_coded_cases
def test_strided_params_have_the_same_codes(case: Case, layout: Any) -> None:
    shape, strides = layout
    room = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    strided = values(room).as_strided(shape, strides)
    dense = strided.clone(memory_format=torch.contiguous_format)
    runs = []
    for param in (strided, dense):
        optimizer = of_q8(case, [param], stochastic_rounding=True)
        for step in range(3):
            step_with(optimizer, [values(*shape, seed=step + 1)])
        assert all(
            entry.is_contiguous()
            for name, entry in optimizer.state[param].items()
            if name != "step"
        )
        runs.append(record(optimizer))
    for name, value in runs[0].items():
        assert torch.equal(bits(value.contiguous()), bits(runs[1][name])), name


def test_zeros_are_exact_and_small_squares_stay() -> None:
    param = torch.zeros(64, 64)
    optimizer = of_q8(CASE, [param])
    grad = torch.zeros(64, 64)
    grad[1, 0], grad[1, 1] = 1.0, 1e-15
    grad[2] = 1e-25  # whose squares are 0 in float32
    step_with(optimizer, [grad] * 3)
    entries = optimizer.state[param]
    codes = entries["exp_avg_sq_q8"].cpu()
    assert codes[1, 0] == 255
    assert codes[1, 1] == 1  # 1e-30 of the largest
    assert (codes[1, 2:] == 0).all()
    assert (codes[[0, 2]] == 0).all()
    assert entries["exp_avg_sq_scale"][0] == 0
    assert (entries["exp_avg_q8"][0] == 0).all()
    assert entries["exp_avg_scale"][0] == 0
    assert (param[0] == 0).all()


def test_conversions_to_and_fro_stay() -> None:
    """The nearest codes of what codes stand for are these, and the largest of a group stays. What
    is never negative in a step may be so in what is loaded: it counts as 0."""
    scales = torch.ones(40, 2)
    for dtype in (torch.int8, torch.uint8):
        codes = torch.arange(128).repeat(40, 1).to(dtype)
        codes[1::2, :64] += 64
        codes[:, [0, 64]] = torch.tensor(127, dtype=dtype) if dtype == torch.int8 else 255
        for _ in range(10):
            found, scales_found = _codes.encode(_codes.decode(codes, scales), dtype, (40, 2))
            assert torch.equal(found, codes)
            torch.testing.assert_close(scales_found, scales, rtol=2e-7, atol=0)
            assert (scales_found <= scales).all()
            scales = scales_found
    below = torch.full((64, 64), -0.0)
    below[0, 0], below[0, 1] = 1.0, -0.5
    codes, _ = _codes.encode(below, torch.uint8, (64, 1))
    assert codes[0, 0] == 255
    assert int(codes.count_nonzero()) == 1


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    param = values(64, 128)
    optimizer = of_q8(CASE, [param])
    grad = values(64, 128, seed=1)
    grad[3, 70] = bad
    step_with(optimizer, [grad])
    for name in ("exp_avg_scale", "exp_avg_sq_scale"):
        scales = optimizer.state[param][name].cpu()
        assert scales[3, 1].isnan()
        assert scales.isfinite().sum() == scales.numel() - 1
    step_with(optimizer, [values(64, 128, seed=2)])
    assert param[3, 64:].isnan().all()  # all of the group, not one step later than that
    assert param.isfinite().sum() == param.numel() - GROUP


@pytest.mark.parametrize("name", ["Adagrad", "ASGD", "Rprop", "SparseAdam"])
def test_optimizers_without(name: str) -> None:
    with pytest.raises(ValueError, match=f"state_dtype='q8' is not for {name}"):
        getattr(fusedopt, name)([values(64, 64)], state_dtype="q8")


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"'q8' is not for centered=True"):
        fusedopt.RMSprop([values(64, 64)], state_dtype="q8", centered=True)
    with pytest.raises(ValueError, match=r"'float32', torch.bfloat16, 'bfloat16', 'q8', or None"):
        fusedopt.AdamW([values(64, 64)], state_dtype="q4")  # type: ignore[arg-type]
    for dtype in (FLOAT64, torch.complex64, torch.complex128):
        optimizer = of_q8(CASE, [values(64, 64), values(64, 64, dtype=dtype)])
        for param in params_of(optimizer):
            param.grad = torch.ones_like(param)
        message = "state_dtype='q8' is for float32, bfloat16 and .*group 0, index 1"
        with refused(optimizer, ValueError, message):
            optimizer.step()


# What is done to the state of a param, and what the next step says.
DAMAGE: dict[str, tuple[Any, type[Exception], str]] = {
    "no-scales": (
        lambda state: state.pop("exp_avg_scale"),
        ValueError,
        "has no 'exp_avg_scale', but has",
    ),
    "no-codes": (lambda state: state.pop("exp_avg_sq_q8"), ValueError, "has no 'exp_avg_sq_q8'"),
    "signed": (
        lambda state: state.update(exp_avg_sq_q8=state["exp_avg_sq_q8"].view(torch.int8)),
        TypeError,
        r"exp_avg_sq_q8 of .* must be torch.uint8",
    ),
    "unsigned": (
        lambda state: state.update(exp_avg_q8=state["exp_avg_q8"].view(torch.uint8)),
        TypeError,
        r"exp_avg_q8 of .* must be torch.int8",
    ),
    "numbers": (
        lambda state: state.update(exp_avg_q8=state["exp_avg_q8"].float()),
        TypeError,
        r"exp_avg_q8 of .* must be torch.int8",
    ),
    "fewer-scales": (
        lambda state: state.update(exp_avg_scale=state["exp_avg_scale"][1:]),
        ValueError,
        r"exp_avg_scale of .* one number for 64 elements",
    ),
    "double-scales": (
        lambda state: state.update(exp_avg_scale=state["exp_avg_scale"].double()),
        ValueError,
        r"exp_avg_scale of .* must be torch.float32",
    ),
    "transposed": (
        lambda state: state.update(exp_avg_q8=state["exp_avg_q8"].t().contiguous().t()),
        ValueError,
        r"exp_avg_q8 of .* is not contiguous",
    ),
    "other-shape": (
        lambda state: state.update(exp_avg_q8=state["exp_avg_q8"].reshape(-1)),
        ValueError,
        r"exp_avg_q8 of .* does not fit the parameter",
    ),
    "no-tensor": (lambda state: state.update(exp_avg_q8=3), TypeError, "must be a tensor"),
    "shared": (
        lambda state: state.update(exp_avg_scale=state["exp_avg_sq_scale"]),
        ValueError,
        "share memory",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_state(damage: Any, error: type[Exception], message: str) -> None:
    param = values(64, 64)
    optimizer = of_q8(CASE, [param])
    step_with(optimizer, [values(64, 64, seed=1)] * 2)
    damage(optimizer.state[param])
    param.grad = values(64, 64, seed=2)
    with refused(optimizer, error, message):
        optimizer.step()


def test_a_uint8_param_is_refused() -> None:
    param = torch.zeros(64, 64, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(TypeError, match="dtypes that can be stepped"):
        step_with(fusedopt.SGD([param]), [param.clone()])


def test_both_forms_in_a_state() -> None:
    param = values(64, 64)
    optimizer = of_q8(CASE, [param])
    step_with(optimizer, [values(64, 64, seed=1)])
    optimizer.state[param]["exp_avg"] = torch.zeros_like(param)
    param.data = param.data.clone()  # so that the step looks
    param.grad = values(64, 64, seed=2)
    with refused(optimizer, ValueError, "has both 'exp_avg' and 'exp_avg_q8'"):
        optimizer.step()


def test_a_state_that_was_deleted_is_made_anew() -> None:
    params = draw([(64, 64)] * 4)
    optimizer = of_q8(CASE, params)
    for step in range(2):
        one_step(optimizer, grads_for(params, step))
    del optimizer.state[params[2]]
    one_step(optimizer, grads_for(params, 3))
    assert optimizer.state[params[2]]["step"] == 1
    assert coded_names(optimizer.state[params[2]]) == ["exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize("make", ["AdamW", "Adamax"])
@pytest.mark.unsanitized
@pytest.mark.unemulated
def test_weights_without_grads_rest(make: str) -> None:
    # To nearest, a small first moment would stand still while the second one falls.
    kept, full = (Parameter(torch.zeros(64, 64, device=DEVICE)) for _ in range(2))
    ours = getattr(fusedopt, make)([kept], lr=1e-3, weight_decay=0, state_dtype="q8")
    theirs = getattr(fusedopt, make)([full], lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(5)
    for step in range(6000):
        grad = torch.randn(64, 64, generator=generator, device="cpu").to(DEVICE)
        if step >= 100:
            grad[:, 0] = 0
        kept.grad, full.grad = grad, grad.clone()
        ours.step()
        theirs.step()
    moved, expected = (float(each.detach()[:, 0].abs().mean()) for each in (kept, full))
    assert moved < 2 * expected


def test_settings_that_change_in_mid_run() -> None:
    """A step goes by what is in the state; new parameters and checkpoints go by the settings."""
    param, late = draw([(64, 64), (64, 128)])
    optimizer = CASE.ours([param])
    step_with(optimizer, [values(64, 64, seed=1)])
    optimizer.param_groups[0]["state_dtype"] = "q8"
    optimizer.add_param_group({"params": [late]})
    for seed in (2, 3):
        one_step(optimizer, [values(64, 64, seed=seed), values(64, 128, seed=seed)])
    assert optimizer.state[param].keys() == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.param_groups[1]["state_dtype"] = "q8"
    del optimizer.state[late]
    optimizer.load_state_dict(optimizer.state_dict())
    one_step(optimizer, [values(64, 64, seed=4), values(64, 128, seed=4)])
    for each in (param, late):
        assert coded_names(optimizer.state[each]) == ["exp_avg", "exp_avg_sq"]
    # And back.
    for group in optimizer.param_groups:
        group["state_dtype"] = "float32"
    one_step(optimizer, [values(64, 64, seed=5), values(64, 128, seed=5)])
    assert coded_names(optimizer.state[param]) == ["exp_avg", "exp_avg_sq"]
    optimizer.load_state_dict(optimizer.state_dict())
    one_step(optimizer, [values(64, 64, seed=6), values(64, 128, seed=6)])
    assert optimizer.state[param].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_a_first_moment_that_is_left_out_takes_its_codes_along() -> None:
    param = values(64, 64)
    optimizer = of_q8(CASE, [param])
    step_with(optimizer, [values(64, 64, seed=1)])
    optimizer.param_groups[0]["betas"] = (0.0, 0.99)
    step_with(optimizer, [values(64, 64, seed=2)])
    assert optimizer.state[param].keys() == {"step", "exp_avg_sq_q8", "exp_avg_sq_scale"}


def test_memory() -> None:
    optimizer = trained(CASE, BFLOAT16, master_weights="split8")
    groups = sum(-(-param.numel() // GROUP) for param in params_of(optimizer)[:3])
    coded = sum(param.numel() for param in params_of(optimizer)[:3])
    others = sum(param.numel() for param in params_of(optimizer)[3:])
    found = optimizer.memory()
    assert found["scales"] == 2 * 4 * groups
    assert found["states"] == 2 * coded + 2 * 4 * others + 4 * len(SHAPES)
    assert found["masters"] == coded + others
    of_one = of_q8(CASE, [values(1024, 1024, dtype=BFLOAT16)], master_weights="split8")
    step_with(of_one, [values(1024, 1024, dtype=BFLOAT16)])
    (param,) = params_of(of_one)
    total = of_one.memory()["total"] - 4  # for the count of steps
    assert total / param.numel() == 2 + 2 + 1 + 2 + 2 * 4 / GROUP


@each_of_all_names
def test_each_name_has_codes_or_says_why(name: str) -> None:
    make = getattr(fusedopt, name)
    if name in ("Adagrad", "ASGD", "Rprop"):
        pytest.skip("test_optimizers_without")
    param = values(64, 64)
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = make([param], state_dtype="q8", **options)
    step_with(optimizer, [values(64, 64, seed=1)])
    assert len(coded_names(optimizer.state[param])) == (
        1 if name in ("SGD", "Lion", "RMSprop") else 2
    )
    assert {f"{each}_scale" for each in coded_names(optimizer.state[param])} <= set(
        _C.names_of_scales(make._row)
    )
