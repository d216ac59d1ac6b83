"""Tensors whose memory does not hold their values, or is not there: read rightly, or refused.

Reports: grads without memory from torch.sgn (a crash in 0.1.0), NVIDIA/TransformerEngine#2370 and
pytorch/ao#590 (wrappers inside DTensors), pytorch/pytorch#116122 (grads that are still under way).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import _C
from support.equality import assert_equal, both_ways
from support.optimizers import Case, main_cases
from support.snapshots import photograph, record, snapshot
from support.tensors import Wrapper, by_id, params_of

SHAPE = (4, 3)


def numbers(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    count = torch.Size(shape).numel()
    values = torch.arange(1, count + 1, dtype=torch.float64) / count
    return values.reshape(shape).to(dtype)


def of_sgn(param: Parameter) -> Tensor:
    copy = param.detach().clone().requires_grad_()
    torch.sgn(copy).sum().backward()
    assert copy.grad is not None
    return copy.grad


def negated(tensor: Tensor) -> Tensor:
    return torch._neg_view(tensor)


def zeros_without_memory(like: Tensor) -> Tensor:
    return torch._efficientzerotensor(like.shape, dtype=like.dtype, device=like.device)


def imag_of_conjugate(param: Parameter) -> Tensor:
    return torch.complex(numbers(), numbers()).to(param.dtype.to_complex()).conj().imag


def contiguous_imag_of_conjugate(param: Parameter) -> Tensor:
    """The public way to a lazy negation, with the strides of an ordinary grad."""
    grad = imag_of_conjugate(param)
    return grad.as_strided(grad.shape, (grad.shape[1], 1))


# What a grad may be; its values are those that torch's operations on it see.
GRADS: dict[str, Callable[[Parameter], Tensor]] = {
    "zeros of sgn": of_sgn,
    "zeros without memory": zeros_without_memory,
    "negated zeros": lambda p: negated(zeros_without_memory(p)),
    "negated": lambda p: negated(numbers(dtype=p.dtype)),
    "negated twice": lambda p: negated(negated(numbers(dtype=p.dtype))),
    "negated and transposed": lambda p: negated(numbers((3, 4), dtype=p.dtype)).t(),
    "negated slice": lambda p: negated(numbers((4, 6), dtype=p.dtype))[:, ::2],
    "imag of a conjugate": imag_of_conjugate,
    "contiguous imag of a conjugate": contiguous_imag_of_conjugate,
    "expanded": lambda p: negated(numbers((1, 3), dtype=p.dtype)).expand(SHAPE),
}
COMPLEX_GRADS: dict[str, Callable[[Parameter], Tensor]] = {
    "conjugate": lambda p: (numbers() * (1 + 2j)).to(p.dtype).conj(),
    "negated conjugate": lambda p: negated((numbers() * (1 + 2j)).to(p.dtype).conj()),
    "negated": lambda p: negated((numbers() * (1 + 2j)).to(p.dtype)),
    "zeros without memory": zeros_without_memory,
}


def stepped_with(make: Callable[[Parameter], Tensor], as_it_is: bool, optimizer: Any) -> Any:
    """Such a grad as the first, after ordinary ones, and again; or its plain copy."""
    params = params_of(optimizer)
    for step in range(5):
        for param in params:
            param.grad = numbers(dtype=param.dtype)
        if step != 1:
            grad = make(params[1])
            params[1].grad = grad if as_it_is else torch.empty_like(params[1]).copy_(grad)
        optimizer.step()
    return record(optimizer)


def three_params(dtype: torch.dtype) -> list[Parameter]:
    return [Parameter(numbers(dtype=dtype)) for _ in range(3)]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@main_cases
@pytest.mark.parametrize("make", **by_id(GRADS))
@both_ways
def test_grad(as_it_is: bool, make: Any, case: Case, dtype: torch.dtype, options: Any) -> Any:
    return stepped_with(make, as_it_is, case.ours(three_params(dtype), **options))


@main_cases
@pytest.mark.parametrize("make", **by_id(COMPLEX_GRADS))
@both_ways
def test_complex_grad(as_it_is: bool, make: Any, case: Case) -> Any:
    return stepped_with(make, as_it_is, case.ours(three_params(torch.complex64)))


def test_lazy_scalar_grad() -> None:
    param = Parameter(torch.tensor(1.0))
    param.grad = negated(torch.tensor(2.0))
    fusedopt.SGD([param], lr=0.5).step()
    assert param.item() == 2.0


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


UNREADABLE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "negated": (lambda t: negated(t.clone()), "lazily"),
    "no memory": (zeros_without_memory, "without memory"),
    "freed": (freed, "without memory: its storage has been emptied"),
}


@contextmanager
def step_refused(pattern: str, *others: Tensor) -> Iterator[None]:
    """Raises and changes none of these; the optimizer's tensors may have no memory to look at."""
    before = [photograph(tensor) for tensor in others]
    with pytest.raises(ValueError, match=pattern):
        yield
    assert [photograph(tensor) for tensor in others] == before


def two_named(case: Case, stepped: bool) -> tuple[Any, Parameter, Parameter]:
    first, second = Parameter(numbers()), Parameter(numbers())
    optimizer = case.ours([("first", first), ("second", second)])
    first.grad, second.grad = numbers(), numbers()
    if stepped:
        optimizer.step()
    return optimizer, first, second


@pytest.mark.parametrize("stepped", [False, True], ids=["first step", "later step"])
@main_cases
@pytest.mark.parametrize(("make", "pattern"), **by_id(UNREADABLE))
def test_param_is_refused(make: Any, pattern: str, case: Case, stepped: bool) -> None:
    optimizer, first, second = two_named(case, stepped)
    second.data = make(second.data)
    with step_refused(f"'second'.* is .*{pattern}", first):
        optimizer.step()


@main_cases
@pytest.mark.parametrize(("make", "pattern"), **by_id(UNREADABLE))
def test_state_is_refused(make: Any, pattern: str, case: Case) -> None:
    optimizer, first, second = two_named(case, stepped=True)
    key = next(name for name in optimizer.state[second] if name != "step")
    optimizer.state[second][key] = make(optimizer.state[second][key])
    with step_refused(f"{key} of .*'second'.* is .*{pattern}", first, second):
        optimizer.step()


@pytest.mark.parametrize("stepped", [False, True], ids=["first step", "later step"])
@main_cases
def test_freed_grad_is_refused(case: Case, stepped: bool) -> None:
    optimizer, first, second = two_named(case, stepped)
    second.grad.untyped_storage().resize_(0)
    with step_refused("grad of .*'second'.*storage has been emptied", first, second):
        optimizer.step()


def test_empty_tensors_need_no_memory() -> None:
    param, other = Parameter(torch.empty(0, 3)), Parameter(numbers())
    param.grad, other.grad = torch.empty(0, 3), numbers()
    fusedopt.AdamW([param, other]).step()


@pytest.mark.skipif(not hasattr(torch, "_lazy_clone"), reason="this torch copies at once")
@main_cases
@pytest.mark.parametrize("of", ["param", "state", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_ways
def test_snapshot_that_is_copied_on_write(
    takes: bool, case: Case, of: str, dtype: torch.dtype
) -> Any:
    """Taken between two steps, it keeps what it shows, and the steps go on as without it."""
    params = [Parameter(numbers(dtype=dtype)) for _ in range(2)]
    optimizer = case.ours(params)
    snapshots: list[tuple[Tensor, Tensor]] = []
    for _ in range(3):
        for param in params:
            param.grad = numbers(dtype=dtype)
        optimizer.step()
        tensors = [param.detach() for param in params] if of != "state" else []
        if of != "param":
            tensors += [t for p in params for t in optimizer.state[p].values() if t.dim()]
        snapshots += [(torch._lazy_clone(t), t.clone()) for t in tensors if takes]
    for lazy, copy in snapshots:
        assert torch.equal(lazy, copy)
    return [params, list(optimizer.state.values())]


# Wrappers, alone and inside each other.


def shard(mesh: Any, local: Tensor) -> Any:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)


def pending(tensor: Tensor) -> Any:
    """A collective that nobody has waited for."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor(tensor)


@pytest.mark.parametrize("which", ["param", "grad", "state"])
@main_cases
def test_wrapper_inside_a_dtensor_is_refused(case: Case, which: str, mesh: Any) -> None:
    first, second = Parameter(numbers()), Parameter(shard(mesh, numbers()))
    optimizer = case.ours([("first", first), ("second", second)])
    first.grad, second.grad = numbers(), shard(mesh, numbers())
    optimizer.step()
    local, name = numbers(), r"parameter 'second'.*"
    if which == "param":
        second = Parameter(shard(mesh, Wrapper(local)))
        second.grad = shard(mesh, numbers())
        optimizer = case.ours([("first", first), ("second", second)])
    elif which == "grad":
        second.grad = shard(mesh, Wrapper(local))
        name = rf"grad of {name}"
    else:
        key = next(name for name in optimizer.state[second] if name != "step")
        optimizer.state[second][key] = shard(mesh, Wrapper(local))
        name = rf"{key} of {name}"
    before, values = first.detach().clone(), local.clone()
    with pytest.raises(TypeError, match=rf"^{name} is .*Wrapper, a tensor subclass"):
        optimizer.step()
    assert torch.equal(first.detach(), before)
    assert torch.equal(local, values)


def test_fake_tensor_inside_a_dtensor_is_refused(mesh: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(4, 3)
    param = Parameter(shard(mesh, torch.ones(4, 3)))
    optimizer = fusedopt.SGD([("fake", param)], lr=0.1)
    param.grad = shard(mesh, torch.ones(4, 3))
    param.grad._local_tensor = fake
    with pytest.raises(TypeError, match=r"grad of parameter 'fake'.*FakeTensor"):
        optimizer.step()


@main_cases
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "dtensor"])
@pytest.mark.parametrize("kind", ["pending", "pending and negated", "pending twice"])
def test_pending_collective_is_waited_for(
    case: Case, sharded: bool, kind: str, mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed import _functional_collectives

    waits = []
    wait = _functional_collectives.AsyncCollectiveTensor.trigger_wait

    def trigger_wait(self: Any) -> Tensor:
        waits.append(self)
        return wait(self)

    monkeypatch.setattr(_functional_collectives.AsyncCollectiveTensor, "trigger_wait", trigger_wait)
    results = []
    for is_pending in (True, False):
        values = numbers()
        param = Parameter(shard(mesh, values) if sharded else values)
        optimizer = case.ours([param])
        for _ in range(3):
            grad = negated(numbers()) if "negated" in kind else numbers()
            if is_pending:
                grad = pending(pending(grad) if "twice" in kind else grad)
            if sharded:
                param.grad = shard(mesh, torch.ones(SHAPE, dtype=torch.float64))
                param.grad._local_tensor = grad
            else:
                param.grad = grad
            optimizer.step()
        results.append(param.detach().to_local() if sharded else param.detach())
    assert len(waits) >= 3
    assert_equal(*results)


@pytest.mark.parametrize("master", ["float32", "split"])
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "dtensor"])
def test_wrapped_param_with_a_master_is_refused_by_name(
    master: str, sharded: bool, mesh: Any
) -> None:
    wrapper = Wrapper(numbers(dtype=torch.bfloat16))
    param = Parameter(shard(mesh, wrapper) if sharded else wrapper)
    param.grad = shard(mesh, numbers(dtype=torch.bfloat16)) if sharded else Wrapper(param.wrapped)
    optimizer = fusedopt.AdamW([("wrapped", param)], master_weights=master)
    with pytest.raises(TypeError, match=r"^parameter 'wrapped'.* is .*Wrapper, a tensor subclass"):
        optimizer.step()


STEPS: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "wrapped": (Wrapper, TypeError, "Wrapper, a tensor subclass"),
    "negated": (negated, ValueError, "does not hold its value; clone"),
    "no memory": (zeros_without_memory, ValueError, "does not hold its value; clone"),
}


@pytest.mark.parametrize(("make", "error", "pattern"), **by_id(STEPS))
def test_step_count_is_refused_by_name(make: Any, error: Any, pattern: str) -> None:
    param = Parameter(numbers())
    optimizer = fusedopt.AdamW([("first", param)])
    param.grad = numbers()
    optimizer.step()
    optimizer.state[param]["step"] = make(torch.tensor(1.0, device="cpu"))
    before = param.detach().clone()
    with pytest.raises(error, match=f"^step of parameter 'first'.* is .*{pattern}"):
        optimizer.step()
    assert torch.equal(param.detach(), before)


@pytest.mark.cpu_only
def test_option_that_is_a_wrapper_is_read_as_a_number() -> None:
    """Of a wrapper without ``__torch_dispatch__`` for item(), torch's own error comes through."""

    class Number(torch.Tensor):
        value: float

        @staticmethod
        def __new__(cls, value: float) -> "Number":
            number = torch.Tensor._make_wrapper_subclass(cls, (), dtype=torch.float64)
            number.value = value
            return number

        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            plain = [torch.tensor(a.value) if isinstance(a, Number) else a for a in args]
            return func(*plain, **(kwargs or {}))

    param = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = fusedopt.SGD([param], lr=1.0)
    optimizer.param_groups[0]["lr"] = Number(0.5)
    param.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    assert param.tolist() == [0.5] * 3


def test_unknown_wrapper_is_refused_every_time() -> None:
    param = Parameter(numbers())
    optimizer = fusedopt.SGD([("wrapped", param)], lr=0.1)
    for _ in range(3):
        param.grad = Wrapper(numbers())
        before = snapshot(optimizer)["param 0.0"]
        with pytest.raises(TypeError, match=r"grad of parameter 'wrapped'.*Wrapper"):
            optimizer.step()
        assert snapshot(optimizer)["param 0.0"] == before


@pytest.mark.cpu_only
def test_lazy_tensors_are_told_by_their_keys() -> None:
    """Else every grad costs two calls into torch more."""
    is_on = os.environ.get("FUSEDOPT_FINGERPRINTS") != "0"
    assert _C.build_info()["fingerprints"] == is_on
    assert _C.build_info()["lazy_keys"] == is_on
    assert _C.build_info()["versions"] == is_on  # and every param two
