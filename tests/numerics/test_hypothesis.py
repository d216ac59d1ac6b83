"""Shapes, strides, dtypes and hyper-parameters that nobody thought of, against unfused torch."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.optimizers import Case, step_with
from support.snapshots import results
from support.tensors import some_dtypes, values

repeatable = settings(derandomize=True, deadline=None, max_examples=150)

rates = st.sampled_from([0.0, 1e-8, 1.0]) | st.floats(1e-6, 1.0)
decays = st.sampled_from([0.0]) | st.floats(1e-6, 0.5)


@st.composite
def sgd_cases(draw: st.DrawFn) -> Case:
    options: dict[str, Any] = {
        "lr": draw(rates),
        "momentum": draw(st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.99)),
        "weight_decay": draw(decays),
        "maximize": draw(st.booleans()),
    }
    if options["momentum"] and draw(st.booleans()):
        options["nesterov"] = True
    else:
        options["dampening"] = draw(st.sampled_from([0.0, 1.0]) | st.floats(-1.0, 2.0))
    return Case("SGD", options)


@st.composite
def adam_cases(draw: st.DrawFn) -> Case:
    options: dict[str, Any] = {
        "lr": draw(rates),
        "betas": (draw(st.floats(0.0, 0.99)), draw(st.floats(0.0, 0.9999))),
        "eps": draw(st.floats(1e-8, 1.0)),
        "weight_decay": draw(decays),
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
    }
    name = draw(st.sampled_from(["Adam", "AdamW"]))
    if name == "Adam":
        options["decoupled_weight_decay"] = draw(st.booleans())
    return Case(name, options)


# Of others, what differs from torch's default; sensitive ones in ranges in which all is well-posed.
betas = st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.99))
small = st.floats(1e-8, 1.0)
OTHERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "RMSprop": {
        **{"alpha": st.floats(0.5, 0.99), "eps": small, "centered": st.booleans()},
        "momentum": st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.99),
    },
    "Adagrad": {
        **{"lr_decay": decays, "eps": small, "initial_accumulator_value": decays},
    },
    "Adadelta": {"rho": st.floats(0.0, 1.0), "eps": st.floats(1e-6, 1.0)},
    "Adamax": {"betas": betas, "eps": small},
    "NAdam": {
        **{"betas": betas, "eps": small, "momentum_decay": decays},
        "decoupled_weight_decay": st.booleans(),
    },
    "RAdam": {"betas": betas, "eps": small, "decoupled_weight_decay": st.booleans()},
    "ASGD": {
        **{"lambd": decays, "alpha": st.floats(0.0, 2.0), "t0": st.sampled_from([0, 1, 1e6])},
    },
    "Rprop": {
        "etas": st.tuples(st.floats(0.01, 0.99), st.floats(1.01, 10.0)),
        "step_sizes": st.tuples(st.floats(0.0, 0.1), st.floats(0.1, 50.0)),
    },
}


@st.composite
def other_cases(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(sorted(OTHERS)))
    options = {"lr": rates, "maximize": st.booleans(), **OTHERS[name]}
    if name != "Rprop":
        options["weight_decay"] = decays
    return Case(name, {key: draw(strategy) for key, strategy in options.items()})


cases = sgd_cases() | adam_cases() | other_cases()
shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@st.composite
def laid_out(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of that shape whose dims lie in any order, with gaps of any width between."""
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.integers(1, 3)) for _ in shape]
    room = [shape[d] * gaps[d] + draw(st.integers(0, 2)) for d in order]
    tensor = values(*room, dtype=dtype, seed=draw(st.integers(0, 999)))
    tensor = tensor.permute([order.index(d) for d in range(len(shape))])
    for d, size in enumerate(shape):
        tensor = tensor.narrow(d, 0, size * gaps[d])
    return tensor[tuple(slice(None, None, gap) for gap in gaps)]


def assert_near(found: Tensor, expected: Tensor, ulps: float) -> None:
    error = (found.to(expected) - expected).abs()
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert (error <= ulps * torch.finfo(found.dtype).eps * scale).all(), error.max()


@some_dtypes(torch.float64, torch.complex128, torch.float32)
@repeatable
@given(data=st.data())
def test_any_step_is_torchs(dtype: torch.dtype, data: st.DataObject) -> None:
    case, shape = data.draw(cases), data.draw(shapes)
    param = data.draw(laid_out(shape, dtype))
    grads = [data.draw(laid_out(shape, dtype)) for _ in range(3)]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    twin = param.to("cpu", wide, copy=True)
    optimizer, unfused = case.ours([param]), case.theirs([twin])
    step_with(optimizer, grads)
    step_with(unfused, [grad.to("cpu", wide) for grad in grads])
    for name, expected in results(unfused, twin).items():
        if name not in case.state_names | {"param"}:
            continue  # without beta1, exp_avg is the grad, and not kept here
        assert_near(results(optimizer, param)[name], expected, ulps=32)


@some_dtypes(torch.bfloat16, torch.float16, torch.complex64)
@repeatable
@given(data=st.data())
def test_any_layout_gives_the_same_bits(dtype: torch.dtype, data: st.DataObject) -> None:
    case, shape = data.draw(cases), data.draw(shapes)
    param = data.draw(laid_out(shape, dtype))
    grads = [data.draw(laid_out(shape, dtype)) for _ in range(2)]
    dense = param.clone(memory_format=torch.contiguous_format)
    step_with(case.ours([param]), grads)
    step_with(case.ours([dense]), [grad.contiguous() for grad in grads])
    torch.testing.assert_close(param, dense, rtol=0, atol=0, equal_nan=True)
