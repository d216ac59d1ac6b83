"""capturable=True: steps whose counts and options are the GPU's."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from support.device import needs_driver
from support.optimizers import CASES, Case, each_case, some_cases, take_step, train
from support.sides import SIZES, WORK_DTYPES, Results, Side, capturable, on_both_drivers, warmed_up
from support.snapshots import record
from support.tensors import by_id, draw, params_of, set_grads, some_dtypes

pytestmark = needs_driver


@some_dtypes(*WORK_DTYPES)
@each_case
@on_both_drivers
def test_eager_steps(side: Side, case: Case, dtype: torch.dtype) -> Results:
    optimizer = capturable(side, case, dtype)
    train(optimizer, 4)
    for param, state in optimizer.state.items():
        assert state.get("step", param).device == param.device
    return record(optimizer)


@some_cases("momentum-damped", "adamw")
@on_both_drivers
def test_capturable_switched_on_and_off(side: Side, case: Case) -> Results:
    """Counts move to the GPU, and stay there; checkpoints carry them."""
    optimizer = case.ours(draw(SIZES, side.device))
    for seed in range(6):
        optimizer.param_groups[0]["capturable"] = side.is_gpu and seed in (2, 3)
        take_step(optimizer, seed)
        if seed in (3, 4):
            optimizer.load_state_dict(optimizer.state_dict())
    return record(optimizer)


# Options that are one-element tensors on the GPU, and what they hold in one step after the other.
# Exactly representable in both formats: elsewhere they are plain numbers.
VALUES = {
    "lr": (0.03125, 0.0625, 0.0, 0.5, 0.0078125),
    "weight_decay": (0.125, 0.25, 0.5, 0.0625, 0.125),
    "momentum": (0.5, 0.875, 0.75, 0.25, 0.5),
    "dampening": (0.125, 0.25, 0.5, 0.0, 0.75),
    "eps": (2.0**-20, 2.0**-10, 2.0**-30, 2.0**-20, 2.0**-8),
    "beta1": (0.875, 0.5, 0.25, 0.75, 0.9375),
    "beta2": (0.984375, 0.9375, 0.5, 0.875, 0.96875),
}
ON_GPU = {
    "SGD lr": ("sgd", ["lr"]),
    "SGD lr and weight_decay": ("momentum-l2", ["lr", "weight_decay"]),
    "SGD momentum and dampening": ("momentum-damped", ["momentum", "dampening"]),
    "SGD all": ("momentum-l2", ["lr", "weight_decay", "momentum", "dampening"]),
    "Nesterov momentum": ("nesterov", ["momentum"]),
    "Adam lr": ("adam", ["lr"]),
    "Adam L2": ("adam-l2", ["lr", "weight_decay"]),
    "AdamW lr": ("adamw-amsgrad", ["lr"]),
    "AdamW betas": ("adamw", ["beta1", "beta2"]),
    "AdamW one beta": ("adamw", ["beta2"]),
    "AdamW all": ("adamw", ["lr", "weight_decay", "beta1", "beta2", "eps"]),
}


class Numbers:
    """The options of VALUES with these names: tensors on the GPU, numbers elsewhere."""

    def __init__(self, side: Side, names: list[str], dtype: torch.dtype) -> None:
        self.tensors = {name: side.tensor(VALUES[name][0], dtype) for name in names}
        self.side = side

    def _now(self, name: str, otherwise: float) -> Any:
        if name not in self.tensors:
            return otherwise
        return self.tensors[name] if self.side.is_gpu else self.tensors[name].item()

    def options(self, case: Case) -> dict[str, Any]:
        now = {name: self._now(name, 0) for name in self.tensors if not name.startswith("beta")}
        if case.takes("betas"):
            now["betas"] = (self._now("beta1", 0.9), self._now("beta2", 0.999))
        return now

    def change(self, step: int, optimizer: Any, case: Case) -> None:
        """In place on the GPU, where the group's entries stay what they are."""
        for name, tensor in self.tensors.items():
            tensor.fill_(VALUES[name][step])
        if not self.side.is_gpu:
            optimizer.param_groups[0].update(self.options(case))


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@some_dtypes(torch.float32, torch.float64)
@pytest.mark.parametrize("row", **by_id(ON_GPU))
@on_both_drivers
def test_options_on_the_gpu(side: Side, row: Any, dtype: torch.dtype, captured: bool) -> Results:
    case, names = CASES[row[0]], row[1]
    numbers = Numbers(side, names, dtype)
    case = replace(case, options={**case.options, **numbers.options(case)})
    optimizer = warmed_up(side, case)
    step = side.replayable(optimizer.step) if captured else optimizer.step
    for index in range(1, 5):
        numbers.change(index, optimizer, case)
        set_grads(optimizer, index + 1, in_place=True)
        step()
    return record(optimizer)


@some_cases("momentum-damped", "adamw")
@on_both_drivers
def test_groups_of_both_kinds(side: Side, case: Case) -> Results:
    """One group's options are on the GPU, another's are numbers; counts differ, too."""
    lr = side.tensor(0.25)
    groups = [
        {"params": draw(SIZES, side.device), "lr": lr if side.is_gpu else 0.25},
        {"params": draw(SIZES, side.device, torch.bfloat16), "lr": 0.5, "weight_decay": 0.0},
    ]
    optimizer = case.ours(groups, capturable=side.is_gpu)
    for seed in range(4):
        params = params_of(optimizer)
        set_grads(params, seed)
        for param in params[:: seed % 2 + 2]:
            param.grad = None
        optimizer.step()
    return record(optimizer)
