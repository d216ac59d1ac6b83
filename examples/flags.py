"""The command line of train_gpt.py."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from gpt import HYPER

import fusedopt

TORCH_KINDS: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
NUMBER: dict[str, Any] = {"type": float, "metavar": "X"}
SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
# The arguments of fusedopt.AdamW, all but `differentiable`, which must be False, and `norm_group`,
# which the params of DDP and of FSDP2 do not need. Those of the other optimizers are among them,
# but for SGD's few.
SETTINGS: dict[str, dict[str, Any]] = {
    "lr": NUMBER,
    "betas": NUMBER | {"nargs": 2},
    "eps": NUMBER,
    "weight_decay": NUMBER,
    "amsgrad": SWITCH,
    "maximize": SWITCH,
    "foreach": SWITCH,
    "capturable": SWITCH,
    "fused": SWITCH,
    "state_dtype": {"choices": ["float32", "bfloat16", "q8"]},
    "master_weights": {"choices": ["float32", "split", "split8"]},
    "stochastic_rounding": SWITCH,
    "rounding_seed": {"type": int, "metavar": "N"},
    "max_grad_norm": NUMBER,
    "error_if_nonfinite": SWITCH,
    "ema_decay": NUMBER,
    "ema_bias_correction": SWITCH,
    "lr_independent_weight_decay": SWITCH,
    "cautious_update": SWITCH,
    "cautious_weight_decay": SWITCH,
}


def parse_args(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", choices=HYPER, default="AdamW", help="default: %(default)s")
    add("--torch", choices=TORCH_KINDS, default="default",
        help="implementation in torch.optim to run against (default: its own choice)")  # fmt: skip
    add("--steps", type=int, default=500, metavar="N", help="default: %(default)s")
    add("--max-seconds", type=float, default=150.0, metavar="S",
        help="stop early on a slow or busy machine (default: %(default)s)")  # fmt: skip
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    add("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    add("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    add("--text", type=Path, metavar="FILE", help="default: Python's standard library")
    add("--plot", type=Path, default=Path("train_gpt.png"), metavar="FILE",
        help="picture to write (default: %(default)s)")  # fmt: skip
    add("--no-plot", action="store_true", help="write no picture; matplotlib is not needed then")
    add("--json", type=Path, metavar="FILE", help="write machine, figures and both curves")
    add("--ddp", dest="parallel", action="store_const", const="ddp",
        help="replicate the model over the processes of torchrun")  # fmt: skip
    add("--fsdp", dest="parallel", action="store_const", const="fsdp",
        help="shard it over them, with FSDP2")  # fmt: skip
    add("--checkpoint", type=Path, metavar="FOLDER", help="save there at the end")
    add("--save-every", type=int, metavar="N", help="and after every N steps")
    add("--resume", action="store_true", help="go on from the latest checkpoint")
    settings = parser.add_argument_group("settings of the optimizer, as help(fusedopt.AdamW) says")
    for name, kind in SETTINGS.items():
        settings.add_argument(f"--{name.replace('_', '-')}", default=None, **kind)
    args = parser.parse_args()
    if min(n for n in (args.steps, args.threads, args.save_every) if n is not None) < 1:
        parser.error("--steps, --threads and --save-every must be at least 1")
    if (args.resume or args.save_every) and not args.checkpoint:
        parser.error("--resume and --save-every need --checkpoint")
    known = inspect.signature(getattr(fusedopt, args.optimizer)).parameters
    for name in SETTINGS:
        if getattr(args, name) is not None and name not in known:
            parser.error(f"{args.optimizer} has no {name}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device here")
    return args
