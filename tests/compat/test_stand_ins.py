"""The stand-ins for others' optimizers, each against the one of fusedopt that it stands for."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt.compat import apex, deepspeed, transformer_engine
from support.device import DEVICE
from support.equality import assert_equal
from support.optimizers import train
from support.processes import run_fork
from support.snapshots import COPIES, record, refused, snapshot, through_a_file
from support.tensors import BFLOAT16, FLOAT16, FLOAT32, by_id, params_of, set_grads, values

ORIGINS: dict[str, type] = {
    "te": transformer_engine.FusedAdam,
    "apex": apex.FusedAdam,
    "apex-sgd": apex.FusedSGD,
    "deepspeed-cpu": deepspeed.DeepSpeedCPUAdam,
    "deepspeed": deepspeed.FusedAdam,
}
REQUIRED: dict[str, dict[str, Any]] = {"apex-sgd": {"lr": 0.1}}
each_origin = pytest.mark.parametrize("origin", ORIGINS)
each_adam = pytest.mark.parametrize("origin", [name for name in ORIGINS if name != "apex-sgd"])


def make(origin: str, params: Any, **options: Any) -> Any:
    return ORIGINS[origin](params, **{**REQUIRED.get(origin, {}), **options})


@dataclass(frozen=True)
class Row:
    """Options of a stand-in, and the optimizer of fusedopt that they stand for."""

    origin: str
    options: dict[str, Any]
    twin: Callable[..., Any]
    twins: dict[str, Any]  # the options of the twin
    dtypes: tuple[torch.dtype, ...] = (FLOAT32, BFLOAT16, FLOAT16)
    without: tuple[str, ...] = field(default=())  # states that the twin has not


FAST: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
MOMENTUM: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
F32 = {"state_dtype": "float32"}
AS_TENSOR = {"lr": torch.tensor(0.01), "capturable": True, "fused": True}
MASTERS, SPLIT = {"master_weights": "float32"}, {"master_weights": "split"}
BOTH_BF16 = {"exp_avg_dtype": BFLOAT16, "exp_avg_sq_dtype": BFLOAT16}
TE_MASTERS = {"master_weights": True}
TE_SPLIT = {**TE_MASTERS, "store_param_remainders": True}
L2 = {"adam_w_mode": False}

ROWS = {
    "te-defaults": Row("te", {}, fusedopt.AdamW, {"weight_decay": 0.0, **F32}),
    "te": Row("te", FAST, fusedopt.AdamW, {**FAST, **F32}),
    "te-l2": Row("te", {**FAST, **L2}, fusedopt.Adam, {**FAST, **F32}),
    "te-bf16": Row("te", {**FAST, **BOTH_BF16}, fusedopt.AdamW, {**FAST, "state_dtype": BFLOAT16}),
    "te-masters": Row(
        *("te", {**FAST, **TE_MASTERS}, fusedopt.AdamW, {**FAST, **F32, **MASTERS}),
        *((BFLOAT16, FLOAT16),),
    ),
    "te-masters-float32": Row(
        *("te", {**FAST, **TE_MASTERS}, fusedopt.AdamW, {**FAST, **F32}),
        *((FLOAT32,), ("master_param",)),
    ),
    "te-remainders": Row(
        *("te", {**FAST, **TE_SPLIT}, fusedopt.AdamW, {**FAST, **F32, **SPLIT}),
        *((BFLOAT16,), ("master_param",)),
    ),
    "te-remainders-of-others": Row(
        *("te", {**FAST, **TE_SPLIT}, fusedopt.AdamW, {**FAST, **F32, **MASTERS}),
        *((FLOAT32, BFLOAT16), ("master_param",)),
    ),
    "te-remainders-bf16": Row(
        *("te", {**FAST, **TE_SPLIT, **BOTH_BF16}, fusedopt.AdamW),
        *({**FAST, **SPLIT, "state_dtype": BFLOAT16}, (BFLOAT16,), ("master_param",)),
    ),
    "te-capturable": Row(
        "te", {**FAST, "capturable": True}, fusedopt.AdamW, {**FAST, **F32, **AS_TENSOR}
    ),
    "te-capturable-remainders": Row(
        *("te", {**FAST, **TE_SPLIT, "capturable": True}, fusedopt.AdamW),
        *({**FAST, **F32, **SPLIT, **AS_TENSOR}, (BFLOAT16,), ("master_param",)),
    ),
    "apex-defaults": Row("apex", {}, fusedopt.AdamW, {"weight_decay": 0.0, **F32}),
    "apex": Row("apex", FAST, fusedopt.AdamW, {**FAST, **F32}),
    "apex-l2": Row("apex", {**FAST, **L2}, fusedopt.Adam, {**FAST, **F32}),
    "apex-masters": Row(
        "apex", {**FAST, "master_weights": True}, fusedopt.AdamW, {**FAST, **F32, **MASTERS}
    ),
    "apex-capturable": Row(
        "apex", {**FAST, "capturable": True}, fusedopt.AdamW, {**FAST, **F32, **AS_TENSOR}
    ),
    "sgd": Row("apex-sgd", {"lr": 0.1}, fusedopt.SGD, {"lr": 0.1}),
    "sgd-momentum": Row("apex-sgd", MOMENTUM, fusedopt.SGD, MOMENTUM),
    "sgd-damped": Row(
        *("apex-sgd", {**MOMENTUM, "dampening": 0.2}, fusedopt.SGD),
        {**MOMENTUM, "dampening": 0.2},
    ),
    "sgd-nesterov": Row(
        *("apex-sgd", {**MOMENTUM, "nesterov": True}, fusedopt.SGD),
        {**MOMENTUM, "nesterov": True},
    ),
    "sgd-decay-last": Row(
        *("apex-sgd", {**MOMENTUM, "wd_after_momentum": True}, fusedopt.SGD),
        {**MOMENTUM, "decoupled_weight_decay": True},
    ),
    "deepspeed-cpu-defaults": Row(
        "deepspeed-cpu", {}, fusedopt.AdamW, {"weight_decay": 0.0, **F32}
    ),
    "deepspeed-cpu": Row("deepspeed-cpu", FAST, fusedopt.AdamW, {**FAST, **F32}),
    "deepspeed-cpu-l2": Row(
        "deepspeed-cpu", {**FAST, "adamw_mode": False}, fusedopt.Adam, {**FAST, **F32}
    ),
    "deepspeed-cpu-states": Row(
        "deepspeed-cpu", {**FAST, "fp32_optimizer_states": False}, fusedopt.AdamW, FAST
    ),
    "deepspeed-defaults": Row("deepspeed", {}, fusedopt.AdamW, {"weight_decay": 0.0}),
    "deepspeed": Row("deepspeed", FAST, fusedopt.AdamW, FAST),
    "deepspeed-l2": Row("deepspeed", {**FAST, **L2}, fusedopt.Adam, FAST),
}
each_row = pytest.mark.parametrize("row", **by_id(ROWS))


def params_for(row: Row) -> list[Parameter]:
    """Of several sizes, an empty one last, where TransformerEngine's kernels lose their work."""
    sizes = ((5, 7), (300,), (), (0,))
    return [
        Parameter(values(*shape, seed=seed, dtype=dtype))
        for dtype in row.dtypes
        for seed, shape in enumerate(sizes)
    ]


@each_row
def test_steps_are_those_of_the_optimizer_it_stands_for(row: Row) -> None:
    ours = make(row.origin, params_for(row), **row.options)
    twin = row.twin(params_for(row), **row.twins)
    for optimizer in (ours, twin):
        train(optimizer)
    for param, other in zip(params_of(ours), params_of(twin), strict=True):
        assert_equal(param, other)
        states = {k: v for k, v in ours.state[param].items() if k not in row.without}
        others = {k: v for k, v in twin.state[other].items() if k not in row.without}
        assert_equal(states, others)
    assert_equal(ours.fp32_params(), twin.fp32_params())


SGD_ARGUMENTS = {
    **{"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False},
    **{"wd_after_momentum": False, "materialize_master_grads": True, "set_grad_none": False},
}
BETAS = {"betas": (0.9, 0.999), "eps": 1e-8}
# As the packages have them: TransformerEngine 2.x, apex and DeepSpeed of August 2026.
SIGNATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "te": (
        "params",
        {
            **{"lr": 1e-3, **BETAS, "weight_decay": 0.0, "amsgrad": False},
            **{"bias_correction": True, "adam_w_mode": True, "capturable": False},
            **{"master_weights": False, "master_weight_dtype": FLOAT32},
            **{"exp_avg_dtype": FLOAT32, "exp_avg_sq_dtype": FLOAT32},
            **{"use_decoupled_grad": False, "store_param_remainders": False},
            **{"set_grad_none": None},
        },
    ),
    "apex": (
        "params",
        {
            **{"lr": 1e-3, "bias_correction": True, **BETAS, "adam_w_mode": True},
            **{"weight_decay": 0.0, "amsgrad": False, "set_grad_none": True},
            **{"capturable": False, "master_weights": False},
        },
    ),
    "apex-sgd": ("params", {"lr": inspect.Parameter.empty, **SGD_ARGUMENTS}),
    "deepspeed-cpu": (
        "model_params",
        {
            **{"lr": 1e-3, "bias_correction": True, **BETAS, "weight_decay": 0},
            **{"amsgrad": False, "adamw_mode": True, "fp32_optimizer_states": True},
        },
    ),
    "deepspeed": (
        "params",
        {
            **{"lr": 1e-3, "bias_correction": True, **BETAS, "adam_w_mode": True},
            **{"weight_decay": 0.0, "amsgrad": False, "set_grad_none": True},
        },
    ),
}


@pytest.mark.cpu_only
@each_origin
def test_signature(origin: str) -> None:
    params, arguments = SIGNATURES[origin]
    first, *others = inspect.signature(ORIGINS[origin]).parameters.values()
    assert first.name == params
    assert [(p.name, p.default) for p in others] == list(arguments.items())
    keyword_only = [p.name for p in others if p.kind == p.KEYWORD_ONLY]
    assert keyword_only == (list(arguments)[5:] if origin == "te" else [])


@pytest.mark.cpu_only
@each_origin
def test_docstring_has_every_argument(origin: str) -> None:
    text = inspect.getdoc(ORIGINS[origin]) or ""
    for name in SIGNATURES[origin][1]:
        assert name in text, name


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "uncorrected": (
        *(("te", "apex", "deepspeed-cpu", "deepspeed"), {"bias_correction": False}),
        r"bias_correction=False is not supported.*lr that is multiplied by",
    ),
    "amsgrad": (
        *(("te", "apex", "deepspeed-cpu", "deepspeed"), {"amsgrad": True}),
        r"amsgrad=True is not supported.*fusedopt.AdamW\(amsgrad=True\)",
    ),
    "two-dtypes": (("te",), {"exp_avg_dtype": BFLOAT16}, r"exp_avg_dtype=torch.bfloat16 with exp"),
    "fp8": (
        *(("te",), {"exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.uint8}),
        r"exp_avg_dtype=torch.uint8 .*torch.float32 or torch.bfloat16 for both",
    ),
    "float16-states": (
        *(("te",), {"exp_avg_dtype": FLOAT16, "exp_avg_sq_dtype": FLOAT16}),
        r"exp_avg_dtype=torch.float16 .*torch.float32 or torch.bfloat16 for both",
    ),
    "float16-masters": (
        *(("te",), {"master_weights": True, "master_weight_dtype": FLOAT16}),
        r"master_weight_dtype=torch.float16 .*store_param_remainders",
    ),
}
REFUSALS = [(origin, name) for name, (origins, _, _) in REFUSED.items() for origin in origins]


@pytest.mark.cpu_only
@pytest.mark.parametrize(("origin", "name"), REFUSALS)
def test_refused_arguments(origin: str, name: str) -> None:
    _, options, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        make(origin, [torch.ones(3)], **options)


@each_adam
def test_a_group_without_bias_correction_is_refused(origin: str) -> None:
    optimizer = make(origin, [{"params": [torch.ones(3)], "bias_correction": True}])
    assert "bias_correction" not in optimizer.param_groups[0]
    group = {"params": [torch.ones(2)], "bias_correction": False}
    with refused(optimizer, ValueError, "bias_correction=False"):
        optimizer.add_param_group(group)
    assert group["bias_correction"] is False
    saved = {**optimizer.state_dict()}
    saved["param_groups"] = [{**saved["param_groups"][0], "bias_correction": False}]
    with refused(optimizer, ValueError, "bias_correction=False in group 0 of the state dict"):
        optimizer.load_state_dict(saved)


@pytest.mark.cpu_only
def test_without_bias_correction_is_a_schedule_of_lr() -> None:
    """What the refusal says: the formula without it, with another eps, and no decay."""
    beta1, beta2, lr = 0.8, 0.95, 0.01
    param = Parameter(values(40, dtype=torch.float64))
    m, v, p = torch.zeros_like(param), torch.zeros_like(param), param.detach().clone()
    optimizer = fusedopt.Adam([param], betas=(beta1, beta2), eps=0.0)
    for step in range(1, 6):
        param.grad = values(40, dtype=torch.float64, seed=step)
        m, v = m.lerp(param.grad, 1 - beta1), v.lerp(param.grad**2, 1 - beta2)
        p -= lr * m / v.sqrt()
        optimizer.param_groups[0]["lr"] = lr * (1 - beta1**step) / (1 - beta2**step) ** 0.5
        optimizer.step()
    torch.testing.assert_close(param.detach(), p, rtol=1e-12, atol=1e-14)


GRADS: list[tuple[str, dict[str, Any], bool]] = [
    ("te", {}, True),
    ("te", {"set_grad_none": False}, False),
    ("apex", {}, True),
    ("apex", {"set_grad_none": False}, False),
    ("apex-sgd", {}, False),
    ("apex-sgd", {"set_grad_none": True}, True),
    ("deepspeed-cpu", {}, True),
    ("deepspeed", {}, True),
    ("deepspeed", {"set_grad_none": False}, False),
]


@pytest.mark.cpu_only
@pytest.mark.parametrize(("origin", "options", "drops"), GRADS)
def test_zero_grad(origin: str, options: dict[str, Any], drops: bool) -> None:
    param = Parameter(torch.ones(3))
    optimizer = make(origin, [param], **options)
    for told in (None, True, False):
        param.grad = grad = torch.ones(3)
        optimizer.zero_grad(*([] if told is None else [told]))
        if drops if told is None else told:
            assert param.grad is None
            assert torch.equal(grad, torch.ones(3))
        else:
            assert param.grad is grad
            assert torch.equal(grad, torch.zeros(3))


@pytest.mark.parametrize("origin", ["te", "apex"])
def test_capturable_has_lr_as_tensors(origin: str) -> None:
    groups = [{"params": [torch.ones(3)]}, {"params": [torch.ones(2)], "lr": 0.5}, {"params": []}]
    optimizer = make(origin, groups, capturable=True, lr=0.25)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [(rate.item(), rate.dtype) for rate in rates] == [
        *((0.25, FLOAT32), (0.5, FLOAT32), (0.25, FLOAT32))
    ]
    assert {rate.device.type for rate in rates[:2]} == {DEVICE}
    assert len({rate.data_ptr() for rate in rates}) == 3
    assert optimizer._step_supports_amp_scaling
    assert not make(origin, [torch.ones(3)])._step_supports_amp_scaling


@each_row
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copies_go_on_alike(row: Row, copy: Callable[[Any], Any]) -> None:
    optimizer = make(row.origin, params_for(row), **row.options)
    train(optimizer, steps=2)
    other = copy(optimizer)
    for each in (optimizer, other):
        train(each, steps=2, first=2)
    assert_equal(record(other), record(optimizer))
    for each in (optimizer, other):
        each.zero_grad()
    assert snapshot(other, values_only=True).keys() == snapshot(optimizer).keys()
    grads = [[param.grad for param in params_of(each)] for each in (optimizer, other)]
    assert_equal(*grads)


@each_row
def test_resume_from_its_own_state_dict(row: Row) -> None:
    optimizer = make(row.origin, params_for(row), **row.options)
    train(optimizer, steps=2)
    params = [Parameter(param.detach().clone()) for param in params_of(optimizer)]
    other = make(row.origin, params, **row.options)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for each in (optimizer, other):
        train(each, steps=2, first=2)
    assert_equal(record(other), record(optimizer))


@each_adam
def test_resume_from_torch_and_back(origin: str) -> None:
    start = values(30)
    theirs = torch.optim.AdamW([Parameter(start.clone())], foreach=False)
    train(theirs, steps=2)
    params = [param.detach().clone() for param in params_of(theirs)]
    ours = make(origin, params)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    twin = fusedopt.AdamW([params[0].clone()])
    twin.load_state_dict(through_a_file(theirs.state_dict()))
    for each in (ours, twin):
        train(each, steps=2, first=2)
    assert_equal(params_of(ours)[0], params_of(twin)[0])
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    set_grads(theirs, 9)
    theirs.step()
    assert theirs.state[params_of(theirs)[0]]["step"] == 5


@pytest.mark.cpu_only
@pytest.mark.unsanitized  # imports, and no more
def test_it_is_not_imported_unasked() -> None:
    code = (
        "import sys, fusedopt; print([name for name in sys.modules if 'fusedopt.compat' in name])"
    )
    assert run_fork(code) == "[]\n"
