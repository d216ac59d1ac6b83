"""Grads that are new tensors in every step, in the form of the step before or in another."""

import os
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import _C
from support.device import STEPS_ON_DEVICE
from support.files import run_python
from support.processes import run_fork
from support.tensors import values

SHAPE = (6, 4)


def gradient(grad: Tensor) -> Tensor:
    """As autograd computes it."""
    x = torch.ones(SHAPE, dtype=grad.dtype, requires_grad=True)
    (x * grad).sum().backward()
    assert x.grad is not None
    return x.grad


def in_bucket(grad: Tensor, at: int) -> Tensor:
    return grad.new_zeros(100)[at : at + grad.numel()].view(SHAPE).copy_(grad)


# The same values, lying in memory in one way or another.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "new": lambda grad: grad.clone(),
    "detached": lambda grad: grad.clone().detach(),
    "view of a bucket": lambda grad: in_bucket(grad, 7),
    "further in a bucket": lambda grad: in_bucket(grad, 32),
    "transposed": lambda grad: grad.t().contiguous().t(),
    "with gaps": lambda grad: grad.new_zeros(6, 8)[:, ::2].copy_(grad),
    "lazily negated": lambda grad: torch.complex(torch.zeros_like(grad), -grad).conj().imag,
    "of backward": gradient,
}


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_forms_may_change_from_step_to_step(first: str, second: str) -> None:
    start = values(*SHAPE)
    param, expected = Parameter(start.clone()), Parameter(start.clone())
    ours, theirs = fusedopt.AdamW([param]), fusedopt.AdamW([expected])
    for step, kind in enumerate([first, first, second, second, first, second]):
        grad = values(*SHAPE, seed=step)
        param.grad = KINDS[kind](grad)
        if expected.grad is None:
            expected.grad = grad.clone()
        else:
            expected.grad.copy_(grad)
        ours.step()
        theirs.step()
        assert torch.equal(param, expected), (step, kind)


def test_a_freed_grad_of_the_same_form_is_refused() -> None:
    param = Parameter(values(*SHAPE))
    optimizer = fusedopt.AdamW([param])
    for _ in range(2):
        param.grad = values(*SHAPE)
        optimizer.step()
    before = param.detach().clone()
    param.grad = values(*SHAPE)
    param.grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="its storage has been emptied"):
        optimizer.step()
    assert torch.equal(param, before)
    param.grad = values(*SHAPE)
    optimizer.step()
    assert not torch.equal(param, before)


def test_a_grad_that_is_another_params_memory_is_found() -> None:
    params = [Parameter(values(*SHAPE, seed=seed)) for seed in range(2)]
    optimizer = fusedopt.SGD(params, lr=1.0)
    for _ in range(2):
        for param in params:
            param.grad = torch.zeros(*SHAPE)
        optimizer.step()
    first, second = (param.detach().clone() for param in params)
    params[0].grad, params[1].grad = torch.ones(SHAPE), params[0].detach()
    if STEPS_ON_DEVICE:
        with pytest.raises(ValueError, match="share memory"):
            optimizer.step()
        assert torch.equal(params[0], first)
        assert torch.equal(params[1], second)
        return
    optimizer.step()  # as if one after the other, in the order of the params
    assert torch.equal(params[0], first - 1)
    assert torch.equal(params[1], second - (first - 1))


def fingerprints_with(setting: str) -> bool:
    code = "from fusedopt import _C; print(_C.build_info()['fingerprints'])"
    return run_fork(code, FUSEDOPT_FINGERPRINTS=setting).strip() == "True"


@pytest.mark.cpu_only
@pytest.mark.unsanitized  # a process of its own
def test_fingerprints_can_be_switched_off() -> None:
    assert not fingerprints_with("0")
    assert _C.build_info()["fingerprints"] == (os.environ.get("FUSEDOPT_FINGERPRINTS") != "0")


def test_grads_without_elements_from_step_to_step() -> None:
    """DLPack knows no address for them, so where they lie in their storage cannot be told."""
    params = [Parameter(values(0, 3)), Parameter(values(5))]
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0)
    for step in range(4):
        for param in params:
            room = torch.zeros(64 + param.numel())
            param.grad = room[32 + step :][: param.numel()].view(param.shape).fill_(0.5)
        optimizer.step()
    assert optimizer.grad_norm is not None
    assert float(optimizer.grad_norm) == pytest.approx(0.5 * 5**0.5)
    assert [float(optimizer.state[param]["step"]) for param in params] == [4.0, 4.0]


def test_keys_of_created_state_are_found_by_identity() -> None:
    """Steps look for names that Python has interned; an equal string costs a lookup in each."""
    param = Parameter(values(4, dtype=torch.bfloat16))
    optimizer = fusedopt.AdamW([param], amsgrad=True, master_weights="float32", ema_decay=0.9)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(optimizer.state[param]) == 6
    assert all(key is sys.intern(str(key)) for key in optimizer.state[param])


def test_versions_are_shared_by_views_and_not_by_data() -> None:
    """As torch counts writes: a view has the counter of its base, `.data` one of its own."""
    base = torch.zeros(8)
    param = base[2:6]
    data, other = param.data, torch.zeros(4)
    optimizer = fusedopt.SGD([param, other], lr=1.0)
    before = base._version
    for _ in range(3):
        param.grad = torch.ones(4)
        optimizer.step()
    assert base._version == param._version == before + 3
    assert (data._version, other._version) == (0, 0)


def test_inference_tensors_are_left_to_torch() -> None:
    """They have no version; outside of inference mode, torch refuses to write to them."""
    with torch.inference_mode():
        param = torch.zeros(4)
        param.grad = torch.ones(4)
        optimizer = fusedopt.SGD([param], lr=1.0)
        optimizer.step()
    assert param.tolist() == [-1.0] * 4


# What may be set where fusedopt is imported.
AMBIENT = {
    "nothing": "contextlib.nullcontext()",
    "default dtype bfloat16": "torch.set_default_dtype(torch.bfloat16)",
    "default dtype float64": "torch.set_default_dtype(torch.float64)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "no grad": "torch.no_grad()",
    "inference": "torch.inference_mode()",
    "deferred initialisation": "torch.device('meta')",
    "fake tensors": "FakeTensorMode()",
}
IMPORTED = """
import contextlib, torch
from torch._subclasses.fake_tensor import FakeTensorMode

def of_torch():
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    return *modes, str(torch.zeros(1).device), type(torch.zeros(1)), torch.get_rng_state().tolist()

with {} or contextlib.nullcontext():
    torch.manual_seed(0)
    before = of_torch()
    import fusedopt
    assert of_torch() == before
print(fusedopt._C.build_info()["fingerprint_obstacle"])
"""


@pytest.mark.cpu_only
@pytest.mark.parametrize("setting", AMBIENT.values(), ids=AMBIENT)
def test_imports_leave_torch_alone_and_do_not_depend_on_it(setting: str) -> None:
    """The random state, too: an import must not change the numbers of a seeded run."""
    code = IMPORTED.format(setting)
    if "FakeTensorMode" in setting:  # torch.get_rng_state() is none then
        code = code.replace(", torch.get_rng_state().tolist()", "")
    is_off = os.environ.get("FUSEDOPT_FINGERPRINTS") == "0"
    # A fork has imported dynamo and FSDP already, so it could not tell what fusedopt's import does.
    assert run_python("-c", code).strip() == ("FUSEDOPT_FINGERPRINTS=0" if is_off else "None")
