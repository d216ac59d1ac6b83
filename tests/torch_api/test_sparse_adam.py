"""SparseAdam: only the rows that a grad is of, whether it is sparse or dense."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.equality import assert_close, assert_equal, assert_same_math
from support.tensors import BFLOAT16, FLOAT32, FLOAT64, some_dtypes, values

ROWS = 40
SHAPES = [(ROWS, 17), (ROWS,), (ROWS, 3, 5), (ROWS, 64)]


def sparse(rows: list[int], shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """A grad of these rows, in this order."""
    return holding(rows, values(len(rows), *shape[1:], dtype=dtype, seed=seed), shape)


def holding(rows: Any, numbers: Tensor, shape: Any) -> Tensor:
    where = torch.as_tensor(rows, dtype=torch.int64).reshape(1, -1)
    return torch.sparse_coo_tensor(where, numbers, shape, check_invariants=True)


def rows_of(seed: int) -> list[int]:
    """Some rows, of which some occur twice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, ROWS, (12,), generator=generator, device="cpu").tolist()


def params_of(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[Parameter]:
    return [Parameter(values(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]


def train(optimizer: Any, params: list[Parameter], seeds: range = range(6)) -> None:
    for seed in seeds:
        for i, param in enumerate(params):
            shape = tuple(param.shape)
            param.grad = sparse(rows_of(100 * seed + i), shape, seed, param.dtype)
        optimizer.step()


def numbers_of(optimizer: Any, params: list[Parameter]) -> list[dict[str, Tensor]]:
    names = ("exp_avg", "exp_avg_sq")
    state = optimizer.state
    return [{"param": p.detach(), **{name: state[p][name] for name in names}} for p in params]


@pytest.mark.parametrize("options", [{}, {"betas": (0.3, 0.7), "eps": 1e-3}, {"maximize": True}])
def test_like_torch(options: dict[str, Any]) -> None:
    """In real numbers: torch's takes the root of the square of complex ones."""
    ours, theirs = params_of(FLOAT64), params_of(FLOAT64)
    optimizer = fusedopt.SparseAdam(ours, lr=0.01, **options)
    twin = torch.optim.SparseAdam(theirs, lr=0.01, **options)
    train(optimizer, ours)
    train(twin, theirs)
    assert_same_math(numbers_of(optimizer, ours), numbers_of(twin, theirs))
    assert all(optimizer.state[p]["step"] == 6 == twin.state[q]["step"]
               for p, q in zip(ours, theirs, strict=True))  # fmt: skip


def test_complex_numbers_are_two_real_ones() -> None:
    (param,) = params_of(torch.complex128, [(ROWS, 6)])
    real = Parameter(torch.view_as_real(param.detach()).clone())
    optimizers = [fusedopt.SparseAdam([p], lr=0.01) for p in (param, real)]
    for seed in range(4):
        grad = sparse(rows_of(seed), (ROWS, 6), seed, torch.complex128).coalesce()
        param.grad = grad
        numbers = torch.view_as_real(grad.values())
        real.grad = holding(grad.indices(), numbers, real.shape)
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(torch.view_as_real(param.detach()), real.detach())


def test_other_rows_stay_as_they_are() -> None:
    (param,) = params_of(FLOAT32, [(ROWS, 64)])
    optimizer = fusedopt.SparseAdam([param], lr=0.1)
    train(optimizer, [param])
    before = copy.deepcopy(numbers_of(optimizer, [param])[0])
    rows = [3, 7, 39]
    param.grad = sparse(rows, (ROWS, 64), 9, FLOAT32)
    optimizer.step()
    others = [row for row in range(ROWS) if row not in rows]
    for name, after in numbers_of(optimizer, [param])[0].items():
        assert_equal(after[others], before[name][others])
        assert (after[rows] != before[name][rows]).all()


@some_dtypes(FLOAT32, BFLOAT16)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_dtype": "bfloat16"},
        {"stochastic_rounding": True},
        {"master_weights": "float32"},
        {"master_weights": "split", "state_dtype": "float32"},
    ],
)
def test_rows_are_stepped_as_tensors_of_their_own(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """With all settings: what a row becomes depends on its grads alone, and on its place."""
    if dtype == FLOAT32 and options.get("master_weights") == "split":
        options = {}
    shape = (ROWS, 33)
    params = [Parameter(values(*shape, dtype=dtype)) for _ in range(2)]
    optimizers = [fusedopt.SparseAdam([p], lr=0.01, **options) for p in params]
    rows = sorted(set(rows_of(0)))
    for seed in range(5):
        grad = sparse(rows, shape, seed, dtype).coalesce()
        params[0].grad = grad
        optimizers[0].step()
        # Half of the rows in one step, the others in another one that has the same number.
        for step, part in enumerate((rows[::2], rows[1::2])):
            numbers = grad.to_dense()[part]
            params[1].grad = holding(part, numbers, shape)
            optimizers[1].step()
            if step == 0:
                optimizers[1].state[params[1]]["step"].sub_(1)
    found, expected = (optimizer.state_dict()["state"][0] for optimizer in optimizers)
    assert_equal(params[0].detach(), params[1].detach())
    assert_equal(found, expected)


@some_dtypes(FLOAT32, BFLOAT16)
def test_threads_and_order_make_no_difference(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (50_000, 8)
    rows = torch.randperm(50_000, generator=torch.Generator().manual_seed(0), device="cpu")[:9000]
    numbers = values(9000, 8, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        param = Parameter(values(*shape, dtype=dtype, seed=3))
        optimizer = fusedopt.SparseAdam([param], stochastic_rounding=True)
        order = torch.randperm(9000, generator=torch.Generator().manual_seed(threads), device="cpu")
        monkeypatch.setattr(torch, "get_num_threads", functools.partial(int, threads))
        for _ in range(2):
            param.grad = holding(rows[order], numbers[order], shape)
            optimizer.step()
        results.append(numbers_of(optimizer, [param]))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


LAYOUTS = {
    "transposed": lambda shape: values(*shape[::-1]).t(),
    "sliced": lambda shape: values(shape[0], 2 * shape[1])[:, ::2],
    "every second row": lambda shape: values(2 * shape[0], shape[1])[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    shape = (ROWS, 9)
    strided = Parameter(LAYOUTS[layout](shape))
    plain = Parameter(strided.detach().clone(memory_format=torch.contiguous_format))
    assert not strided.is_contiguous()
    optimizers = [fusedopt.SparseAdam([p], stochastic_rounding=False) for p in (strided, plain)]
    for optimizer, param in zip(optimizers, (strided, plain), strict=True):
        train(optimizer, [param])
    assert_equal(strided.detach(), plain.detach())


def test_dense_grads_are_of_the_rows_that_are_not_zero() -> None:
    shape = (ROWS, 7)
    params = [Parameter(values(*shape)) for _ in range(2)]
    optimizers = [fusedopt.SparseAdam([param], lr=0.1) for param in params]
    for seed in range(4):
        grad = sparse(rows_of(seed), shape, seed, FLOAT32).coalesce()
        params[0].grad, params[1].grad = grad, grad.to_dense()
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(*(numbers_of(o, [p]) for o, p in zip(optimizers, params, strict=True)))
    # A NaN is not zero.
    params[1].grad = torch.zeros(shape)
    params[1].grad[5, 0] = torch.nan
    optimizers[1].step()
    assert params[1].isnan().nonzero().tolist() == [[5, 0]]


def test_a_grad_of_no_rows_counts_as_a_step() -> None:
    (param,) = params_of(FLOAT32, [(ROWS, 4)])
    before = param.detach().clone()
    optimizer = fusedopt.SparseAdam([param])
    param.grad = sparse([], (ROWS, 4), 0, FLOAT32)
    optimizer.step()
    param.grad = torch.zeros(ROWS, 4)
    optimizer.step()
    assert optimizer.state[param]["step"] == 2
    assert_equal(param.detach(), before)
    param.grad = None
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (1, 1)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    for grad in (torch.ones(shape), torch.ones(shape).to_sparse(1)):
        param = Parameter(torch.ones(shape))
        optimizer = fusedopt.SparseAdam([param], lr=0.5)
        param.grad = grad
        optimizer.step()
        assert optimizer.state[param]["step"] == 1
        assert_close(param.detach(), torch.full(shape, 0.5))


def test_clipping_is_by_the_norm_of_the_rows() -> None:
    params = [Parameter(values(ROWS, 8)) for _ in range(2)]
    clipped = fusedopt.SparseAdam([params[0]], max_grad_norm=0.5, betas=(0.5, 0.5))
    plain = fusedopt.SparseAdam([params[1]], betas=(0.5, 0.5))
    for seed in range(3):
        grad = sparse(rows_of(seed), (ROWS, 8), seed, FLOAT32).coalesce()
        norm = grad.values().double().norm()
        params[0].grad, params[1].grad = grad, grad * float(0.5 / (norm + 1e-6))
        clipped.step()
        plain.step()
        assert_close(clipped.grad_norm.cpu(), norm.cpu(), rtol=1e-7, atol=0)
    assert_close(params[0].detach(), params[1].detach())


def test_an_overflow_is_skipped() -> None:
    (param,) = params_of(FLOAT32, [(ROWS, 8)])
    before = param.detach().clone()
    optimizer = fusedopt.SparseAdam([param], max_grad_norm=1.0)
    param.grad = sparse([1, 2], (ROWS, 8), 0, FLOAT32) * torch.inf
    optimizer.step()
    assert optimizer.skipped
    assert optimizer.nonfinite_grads == 16
    assert_equal(param.detach(), before)


def test_state_dicts_both_ways() -> None:
    ours, theirs = params_of(FLOAT64), params_of(FLOAT64)
    optimizer, twin = fusedopt.SparseAdam(ours), torch.optim.SparseAdam(theirs)
    train(optimizer, ours)
    train(twin, theirs)
    saved = copy.deepcopy((optimizer.state_dict(), twin.state_dict()))
    twin.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(optimizer, ours, range(6, 9))
    train(twin, theirs, range(6, 9))
    assert_same_math(numbers_of(optimizer, ours), numbers_of(twin, theirs))


def test_embedding() -> None:
    """As it is used: with another optimizer for the dense part."""
    torch.manual_seed(0)
    models = [torch.nn.EmbeddingBag(100, 8, sparse=True, mode="sum") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    makers: Any = (fusedopt.SparseAdam, torch.optim.SparseAdam)
    for model, make in zip(models, makers, strict=True):
        optimizer = make(list(model.parameters()), lr=0.05)
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            words = torch.randint(0, 100, (4, 6), generator=generator, device="cpu")
            loss = model(words.to(model.weight.device)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_close(models[0].weight.detach(), models[1].weight.detach())


def test_sparse_params_are_refused() -> None:
    """In torch's words."""
    params = [torch.ones(2), torch.ones(2, 3).to_sparse()]
    for package in (fusedopt, torch.optim):
        with pytest.raises(
            ValueError, match=r"Sparse params at indices \[\[0, 1\]\]: SparseAdam requires"
        ):
            package.SparseAdam(params)


@pytest.mark.parametrize("option", ["lr", "eps"])
def test_ranges_are_torchs(option: str) -> None:
    """Above 0 as defaults, at least 0 later."""
    for package in (fusedopt, torch.optim):
        with pytest.raises(
            ValueError, match=f"Invalid {'learning rate' if option == 'lr' else 'epsilon'}"
        ):
            package.SparseAdam([torch.ones(2)], **{option: 0.0})
    param = torch.ones(ROWS, 4)
    optimizer = fusedopt.SparseAdam([param])
    optimizer.param_groups[0][option] = 0.0
    param.grad = torch.ones(ROWS, 4)
    optimizer.step()
    assert bool((param == 1).all()) == (option == "lr")


def emptied() -> Tensor:
    grad = torch.ones(ROWS, 4)
    grad.untyped_storage().resize_(0)
    return grad


def bad_grads() -> dict[str, tuple[Any, type[Exception], str]]:
    where = torch.tensor([[0, 1], [2, 3]])
    outside, twice = torch.tensor([[1, ROWS]]), torch.tensor([[5, 5]])
    numbers = torch.ones(2, 4)
    return {
        "two sparse dims": (
            lambda: torch.sparse_coo_tensor(where, torch.ones(2), (ROWS, 4), check_invariants=True),
            TypeError,
            "with 2 sparse dims, but must be dense or sparse in its first dim alone",
        ),
        "outside": (
            lambda: torch.sparse_coo_tensor(
                outside, numbers, (ROWS, 4), check_invariants=False, is_coalesced=True
            ),
            ValueError,
            f"not in rising order, each of them once and from 0 to {ROWS - 1}",
        ),
        "twice": (
            lambda: torch.sparse_coo_tensor(
                twice, numbers, (ROWS, 4), check_invariants=False, is_coalesced=True
            ),
            ValueError,
            f"not in rising order, each of them once and from 0 to {ROWS - 1}",
        ),
        "emptied": (emptied, ValueError, "without memory: its storage has been emptied"),
        "below": (
            lambda: torch.sparse_coo_tensor(
                -outside, numbers, (ROWS, 4), check_invariants=False, is_coalesced=True
            ),
            ValueError,
            f"not in rising order, each of them once and from 0 to {ROWS - 1}",
        ),
    }


@pytest.mark.parametrize("which", bad_grads())
def test_bad_grads_change_nothing(which: str) -> None:
    make, error, text = bad_grads()[which]
    params = params_of(FLOAT32, [(ROWS, 4), (ROWS, 4)])
    optimizer = fusedopt.SparseAdam(params)
    before = [param.detach().clone() for param in params]
    params[0].grad = sparse([1, 2], (ROWS, 4), 0, FLOAT32)
    params[1].grad = make()
    with pytest.raises(error, match=text) as raised:
        optimizer.step()
    assert "grad of the parameter at group 0, index 1" in str(raised.value)
    assert_equal([param.detach() for param in params], before)
    assert not optimizer.state


def test_bad_options() -> None:
    (param,) = params_of(FLOAT32, [(ROWS, 4)])
    for options in ({"lr": -1.0}, {"eps": -1e-8}, {"betas": (1.0, 0.9)}, {"betas": (0.9, 1.0)}):
        with pytest.raises(ValueError, match="Invalid"):
            fusedopt.SparseAdam([param], **options)
    optimizer = fusedopt.SparseAdam([param])
    optimizer.param_groups[0]["ema_decay"] = 0.9
    param.grad = sparse([1], (ROWS, 4), 0, FLOAT32)
    with pytest.raises(ValueError, match="ema_decay is not for SparseAdam"):
        optimizer.step()


def test_a_parameter_without_dims_has_no_rows() -> None:
    param = Parameter(torch.tensor(1.0))
    optimizer = fusedopt.SparseAdam([param])
    param.grad = torch.tensor(1.0)
    with pytest.raises(ValueError, match="without dims, which has no rows"):
        optimizer.step()


def test_params_that_share_rows_are_refused() -> None:
    memory = values(ROWS, 4)
    params = [Parameter(memory[:30]), Parameter(memory[20:])]
    optimizer = fusedopt.SparseAdam(params)
    params[0].grad = sparse([1], (30, 4), 0, FLOAT32)
    params[1].grad = sparse([19], (20, 4), 0, FLOAT32)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert_equal(memory, values(ROWS, 4))
