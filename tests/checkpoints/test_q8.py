"""States in 8 bits: in files, from and to other settings, and torch's optimizers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fusedopt.compat import float32_states
from support.codes import (
    CASE,
    CODED_SHAPES,
    SHAPES,
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
from support.equality import bits
from support.optimizers import Case, step_with
from support.pairs import in_pairs
from support.snapshots import COPIES, record, refused, through_a_file
from support.tensors import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    draw,
    params_of,
    values,
)


@in_pairs(each_coded_case, each_narrow, pytest.mark.parametrize("copied", [*COPIES, "file"]))
def test_a_resumed_run_repeats_the_bits(case: Case, dtype: torch.dtype, copied: str) -> None:
    optimizer = trained(case, dtype)
    if copied == "file":
        params = [param.detach().clone() for param in params_of(optimizer)]
        other = of_q8(case.suited_to(dtype), params)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        other = COPIES[copied](optimizer)
    for each in (optimizer, other):
        for step in (5, 6):
            one_step(each, grads_for(params_of(each), step))
    ours, theirs = record(optimizer), record(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(bits(value), bits(theirs[name])), name


KEPT: dict[str, Any] = {"None": None, "float32": "float32", "bfloat16": BFLOAT16, "q8": "q8"}


@pytest.mark.parametrize("to", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("start", KEPT.values(), ids=KEPT)
@few_coded_cases
def test_conversions(case: Case, start: Any, to: Any) -> None:
    """From each kind of states to each; nearest codes, which are then what they are."""
    params = draw(SHAPES, dtype=BFLOAT16)
    first = case.ours(params, state_dtype=start)
    for step in range(3):
        one_step(first, grads_for(params, step))
    second = case.ours([param.detach().clone() for param in params], state_dtype=to)
    second.load_state_dict(through_a_file(first.state_dict()))
    for own, other in zip(params, params_of(second), strict=True):
        before, after = first.state[own], second.state[other]
        codes = start == "q8" if to is None else to == "q8"
        has_states = bool(before.keys() - {"step"})
        assert bool(coded_names(after)) == (codes and own.shape in CODED_SHAPES and has_states)
        numbers = numbers_of(before)
        assert numbers_of(after).keys() - {"step"} == numbers.keys() - {"step"}
        for name, value in numbers_of(after).items():
            if f"{name}_q8" in before and f"{name}_q8" in after:
                for each in (f"{name}_q8", f"{name}_scale"):
                    assert torch.equal(before[each], after[each]), each
            elif f"{name}_q8" in after:
                assert_codes_of(after, name, numbers[name].double().cpu(), 0.5)
            elif name != "step":
                decides = start if to is None else to
                wide = FLOAT32 if decides in ("q8", "float32") else BFLOAT16
                assert after[name].dtype == wide, name
                torch.testing.assert_close(value.float(), numbers[name].float(), rtol=1e-2, atol=0)
    one_step(second, grads_for(params, 9))
    assert all(param.isfinite().all() for param in params_of(second))


@few_coded_cases
def test_to_torch_and_back(case: Case) -> None:
    optimizer = trained(case, FLOAT32)
    theirs = case.theirs([Parameter(param.detach().clone()) for param in params_of(optimizer)])
    exported = float32_states(optimizer.state_dict())
    theirs.load_state_dict(through_a_file(exported))
    for own, other in zip(params_of(optimizer), params_of(theirs), strict=True):
        for name, value in numbers_of(optimizer.state[own]).items():
            found = theirs.state[other][name].float()
            torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
    one_step(theirs, grads_for(params_of(theirs), 8))
    back = of_q8(case, [param.detach().clone() for param in params_of(theirs)])
    back.load_state_dict(theirs.state_dict())
    one_step(back, grads_for(params_of(back), 9))
    assert coded_names(back.state[params_of(back)[0]]) == coded_names(
        optimizer.state[params_of(optimizer)[0]]
    )


def test_through_a_cast_by_torch_codes_stay() -> None:
    optimizer = trained(CASE, BFLOAT16)
    params = params_of(optimizer)
    theirs = torch.optim.AdamW([Parameter(param.detach().clone()) for param in params])
    theirs.load_state_dict(optimizer.state_dict())
    back = of_q8(CASE, params)
    back.load_state_dict(theirs.state_dict())
    for param in params[:3]:
        for name in ("exp_avg_q8", "exp_avg_sq_q8"):
            assert torch.equal(optimizer.state[param][name], back.state[param][name])


BAD_FILES: dict[str, tuple[Any, type[Exception], str]] = {
    "no-scales": (lambda state: state.pop("exp_avg_scale"), ValueError, "has no 'exp_avg_scale'"),
    "other-codes": (
        lambda state: state.update(exp_avg_q8=state["exp_avg_q8"][1:]),
        ValueError,
        "exp_avg_q8 and exp_avg_scale of .* are of shapes",
    ),
    "other-scales": (
        lambda state: state.update(exp_avg_scale=state["exp_avg_scale"][1:]),
        ValueError,
        "exp_avg_q8 and exp_avg_scale of .* are of shapes",
    ),
    "other-kind": (
        lambda state: state.update(exp_avg_q8=state["exp_avg_q8"].view(torch.uint8)),
        TypeError,
        "exp_avg_q8 of .* must be torch.int8",
    ),
    "no-tensor": (lambda state: state.update(exp_avg_scale=1.0), TypeError, "must be a tensor"),
    "cast": (
        lambda state: state.update(exp_avg_sq_scale=state["exp_avg_sq_scale"].half()),
        ValueError,
        "exp_avg_sq_scale of .* was cast to float16",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_checkpoints(damage: Any, error: type[Exception], message: str) -> None:
    optimizer = trained(CASE, FLOAT32)
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved["state"][0])
    with refused(optimizer, error, message):
        optimizer.load_state_dict(saved)


def test_another_optimizers_codes_are_refused() -> None:
    optimizer = trained(CASE, FLOAT32)
    saved = copy.deepcopy(optimizer.state_dict())
    entries = saved["state"][0]
    entries |= {f"square_avg{end}": entries[f"exp_avg_sq{end}"] for end in ("_q8", "_scale")}
    with refused(optimizer, ValueError, "'square_avg_q8', which Adam has not"):
        optimizer.load_state_dict(saved)


def test_saved_in_float16_warns() -> None:
    params = draw([(64, 64)], dtype=FLOAT16)
    saved = CASE.suited_to(FLOAT16).ours(params)
    one_step(saved, grads_for(params, 1))
    with pytest.warns(UserWarning, match="exp_avg_sq of .* was saved in float16"):
        of_q8(CASE, params).load_state_dict(saved.state_dict())


@pytest.mark.parametrize("start", ["q8", "float32"])
def test_a_checkpoint_that_was_filled_up_with_what_is_here(start: str) -> None:
    """As torch.distributed.checkpoint hands over full state dicts: beside the moments of the other
    form that its first step of nothing has made."""
    params = draw([(64, 64)])
    trained_so = CASE.ours(params, state_dtype=start)
    for step in range(3):
        one_step(trained_so, grads_for(params, step))
    fresh = CASE.ours(params, state_dtype="float32" if start == "q8" else "q8")
    one_step(fresh, [torch.zeros_like(params[0])])
    saved = trained_so.state_dict()
    saved["state"][0] = {**fresh.state_dict()["state"][0], **saved["state"][0]}
    expected = numbers_of(trained_so.state[params[0]])
    fresh.load_state_dict(saved)
    found = numbers_of(fresh.state[params[0]])
    for name in ("exp_avg", "exp_avg_sq"):
        assert rms_difference(found[name], expected[name]) < 0.02
    open_to_both = CASE.ours(params)
    with refused(open_to_both, ValueError, "has both exp_avg and exp_avg_q8"):
        open_to_both.load_state_dict(saved)


def rms_difference(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected.cpu()).norm() / expected.cpu().norm())


def test_defaults_of_torch_change_no_state() -> None:
    # Scales are float32 beside the parameter, whatever new tensors are by default.
    (param,) = draw([(64, 64)])
    optimizer = of_q8(CASE, [param])
    torch.set_default_dtype(FLOAT64)
    try:
        with torch.device("meta"):
            step_with(optimizer, [values(64, 64, seed=1)])
            optimizer.load_state_dict(optimizer.state_dict())
            found = float32_states(optimizer.state_dict())["state"][0]
    finally:
        torch.set_default_dtype(FLOAT32)
    assert optimizer.state[param]["exp_avg_scale"].dtype == FLOAT32
    assert found["exp_avg"].device == param.device


def test_flattened_and_other_state_dicts() -> None:
    optimizer = trained(CASE, FLOAT32)
    (entries, *_) = optimizer.state_dict()["state"].values()
    flat = {f"state.fc.weight.{name}": entry for name, entry in entries.items()}
    found = float32_states(flat)
    assert found.keys() == {f"state.fc.weight.{name}" for name in ("step", "exp_avg", "exp_avg_sq")}
    for wrong in ({"optimizer": optimizer.state_dict()}, {}):
        with pytest.raises(ValueError, match="not the state dict of an optimizer"):
            float32_states(wrong)
    cast = {"state": {0: {**entries, "exp_avg_q8": entries["exp_avg_q8"].bfloat16()}}}
    with pytest.raises(ValueError, match=r"exp_avg_q8 is torch\.bfloat16: codes"):
        float32_states(cast)
    del entries["exp_avg_scale"]
    with pytest.raises(ValueError, match="has exp_avg_q8, but no exp_avg_scale"):
        float32_states({"state": {0: entries}})


def test_a_state_that_is_not_in_use_stays_as_it_was_saved() -> None:
    optimizer = trained(CASE, FLOAT32)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["max_exp_avg_sq"] = torch.zeros(3, 3)
    optimizer.load_state_dict(saved)
    assert optimizer.state[params_of(optimizer)[0]]["max_exp_avg_sq"].shape == (3, 3)
