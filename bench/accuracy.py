"""How far AdamW's updates are off with states of few bits, beside those of other packages.

A simulation with each package's own kernels (lib/accuracy.py), on the CPU or a GPU; packages that
are not installed, or that do not run on the device, are left out.

Examples:
    python bench/accuracy.py
    python bench/accuracy.py --seeds 0 1 2 --json accuracy.json
"""

from __future__ import annotations

import importlib
import importlib.metadata
import statistics
import sys
from typing import Any

import torch

from lib import report
from lib.accuracy import FALLS, SHAPE, STEPS, simulate

BF16 = torch.bfloat16
# How grads spread in a group, and what falls after 1000 steps.
CASES = [(0.5, "none"), (0.5, "all"), (0.5, "half"), (1.0, "none"), (1.5, "none")]

OPTIONS: dict[str, dict[str, Any]] = {
    "fusedopt, bf16": {"state_dtype": BF16},
    "fusedopt, bf16, to nearest": {"state_dtype": BF16, "stochastic_rounding": False},
    "fusedopt, q8": {"state_dtype": "q8"},
    "fusedopt, q8, to nearest": {"state_dtype": "q8", "stochastic_rounding": False},
}


# Those of other packages, where they are and what they are called.
OTHERS = {
    "torchao, AdamW8bit": "torchao.optim",
    "bitsandbytes, AdamW8bit": "bitsandbytes.optim",
    "FlashOptim, FlashAdamW": "flashoptim",
}


def maker(name: str) -> Any:
    library: Any
    if name in OTHERS:
        library, kind = importlib.import_module(OTHERS[name]), name.split(", ")[1]
    else:
        library, kind = report.load_fusedopt(), "AdamW"
    options = OPTIONS.get(name, {})
    return lambda params: getattr(library, kind)(params, lr=1.0, weight_decay=0, **options)


def measure(name: str, seeds: list[int], device: torch.device) -> list[dict[str, Any]]:
    make = maker(name)
    found = []
    for spread, fall in CASES:
        runs = [simulate(make, spread, fall, seed, device) for seed in seeds]
        found.append({
            "spread": spread,
            "fall": fall,
            "errors": [run.error for run in runs],
            "largest": [run.largest for run in runs],
        })  # fmt: skip
    return found


def main() -> int:
    parser = report.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="default: 3 4 5")
    args = report.parse_args(parser)
    machine = report.start(args)
    heads = [f"{spread:g} {fall}" for spread, fall in CASES]
    print(f"{'spread, what falls':28}" + "".join(f"{head:>10}" for head in [*heads, "largest"]))
    rows, left_out = [], {}
    for name in [*OPTIONS, *OTHERS]:
        try:
            version = importlib.metadata.version(name.partition(",")[0].lower())
            found = measure(name, args.seeds, args.device)
        except (ImportError, NotImplementedError, RuntimeError) as error:
            left_out[name] = str(error)
            print(f"{name:28}left out: {error}")
            continue
        cells = [statistics.mean(case["errors"]) for case in found] + [max(found[-1]["largest"])]
        print(f"{name:28}" + "".join(f"{cell:10.3g}" for cell in cells))
        rows.append({"name": name, "version": version, "cases": found})
    if args.json:
        config = {"shape": SHAPE, "steps": STEPS, "falls": FALLS, "seeds": args.seeds}
        content = {"machine": machine, "config": config, "accuracy": rows, "left_out": left_out}
        report.write_json(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
