"""Drop-in for torch.optim: signatures, groups, state, repr, hooks, closures, copies."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import optimizer as torch_optimizer

import fusedopt
from support.equality import assert_equal
from support.optimizers import (
    Build,
    Case,
    assert_params_after,
    each_adam,
    each_name,
    like_torch,
    main_cases,
    take_step,
    train,
    varied_cases,
)
from support.snapshots import COPIES, DERIVED, copy_params, record
from support.tensors import make_params, params_of, set_grads

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


# Where groups and states are in torch's order; others' are in that of the signature and the rule.
IN_TORCHS_ORDER = ("SGD", "Adam", "AdamW")


def pair(case: Case, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's over equal parameters."""
    return case.ours(make_params(), **options), case.theirs(make_params(), **options)


@each_name
def test_signature(name: str) -> None:
    """Names, order, kinds and defaults; what torch lacks may only be keyword-only and last."""
    ours = inspect.signature(getattr(fusedopt, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters

    def describe(parameters: Any, among: Any) -> list[Any]:
        return [(p.name, p.kind, p.default) for p in parameters.values() if p.name in among]

    positional = {k for k, p in theirs.items() if p.kind is not p.KEYWORD_ONLY}
    keywords = set(theirs) - positional
    assert describe(ours, positional) == describe(theirs, positional)
    assert sorted(describe(ours, keywords)) == sorted(describe(theirs, keywords))
    assert all(ours[k].kind is inspect.Parameter.KEYWORD_ONLY for k in set(ours) - positional)


@each_name
@pytest.mark.parametrize("method", ["step", "zero_grad", "state_dict", "load_state_dict"])
def test_signature_of_methods(name: str, method: str) -> None:
    """What torch lacks is keyword-only, and may be left out."""

    def describe(cls: type) -> list[Any]:
        function = inspect.unwrap(getattr(cls, method))
        return [
            (p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()
        ]

    ours, theirs = (describe(getattr(lib, name)) for lib in (fusedopt, torch.optim))
    assert ours[: len(theirs)] == theirs
    more = [(inspect.Parameter.KEYWORD_ONLY, None)] if method == "step" else []
    assert [(kind, default) for _, kind, default in ours[len(theirs) :]] == more


@each_name
def test_class_relations(name: str) -> None:
    cls = getattr(fusedopt, name)
    assert issubclass(cls, torch.optim.Optimizer)
    assert issubclass(fusedopt.AdamW, fusedopt.Adam)
    assert cls._step_supports_amp_scaling is False
    assert name in fusedopt.__all__


@varied_cases
def test_groups_and_defaults(case: Case) -> None:
    ours, theirs = pair(case)
    theirs.param_groups[0]["foreach"] = theirs.defaults["foreach"] = None
    params = ours.param_groups[0].pop("params"), theirs.param_groups[0].pop("params")
    assert ours.param_groups == theirs.param_groups
    if case.optimizer in IN_TORCHS_ORDER:
        assert list(ours.param_groups[0]) == list(theirs.param_groups[0])
    assert ours.defaults == theirs.defaults
    assert len(params[0]) == len(params[1])


@varied_cases
def test_repr(case: Case) -> None:
    ours, theirs = pair(case)
    assert repr(ours) == repr(theirs).replace("foreach: False", "foreach: None")
    ours.add_param_group({"params": [Parameter(torch.ones(1))], "lr": 0.5})
    assert "Parameter Group 1" in repr(ours)
    assert "lr: 0.5" in repr(ours)


@varied_cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@like_torch
def test_state(build: Build, case: Case, dtype: torch.dtype) -> Any:
    """Keys, shapes, dtypes, devices, strides: a checkpoint moves both ways."""
    shapes = [(3, 4), (), (0,), (2, 3, 4, 5)]
    params = [Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    images = torch.ones(2, 3, 4, 5, dtype=dtype)
    params.append(Parameter(images.to(memory_format=torch.channels_last)))
    params.append(Parameter(torch.ones(4, 6, dtype=dtype).t()))
    optimizer = build(params)
    assert len(optimizer.state) == 0
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    described = [
        (key, t.shape, t.dtype, t.device, t.stride(), t.requires_grad)
        for param in params
        for key, t in optimizer.state.get(param, {}).items()
        if key not in DERIVED
    ]
    assert {key for key, *_ in described} == case.state_names
    return described if case.optimizer in IN_TORCHS_ORDER else sorted(described, key=str)


@each_adam
def test_step_is_double_when_that_is_the_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = getattr(fusedopt, name)(make_params())
        train(optimizer, steps=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [entry["step"].dtype for entry in optimizer.state.values()] == [torch.float64] * 7
    assert [entry["step"].item() for entry in optimizer.state.values()] == [2.0] * 7


@varied_cases
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@like_torch
def test_same_training(build: Build, maximize: bool) -> Any:
    optimizer = build(make_params(), maximize=maximize)
    train(optimizer, steps=5)
    return params_of(optimizer)


@varied_cases
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("option", ["foreach", "fused", "capturable"])
def test_implementation_options_change_nothing(case: Case, option: str, value: bool) -> None:
    optimizer = case.ours(make_params(), **{option: value})
    assert optimizer.param_groups[0][option] is value
    train(optimizer)
    assert_params_after(optimizer, case, 0, 1, 2)


@varied_cases
@like_torch
def test_closure(build: Build) -> Any:
    params = make_params()
    optimizer = build(params)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = torch.stack([(param**2).sum() for param in params]).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure) for _ in range(3)]
    assert losses[0] > losses[2]
    return losses, params


@main_cases
def test_step_without_closure_returns_none(case: Case) -> None:
    optimizer = case.ours(make_params())
    assert optimizer.step() is None  # no grads at all
    assert optimizer.step(None) is None
    assert optimizer.step(closure=None) is None
    assert len(optimizer.state) == 0


@main_cases
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_step_in_grad_modes(case: Case, guard: Any) -> None:
    """State made under inference_mode must serve outside of it too."""
    optimizer = case.ours(make_params())
    for seed in range(2):
        set_grads(optimizer, seed)
        with guard():
            optimizer.step()
    take_step(optimizer, 2)
    assert_params_after(optimizer, case, 0, 1, 2)
    assert torch.is_grad_enabled()


@main_cases
def test_step_hooks(case: Case) -> None:
    seen: list[tuple[str, Any]] = []

    def note(what: str) -> Any:
        return lambda *args: seen.append((what, args[0]))

    optimizer = case.ours(make_params())
    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        torch_optimizer.register_optimizer_step_pre_hook(note("all pre")),
        torch_optimizer.register_optimizer_step_post_hook(note("all post")),
    ]
    try:
        take_step(optimizer, 0)
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(name for name, _ in seen) == ["all post", "all pre", "post", "pre"]
    assert {"pre", "all pre"} == {name for name, _ in seen[:2]}
    assert all(opt is optimizer for _, opt in seen)
    take_step(optimizer, 0)
    assert len(seen) == 4


def test_step_pre_hook_replaces_arguments() -> None:
    optimizer = fusedopt.SGD(make_params())
    optimizer.register_step_pre_hook(lambda *given: (given[1], {"closure": lambda: 42}))
    assert optimizer.step() == 42


@main_cases
@like_torch
def test_step_pre_hook_that_changes_grads(build: Build) -> Any:
    def clip(optimizer: Any, *_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.5)

    optimizer = build(make_params())
    optimizer.register_step_pre_hook(clip)
    train(optimizer)
    return params_of(optimizer)


@main_cases
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zero"])
@like_torch
def test_zero_grad(build: Build, set_to_none: bool) -> Any:
    params = make_params()
    optimizer = build(params)
    take_step(optimizer, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((param.grad is None) == set_to_none for param in params)
    assert set_to_none or not any(param.grad.any() for param in params)
    optimizer.step()
    return params


@varied_cases
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@like_torch
def test_add_param_group(build: Build, case: Case, named: bool) -> Any:
    """Added in the middle of training: it starts at its own step 1."""
    optimizer = build(make_params())
    train(optimizer, steps=2)
    decay = {"weight_decay": 0.2} if case.takes("weight_decay") else {}
    optimizer.add_param_group({"params": make_params(seed=5), "lr": 0.003, **decay})
    train(optimizer, steps=2, first=2)
    first, second = optimizer.param_groups
    assert second["lr"] == 0.003
    assert second.keys() == first.keys()
    with_names = [(f"layer.{i}", param) for i, param in enumerate(make_params())]
    if named:
        with pytest.raises(ValueError, match="names"):
            optimizer.add_param_group({"params": with_names})
    return params_of(optimizer)


FORMS: dict[str, Callable[[list[Parameter]], Any]] = {
    "tensor": lambda params: [{"params": param} for param in params],
    "generator": lambda params: (param for param in params),
    "list of dicts": lambda params: [{"params": params[:2]}, {"params": iter(params[2:])}],
    "named": lambda params: [(f"p{i}", param) for i, param in enumerate(params)],
    "named dict": lambda params: [{"params": FORMS["named"](params)}],
}


@main_cases
@pytest.mark.parametrize("form", FORMS)
@like_torch
def test_forms_of_params(build: Build, form: str) -> Any:
    optimizer = build(FORMS[form](make_params()))
    train(optimizer)
    names = [group.get("param_names") for group in optimizer.param_groups]
    assert (names[0] is not None) == form.startswith("named")
    return params_of(optimizer), names


@each_name
@pytest.mark.parametrize(
    ("params", "exception"),
    [([], ValueError), (Parameter(torch.ones(1)), TypeError), ([1.0], TypeError),
     ([{"params": {Parameter(torch.ones(1))}}], TypeError)],
    ids=["empty", "one tensor", "no tensor", "a set"],
)  # fmt: skip
def test_same_refusals_as_torch(name: str, params: Any, exception: type[Exception]) -> None:
    messages = []
    for module in (torch.optim, fusedopt):
        with pytest.raises(exception) as raised:
            getattr(module, name)(copy.deepcopy(params))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_non_leaf_is_refused() -> None:
    with pytest.raises(ValueError, match="non-leaf"):
        fusedopt.AdamW([torch.ones(2, requires_grad=True) * 2])


@varied_cases
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps", [0, 2], ids=["new", "stepped"])
def test_copies_go_on_alone(case: Case, how: str, steps: int) -> None:
    """A copy has parameters, state and bookkeeping of its own, and gives the same bits."""
    original = case.ours(make_params())
    train(original, steps=steps)
    before = copy_params(original)
    other = COPIES[how](original)
    assert repr(other) == repr(original)
    train(other, first=steps)
    assert_equal(params_of(original), before)
    train(original, first=steps)
    assert_equal(params_of(other), params_of(original))


def test_module_and_optimizer_copied_together_stay_connected() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = fusedopt.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    assert optimizer2.param_groups[0]["params"][0] is model2.weight
    model2(torch.ones(1, 3)).sum().backward()
    before = model2.weight.detach().clone()
    optimizer2.step()
    assert not torch.equal(model2.weight, before)


@pytest.mark.cpu_only
@pytest.mark.parametrize("steps", [0, 2])
def test_adagrads_shared_memory(steps: int) -> None:
    """States that there are none of yet are made, so that processes can share them."""
    options = {"initial_accumulator_value": 0.5, "master_weights": "float32"}
    found = []
    for shares in (False, True):
        params = [torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = fusedopt.Adagrad(params, **options)
        train(optimizer, steps)
        if shares:
            optimizer.share_memory()
            assert all(state["sum"].is_shared() for state in optimizer.state.values())
            assert len(optimizer.state) == 2
        train(optimizer, 2, steps)
        found.append(record(optimizer))
    assert_equal(*found)
