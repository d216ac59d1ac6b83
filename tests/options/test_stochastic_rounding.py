"""Stochastic rounding to bfloat16: fair, never more than one unit off, and repeatable.

All draws are those of fixed seeds: five standard deviations are an allowance, not a gamble.
"""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.optimizers import Case, some_cases, step_with
from support.plans import MANY, each_isa, require, use_plan
from support.tensors import BFLOAT16, FLOAT32, FLOAT64, values

DRAWS = 10**6


class Rounder:
    """Rounds float32 numbers in a step of SGD: 0 - 1 (-number); the momentum is -number."""

    def __init__(self, numbers: Tensor, dtype: torch.dtype = BFLOAT16, **options: Any) -> None:
        self.param = Parameter(torch.zeros(numbers.shape, dtype=dtype))
        self.param.grad_dtype = FLOAT32
        self.param.grad = -numbers
        options = {"stochastic_rounding": True, **options}
        self.optimizer: Any = fusedopt.SGD([self.param], lr=1.0, **options)

    def round(self) -> Tensor:
        """Once more: each step has draws of its own."""
        with torch.no_grad():
            self.param.zero_()
        self.optimizer.step()
        return self.param.detach().clone()

    def momentum(self) -> Tensor:
        buffer: Tensor = self.optimizer.state[self.param]["momentum_buffer"]
        return -buffer.detach()


def pattern(bits: int, count: int = DRAWS) -> Tensor:
    """A float32 by its bits, many times."""
    return torch.tensor([bits - (bits >> 31 << 32)], dtype=torch.int32).view(FLOAT32).repeat(count)


def is_up(rounded: Tensor, number: Tensor) -> Tensor:
    """Where the magnitude grew; anything but the two neighbours fails."""
    assert rounded.dtype == BFLOAT16
    low = number.view(torch.int32) >> 16
    moved = rounded.contiguous().view(torch.int16).to(torch.int32) - low
    assert ((moved == 0) | (moved == 1)).all()
    return moved == 1


# Upper halves: ones, an odd number, the smallest binade's ends, others' last ones.
UPPER = (0x3F80, 0xBF80, 0x3DCD, 0x4049, 0x0080, 0x00FF, 0xC7FF, 0x7F00)
LOWER = (1, 0x0100, 0x4000, 0x8000, 0xB333, 0xFFFF)


def assert_fair(up: Tensor, probability: float) -> None:
    """The mean over all, and the variance of sums of a thousand draws, which tells of patterns."""
    count, variance = up.numel(), probability * (1 - probability)
    assert abs(up.sum().item() - count * probability) <= 5 * math.sqrt(count * variance)
    block = 1000
    if block * variance < 5:
        return  # too rare for the sums to be nearly normal
    sums = up.view(-1, block).sum(dim=1, dtype=FLOAT64)
    found = ((sums - block * probability) ** 2).mean().item()
    assert abs(found / (block * variance) - 1) <= 5 * math.sqrt(2 / len(sums))


@pytest.mark.unemulated
@pytest.mark.unsanitized  # no other accesses than of fewer elements
@pytest.mark.parametrize("lower", LOWER, ids=hex)
@pytest.mark.parametrize("upper", UPPER, ids=hex)
def test_mean_and_variance(upper: int, lower: int) -> None:
    number = pattern(upper << 16 | lower)
    rounder = Rounder(number, momentum=0.9)
    assert_fair(is_up(rounder.round(), number), lower / 65536)
    assert_fair(is_up(rounder.momentum(), number), lower / 65536)


@pytest.mark.unemulated
@pytest.mark.unsanitized  # no other accesses than of fewer elements
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
@pytest.mark.parametrize("lower", LOWER, ids=hex)
def test_states_of_wide_params(lower: int, dtype: torch.dtype) -> None:
    number = pattern(0x3F80 << 16 | lower)
    rounder = Rounder(number, dtype, momentum=0.9, state_dtype=BFLOAT16)
    assert torch.equal(rounder.round(), number.to(dtype))
    assert_fair(is_up(rounder.momentum(), number), lower / 65536)


def assert_unrelated(first: list[Tensor], second: list[Tensor]) -> None:
    """No correlation between any of the first and any of the second, but of one with itself."""

    def standardised(ups: list[Tensor]) -> Tensor:
        rows = torch.stack(ups).float()
        return (rows - rows.mean(dim=1, keepdim=True)) / rows.std(dim=1, keepdim=True)

    count = len(first[0])
    correlations = standardised(first) @ standardised(second).T / count
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            assert one is other or abs(correlations[i, j]) <= 5 / math.sqrt(count)


HALF = 0x3F808000  # between 1 and the next


def test_elements_do_not_resemble_each_other() -> None:
    up = is_up(Rounder(pattern(HALF)).round(), pattern(HALF))
    for distance in (1, 2, 3, 4, 7, 8, 16, 32, 64, 256, 1000, 1024, 4096, 65536):
        assert_unrelated([up[distance:]], [up[:-distance]])


def test_steps_seeds_and_values_do_not_resemble_each_other() -> None:
    number = pattern(HALF)
    rounder = Rounder(number)
    ups = [is_up(rounder.round(), number) for _ in range(3)]
    for seed in (1, 2, 2**32 - 1):
        ups.append(is_up(Rounder(number, rounding_seed=seed).round(), number))
    for other in (0x3F818000, 0x3F008000, 0xBF808000):
        ups.append(is_up(Rounder(pattern(other)).round(), pattern(other)))
    assert_unrelated(ups, ups)
    for shift in (-1, 1):  # a counter that is a sum would repeat its neighbours' draws
        assert_unrelated(ups, [up.roll(shift) for up in ups])


def test_operands_do_not_resemble_each_other() -> None:
    param = Parameter(torch.zeros(DRAWS))
    param.grad = torch.ones(DRAWS)
    options = {"betas": (0.9, 0.9), "amsgrad": True, "state_dtype": BFLOAT16}
    optimizer = fusedopt.Adam([param], stochastic_rounding=True, **options)  # type: ignore[arg-type]
    optimizer.step()
    ups = [
        is_up(optimizer.state[param][name], pattern(0x3DCCCCCD))
        for name in ("exp_avg", "exp_avg_sq")
    ]
    assert_unrelated(ups[:1], ups[1:])
    number = pattern(HALF)
    rounder = Rounder(number, momentum=0.9)
    assert_unrelated([is_up(rounder.round(), number)], [is_up(rounder.momentum(), number)])


def second_moments_up(weights: Tensor, *, seed: int = 0) -> Tensor:
    """Where exp_avg_sq, 0.1 everywhere, was rounded up, as it is by default."""
    param = Parameter(weights.clone())
    param.grad = torch.ones_like(param)
    options = {"betas": (0.9, 0.9), "state_dtype": BFLOAT16, "rounding_seed": seed}
    optimizer: Any = fusedopt.Adam([param], **options)  # type: ignore[arg-type]
    optimizer.step()
    return is_up(optimizer.state[param]["exp_avg_sq"], pattern(0x3DCCCCCD, weights.numel()))


def test_second_moments_are_rounded_fairly_and_each_in_its_own_way() -> None:
    ones = torch.ones(DRAWS)
    ups = [second_moments_up(ones), second_moments_up(ones, seed=1)]
    ups += [second_moments_up(values(DRAWS, seed=seed)) for seed in (1, 2)]
    for up in ups:
        assert_fair(up, 0xCCCD / 65536)
        for distance in (1, 2, 3, 4, 8, 16, 64, 1024):
            assert_unrelated([up[distance:]], [up[:-distance]])
    assert_unrelated(ups, ups)


def test_the_same_inputs_give_the_same_bits() -> None:
    numbers = values(3000)
    first, second = (Rounder(numbers, rounding_seed=5) for _ in range(2))
    for _ in range(3):
        assert torch.equal(first.round(), second.round())


def test_exact_numbers_stay() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(BFLOAT16)
    param = every.clone()
    optimizer = fusedopt.SGD([param], lr=1.0, stochastic_rounding=True)
    for _ in range(20):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param.isnan(), every.isnan())
    expected = torch.where(every.abs() < torch.finfo(FLOAT32).tiny, 0 * every, every)
    same = param.view(torch.int16) == expected.view(torch.int16)
    assert (same | every.isnan()).all()


NAN = (0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000, 0x7F80FFFF, 0xFFFF8000)


@pytest.mark.parametrize("number", NAN, ids=hex)
def test_nan_stays_nan(number: int) -> None:
    rounder = Rounder(pattern(number, 10_000), momentum=0.9)
    assert rounder.round().isnan().all()
    assert rounder.momentum().isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_end_of_the_range(sign: int) -> None:
    # No finite number becomes infinite: that would be an error without bound.
    infinity = Rounder(sign * torch.full((10_000,), torch.inf))
    assert (infinity.round() == sign * torch.inf).all()
    largest = torch.finfo(BFLOAT16).max
    assert (Rounder(torch.full((10_000,), sign * largest)).round() == sign * largest).all()
    between = Rounder(torch.full((10_000,), sign * torch.finfo(FLOAT32).max)).round()
    assert (between == sign * largest).all()


def test_the_end_of_the_range_of_states() -> None:
    """Squares between the largest bfloat16 and the largest float32, beside ordinary weights."""
    largest = torch.finfo(BFLOAT16).max
    param = torch.ones(10_000)
    param.grad = torch.full((10_000,), 1.844e19)
    assert largest < float(param.grad[0] * param.grad[0]) < torch.finfo(FLOAT32).max
    optimizer = fusedopt.Adam([param], betas=(0.9, 0.0), state_dtype=BFLOAT16)
    optimizer.step()
    assert (optimizer.state[param]["exp_avg_sq"] == largest).all()
    assert param.isfinite().all()


SIZES = [1, 0, 64, 1000, 16385, 40001, 7]


def train(case: Case, *, threads: int, isa: str, chunk_elements: int | None) -> list[Tensor]:
    params = [values(size, dtype=BFLOAT16, seed=index) for index, size in enumerate(SIZES)]
    optimizer = case.ours(params, stochastic_rounding=True, rounding_seed=3)
    use_plan(optimizer, isa, chunk_elements or MANY)
    torch.set_num_threads(threads)
    for step in range(3):
        for index, param in enumerate(params):
            param.grad = values(param.numel(), dtype=BFLOAT16, seed=100 * step + index)
        optimizer.step()
    return [t for p in params for t in (p, *optimizer.state[p].values())]


@pytest.mark.cpu_only
@each_isa
@some_cases("sgd-l2", "momentum", "adamw-amsgrad", "rmsprop-all", "adadelta", "lion")
def test_chunks_threads_and_instruction_sets(case: Case, isa: str) -> None:
    require(isa)
    expected = train(case, threads=1, isa="baseline", chunk_elements=None)
    for threads, chunk_elements in product((1, 2), (1, 64, 1000, None)):
        found = train(case, threads=threads, isa=isa, chunk_elements=chunk_elements)
        assert all(map(torch.equal, found, expected)), (threads, chunk_elements)


def assert_mean(found: Tensor, expected: float) -> None:
    found = found.double()
    assert abs(found.mean().item() - expected) <= 5 * found.std().item() / math.sqrt(found.numel())


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_tiny_updates_are_kept_in_the_mean(stochastic: bool) -> None:
    # Each is a four-hundredth of what bfloat16 can tell from 1: to the nearest, nothing ever moves.
    param = torch.ones(4096, dtype=BFLOAT16)
    optimizer = fusedopt.SGD([param], lr=2.0**-17, stochastic_rounding=stochastic)
    step_with(optimizer, [torch.ones_like(param)] * 1000)
    if stochastic:
        assert_mean(param, 1 - 1000 * 2.0**-17)
    else:
        assert (param == 1).all()


@pytest.mark.parametrize("stochastic", [False, None, True], ids=["nearest", "default", "all"])
def test_slow_states_move_in_the_mean(stochastic: bool | None) -> None:
    # 0.001 of the way in each step: to the nearest, the second moment stands still half way.
    param = torch.zeros(4096)
    rounding = {"state_dtype": BFLOAT16, "stochastic_rounding": stochastic}
    optimizer = fusedopt.Adam([param], **rounding)  # type: ignore[arg-type]
    step_with(optimizer, [torch.ones_like(param)] * 2000)
    second = optimizer.state[param]["exp_avg_sq"]
    if stochastic is not False:
        assert_mean(second, 1 - 0.999**2000)
    else:
        assert (second < 0.6).all()


@pytest.mark.unemulated
@pytest.mark.unsanitized  # no other accesses than in fewer steps
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("stochastic", [False, None, True], ids=["nearest", "default", "all"])
def test_second_moments_after_grads_have_fallen(
    stochastic: bool | None, dtype: torch.dtype, amsgrad: bool
) -> None:
    """What the default is for: to the nearest, steps stay far too small when grads get smaller.

    1000 steps with grads, 1000 steps with a tenth of them; the root of exp_avg_sq against float64.
    """
    size = 2048
    param = torch.zeros(size, dtype=dtype)
    options = {"state_dtype": BFLOAT16, "stochastic_rounding": stochastic, "amsgrad": amsgrad}
    optimizer = fusedopt.Adam([param], lr=1e-6, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    exact = torch.zeros(size, dtype=FLOAT64, device="cpu")
    largest = exact
    for step in range(2000):
        scale = 1.0 if step < 1000 else 0.1
        grad = scale * torch.randn(size, generator=generator, device="cpu")
        param.grad = grad.to(param)
        optimizer.step()
        exact = exact.lerp(param.grad.to("cpu", FLOAT64).square(), 0.001)
        largest = torch.maximum(largest, exact)
    state = optimizer.state[param]
    ratio = (state["exp_avg_sq"].to("cpu", FLOAT64).sqrt() / exact.sqrt()).mean().item()
    if stochastic is False:
        assert abs(ratio - 1.67) < 0.01  # as docs/numerics.md says
        return
    assert abs(ratio - 1) < 0.005
    if amsgrad:  # of numbers that are right in the mean the largest is a little larger
        kept = state["max_exp_avg_sq"].to("cpu", FLOAT64).sqrt() / largest.sqrt()
        assert 0.99 < kept.mean().item() < 1.03


@pytest.mark.parametrize("stochastic", [None, False, True], ids=["default", "nearest", "all"])
def test_what_is_rounded(stochastic: bool | None) -> None:
    """By default exp_avg_sq and nothing else, not even the largest so far: it adds nothing up."""
    number = pattern(HALF, 10_000)
    options = {"state_dtype": BFLOAT16, "stochastic_rounding": stochastic}
    rounder = Rounder(number, FLOAT32, momentum=0.9, **options)
    rounder.round()
    assert (rounder.momentum().unique().numel() == 2) == (stochastic is True)
    rounder = Rounder(number, BFLOAT16, **options)
    assert (rounder.round().unique().numel() == 2) == (stochastic is True)
    assert ("step" in rounder.optimizer.state[rounder.param]) == (stochastic is True)
    param = Parameter(torch.zeros(10_000))
    param.grad = torch.full((10_000,), 1.003)
    adam = fusedopt.Adam([param], amsgrad=True, **options)  # type: ignore[arg-type]
    adam.step()
    found = {name: value.unique().numel() > 1 for name, value in adam.state[param].items()}
    others = dict.fromkeys(("exp_avg", "max_exp_avg_sq"), stochastic is True)
    assert found == {"step": False, "exp_avg_sq": stochastic is not False, **others}


@pytest.mark.parametrize("master", ["float32", "split"])
def test_params_with_masters_are_not_rounded(master: str) -> None:
    """The weight is exact, the param is its nearest bfloat16, the states are rounded."""
    param = Parameter(torch.zeros(10_000, dtype=BFLOAT16))
    param.grad_dtype = FLOAT32
    param.grad = -pattern(HALF, 10_000)
    options = {"stochastic_rounding": True, "master_weights": master}
    optimizer = fusedopt.SGD([param], lr=1.0, momentum=0.9, **options)  # type: ignore[arg-type]
    optimizer.step()
    assert param.unique().numel() == 1
    assert torch.equal(optimizer.fp32_params()[0], pattern(HALF, 10_000))
    assert optimizer.state[param]["momentum_buffer"].unique().numel() == 2


def test_float16_params_by_default() -> None:
    """They take no part; their bfloat16 second moments do. All of it is refused."""
    param = Parameter(torch.zeros(10_000, dtype=torch.float16))
    param.grad = torch.full((10_000,), 1.003, dtype=torch.float16)
    optimizer = fusedopt.Adam([param], state_dtype=BFLOAT16)
    optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].unique().numel() == 2
    optimizer.param_groups[0]["stochastic_rounding"] = False
    optimizer.step()
    optimizer.param_groups[0]["stochastic_rounding"] = True
    with pytest.raises(ValueError, match="stochastic_rounding"):
        optimizer.step()
