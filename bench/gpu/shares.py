"""How near many settings come to a copy's bandwidth, by the GPU's own time, in half a minute.

The first look after a change of the kernels: one tensor of 256 Mi elements in all formats, and some
models. Nothing is verified here (bench/training.py does), and there are no targets.

Examples:
    python bench/gpu/shares.py
    python bench/gpu/shares.py --only fp32 "q8, split8" --json build/shares.json
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib import report
from lib.cases import WORKLOADS
from lib.configs import (
    BF16,
    BF16_STATES,
    CLIP,
    EMA,
    FP16,
    FP32,
    FP32_STATES,
    MASTERS,
    NEAREST,
    Q8_BYTES,
    SPLIT,
    SPLIT8_Q8,
    SPLIT_BF16,
    SPLIT_FP32,
)
from lib.timing import Step

LARGE = "matrix-256Mi"
ROUNDS, STEPS, COPIES = 5, 4, 2
COPY_FLOATS = 2**28
CYCLES_PER_S = 2e9  # of a GPU that sleeps: about
SLEEP_S, SLEEP_PER_TENSOR_S = 1e-3, 1.2e-6  # while the host hands over the steps

DRAWN: dict[str, Any] = {"stochastic_rounding": True}
Q8: dict[str, Any] = {"state_dtype": "q8"}
CLIPPED: dict[str, Any] = {"max_grad_norm": CLIP}
SPLIT8_Q8_BYTES = 8 + 4 * Q8_BYTES


@dataclass(frozen=True)
class Row:
    name: str
    moved: float  # bytes for an element
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "AdamW"  # "torch": its fused AdamW
    workload: str = LARGE
    grad_dtype: torch.dtype | None = None
    offset: int = 0  # of the grads in their memory, in elements


ROWS = [
    Row("fp32", 28, FP32),
    Row("bf16", 14, BF16, NEAREST),
    Row("bf16, default", 14, BF16),
    Row("fp16", 14, FP16),
    Row("SGD fp32", 20, FP32, optimizer="SGD"),
    Row("SGD bf16", 10, BF16, optimizer="SGD"),
    Row("Adam fp32", 28, FP32, optimizer="Adam"),
    Row("Adam bf16", 14, BF16, NEAREST, optimizer="Adam"),
    Row("fp32, bf16 states", 20, FP32, BF16_STATES | NEAREST),
    Row("bf16, fp32 states", 22, BF16, FP32_STATES),
    Row("masters", 28, BF16, MASTERS),
    Row("masters, fp32 grads", 30, BF16, MASTERS, grad_dtype=FP32),
    Row("split, fp32 states", 26, BF16, SPLIT_FP32),
    Row("split, bf16 states", 18, BF16, SPLIT_BF16),
    Row("split, bf16 states, default", 18, BF16, SPLIT),
    Row("split8, bf16 states", 16, BF16, BF16_STATES | {"master_weights": "split8"}),
    Row("fp32, average", 36, FP32, EMA),
    Row("bf16, average", 22, BF16, EMA | NEAREST),
    Row("masters, average", 36, BF16, EMA | MASTERS),
    Row("split, average", 26, BF16, EMA | SPLIT_BF16),
    Row("fp32, clipped", 32, FP32, CLIPPED),
    Row("bf16, clipped", 16, BF16, CLIPPED | NEAREST),
    Row("split, clipped", 20, BF16, CLIPPED | SPLIT_BF16),
    Row("fp32, grads one off", 28, FP32, offset=1),
    Row("bf16, grads one off", 14, BF16, NEAREST, offset=1),
    Row("split, grads one off", 18, BF16, SPLIT_BF16, offset=1),
    Row("bf16, all drawn", 14, BF16, DRAWN),
    Row("fp32, bf16 states, drawn", 20, FP32, BF16_STATES | DRAWN),
    Row("bf16, fp32 states, drawn", 22, BF16, FP32_STATES | DRAWN),
    Row("split, bf16 states, drawn", 18, BF16, SPLIT | DRAWN),
    Row("q8, split8", SPLIT8_Q8_BYTES, BF16, SPLIT8_Q8),
    Row("q8, split8, to nearest", SPLIT8_Q8_BYTES, BF16, SPLIT8_Q8 | NEAREST),
    Row("q8, bf16", 6 + 4 * Q8_BYTES, BF16, Q8),
    Row("q8, fp32", 12 + 4 * Q8_BYTES, FP32, Q8),
    Row("Lion bf16", 10, BF16, optimizer="Lion"),
    Row("AMSGrad bf16", 18, BF16, NEAREST | {"amsgrad": True}),
    Row("NAdam fp32", 28, FP32, optimizer="NAdam"),
    Row("Adagrad fp32", 20, FP32, optimizer="Adagrad"),
    Row("RMSprop fp32", 20, FP32, optimizer="RMSprop"),
    Row("Lion bf16, q8", 6 + 2 * Q8_BYTES, BF16, Q8, optimizer="Lion"),
    *(Row(f"{name}, {work}", moved, dtype, options, workload=work)
      for work in ("one-64Mi", "gpt2-124m", "llama-8b-eighth")
      for name, moved, dtype, options in (
          ("fp32", 28, FP32, {}), ("bf16", 14, BF16, NEAREST), ("masters", 28, BF16, MASTERS),
          ("split, bf16 states", 18, BF16, SPLIT_BF16),
          ("q8, split8", SPLIT8_Q8_BYTES, BF16, SPLIT8_Q8))),
    Row("SGD bf16, gpt2-124m", 10, BF16, optimizer="SGD", workload="gpt2-124m"),
    Row("fp32, many-1000x1000", 28, FP32, workload="many-1000x1000"),
    Row("fp32, many-10000x64", 28, FP32, workload="many-10000x64"),
    Row("torch fused bf16", 14, BF16, optimizer="torch"),
    Row("torch fused fp32", 28, FP32, optimizer="torch"),
    Row("torch fused bf16, llama-8b-eighth", 14, BF16, optimizer="torch",
        workload="llama-8b-eighth"),
]  # fmt: skip


def parameters(row: Row, device: torch.device) -> list[torch.nn.Parameter]:
    generator = torch.Generator(device).manual_seed(0)

    def values(numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, device=device, dtype=dtype).uniform_(
            0.05, 0.1, generator=generator
        )

    params = []
    for group in WORKLOADS[row.workload].groups:
        for shape in group:
            numel = torch.Size(shape).numel()
            param = torch.nn.Parameter(values(numel, row.dtype).view(shape))
            if row.grad_dtype:
                param.grad_dtype = row.grad_dtype
            grad = values(numel + row.offset, row.grad_dtype or row.dtype)
            param.grad = grad[row.offset :].view(shape)
            params.append(param)
    return params


def step_of(row: Row, params: list[torch.nn.Parameter]) -> Callable[[], object]:
    if row.optimizer == "torch":
        return torch.optim.AdamW(params, lr=1e-3, fused=True).step
    more = {"momentum": 0.9} if row.optimizer == "SGD" else {}
    made = getattr(report.load_fusedopt(), row.optimizer)(params, lr=1e-3, **more, **row.options)
    return made.step  # type: ignore[no-any-return]


def gpu_ms(step: Step, count: int, tensors: int) -> tuple[float, bool]:
    """Of a step, and whether the GPU still slept when the last one was handed over."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    sleep = SLEEP_S + count * tensors * SLEEP_PER_TENSOR_S
    torch.cuda._sleep(int(CYCLES_PER_S * sleep))
    begin.record()
    for _ in range(count):
        step()
    end.record()
    hidden = not begin.query()
    end.synchronize()
    return begin.elapsed_time(end) / count, hidden


def measure(row: Row, copy: Step, device: torch.device) -> dict[str, Any]:
    params = parameters(row, device)
    elements = sum(param.numel() for param in params)
    step = step_of(row, params)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(2):
        step()
    shares, times, hidden = [], [], True
    for _ in range(ROUNDS):
        copy_ms, _ = gpu_ms(copy, COPIES, 1)
        ms, was_hidden = gpu_ms(step, STEPS, len(params))
        hidden = hidden and was_hidden
        times.append(ms)
        shares.append(row.moved * elements / ms / (2 * 4 * COPY_FLOATS / copy_ms))
    return {
        "share": statistics.median(shares), "lowest": min(shares), "highest": max(shares),
        "ms": statistics.median(times), "copy_gb_per_s": 2 * 4 * COPY_FLOATS / copy_ms * 1e-6,
        "first_step_s": first, "hidden": hidden, "elements": elements, "tensors": len(params),
        "bytes_per_element": row.moved,
    }  # fmt: skip


def main() -> int:
    parser = report.make_parser(__doc__, device="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="default: all rows")
    args = report.parse_args(parser)
    wanted = [row for row in ROWS if args.only is None or row.name in args.only]
    machine = report.start(args)
    source = torch.rand(COPY_FLOATS, device=args.device)
    target = torch.empty_like(source)

    def copy() -> object:
        return target.copy_(source)

    for _ in range(20):  # until the clocks are up
        copy()

    def run(row: Row) -> dict[str, Any]:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            return {"name": row.name} | measure(row, copy, args.device)
        except Exception as error:  # one row's fault must not cost the others
            return {"name": row.name, "failed": report.reason(error)}

    def show(found: dict[str, Any]) -> None:
        if "failed" in found:
            print(f"{found['name']:34} failed: {found['failed']}", flush=True)
            return
        around = f"({found['lowest']:.1%}..{found['highest']:.1%})"
        note = "" if found["hidden"] else "  waited for the host"
        print(f"{found['name']:34}{found['share']:7.1%} {around:18}{found['ms']:9.4f} ms{note}",
              flush=True)  # fmt: skip

    content: dict[str, Any] = {"machine": machine, "shares": []}
    for row in wanted:
        content["shares"].append(run(row))
        show(content["shares"][-1])
        if args.json:
            report.write_json(args.json, content)
    return 1 if any("failed" in row for row in content["shares"]) else 0


if __name__ == "__main__":
    sys.exit(main())
