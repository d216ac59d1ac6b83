"""Subnormal numbers: where a step computes in float32 they count as zero, where it does in float64
they are numbers as all others, whatever the caller's threads are set to; and they stay set so."""

import pytest
import torch
from torch import Tensor

import fusedopt
from support.equality import same_bits
from support.optimizers import Case, some_cases, step_with
from support.plans import best_isa, use_plan
from support.snapshots import results
from support.tensors import some_dtypes, values

TINY = float(torch.finfo(torch.float32).tiny)
SCALES = {
    torch.float32: 2 * TINY,
    torch.bfloat16: 2 * TINY,
    torch.float16: 1e-6,
    torch.float64: 1e-308,
}
each_dtype = some_dtypes(*SCALES)


def set_flush(flushes: bool) -> None:
    if not torch.set_flush_denormal(flushes):
        pytest.skip("this processor cannot flush subnormals")


def small_numbers(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (values(size, dtype=torch.float64, seed=seed) * SCALES[dtype]).to(dtype)


def train(case: Case, dtype: torch.dtype, threads: int, flushes: bool) -> dict[str, Tensor]:
    params = [small_numbers(5000, dtype, seed) for seed in range(8)]
    grads = [small_numbers(5000, dtype, seed) for seed in (10, 11)]
    optimizer = case.ours(params)
    use_plan(optimizer, best_isa(), 64)  # many chunks, so that each thread takes some
    torch.set_num_threads(threads)
    set_flush(flushes)
    step_with(optimizer, grads)
    set_flush(False)
    return {f"{i}.{k}": v for i, p in enumerate(params) for k, v in results(optimizer, p).items()}


def subnormals(tensor: Tensor, smallest_normal: float) -> Tensor:
    magnitude = tensor.double().abs()
    return (magnitude > 0) & (magnitude < smallest_normal)


@pytest.mark.cpu_only
@each_dtype
@some_cases("sgd-l2", "momentum", "adamw", "rmsprop-all", "adadelta", "rprop")
def test_the_callers_mode_makes_no_difference(case: Case, dtype: torch.dtype) -> None:
    expected = train(case, dtype, threads=1, flushes=False)
    for threads in (1, 2):
        for flushes in (False, True):
            assert same_bits(train(case, dtype, threads, flushes), expected)


@each_dtype
@some_cases("sgd-l2", "momentum", "adamw", "rmsprop-all", "adadelta", "asgd", "rprop")
def test_which_are_kept(case: Case, dtype: torch.dtype) -> None:
    """Those of float16 are ordinary numbers of float32."""
    found = train(case, dtype, threads=2, flushes=False)
    params = torch.cat([value for name, value in found.items() if name.endswith(".param")])
    assert params.any()
    are_kept = dtype in (torch.float16, torch.float64)
    if case.optimizer == "SGD":  # others move by about lr
        smallest_normal = float(torch.finfo(dtype).smallest_normal)
        assert subnormals(params, smallest_normal).any() == are_kept
    for value in found.values():
        assert dtype == torch.float64 or not subnormals(value, TINY).any()


@each_dtype
def test_inputs_count_as_zero(dtype: torch.dtype) -> None:
    """A param, a grad, a state and a master weight, each alone, times a power of two."""
    below, kept = SCALES[dtype] / 8, dtype in (torch.float16, torch.float64)
    param = torch.full((37,), below, dtype=dtype)
    optimizer = fusedopt.SGD([param], lr=0.0)
    step_with(optimizer, [torch.zeros_like(param)])
    assert (param != 0).all() == kept
    param = torch.zeros(37, dtype=dtype)
    optimizer = fusedopt.SGD([param], lr=64.0)
    step_with(optimizer, [torch.full_like(param, below)])
    assert (param != 0).all() == kept
    param = torch.zeros(37, dtype=dtype)
    optimizer = fusedopt.SGD([param], lr=64.0, momentum=1.0)
    optimizer.state[param]["momentum_buffer"] = torch.full_like(param, below)
    step_with(optimizer, [torch.zeros_like(param)])
    assert (param != 0).all() == kept


@some_dtypes(torch.bfloat16, torch.float16)
def test_master_weights_count_as_zero(dtype: torch.dtype) -> None:
    param = torch.zeros(37, dtype=dtype)
    optimizer = fusedopt.SGD([param], lr=0.0, master_weights="float32")
    optimizer.load_fp32_params([torch.full((37,), TINY / 4)])
    step_with(optimizer, [torch.zeros_like(param)])
    assert not optimizer.fp32_params()[0].any()


@pytest.mark.cpu_only
@some_dtypes(torch.float32, torch.float64)
@pytest.mark.parametrize("flushes", [False, True], ids=["kept", "flushed"])
@pytest.mark.parametrize("clips", [False, True])
def test_modes_are_as_before_the_step(flushes: bool, dtype: torch.dtype, clips: bool) -> None:
    """Of the caller and of torch's threads, which keep subnormals whatever the caller sets."""

    def product() -> Tensor:
        return torch.full((1 << 18,), TINY).mul_(0.5).view(torch.int32)

    torch.set_num_threads(2)
    set_flush(flushes)
    expected = product()
    assert (expected[0] == 0) == flushes
    param = torch.ones(1 << 18, dtype=dtype)
    optimizer = fusedopt.AdamW([param], max_grad_norm=1.0 if clips else None)
    step_with(optimizer, [torch.ones_like(param)])
    assert torch.equal(product(), expected)
