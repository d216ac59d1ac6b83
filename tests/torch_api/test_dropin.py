"""Drop-in for torch.optim: signatures, groups, state, repr, hooks, closures, copies."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import optimizer as torch_optimizer

import fusedopt
from support.api_helpers import (
    CASES,
    MAIN_CASES,
    NAMES,
    Case,
    assert_equal,
    assert_same_math,
    by_id,
    make_params,
    params_of,
    set_grads,
    train,
)

EVERY_CASE = pytest.mark.parametrize("case", **by_id(CASES))
MAIN_CASE = pytest.mark.parametrize("case", **by_id(MAIN_CASES))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def pair(case: Case, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's over equal parameters."""
    return case.ours(make_params(), **options), case.torchs(make_params(), **options)


def assert_pair_agrees(ours: Any, theirs: Any) -> None:
    assert_same_math(params_of(ours), params_of(theirs))


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["step", "zero_grad", "state_dict", "load_state_dict"])
def test_signature_of_methods(name: str, method: str) -> None:
    def describe(cls: type) -> list[Any]:
        function = inspect.unwrap(getattr(cls, method))
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert describe(getattr(fusedopt, name)) == describe(getattr(torch.optim, name))


@pytest.mark.parametrize("name", NAMES)
def test_class_relations(name: str) -> None:
    cls = getattr(fusedopt, name)
    assert issubclass(cls, torch.optim.Optimizer)
    assert issubclass(fusedopt.AdamW, fusedopt.Adam)
    assert cls._step_supports_amp_scaling is False
    assert name in fusedopt.__all__


@EVERY_CASE
def test_groups_and_defaults(case: Case) -> None:
    ours, theirs = pair(case)
    theirs.param_groups[0]["foreach"] = theirs.defaults["foreach"] = None
    params = ours.param_groups[0].pop("params"), theirs.param_groups[0].pop("params")
    if case.name == "SGD":  # torch's cannot be captured
        assert ours.param_groups[0].pop("capturable") is ours.defaults.pop("capturable") is False
    assert ours.param_groups == theirs.param_groups
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])
    assert ours.defaults == theirs.defaults
    assert len(params[0]) == len(params[1])


@EVERY_CASE
def test_repr(case: Case) -> None:
    ours, theirs = pair(case)
    ours_alone = "    capturable: False\n" if case.name == "SGD" else ""
    assert repr(ours).replace(ours_alone, "") == repr(theirs).replace(
        "foreach: False", "foreach: None"
    )
    ours.add_param_group({"params": [Parameter(torch.ones(1))], "lr": 0.5})
    assert "Parameter Group 1" in repr(ours)
    assert "lr: 0.5" in repr(ours)


@EVERY_CASE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state(case: Case, dtype: torch.dtype) -> None:
    """Keys in torch's order, shapes, dtypes, devices, strides: a checkpoint moves both ways."""
    shapes = [(3, 4), (), (0,), (2, 3, 4, 5)]
    described = []
    for build in (case.ours, case.torchs):
        params = [Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
        images = torch.ones(2, 3, 4, 5, dtype=dtype)
        params.append(Parameter(images.to(memory_format=torch.channels_last)))
        params.append(Parameter(torch.ones(4, 6, dtype=dtype).t()))
        optimizer = build(params)
        assert len(optimizer.state) == 0
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        described.append([describe_state(optimizer.state.get(param, {})) for param in params])
    assert described[0] == described[1]
    assert {key for key, *_ in described[0][0]} == case.state_names


def describe_state(entries: dict[str, Tensor]) -> list[Any]:
    return [
        (key, t.shape, t.dtype, t.device, t.stride(), t.requires_grad) for key, t in entries.items()
    ]


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_step_is_double_when_that_is_the_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = getattr(fusedopt, name)(make_params())
        train(optimizer, steps=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [entry["step"].dtype for entry in optimizer.state.values()] == [torch.float64] * 7
    assert [entry["step"].item() for entry in optimizer.state.values()] == [2.0] * 7


@EVERY_CASE
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_same_training(case: Case, maximize: bool) -> None:
    ours, theirs = pair(case, maximize=maximize)
    for optimizer in (ours, theirs):
        train(optimizer, steps=5)
    assert_pair_agrees(ours, theirs)


@EVERY_CASE
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("option", ["foreach", "fused", "capturable"])
def test_implementation_options_change_nothing(case: Case, option: str, value: bool) -> None:
    plain, other = case.ours(make_params()), case.ours(make_params(), **{option: value})
    assert other.param_groups[0][option] is value
    for optimizer in (plain, other):
        train(optimizer)
    assert_equal(params_of(other), params_of(plain))


@EVERY_CASE
def test_closure(case: Case) -> None:
    ours, theirs = pair(case)
    losses = []
    for optimizer in (ours, theirs):
        params = optimizer.param_groups[0]["params"]

        def closure(optimizer: Any = optimizer, params: Any = params) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = torch.stack([(param**2).sum() for param in params]).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append([optimizer.step(closure) for _ in range(3)])
    assert_same_math(losses[0], losses[1])
    assert losses[0][0] > losses[0][2]
    assert_pair_agrees(ours, theirs)


@MAIN_CASE
def test_step_without_closure_returns_none(case: Case) -> None:
    optimizer = case.ours(make_params())
    assert optimizer.step() is None  # no grads at all
    assert optimizer.step(None) is None
    assert optimizer.step(closure=None) is None
    assert len(optimizer.state) == 0


@MAIN_CASE
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_step_in_grad_modes(case: Case, guard: Any) -> None:
    """State made under inference_mode must serve outside of it too."""
    plain, guarded = case.ours(make_params()), case.ours(make_params())
    train(plain, steps=3)
    for seed in range(2):
        set_grads(guarded.param_groups[0]["params"], seed)
        with guard():
            guarded.step()
    train(guarded, steps=1, first=2)
    assert_equal(params_of(guarded), params_of(plain))
    assert torch.is_grad_enabled()


@MAIN_CASE
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
        train(optimizer, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(name for name, _ in seen) == ["all post", "all pre", "post", "pre"]
    assert {"pre", "all pre"} == {name for name, _ in seen[:2]}
    assert all(opt is optimizer for _, opt in seen)
    train(optimizer, steps=1)
    assert len(seen) == 4


def test_step_pre_hook_replaces_arguments() -> None:
    optimizer = fusedopt.SGD(make_params())
    optimizer.register_step_pre_hook(lambda *given: (given[1], {"closure": lambda: 42}))
    assert optimizer.step() == 42


@MAIN_CASE
def test_step_pre_hook_that_changes_grads(case: Case) -> None:
    ours, theirs = pair(case)

    def clip(optimizer: Any, *_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)

    for optimizer in (ours, theirs):
        optimizer.register_step_pre_hook(clip)
        train(optimizer)
    assert_pair_agrees(ours, theirs)


@MAIN_CASE
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zero"])
def test_zero_grad(case: Case, set_to_none: bool) -> None:
    ours, theirs = pair(case)
    for optimizer in (ours, theirs):
        params = optimizer.param_groups[0]["params"]
        train(optimizer, steps=1)
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((param.grad is None) == set_to_none for param in params)
        assert set_to_none or not any(param.grad.any() for param in params)
        optimizer.step()
    assert_pair_agrees(ours, theirs)


@EVERY_CASE
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_add_param_group(case: Case, named: bool) -> None:
    """Added in the middle of training: it starts at its own step 1."""
    ours, theirs = pair(case)
    for optimizer in (ours, theirs):
        train(optimizer, steps=2)
        late = make_params(seed=5)
        entry = {"params": late, "lr": 0.003, "weight_decay": 0.2}
        optimizer.add_param_group(entry)
        train(optimizer, steps=2, first=2)
    assert_pair_agrees(ours, theirs)
    assert ours.param_groups[1]["lr"] == 0.003
    assert ours.param_groups[1].keys() == ours.param_groups[0].keys()
    with_names = [(f"layer.{i}", param) for i, param in enumerate(make_params())]
    if named:
        with pytest.raises(ValueError, match="names"):
            ours.add_param_group({"params": with_names})


@MAIN_CASE
@pytest.mark.parametrize("form", ["tensor", "generator", "list of dicts", "named", "named dict"])
def test_forms_of_params(case: Case, form: str) -> None:
    forms: dict[str, Any] = {
        "tensor": lambda params: [{"params": param} for param in params],
        "generator": lambda params: (param for param in params),
        "list of dicts": lambda params: [{"params": params[:2]}, {"params": iter(params[2:])}],
        "named": lambda params: [(f"p{i}", param) for i, param in enumerate(params)],
        "named dict": lambda params: [
            {"params": [(f"p{i}", param) for i, param in enumerate(params)]}
        ],
    }
    ours = case.ours(forms[form](make_params()))
    theirs = case.torchs(forms[form](make_params()))
    for optimizer in (ours, theirs):
        train(optimizer)
    assert_pair_agrees(ours, theirs)
    names = [group.get("param_names") for group in ours.param_groups]
    assert names == [group.get("param_names") for group in theirs.param_groups]
    assert (names[0] is not None) == form.startswith("named")


@pytest.mark.parametrize("name", NAMES)
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


def copied(optimizer: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(optimizer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(optimizer))
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@EVERY_CASE
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("steps", [0, 2], ids=["new", "stepped"])
def test_copies_go_on_alone(case: Case, how: str, steps: int) -> None:
    """A copy has parameters, state and bookkeeping of its own, and gives the same bits."""
    original = case.ours(make_params())
    train(original, steps=steps)
    before = [param.clone() for param in params_of(original)]
    other = copied(original, how)
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
