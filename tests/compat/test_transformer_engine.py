"""The stand-in for TransformerEngine's FusedAdam: its grads and states, and what Megatron does."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.compat.transformer_engine import FusedAdam, convert_state_dict
from support.device import DEVICE
from support.equality import assert_equal, bits
from support.optimizers import train
from support.snapshots import copy_params, record, refused, snapshot, through_a_file
from support.tensors import BFLOAT16, FLOAT16, FLOAT32, params_of, values

SPLIT: dict[str, Any] = {"master_weights": True, "store_param_remainders": True}
DECOUPLED: dict[str, Any] = {**SPLIT, "use_decoupled_grad": True}


def bfloat16_params(*sizes: int) -> list[Parameter]:
    return [Parameter(values(size, seed=size, dtype=BFLOAT16)) for size in sizes]


# How TransformerEngine keeps a weight: its kernel cuts the bits in halves, and rounds the upper one
# up where the lower one is negative as an int16 (transformer_engine/common/multi_tensor/adam.cu).


def te_join(param: Tensor, remainder: Tensor) -> Tensor:
    upper = param.view(torch.int16).to(torch.int64)
    upper = torch.where(remainder < 0, upper - 1, upper) & 0xFFFF
    word = upper << 16 | (remainder.to(torch.int64) & 0xFFFF)
    return (word - ((word >> 31) << 32)).to(torch.int32).view(FLOAT32)


def te_split(weight: Tensor) -> tuple[Tensor, Tensor]:
    word = weight.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    upper, lower = word >> 16, word & 0xFFFF
    upper = torch.where(lower >= 0x8000, upper + 1, upper) & 0xFFFF
    halves = [half - ((half >> 15) << 16) for half in (upper, lower)]
    return halves[0].to(torch.int16).view(BFLOAT16), halves[1].to(torch.int16)


UPPER = (0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF)
LOWER = torch.arange(65536)


def all_kinds_of_weights() -> Tensor:
    uppers = torch.tensor([*UPPER, *(upper | 0x8000 for upper in UPPER)])
    word = (uppers.to(torch.int64)[:, None] << 16 | LOWER).reshape(-1)
    return (word - ((word >> 31) << 32)).to(torch.int32).view(FLOAT32)


def test_remainders_are_those_of_transformer_engine() -> None:
    """Of every lower half below numbers of all kinds.

    A NaN may be another one. Some are zeros or infinities in TransformerEngine's params, and stay
    so here: beside a remainder, these may as well have been written since.
    """
    weight = all_kinds_of_weights()
    rounded, remainder = te_split(weight)
    assert torch.equal(bits(te_join(rounded, remainder)), bits(weight))
    is_number = weight.isnan() & ~rounded.isnan()
    expected = torch.where(is_number, rounded.to(FLOAT32), weight)
    for option in ("split", "float32"):
        param = Parameter(rounded.clone())
        optimizer = fusedopt.AdamW([param], master_weights=option)
        optimizer.load_state_dict(convert_state_dict(saved_by_te([param], [remainder]), optimizer))
        (found,) = optimizer.fp32_params()
        if option == "float32":  # what is no rounding of the weight has been written to since
            is_kept = rounded == weight.to(BFLOAT16)
            assert torch.equal(bits(found[is_kept]), bits(weight[is_kept]))
            found = optimizer.state[param]["master_param"]
        assert torch.equal(bits(found), bits(expected))


def saved_by_te(
    params: list[Any], masters: list[Tensor], step: Any = 7, **options: Any
) -> dict[str, Any]:
    """In the layout of TransformerEngine's state_dict(): steps in groups, states in float32."""
    states = {
        index: {
            "exp_avg": values(*param.shape, seed=1),
            "exp_avg_sq": values(*param.shape, seed=2).square(),
            **({"master_param": masters[index]} if masters else {}),
        }
        for index, param in enumerate(params)
    }
    group = {
        **{"lr": 0.01, "bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8},
        **{"weight_decay": 0.1, "step": step, "params": list(range(len(params))), **options},
    }
    return {"state": states, "param_groups": [group]}


@pytest.mark.parametrize("step", [7, torch.tensor([7], dtype=torch.int32)], ids=["int", "tensor"])
def test_what_it_has_saved_is_read(step: Any) -> None:
    weights = [values(5, 3, seed=3), values(4, seed=4)]
    parts = [te_split(weight) for weight in weights]
    params = [Parameter(param.clone()) for param, _ in parts]
    saved = saved_by_te(params, [remainder for _, remainder in parts], step, lr_mult=2.0)
    before = copy.deepcopy(saved)
    for make in (
        lambda p: fusedopt.AdamW(p, master_weights="split"),
        lambda p: FusedAdam(p, **SPLIT),
    ):
        optimizer: Any = make([Parameter(param.clone()) for param in params])
        optimizer.load_state_dict(convert_state_dict(saved, optimizer))
        assert_equal(optimizer.fp32_params(), weights)
        for index, param in enumerate(params_of(optimizer)):
            state = optimizer.state[param]
            assert state["step"] == 7
            for name in ("exp_avg", "exp_avg_sq"):
                assert_equal(state[name], saved["state"][index][name])
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"], group["lr_mult"]) == (0.01, (0.9, 0.95), 2.0)
        assert group["decoupled_weight_decay"]
        assert "bias_correction" not in group
        assert group.get("step") == (7 if isinstance(optimizer, FusedAdam) else None)
    assert_equal(saved, before)


def test_its_float32_masters_become_remainders() -> None:
    weight = values(50)
    param = Parameter(weight.to(BFLOAT16))
    optimizer = FusedAdam([param], **SPLIT)
    optimizer.load_state_dict(saved_by_te([param], [weight]))
    assert_equal(optimizer.fp32_params(), [weight])


BROKEN: dict[str, tuple[dict[str, Any], type, str]] = {
    "no-moment": ({"exp_avg_sq": None}, ValueError, "exp_avg_sq of the parameter at group 0, ind"),
    "float16": (
        {"exp_avg": torch.zeros(4, dtype=FLOAT16)},
        *(ValueError, "exp_avg of .*index 1 is torch.float16, but must be torch.float32"),
    ),
    "fp8": (
        {"exp_avg": torch.zeros(4, dtype=torch.uint8)},
        *(ValueError, "exp_avg of .*index 1 is torch.uint8, but must be torch.float32"),
    ),
    "shape": ({"exp_avg": torch.zeros(5)}, ValueError, r"exp_avg of .*index 1 is of shape \(5,\)"),
    "no-tensor": ({"exp_avg": 1.0}, TypeError, "exp_avg of .*index 1 is 1.0, but must be a tensor"),
    "master": (
        {"master_param": torch.zeros(4, dtype=FLOAT16)},
        *(ValueError, "master_param of .*index 1 is torch.float16"),
    ),
    "other": ({"momentum_buffer": torch.zeros(4)}, ValueError, "momentum_buffer of .* not known"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_its_layout_is_refused(name: str) -> None:
    change, error, match = BROKEN[name]
    params = bfloat16_params(3, 4)
    optimizer = FusedAdam(params, **SPLIT)
    train(optimizer, steps=1)
    saved = saved_by_te(params, [])
    saved["state"][1].update(change)
    before = snapshot(optimizer)
    with pytest.raises(error, match=match):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("step", [-1, 0.5, "x", torch.ones(2)], ids=str)
def test_no_number_of_steps(step: Any) -> None:
    params = bfloat16_params(3)
    with pytest.raises((TypeError, ValueError), match="step of group 0"):
        convert_state_dict(saved_by_te(params, [], step), FusedAdam(params))


def test_remainders_are_for_bfloat16() -> None:
    params = [Parameter(torch.zeros(3))]
    saved = saved_by_te(params, [torch.zeros(3, dtype=torch.int16)])
    with pytest.raises(
        ValueError, match=r"master_param of .* is int16, but the parameter torch.fl"
    ):
        convert_state_dict(saved, FusedAdam(params))
    with pytest.raises(TypeError, match=r"is for a fusedopt.Adam, not for a SGD"):
        convert_state_dict(saved, fusedopt.SGD(params, lr=0.1))


@pytest.mark.parametrize("grad_dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_decoupled_grads_are_taken_for_grads(grad_dtype: torch.dtype) -> None:
    ours, twin = (
        FusedAdam(bfloat16_params(40, 3), **DECOUPLED),
        FusedAdam(bfloat16_params(40, 3), **SPLIT),
    )
    for step in range(3):
        for param, other in zip(params_of(ours), params_of(twin), strict=True):
            grad = values(*param.shape, seed=step).to(grad_dtype)
            param.decoupled_grad = grad
            other.grad, other.grad_dtype = None, None
            other.grad = grad
        ours.step()
        twin.step()
        for param in params_of(ours):
            assert param.grad is None
            assert param.grad_dtype == BFLOAT16
    assert_equal(record(ours), record(twin))


def test_grads_are_left_alone_beside_decoupled_ones() -> None:
    first, second, third = bfloat16_params(4, 5, 6)
    optimizer = FusedAdam([first, second, third], **DECOUPLED)
    grads = [torch.full_like(param, torch.inf) for param in (first, second)]
    first.grad, second.grad = grads
    first.decoupled_grad = torch.ones(4)
    third.decoupled_grad = None
    optimizer.step()
    assert set(optimizer.state) == {first}  # what has no decoupled grad has none
    assert first.grad is grads[0]
    assert second.grad is grads[1]
    assert first.isfinite().all()


def test_a_refused_step_leaves_grads_as_they_were() -> None:
    params = bfloat16_params(4, 5)
    optimizer = FusedAdam(params, **DECOUPLED)
    for param in params:
        param.grad = torch.ones_like(param)
        param.decoupled_grad = torch.ones(param.shape)
    optimizer.step()
    before = snapshot(optimizer)
    for wrong in (torch.ones(7), "grad"):
        params[1].decoupled_grad = wrong
        with pytest.raises(ValueError, match=r"decoupled_grad of .* index 1 does not fit"):
            optimizer.step()
    params[1].decoupled_grad = torch.ones(5)
    optimizer.param_groups[0]["eps"] = float("nan")
    with pytest.raises(ValueError, match="eps"):
        optimizer.step()
    optimizer.param_groups[0]["eps"] = 1e-8
    assert snapshot(optimizer) == before
    assert {param.grad_dtype for param in params} == {BFLOAT16}


def test_interrupted_while_grads_are_put_back() -> None:
    class Interrupting(Parameter):
        is_armed = False

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "grad_dtype" and value is not None and self.is_armed:
                self.is_armed = False
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    param = Interrupting(values(4, dtype=BFLOAT16))
    optimizer = FusedAdam([param], use_decoupled_grad=True)
    param.grad = grad = torch.ones_like(param)
    param.decoupled_grad = torch.ones(4)
    param.is_armed = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert not param.is_armed
    assert param.grad is grad
    assert param.grad_dtype == BFLOAT16


@pytest.mark.parametrize("set_to_none", [None, True, False])
def test_zero_grad_is_for_decoupled_grads(set_to_none: bool | None) -> None:
    first, second = bfloat16_params(3, 4)
    optimizer = FusedAdam([first, second], use_decoupled_grad=True)
    first.grad, first.decoupled_grad = torch.ones_like(first), torch.ones(3)
    optimizer.zero_grad(set_to_none)
    assert torch.equal(first.grad, torch.ones_like(first))
    if set_to_none is False:
        assert torch.equal(first.decoupled_grad, torch.zeros(3))
    else:
        assert first.decoupled_grad is None


def test_scaler_of_fusedopt_reads_decoupled_grads() -> None:
    """In the step, where it unscales, and skips for infinite ones."""
    (param,), (other,) = bfloat16_params(6), bfloat16_params(6)
    ours, twin = FusedAdam([param], use_decoupled_grad=True), FusedAdam([other])
    scaler = fusedopt.GradScaler(DEVICE, init_scale=8.0)
    for seed, is_infinite in enumerate((False, True, False)):
        grad = values(6, seed=seed, dtype=BFLOAT16)
        scaled = scaler.scale(grad)
        param.decoupled_grad = torch.full_like(grad, torch.inf) if is_infinite else scaled
        scaler.step(ours)
        scaler.update()
        assert bool(ours.skipped) is is_infinite
        if not is_infinite:
            other.grad = grad
            twin.step()
    assert_equal(param, other)


def test_steps_of_groups_are_counted_as_there() -> None:
    """Those of empty groups, too: TransformerEngine's own tests want it (its issue 3318)."""
    (param,) = bfloat16_params(3)
    optimizer = FusedAdam([{"params": [param]}, {"params": []}])
    assert "step" not in optimizer.param_groups[0]
    train(optimizer, steps=3)
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    saved = optimizer.state_dict()
    assert [group["step"] for group in saved["param_groups"]] == [3, 3]
    other = FusedAdam([{"params": copy_params(optimizer)}, {"params": []}])
    other.load_state_dict(through_a_file(saved))
    assert [group["step"] for group in other.param_groups] == [3, 3]


def test_a_group_says_how_many_steps_if_no_parameter_does() -> None:
    """Megatron-Core saves the count of the groups, and puts it beside states that it has anew."""
    optimizer = FusedAdam(bfloat16_params(3, 4))
    train(optimizer, steps=1)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["step"] = 40
    optimizer.load_state_dict(saved)
    assert [optimizer.state[param]["step"] for param in params_of(optimizer)] == [40, 40]


def test_a_late_parameter_keeps_its_own_count() -> None:
    early, late = bfloat16_params(3, 4)
    optimizer = FusedAdam([early, late])
    early.grad = torch.ones_like(early)
    optimizer.step()
    train(optimizer, steps=2)
    other = FusedAdam(copy_params(optimizer))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [int(other.state[param]["step"]) for param in params_of(other)] == [3, 2]


def test_masters_have_their_name_whatever_they_are() -> None:
    """And keep it, when options change and states are made anew."""
    (low,), high = bfloat16_params(5), Parameter(values(4))
    optimizer = FusedAdam([{"params": [low]}, {"params": [high]}], **SPLIT)

    def assert_named() -> None:
        state = optimizer.state[low]
        assert state["master_param"] is state["param_remainder"]
        assert optimizer.state[high]["master_param"].data_ptr() == high.data_ptr()
        assert optimizer.get_unscaled_state(high, "master_param").data_ptr() == high.data_ptr()
        for entries in optimizer.state_dict()["state"].values():
            assert "master_param" not in entries  # the same once more

    train(optimizer, steps=1)
    assert_named()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.load_state_dict(optimizer.state_dict())
    assert_named()
    train(optimizer, steps=2)
    assert_named()
    optimizer.initialize_state(low, True)
    assert_named()
    optimizer.reset_masters()
    train(optimizer, steps=1)
    assert_named()
    optimizer.reset_masters()
    optimizer.load_fp32_params([values(5, seed=7), values(4, seed=8)])
    assert_named()
    train(optimizer, steps=2)
    assert_named()
    optimizer.master_weights = False  # as Megatron-FSDP does
    train(optimizer, steps=1)
    assert {*optimizer.state[low]} == {"step", "exp_avg", "exp_avg_sq"}
    assert not optimizer.master_weights


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["fill", "_name_masters"])
def test_masters_have_their_name_after_an_interrupt(name: str) -> None:
    """Of a first step, which is made as a whole with it, or not at all."""
    optimizer = FusedAdam(bfloat16_params(5, 6), **SPLIT)

    def interrupt(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == name:
            sys.settrace(None)
            raise KeyboardInterrupt

    for param in params_of(optimizer):
        param.grad = torch.ones_like(param)
    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    finally:
        sys.settrace(None)
    assert len(optimizer.state) == (2 if name == "_name_masters" else 0)
    for state in optimizer.state.values():
        assert state["master_param"] is state["param_remainder"]


def test_a_master_without_its_name_is_found() -> None:
    optimizer = FusedAdam(bfloat16_params(5), **SPLIT)
    train(optimizer, steps=1)
    (param,) = params_of(optimizer)
    del optimizer.state[param]["master_param"]  # an interrupt came before it had it
    found = optimizer.get_unscaled_state(param, "master_param")
    assert found is optimizer.state[param]["param_remainder"]


@pytest.mark.parametrize(
    ("dtype", "remainders", "expected"),
    [(BFLOAT16, True, 600), (BFLOAT16, False, 1200), (FLOAT32, True, 0), (FLOAT32, False, 0)],
)
def test_masters_are_counted_once(dtype: torch.dtype, remainders: bool, expected: int) -> None:
    """A remainder and a float32 parameter have two names, but take no memory twice."""
    optimizer = FusedAdam(
        [Parameter(values(300, dtype=dtype))],
        master_weights=True,
        store_param_remainders=remainders,
    )
    assert optimizer.memory()["masters"] == 0
    train(optimizer, steps=1)
    assert "master_param" in optimizer.state[params_of(optimizer)[0]]
    found = optimizer.memory()
    assert found["masters"] == expected
    assert found["total"] == sum(count for name, count in found.items() if name != "total")


def test_a_first_moment_that_is_left_out_is_saved_as_zeros() -> None:
    """For torch, as fusedopt.Adam does it."""
    optimizer = FusedAdam(bfloat16_params(4), betas=(0.0, 0.9), **SPLIT)
    train(optimizer, steps=1)
    (entries,) = optimizer.state_dict()["state"].values()
    assert torch.equal(entries["exp_avg"], torch.zeros(4))
    assert "exp_avg" not in optimizer.state[params_of(optimizer)[0]]


def test_as_megatron_fsdp_begins() -> None:
    """Its fully_shard_optimizer() makes a step with an lr of 0, and sets all counts back."""
    ours, twin = FusedAdam(bfloat16_params(6), lr=0.1), FusedAdam(bfloat16_params(6), lr=0.1)
    (param,), (group,) = params_of(ours), ours.param_groups
    before = param.detach().clone()
    param.grad, group["lr"] = torch.zeros_like(param), 0.0
    ours.step()
    group["lr"], group["step"] = 0.1, 0
    ours.state[param]["step"].zero_()
    ours.zero_grad()
    assert torch.equal(param, before)
    for optimizer in (ours, twin):
        train(optimizer, steps=2)
    assert group["step"] == 2
    assert_equal(record(ours), record(twin))


def test_a_state_of_no_parameter() -> None:
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        FusedAdam(bfloat16_params(3)).initialize_state(torch.ones(3))


@pytest.mark.parametrize("given", ["weight", "remainder"])
@pytest.mark.parametrize("remainders", [True, False], ids=["remainders", "masters"])
def test_set_master(remainders: bool, given: str) -> None:
    weight = values(60)
    rounded, remainder = te_split(weight)
    param = Parameter(rounded.clone())
    optimizer = FusedAdam([param], master_weights=True, store_param_remainders=remainders)
    new = {"weight": weight, "remainder": remainder}[given]
    optimizer.set_scaled_state(param, "master_param", new)
    assert_equal(optimizer.fp32_params(), [weight])
    found = optimizer.get_unscaled_state(param, "master_param")
    assert_equal(found, remainder if remainders else weight)


def test_states_are_set_and_read_in_float32() -> None:
    (param,) = bfloat16_params(60)
    options: dict[str, Any] = {"exp_avg_dtype": BFLOAT16, "exp_avg_sq_dtype": BFLOAT16}
    optimizer = FusedAdam([param], **options)
    value = values(60)
    optimizer.set_scaled_state(param, "exp_avg", value)
    assert optimizer.state[param]["exp_avg"].dtype == BFLOAT16
    assert_equal(optimizer.get_unscaled_state(param, "exp_avg"), value.to(BFLOAT16).float())
    kept = optimizer.get_unscaled_state(param, "exp_avg", skip_unscale=True)
    assert kept is optimizer.state[param]["exp_avg"]
    for wrong in (torch.zeros(1), torch.zeros(60, dtype=torch.int16)):
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=r"exp_avg .*(of shape|cannot be)"):
            optimizer.set_scaled_state(param, "exp_avg", wrong)
        assert snapshot(optimizer) == before


def test_a_state_as_it_is_can_be_loaded() -> None:
    """The remainder has the name of a master, too."""
    optimizer = FusedAdam(bfloat16_params(9), **SPLIT)
    train(optimizer, steps=2)
    (param,) = params_of(optimizer)
    saved = {"state": {0: dict(optimizer.state[param])},
             "param_groups": optimizer.state_dict()["param_groups"]}  # fmt: skip
    before = record(optimizer)
    optimizer.load_state_dict(copy.deepcopy(saved))
    after = record(optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("wrong", [None, torch.ones(2), torch.ones(9).to_sparse()], ids=str)
def test_a_state_that_is_refused_is_not_made(wrong: Any) -> None:
    (param,) = bfloat16_params(9)
    optimizer = FusedAdam([param])
    with refused(optimizer, (TypeError, ValueError), "exp_avg (is|must be)"):
        optimizer.set_scaled_state(param, "exp_avg", wrong)
    with refused(optimizer, ValueError, "no 'exp'"):
        optimizer.set_scaled_state(param, "exp", torch.ones(9))
    with refused(optimizer, ValueError, "no 'exp_avg'"):
        optimizer.get_unscaled_state(torch.ones(3), "exp_avg")
    optimizer.state_dict()


@pytest.mark.parametrize("count", [None, "x", "3", [1], -1, float("nan"), torch.ones(2)], ids=str)
def test_a_groups_count_is_looked_at_before_the_step(count: Any) -> None:
    optimizer = FusedAdam(bfloat16_params(9))
    train(optimizer, steps=1)
    optimizer.param_groups[0]["step"] = count
    for param in params_of(optimizer):
        param.grad = torch.ones_like(param)
    with refused(optimizer, (TypeError, ValueError), "step of param group 0"):
        optimizer.step()


def test_an_initial_state_is_that_of_the_first_step() -> None:
    ours, twin = FusedAdam(bfloat16_params(9), **SPLIT), FusedAdam(bfloat16_params(9), **SPLIT)
    ours.initialize_state(params_of(ours)[0])
    for optimizer in (ours, twin):
        train(optimizer, steps=2)
    assert_equal(record(ours), record(twin))


class MegatronShards:
    """What Megatron-Core's distributed optimizer does with a precision-aware Adam.

    Written out from its megatron/core/optimizer (August 2026): the optimizer is made over the
    model's parameters, which are views of flat buffers, in groups with keys of its own. Then it is
    given this process's parts of them, one dim each, without grad, of which one may be empty.
    """

    def __init__(self, weights: list[Tensor], **options: Any) -> None:
        model = [Parameter(weight.clone()) for weight in weights]
        groups = [
            {"params": model[:2], "wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False},
            {"params": model[2:], "wd_mult": 0.0, "lr_mult": 1.0, "is_expert_parallel": False},
        ]
        self.optimizer = FusedAdam(
            params=groups,  # type: ignore[arg-type]
            lr=0.01,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            eps=1e-8,
            capturable=False,
            adam_w_mode=True,
            **{"exp_avg_dtype": FLOAT32, "exp_avg_sq_dtype": FLOAT32, "master_weights": True},
            **{"use_decoupled_grad": True, "master_weight_dtype": FLOAT32, **options},
        )
        shards = [param.detach().view(-1)[1:] for param in model]  # another process has the first
        self.shards = [*shards, model[0].detach().view(-1)[:0]]
        original = list(self.optimizer.param_groups)
        original[0]["params"] = [self.shards[0], self.shards[1]]
        original[1]["params"] = [*self.shards[2:]]
        self.optimizer.param_groups = original
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def step(self, seed: int) -> None:
        for shard in self.shards:
            shard.decoupled_grad = values(shard.numel(), seed=seed)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
        """DistributedOptimizer.state_dict() and its _get_main_param_and_optimizer_states()."""
        groups = self.optimizer.state_dict()["param_groups"]
        steps = {group["step"] for group in groups if group["params"]}
        assert len(steps) == 1
        groups = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        saved = []
        for shard in self.shards:
            tensors = {
                key: self.optimizer.get_unscaled_state(shard, key).clone()
                for key, value in self.optimizer.state[shard].items()
                if isinstance(value, Tensor)
            }
            tensors["param"] = tensors.pop("master_param")
            saved.append({key: tensors[key] for key in ("param", "exp_avg", "exp_avg_sq")})
        return groups, saved

    def load(self, groups: list[dict[str, Any]], saved: list[dict[str, Tensor]]) -> None:
        """DistributedOptimizer.load_state_dict(), with its empty tensors, and what sets them."""
        own = self.optimizer.state_dict()["param_groups"]
        merged = [
            {**new, "params": group["params"]} for new, group in zip(groups, own, strict=True)
        ]
        keys = [key for group in own for key in group["params"]]
        garbage = {
            key: {
                "exp_avg": torch.full((shard.numel(),), 3.0),
                "exp_avg_sq": torch.full((shard.numel(),), 4.0),
                "master_param": torch.full_like(tensors["param"], 5),
            }
            for key, shard, tensors in zip(keys, self.shards, saved, strict=True)
        }
        self.optimizer.load_state_dict({"state": garbage, "param_groups": merged})
        for shard, tensors in zip(self.shards, saved, strict=True):
            for key, value in tensors.items():
                name = "master_param" if key == "param" else key
                self.optimizer.set_scaled_state(shard, name, value)


@pytest.mark.parametrize("dtypes", [(BFLOAT16,), (BFLOAT16, FLOAT32)], ids=["bf16", "mixed"])
@pytest.mark.parametrize("remainders", [True, False], ids=["remainders", "masters"])
def test_as_megatron_core_does_it(remainders: bool, dtypes: tuple[torch.dtype, ...]) -> None:
    weights = [values(4, 5, seed=seed, dtype=dtypes[seed % len(dtypes)]) for seed in range(4)]
    options: dict[str, Any] = {"store_param_remainders": remainders}
    trained = MegatronShards(weights, **options)
    for seed in range(3):
        trained.step(seed)
    checkpoint = through_a_file(trained.save())
    resumed = MegatronShards(weights, **options)
    for shard, loaded in zip(resumed.shards, trained.shards, strict=True):
        shard.copy_(loaded)  # the model's part of the checkpoint
    resumed.load(*checkpoint)
    for each in (trained, resumed):
        for seed in range(3, 6):
            each.step(seed)
    assert_equal(resumed.shards, trained.shards)
    for group, saved in zip(resumed.optimizer.param_groups, trained.save()[0], strict=True):
        assert group["step"] == saved["step"] == 6
        assert group["wd_mult"] == saved["wd_mult"]

    # And it is AdamW over the same numbers.
    twin = fusedopt.AdamW(
        [weight.clone().view(-1)[1:] for weight in weights],
        **{"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "state_dtype": FLOAT32},
        master_weights="float32",
    )
    for seed in range(6):
        for param in params_of(twin):
            param.grad_dtype = None
            param.grad = values(param.numel(), seed=seed)
        twin.step()
    weights_of = [w for w in trained.optimizer.fp32_params() if w.numel()]
    assert_equal(weights_of, twin.fp32_params())


def test_weights_of_24_bits_are_refused() -> None:
    optimizer = FusedAdam([Parameter(torch.ones(3))], master_weights=True)
    more = {"params": [Parameter(torch.ones(3))], "master_weights": "split8"}
    with pytest.raises(ValueError, match="24 bits"):
        optimizer.add_param_group(more)
    assert len(optimizer.param_groups) == 1
