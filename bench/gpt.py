"""A small decoder-only GPT over bytes, and text for it that every machine has."""

from __future__ import annotations

import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_TEXT_BYTES = 8 * 2**20


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


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases and norms do not, as usual for a GPT."""
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


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
    """Random windows of the text; the same seed gives the same batches."""

    def __init__(self, text: Tensor, batch: int, context: int, seed: int) -> None:
        if len(text) <= context + 1:
            raise SystemExit(f"the text has {len(text)} bytes; it needs more than {context + 1}")
        self.text = text
        self.offsets = torch.arange(context + 1)
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def next(self, device: torch.device) -> tuple[Tensor, Tensor]:
        high = len(self.text) - len(self.offsets) + 1
        starts = torch.randint(high, (self.batch, 1), generator=self.generator)
        windows = self.text[starts + self.offsets].to(device)
        return windows[:, :-1], windows[:, 1:]
