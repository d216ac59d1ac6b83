"""accelerate: prepare, clip, accumulate, scale, save and load."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fusedopt
from support.codes import have_codes
from support.equality import assert_equal
from support.processes import on_ranks
from support.tensors import by_id
from support.twins import (
    LR,
    batch,
    clipping,
    loss_of,
    mixed_twins,
    step_clipped,
    tiny,
    twins,
    whole,
)

pytest.importorskip("accelerate", reason="make stacks installs it")

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]


@pytest.fixture(autouse=True)
def _forget_state() -> Iterator[None]:
    """Accelerators of a process share one state, which keeps what the first was told."""
    yield
    forget_state()


def forget_state() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def batches() -> Any:
    xs, ys = zip(*(batch(step) for step in range(8)), strict=True)
    return DataLoader(TensorDataset(torch.cat(xs), torch.cat(ys)), batch_size=8)


class Run:
    """A model, an optimizer and what else there is, prepared."""

    def __init__(
        self, adamw: Any, dtype: torch.dtype = torch.float32, options: Any = None, **more: Any
    ) -> None:
        from accelerate import Accelerator

        forget_state()
        self.dtype = dtype
        self.accelerator = Accelerator(cpu=True, **more)
        model = tiny().to(dtype)
        optimizer = adamw(model.parameters(), lr=LR, **(options or {}))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        prepared = self.accelerator.prepare(model, optimizer, batches(), scheduler)
        self.model, self.optimizer, self.batches, self.scheduler = prepared

    def train(self, start: int = 0, stop: int = 8, clip: float | None = None) -> list[Any]:
        for step, (x, y) in enumerate(self.batches):
            if not start <= step < stop:
                continue
            with self.accelerator.accumulate(self.model):
                loss = torch.nn.functional.mse_loss(self.model(x.to(self.dtype)).float(), y)
                self.accelerator.backward(loss)
                if clip and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return whole(self.model.parameters())


WAYS: dict[str, Any] = {
    "plain": ({}, None),
    "clipped": ({}, 0.3),
    "accumulated": ({"gradient_accumulation_steps": 3}, None),
    "clipped and accumulated": ({"gradient_accumulation_steps": 3}, 0.3),
}


@pytest.mark.parametrize("way", **by_id(WAYS))
@twins
def test_prepared(adamw: Any, way: Any) -> Any:
    options, clip = way
    return Run(adamw, **options).train(clip=clip)


@mixed_twins
def test_prepared_in_bf16(adamw: Any) -> Any:
    return Run(adamw, mixed_precision="bf16").train(clip=0.3)


@pytest.mark.parametrize("accumulate", [1, 3])
@twins
def test_clipping_is_left_to_the_optimizer(adamw: Any, accumulate: int) -> Any:
    run = Run(adamw, options=clipping(adamw, 0.3), gradient_accumulation_steps=accumulate)
    return run.train(clip=None if adamw is fusedopt.AdamW else 0.3)


BFLOAT16 = torch.bfloat16
SETTINGS: dict[str, Any] = {
    "plain": (torch.float32, {}),
    "everything": (
        BFLOAT16,
        {"master_weights": "split", "ema_decay": 0.9, "state_dtype": BFLOAT16, "max_grad_norm": 1},
    ),
    "8 bits": (BFLOAT16, {"master_weights": "split8", "state_dtype": "q8"}),
    "stochastic rounding": (BFLOAT16, {"stochastic_rounding": True}),
}


@pytest.mark.parametrize("setting", **by_id(SETTINGS))
@pytest.mark.usefixtures("codes_of_small_tensors")
def test_resumes(setting: Any, tmp_path: Path) -> None:
    """With the bits of a run that was not stopped."""
    dtype, options = setting
    straight = Run(fusedopt.AdamW, dtype, options)
    straight.train(stop=4)
    straight.accelerator.save_state(str(tmp_path))
    expected = straight.train(start=4), straight.optimizer.state_dict()["state"]
    assert have_codes(expected[1]) == (options.get("state_dtype") == "q8")
    resumed = Run(fusedopt.AdamW, dtype, options)
    resumed.accelerator.load_state(str(tmp_path))
    assert_equal((resumed.train(start=4), resumed.optimizer.state_dict()["state"]), expected)


@pytest.mark.parametrize("fused", [False, True])
@twins
def test_step_was_skipped(adamw: Any, fused: bool) -> Any:
    """As with torch's: accelerate cannot see it of one made with fused=True, which skips itself."""
    from accelerate.optimizer import AcceleratedOptimizer

    Run(adamw)  # makes the state that the wrapper asks for
    model = tiny()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = adamw(model.parameters(), lr=LR, fused=fused)
    wrapper = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    skipped = []
    for step in range(4):
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model.out.weight.grad[0, 0] = torch.inf
        wrapper.step()
        wrapper.zero_grad()
        skipped.append(wrapper.step_was_skipped)
    assert skipped == [False, not fused, False, False]
    assert scaler.get_scale() == 2.0**7
    return whole(model.parameters())


@on_ranks(2)
@twins
def test_two_processes(adamw: Any) -> Any:
    """accelerate wraps the model in DDP, and gives each process batches of its own."""
    from torch.nn.parallel import DistributedDataParallel

    run = Run(adamw, options=clipping(adamw, 0.3))
    assert isinstance(run.model, DistributedDataParallel)
    assert len(run.batches) == 4
    for x, y in run.batches:
        run.accelerator.backward(torch.nn.functional.mse_loss(run.model(x), y))
        step_clipped(
            run.optimizer.optimizer,
            lambda: run.accelerator.clip_grad_norm_(run.model.parameters(), 0.3),
        )
        run.optimizer.zero_grad()
    return whole(run.model.parameters())
