"""What training.py compares: configurations of fusedopt beside torch's for the same work.

``COMPARISONS`` says who is compared with whom and what fusedopt aims at there; ``ours`` and
``theirs`` make a configuration, whose update is verified before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lib.cases import HYPER
from lib.report import load_fusedopt
from lib.timing import Candidate, Step

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
LOSS_SCALE = 256.0
CLIP, DECAY = 1.0, 0.999
Q8_BYTES = 1 + 4 / 64  # of a matrix' state in 8 bits, with its part of a scale

Results = Callable[[], list[Tensor]]  # the params and, if there are some, their averages
Make = Callable[[list[nn.Parameter]], tuple[Step, Results]]


@dataclass(frozen=True)
class Config:
    name: str
    what: str  # as a user writes it, in short
    make: Make
    bytes_per_element: float  # that a step must read and write, in as many passes as it takes
    dtype: torch.dtype = FP32  # of params and grads
    state_dtype: torch.dtype = FP32
    loss_scale: float = 1.0  # that the grads carry
    grad_dtype: torch.dtype | None = None  # if it is not that of the params
    offset: int = 0  # of the grads in memory of their own, in elements: views into buckets
    grad_value: float | None = None  # of all grads, if they are not ordinary numbers
    scaled: bool = False  # by a GradScaler, which may wait for the GPU

    def set_grad(self, param: nn.Parameter, grad: Tensor) -> None:
        dtype = self.grad_dtype or self.dtype
        memory = torch.empty(grad.numel() + self.offset, dtype=dtype, device=grad.device)
        placed = memory[self.offset :].view(grad.shape)
        placed.copy_(grad * self.loss_scale)
        if dtype != param.dtype:
            param.grad_dtype = dtype
        param.grad = placed


def ours(
    name: str = "fusedopt", dtype: torch.dtype = FP32, scaled: bool = False,
    grad_dtype: torch.dtype | None = None, offset: int = 0, grad_value: float | None = None,
    **options: Any,
) -> Config:  # fmt: skip
    """One pass; clipping and the scaler's look for inf each read the grads before it."""
    size, state_dtype = dtype.itemsize, options.get("state_dtype", dtype)
    state_size = Q8_BYTES if state_dtype == "q8" else state_dtype.itemsize
    state_dtype = FP32 if state_dtype == "q8" else state_dtype  # of small tensors
    grad_size = (grad_dtype or dtype).itemsize
    # The param is read and written, the grad read, two states both.
    moved = 2 * size + grad_size + 4 * state_size
    masters = {None: 0, "split": 2 * 2, "split8": 2, "float32": 2 * 4 - size}
    moved += masters[options.get("master_weights")]
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
    return Config(name, what, make, moved, dtype, state_dtype, LOSS_SCALE if scaled else 1.0,
                  grad_dtype, offset, grad_value, scaled)  # fmt: skip


def theirs(
    dtype: torch.dtype = FP32, clip: float | None = None, ema: float | None = None,
    scaled: bool = False,
) -> Config:  # fmt: skip
    """torch's fused AdamW and what torch offers beside it, each a pass of its own or two."""
    size = dtype.itemsize
    moved = 7 * size + 2 * size * scaled  # the scaler reads and writes the grads
    moved += 3 * size * (clip is not None)  # the norm reads the grads, the scaling reads and writes
    moved += 3 * size * (ema is not None)  # reads the params and the averages, writes these

    def make(params: list[nn.Parameter]) -> tuple[Step, Results]:
        optimizer = torch.optim.AdamW(params, **HYPER["AdamW"], fused=True)
        if scaled:
            return _scaled(torch.amp.GradScaler, optimizer, params), lambda: list(params)
        model = nn.Module()  # AveragedModel takes one
        model.params = nn.ParameterList(params)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None

        def step() -> None:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()
            if average:
                average.update_parameters(model)

        averages = [*average.module.parameters()] if average else []
        return step if clip or ema else optimizer.step, lambda: [*params, *averages]

    what = ("clip_grad_norm_, " if clip else "") + "AdamW(fused=True)"
    what += (", AveragedModel" if ema else "") + (", GradScaler" if scaled else "")
    return Config("torch", what, make, moved, dtype, dtype, LOSS_SCALE if scaled else 1.0,
                  scaled=scaled)  # fmt: skip


def _scaled(kind: Any, optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> Step:
    device = params[0].device
    scaler = kind(device.type, init_scale=LOSS_SCALE, growth_interval=2**30)
    scaler.scale(torch.ones((), device=device))  # a scaler's first loss makes its scale

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return step


def parameters(
    configs: tuple[Config, ...], shapes: list[tuple[int, ...]], device: torch.device
) -> list[list[nn.Parameter]]:
    """For each of the configs its own params and grads, of the same values."""
    generator = torch.Generator(device).manual_seed(0)
    every: list[list[nn.Parameter]] = [[] for _ in configs]
    for shape in shapes:
        both = torch.empty((2, *shape), device=device)
        value, grad = both.uniform_(0.05, 0.1, generator=generator)
        for config, params in zip(configs, every, strict=True):
            param = nn.Parameter(value.to(config.dtype, copy=True))
            unusual = config.grad_value is not None
            config.set_grad(param, torch.full_like(grad, config.grad_value) if unusual else grad)
            params.append(param)
    return every


def difference_between(one: Config, other: Config, device: torch.device) -> str:
    """How two configs differ after three steps on little data, or nothing if rounding explains it.

    The grads grow and shrink from step to step: else a norm that is not clipped shows in nothing,
    since Adam divides by it.
    """

    def run(config: Config) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        params, grads = [], []
        for count in (4099, 33, 1):
            signs = torch.randn(count, generator=generator).sign()
            # Far from zero, where float16 squares nothing to zero.
            grads.append((signs * (0.5 + torch.rand(count, generator=generator))).to(device))
            value = torch.randn(count, generator=generator) / 1000
            params.append(nn.Parameter(value.to(device, config.dtype)))
            config.set_grad(params[-1], grads[-1])
        step, results = config.make(params)
        for factor in (4.0, 1.0, 2.0):
            for param, grad in zip(params, grads, strict=True):
                assert param.grad is not None
                param.grad.copy_(factor * grad * config.loss_scale)
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


@dataclass(frozen=True)
class Pair:
    """``of`` is compared with ``against``: how many times as fast, or by bytes per second."""

    of: str = "fusedopt"
    against: str = "torch"
    cpu: float | None = None  # the target; None: measured, and there is none
    cuda: float | None = None
    avx2: float | None = None  # instead of cpu where AVX-512 is not used
    by_bytes: bool = False

    def compare(
        self, named: dict[str, Candidate], device: torch.device, kind: str = "wall"
    ) -> dict[str, Any]:
        """``kind``: which of timing.py's times."""
        mine, other = named[self.of], named[self.against]
        if self.by_bytes:
            by, text = "bytes/s", f"{self.of} / {self.against}"
            value = mine.bandwidth_ratio(other, kind)
        else:
            by, text, value = "time", f"{self.against} / {self.of}", other.time_ratio(mine, kind)
        target = self.cuda if device.type == "cuda" else self.cpu
        if device.type == "cpu" and load_fusedopt()._config.cpu_isa() != "avx512":
            target = self.avx2 or target
        return {
            "of": self.of, "against": self.against, "by": by, "text": f"{by}, {text}", "kind": kind,
            "value": value, "target": target,
            "good": None if target is None else value["median"] >= target,
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    title: str
    workload: str
    configs: tuple[Config, ...]
    pairs: tuple[Pair, ...]
    busy: bool = False  # beside another process
    devices: tuple[str, ...] = ("cpu", "cuda")  # where it runs unless asked for by name
    is_alike: bool = True  # all configs do the same to the params
    on_gpu: str | None = None  # the workload there, if it is another one
    gpu_alone: bool = False  # there the host's time is left out, as steps of training hide it

    def kind(self, device: torch.device) -> str:
        return "gpu" if self.gpu_alone and device.type == "cuda" else "wall"


def _beside_torch(
    title: str, workload: str, mine: Config, other: Config, cpu: float | None, cuda: float | None,
    **options: Any,
) -> Comparison:  # fmt: skip
    return Comparison(title, workload, (mine, other), (Pair(cpu=cpu, cuda=cuda),), **options)


def _setting(
    title: str, cuda: float, dtype: torch.dtype = BF16, on_cpu: bool = True, **options: Any
) -> Comparison:
    """One large tensor, by the bytes, beside the plain step in float32 and beside a copy."""
    pairs = (Pair("setting", "fusedopt-fp32", cpu=1 / 1.2, avx2=1 / 1.6, by_bytes=True),
             Pair("setting", "copy", cuda=cuda, by_bytes=True))  # fmt: skip
    configs = (ours("setting", dtype, **options), ours("fusedopt-fp32"))
    alike = not options.keys() & {"ema_decay", "max_grad_norm"}
    return Comparison(f"AdamW, {title}", "one-64Mi", configs, pairs if on_cpu else pairs[1:],
                      is_alike=alike, on_gpu="one-256Mi", gpu_alone=True)  # fmt: skip


def _rounded(title: str, dtype: torch.dtype = BF16, **options: Any) -> Comparison:
    """Stochastic rounding beside rounding to nearest."""
    stochastic = ours("stochastic", dtype, stochastic_rounding=True, **options)
    nearest = ours("nearest", dtype, stochastic_rounding=False, **options)
    pairs = (Pair("stochastic", "nearest", cpu=1 / 1.5),
             Pair("stochastic", "copy", cuda=0.93, by_bytes=True))  # fmt: skip
    title = f"AdamW, stochastic rounding, {title}"
    return Comparison(title, "one-64Mi", (stochastic, nearest), pairs, on_gpu="one-256Mi",
                      gpu_alone=True)  # fmt: skip


def _unusual(dtype: torch.dtype) -> Comparison:
    """Grads that are no ordinary numbers, and what the states come to with them."""
    values = {"zeros": 0.0, "subnormals": 1e-40, "tiny": 1e-30, "infinities": float("inf"),
              "nans": float("nan")}  # fmt: skip
    configs = [ours(name, dtype, grad_value=value) for name, value in values.items()]
    pairs = tuple(Pair(name, "ordinary", cpu=1 / 1.3) for name in values)
    return Comparison(f"AdamW, {SHORT[dtype]}, unusual numbers", "one-4Mi",
                      (*configs, ours("ordinary", dtype)), pairs, devices=("cpu",),
                      is_alike=False)  # fmt: skip


NEAREST: dict[str, Any] = {"stochastic_rounding": False}
BF16_STATES: dict[str, Any] = {"state_dtype": BF16}
FP32_STATES: dict[str, Any] = {"state_dtype": FP32}
MASTERS: dict[str, Any] = {"master_weights": "float32", **FP32_STATES}
SPLIT: dict[str, Any] = {"master_weights": "split", **BF16_STATES}
SPLIT_FP32: dict[str, Any] = {"master_weights": "split", **FP32_STATES}
SPLIT_BF16: dict[str, Any] = SPLIT | NEAREST
SPLIT8_Q8: dict[str, Any] = {"master_weights": "split8", "state_dtype": "q8"}
EMA: dict[str, Any] = {"ema_decay": DECAY}
SETTINGS = {
    "of-bf16": _setting("bf16", 0.97, **NEAREST),
    "of-fp16": _setting("fp16", 0.97, FP16),
    "of-bf16-states": _setting("fp32, bf16 states", 0.95, FP32, **BF16_STATES, **NEAREST),
    "of-fp32-states": _setting("bf16, fp32 states", 0.95, **FP32_STATES),
    "of-masters": _setting("bf16, fp32 masters and states", 0.95, **MASTERS),
    "of-masters-fp32-grads": _setting(
        "bf16, fp32 grads, masters and states", 0.95, grad_dtype=FP32, **MASTERS
    ),
    "of-split": _setting("bf16, split masters, fp32 states", 0.95, **SPLIT_FP32),
    "of-split-bf16-states": _setting("bf16, split masters, bf16 states", 0.95, **SPLIT_BF16),
    "of-fp32-ema": _setting("fp32 + EMA", 0.95, FP32, **EMA),
    "of-bf16-ema": _setting("bf16 + EMA", 0.95, **EMA, **NEAREST),
    "of-masters-ema": _setting("bf16, fp32 masters + EMA", 0.95, **EMA, **MASTERS),
    "of-split-ema": _setting("bf16, split, bf16 states + EMA", 0.95, **EMA, **SPLIT_BF16),
    "of-bf16-clip": _setting("bf16 + clip", 0.94, max_grad_norm=CLIP, **NEAREST),
    "of-split-clip": _setting("bf16, split + clip", 0.94, max_grad_norm=CLIP, **SPLIT_BF16),
    "of-q8": Comparison(
        "AdamW, bf16, split8, q8 states",
        "matrix-256Mi",
        (ours("setting", BF16, **SPLIT8_Q8), theirs(BF16)),
        (Pair("setting", "copy", cuda=0.85, by_bytes=True), Pair("setting", cuda=1 / 0.9)),
        devices=("cuda",),
        is_alike=False,
        gpu_alone=True,
    ),
    "of-q8-llama": Comparison(
        "AdamW, bf16, split8, q8 states, Llama-3-8B / 8",
        "llama-8b-eighth",
        (ours("setting", BF16, **SPLIT8_Q8), theirs(BF16)),
        (Pair("setting", "copy", cuda=0.85, by_bytes=True), Pair("setting", cuda=1 / 0.9)),
        devices=("cuda",),
        is_alike=False,
        gpu_alone=True,
    ),
    "of-fp32-misaligned": _setting("fp32, grads one off", 0.85, FP32, offset=1, on_cpu=False),
    "of-bf16-misaligned": _setting("bf16, grads one off", 0.85, offset=1, on_cpu=False, **NEAREST),
    "rounded-bf16": _rounded("bf16"),
    "rounded-bf16-states": _rounded("fp32, bf16 states", FP32, **BF16_STATES),
    "rounded-fp32-states": _rounded("bf16, fp32 states", **FP32_STATES),
}

GPT2, ONE = "gpt2-124m", "one-64Mi"
CLIPPED = ours(max_grad_norm=CLIP), theirs(clip=CLIP)
SCALED = ours(dtype=FP16, scaled=True), theirs(FP16, scaled=True)
OF_BF16 = ours("all-bf16", BF16), ours("split", BF16, **SPLIT), ours("fusedopt-fp32"), theirs(BF16)
OF_FP32: dict[str, Any] = {"against": "fusedopt-fp32", "cuda": 0.9, "by_bytes": True}
COMPARISONS = {
    "plain": _beside_torch(
        "AdamW, all options off, GPT-2 124M", GPT2, ours(), theirs(), 1.0, 1.5),
    "clip": _beside_torch("AdamW + clip, GPT-2 124M", GPT2, *CLIPPED, 1.3, 1.3),
    "clip-many": _beside_torch("AdamW + clip, 1000 x 1000", "many-1000x1000", *CLIPPED, 8.0, 8.0),
    "bf16-states": _beside_torch(
        "AdamW, fp32 params, bf16 states, 64 Mi", ONE, ours(**BF16_STATES), theirs(), 1.0, 1.3),
    "bf16": Comparison(
        "AdamW in bf16, 64 Mi", ONE, OF_BF16,
        (Pair("all-bf16", cpu=1.0), Pair("split", cpu=1.0),
         Pair("all-bf16", **OF_FP32), Pair("split", **OF_FP32))),
    "busy": _beside_torch(
        "AdamW, GPT-2 124M, one other process busy", GPT2, ours(), theirs(), 2.0, None,
        busy=True, devices=("cpu",)),
    "ema": _beside_torch("AdamW + EMA, GPT-2 124M", GPT2, ours(**EMA), theirs(ema=DECAY), 1.3, 1.3),
    "grad-scaler": _beside_torch(
        "AdamW under GradScaler, fp16, GPT-2 124M", GPT2, *SCALED, None, 1.3, devices=("cuda",)),
    **SETTINGS,
    "values-fp32": _unusual(FP32),
    "values-bf16": _unusual(BF16),
}  # fmt: skip
