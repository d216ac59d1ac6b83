"""The same small training with fusedopt.AdamW and with torch.optim.AdamW, through what a stack does
around an optimizer."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fusedopt
from support.equality import without_parameter

LR = 1e-2
INPUTS = 16


class Block(nn.Module):
    """With a norm, biases and a bare parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)))) * self.scale


class Tiny(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.inp = nn.Linear(INPUTS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def tiny(width: int = 12) -> Tiny:
    """The same random weights each time."""
    torch.manual_seed(0)
    return Tiny(width)


def batch(step: int, rank: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(size, INPUTS, generator=generator)
    return x, x.sum(1, keepdim=True).sin()


def loss_of(model: Any, step: int, rank: int = 0) -> Tensor:
    x, y = batch(step, rank)
    return nn.functional.mse_loss(model(x).float(), y)


def whole(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the params; of those that are sharded, in full."""
    return [
        (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
        for param in params
    ]


def assert_near(ours: Any, theirs: Any, rtol: float = 1e-5) -> None:
    """Lists of tensors, each of which differs by no more than this share of its largest element.

    Or of what ten steps can move a param by, where all elements are smaller: a bias that was 0.
    """
    assert len(ours) == len(theirs)
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(our, Tensor):
            assert our == their
            continue
        assert (our.shape, our.dtype) == (their.shape, their.dtype)
        if our.numel():
            scale = their.abs().max().clamp(min=10 * LR)
            off = ((our - their).abs().max() / scale).item()
            assert off <= rtol, f"entry {index} is off by {off:.1e}"


@contextmanager
def counted_steps() -> Iterator[Counter[type]]:
    """How many steps of each class of optimizers are made meanwhile."""
    counts: Counter[type] = Counter()
    handle = register_optimizer_step_post_hook(
        lambda optimizer, *_: counts.update(
            {each for each in (fusedopt.AdamW, torch.optim.AdamW) if isinstance(optimizer, each)}
        )
    )
    try:
        yield counts
    finally:
        handle.remove()


def twins(run: Callable[..., Any] | None = None, *, rtol: float = 1e-5) -> Any:
    """Makes a test of a function of `adamw`, which trains with fusedopt's and then with torch's.

    What it returns of the two must be near. Each must have stepped an optimizer of its class.
    """
    if run is None:
        return functools.partial(twins, rtol=rtol)

    @functools.wraps(run)
    def test(**given: Any) -> None:
        results = []
        for adamw in (fusedopt.AdamW, torch.optim.AdamW):
            with counted_steps() as counts:
                results.append(run(adamw=adamw, **given))
            assert list(counts) == [adamw]
        assert_near(*results, rtol=rtol)

    test.__signature__ = without_parameter(run, "adamw")  # which pytest reads
    return test


# Params that are a rounding apart may be two bfloat16 numbers, and then all grads differ.
mixed_twins = twins(rtol=1e-3)


def clipping(adamw: Any, limit: float) -> dict[str, float]:
    """The option that clips, for ours; torch's twin is clipped by `step_clipped`."""
    return {"max_grad_norm": limit} if adamw is fusedopt.AdamW else {}


def step_clipped(optimizer: Any, clip: Callable[[], Tensor]) -> Tensor:
    """A step of either twin, of which torch's calls `clip` before it; the norm of the grads."""
    ours = isinstance(optimizer, fusedopt.AdamW)
    norm = None if ours else clip()
    optimizer.step()
    return whole([optimizer.grad_norm if ours else norm])[0]
