"""The optimizers that step.py compares, each set to do the same update with the same numbers.

A contender is one function: it gets parameter groups and the name of the optimizer and returns what
to call for a step. A captured CUDA graph (its replay) is one more row of CONTENDERS.
"""

from __future__ import annotations

import packages
import torch
from common import load_fusedopt
from graphs import captured
from packages import SAME_NAMES, package
from recipes import HYPER, Contender, Groups, Make, Step, reason


def _fusedopt(groups: Groups, optimizer: str) -> Step:
    return getattr(load_fusedopt(), optimizer)(groups, **HYPER[optimizer]).step


def _fusedopt_capturable(groups: Groups, optimizer: str) -> torch.optim.Optimizer:
    return getattr(load_fusedopt(), optimizer)(groups, **HYPER[optimizer], capturable=True)


def _torch(**kind: bool) -> Make:
    def make(groups: Groups, optimizer: str) -> Step:
        return getattr(torch.optim, optimizer)(groups, **HYPER[optimizer], **kind).step

    return make


def _torch_capturable(groups: Groups, optimizer: str) -> torch.optim.Optimizer:
    kind = {"fused": True}
    if optimizer != "SGD":  # which has no such option: its lr is what it was at the capture
        kind["capturable"] = True
    return getattr(torch.optim, optimizer)(groups, **HYPER[optimizer], **kind)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("fusedopt", _fusedopt),
        Contender("torch-fused", _torch(fused=True)),
        Contender("torch-foreach", _torch(foreach=True)),
        Contender("torch-loop", _torch(foreach=False, fused=False)),
        Contender("fusedopt-graph", captured(_fusedopt_capturable), "CUDA graph"),
        Contender("torch-graph", captured(_torch_capturable), "CUDA graph of fused"),
        Contender("apex", packages.apex, "its Adam has 32-bit states whatever the dtype"),
        Contender("te", packages.transformer_engine, "TransformerEngine"),
        Contender("flashoptim", packages.flashoptim, "without its low-bit states"),
        Contender("deepspeed", packages.deepspeed, "DeepSpeedCPUAdam"),
        Contender("optimi", package("optimi", SAME_NAMES, {"kahan_sum": False})),
        Contender(
            "torchao",
            package("torchao.optim", {"AdamW": "_AdamW"}),
            "its AdamW without low-bit states, compiled for each shape",
        ),
        Contender(
            "bitsandbytes",
            package("bitsandbytes.optim", SAME_NAMES),
            "32-bit states whatever the dtype of the params",
        ),
    )
}


def _differs(contender: Contender, optimizer: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why the contender's update is not the optimizer's, or nothing if it is.

    A step that leaves work out looks fast. So three steps on one tensor, longer than any SIMD
    block, are compared with torch in float64. The bar is loose (1 % of the update, or 8 times
    the error of unfused torch in this dtype): it looks for another update, not for rounding.
    """

    def after_three_steps(which: Contender, at: torch.dtype) -> torch.Tensor:
        param = (start / 8).to(dtype).to(at).requires_grad_()
        param.grad = (start.flip(0) / 4).to(dtype).to(at)
        groups = [{"params": [param], "lr": 0.05}]
        step = which.make(groups, optimizer)
        for _ in range(3):
            step()
        return param.detach().double()

    start = torch.randn(4099, generator=torch.Generator().manual_seed(1)).to(device)
    exact = after_three_steps(CONTENDERS["torch-loop"], torch.float64)
    honest = (after_three_steps(CONTENDERS["torch-loop"], dtype) - exact).abs().max().item()
    update = (exact - (start / 8).to(dtype).double()).abs().max().item()
    error = (after_three_steps(contender, dtype) - exact).abs().max().item()
    if error <= max(8 * honest, 0.01 * update):
        return ""
    return f"NOT the same update: off by {error / update:.0%} of it"


def qualify(
    contenders: list[Contender], optimizer: str, dtype: torch.dtype, device: torch.device
) -> tuple[dict[Contender, str], dict[str, str]]:
    """Who can take part, with a note, and who cannot, with the reason: tried on a small tensor."""
    notes, skipped = {}, {}
    for contender in contenders:
        try:
            difference = _differs(contender, optimizer, dtype, device)
        except Exception as error:  # other people's packages may raise anything
            skipped[contender.name] = reason(error)
        else:
            notes[contender] = "; ".join(filter(None, (contender.note, difference)))
    return notes, skipped
