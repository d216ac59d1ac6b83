"""A small decoder-only GPT over bytes, text for it that every machine has, and its training."""

from __future__ import annotations

import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

MAX_TEXT_BYTES = 8 * 2**20
BATCH = 12
# The benchmarks in bench/ use the same.
HYPER: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    "Adam": {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0},
    "SGD": {"lr": 0.1, "momentum": 0.9},
}


@dataclass(frozen=True)
class Config:
    vocab: int = 256  # one token for each byte
    context: int = 64
    width: int = 192
    layers: int = 3
    heads: int = 3


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream and added back to it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)
        self.norm_2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2's layout: learned positions, norms first, the head tied to the token embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                # The two layers that add to the stream start smaller, as in GPT-2.
                residual = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(param, std=0.02 / (math.sqrt(2 * config.layers) if residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        return functional.linear(self.norm(self.blocks(x)), self.tokens.weight)

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, temperature: float = 0.7) -> str:
        """Continue the prompt; the same model gives the same text on every call."""
        generator = torch.Generator().manual_seed(0)
        device = self.tokens.weight.device
        text = list(prompt)
        for _ in range(length):
            window = torch.tensor([text[-self.config.context :]], device=device)
            logits = self(window)[0, -1].float().cpu() / temperature
            text.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
        characters = bytes(text).decode("utf-8", errors="replace")
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in characters)


def load_text(path: Path | None) -> Tensor:
    """Bytes of a file, or of the top-level modules of Python's standard library, as token ids."""
    if path is not None:
        try:
            text = path.read_bytes()[:MAX_TEXT_BYTES]
        except OSError as error:
            raise SystemExit(f"cannot read --text {path}: {error.strerror}") from error
    else:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"\n".join(source.read_bytes() for source in sources)[:MAX_TEXT_BYTES]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


class Batches:
    """Random windows of the text; the same seed gives the same batches.

    ``part`` of ``parts`` is what one of several processes has of each.
    """

    def __init__(
        self, text: Tensor, batch: int, context: int, seed: int, part: int = 0, parts: int = 1
    ) -> None:
        if len(text) <= context + 1:
            raise SystemExit(f"the text has {len(text)} bytes; it needs more than {context + 1}")
        self.text = text
        self.offsets = torch.arange(context + 1)
        self.batch = batch
        self.part, self.parts = part, parts
        self.generator = torch.Generator().manual_seed(seed)

    def next(self, device: torch.device) -> tuple[Tensor, Tensor]:
        high = len(self.text) - len(self.offsets) + 1
        starts = torch.randint(high, (self.batch, 1), generator=self.generator)
        starts = starts.tensor_split(self.parts)[self.part]
        windows = self.text[starts + self.offsets].to(device)
        return windows[:, :-1], windows[:, 1:]


@dataclass
class Run:
    """One training and all that it has measured."""

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    clip: float | None = 1.0  # by torch's function; None: the optimizer does
    forward: nn.Module | None = None  # the model, or what DistributedDataParallel makes of it
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)

    def train(self, tokens: Tensor, targets: Tensor) -> None:
        start = _now(tokens.device)
        self.optimizer.zero_grad()
        logits = (self.forward or self.model)(tokens).flatten(0, 1).float()
        loss = functional.cross_entropy(logits, targets.flatten())
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        before = _now(tokens.device)
        self.optimizer.step()
        after = _now(tokens.device)
        self.schedule.step()
        self.losses.append(_mean_of_processes(loss.detach()))
        self.optimizer_s.append(after - before)
        self.step_s.append(_now(tokens.device) - start)

    def figures(self, tokens_per_step: int) -> dict[str, float]:
        """Medians over the steps, which a disturbed step does not move, and one total."""
        step, optimizer = statistics.median(self.step_s), statistics.median(self.optimizer_s)
        shares = [part / whole for part, whole in zip(self.optimizer_s, self.step_s, strict=True)]
        return {
            "step_ms": 1e3 * step,
            "optimizer_ms": 1e3 * optimizer,
            "optimizer_total_s": sum(self.optimizer_s),
            "optimizer_share": statistics.median(shares),
            "tokens_per_s": tokens_per_step / step,
            "final_loss": tail_mean(self.losses),
        }


def _mean_of_processes(loss: Tensor) -> float:
    if not (dist.is_available() and dist.is_initialized()):
        return loss.item()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def start_run(
    name: str, model: GPT, library: ModuleType, optimizer: str, steps: int, options: dict[str, Any]
) -> Run:
    """Matrices decay; biases and norms do not, as usual for a GPT."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim >= 2]},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    made = getattr(library, optimizer)(groups, **{**HYPER[optimizer], **options})
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: learning_rate(step, steps))
    return Run(name, model, made, schedule)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the run, then a cosine down to a tenth."""
    warm_up = min(1.0, (step + 1) / max(1, steps // 10))
    return warm_up * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps)))


def tail_mean(losses: Sequence[float]) -> float:
    """Loss over the last tenth of the run: one batch alone is noisy."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def show_progress(done: int, steps: int, runs: list[Run], seconds: float, first: int = 0) -> None:
    """A bar on a terminal; ten lines in a log. ``seconds`` are those since step ``first``."""
    live = sys.stderr.isatty()
    if not live and done * 10 // steps == (done - 1) * 10 // steps:
        return
    filled = 30 * done // steps
    losses = "  ".join(f"{run.name} {run.losses[-1]:.4f}" for run in runs)
    left = seconds / (done - first) * (steps - done)
    line = (
        f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{steps}  {left:3.0f} s left  loss {losses}"
    )
    end = "\n" if not live or done == steps else ""
    print(f"\r{line}" if live else line, end=end, file=sys.stderr, flush=True)
