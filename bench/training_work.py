"""What one contender of training_step.py does to the parameters, and whether two do the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import load_fusedopt
from recipes import HYPER, Step
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LOSS_SCALE = 256.0
Results = Callable[[], list[Tensor]]  # the params and, if there are some, their averages
Make = Callable[[list[nn.Parameter]], tuple[Step, Results]]


@dataclass(frozen=True)
class Work:
    name: str
    what: str  # as a user writes it, in short
    make: Make
    bytes_per_element: int  # that a step must read and write, in as many passes as it takes
    dtype: torch.dtype = torch.float32  # of params and grads
    state_dtype: torch.dtype = torch.float32
    loss_scale: float = 1.0  # that the grads carry
    grad_dtype: torch.dtype | None = None  # if it is not that of the params
    offset: int = 0  # of the grads in memory of their own, in elements: views into buckets
    grad_value: float | None = None  # of all grads, if they are not ordinary numbers


class Holder(nn.Module):
    """AveragedModel takes a module."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)


def ours(
    name: str = "fusedopt",
    dtype: torch.dtype = torch.float32,
    scaled: bool = False,
    grad_dtype: torch.dtype | None = None,
    offset: int = 0,
    grad_value: float | None = None,
    **options: Any,
) -> Work:
    """One pass; clipping and the scaler's look for inf each read the grads before it."""
    size, state_dtype = dtype.itemsize, options.get("state_dtype", dtype)
    grad_size = (grad_dtype or dtype).itemsize
    # The param is read and written, the grad read, two states both.
    moved = 2 * size + grad_size + 4 * state_dtype.itemsize
    moved += {None: 0, "split": 2 * 2, "float32": 2 * 4 - size}[options.get("master_weights")]
    moved += grad_size * (("max_grad_norm" in options) or scaled) + 8 * ("ema_decay" in options)

    def make(params: list[nn.Parameter]) -> tuple[Step, Results]:
        library = load_fusedopt()
        optimizer = library.AdamW(params, **HYPER["AdamW"], **options)
        step = _scaled(library.GradScaler, optimizer, params) if scaled else optimizer.step

        def results() -> list[Tensor]:
            states = [optimizer.state[param] for param in params]
            return [*params, *(state["ema_param"] for state in states if "ema_param" in state)]

        return step, results

    shown = ", ".join(f"{key}={value!r}" for key, value in options.items())
    what = f"AdamW({shown})" + (", GradScaler" if scaled else "")
    what += f", grads in {SHORT[grad_dtype]}" if grad_dtype else ""
    what += f", grads {offset} off" if offset else ""
    what += f", grads {grad_value}" if grad_value is not None else ""
    scale = LOSS_SCALE if scaled else 1.0
    return Work(name, what, make, moved, dtype, state_dtype, scale, grad_dtype, offset, grad_value)


def theirs(
    dtype: torch.dtype = torch.float32,
    clip: float | None = None,
    ema: float | None = None,
    scaled: bool = False,
) -> Work:
    """torch's fused AdamW and what torch offers beside it, each a pass of its own or two."""
    size = dtype.itemsize
    moved = 7 * size
    moved += 3 * size * (clip is not None)  # the norm reads the grads, the scaling reads and writes
    moved += 2 * size * scaled  # likewise in one pass
    moved += 3 * size * (ema is not None)  # reads the params and the averages, writes these

    def make(params: list[nn.Parameter]) -> tuple[Step, Results]:
        optimizer = torch.optim.AdamW(params, **HYPER["AdamW"], fused=True)
        if scaled:
            return _scaled(torch.amp.GradScaler, optimizer, params), lambda: list(params)
        if ema is None:
            return _clipped(optimizer, params, clip), lambda: list(params)
        model = Holder(params)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema))

        def step() -> None:
            optimizer.step()
            average.update_parameters(model)

        return step, lambda: [*params, *average.module.parameters()]

    parts = [
        *(["clip_grad_norm_"] if clip is not None else []),
        "AdamW(fused=True)",
        *(["AveragedModel"] if ema is not None else []),
        *(["GradScaler"] if scaled else []),
    ]
    scale = LOSS_SCALE if scaled else 1.0
    return Work("torch", ", ".join(parts), make, moved, dtype, dtype, scale)


def _clipped(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], clip: float | None
) -> Step:
    if clip is None:
        return optimizer.step

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()

    return step


def _scaled(kind: Any, optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> Step:
    device = params[0].device
    scaler = kind(device.type, init_scale=LOSS_SCALE, growth_interval=2**30)
    scaler.scale(torch.ones((), device=device))  # a scaler's first loss makes its scale

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return step


def parameters(
    works: tuple[Work, ...], shapes: list[tuple[int, ...]], device: torch.device
) -> list[list[nn.Parameter]]:
    """For each of the works its own params and grads, of the same values."""
    generator = torch.Generator(device).manual_seed(0)
    every: list[list[nn.Parameter]] = [[] for _ in works]
    for shape in shapes:
        value, grad = (
            torch.empty(shape, device=device).uniform_(0.05, 0.1, generator=generator)
            for _ in range(2)
        )
        for work, params in zip(works, every, strict=True):
            param = nn.Parameter(value.to(work.dtype, copy=True))
            set_grad(param, grad if work.grad_value is None else grad.fill_(work.grad_value), work)
            params.append(param)
    return every


def set_grad(param: nn.Parameter, grad: Tensor, work: Work) -> None:
    dtype = work.grad_dtype or work.dtype
    memory = torch.empty(grad.numel() + work.offset, dtype=dtype, device=grad.device)
    placed = memory[work.offset :].view(grad.shape)
    placed.copy_(grad * work.loss_scale)
    if dtype != param.dtype:
        param.grad_dtype = dtype
    param.grad = placed


def disagreement(one: Work, other: Work, device: torch.device) -> str:
    """How two works differ after three steps on little data, or nothing if rounding explains it.

    The grads grow and shrink from step to step: else a norm that is not clipped shows in nothing,
    since Adam divides by it.
    """

    def run(work: Work) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        params, grads = [], []
        for count in (4099, 33, 1):
            signs = torch.randn(count, generator=generator).sign()
            # Far from zero, where float16 squares nothing to zero.
            grads.append((signs * (0.5 + torch.rand(count, generator=generator))).to(device))
            value = torch.randn(count, generator=generator) / 1000
            params.append(nn.Parameter(value.to(device, work.dtype)))
        for param, grad in zip(params, grads, strict=True):
            set_grad(param, grad, work)
        step, results = work.make(params)
        for factor in (4.0, 1.0, 2.0):
            for param, grad in zip(params, grads, strict=True):
                assert param.grad is not None
                param.grad.copy_(factor * grad * work.loss_scale)
            step()
        return [result.detach().float().cpu() for result in results()]

    kinds = (one.dtype, one.state_dtype, other.dtype, other.state_dtype)
    coarse = max(4 * max(torch.finfo(kind).eps for kind in kinds), 1e-4)
    mine, reference = run(one), run(other)
    if len(mine) != len(reference):
        return f"{one.name} keeps averages and {other.name} does not, or the other way round"
    update = 3 * HYPER["AdamW"]["lr"]
    for a, b in zip(mine, reference, strict=True):
        excess = ((a - b).abs() - coarse * (b.abs() + update)).max().item()
        if not excess <= 0:
            return f"{one.name} and {other.name} differ by {(a - b).abs().max().item():.1e}"
    return ""
