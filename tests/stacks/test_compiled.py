"""torch.compile of a model and of a whole training step, autocast, and torch's GradScaler."""

from typing import Any

import pytest
import torch

import fusedopt
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

# torch's own code warns when it is imported and of itself.
pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.unsanitized,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]


inductor = pytest.param("inductor", marks=pytest.mark.stacks_only)  # which compiles C++
each_backend = pytest.mark.parametrize("backend", ["aot_eager", inductor])


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    torch._dynamo.reset()


@each_backend
@twins
def test_compiled_model(adamw: Any, backend: str) -> Any:
    model = tiny()
    compiled = torch.compile(model, backend=backend)
    optimizer = adamw(model.parameters(), lr=LR)
    for step in range(4):
        loss_of(compiled, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model.parameters())


@each_backend
@twins
def test_compiled_step(adamw: Any, backend: str) -> Any:
    """All of it, with the optimizer inside; torch's is traced."""
    model = tiny()
    optimizer = adamw(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(x: Any, y: Any) -> Any:
        loss = torch.nn.functional.mse_loss(model(x), y)
        value = loss.detach()  # dynamo itself warns of a non-leaf that lives across a graph break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    compiled = torch.compile(train, backend=backend)
    losses = []
    for step in range(4):
        losses.append(compiled(*batch(step)))
        scheduler.step()
    return [*whole(model.parameters()), *losses]


SCALERS: dict[str, Any] = {"torch": torch.amp.GradScaler, "fusedopt": fusedopt.GradScaler}
CLIPS = {"plain": None, "clipped": 0.3}


@pytest.mark.parametrize("clip", **by_id(CLIPS))
@mixed_twins
def test_autocast_to_bfloat16(adamw: Any, clip: float | None) -> Any:
    model = tiny()
    optimizer = adamw(model.parameters(), lr=LR, **(clipping(adamw, clip) if clip else {}))
    for step in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        if clip:
            step_clipped(
                optimizer, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            )
        else:
            optimizer.step()
        optimizer.zero_grad()
    return whole(model.parameters())


@pytest.mark.parametrize("clip", **by_id(CLIPS))
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaler_type", **by_id(SCALERS))
@mixed_twins
def test_grad_scaler(adamw: Any, scaler_type: Any, fused: bool, clip: float | None) -> Any:
    """In float16, whose grads overflow at first. fusedopt's scaler clips within the step."""
    ours = adamw is fusedopt.AdamW
    of_ours = ours and scaler_type is fusedopt.GradScaler
    options = clipping(adamw, clip) if of_ours and clip else {}
    model = tiny()
    optimizer = adamw(model.parameters(), lr=LR, fused=fused, **options)
    scaler = (scaler_type if ours else torch.amp.GradScaler)("cpu", init_scale=2.0**20)
    for step in range(12):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, step)
        scaler.scale(loss).backward()
        if clip and not of_ours:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert 1.0 < scaler.get_scale() < 2.0**20
    return [*whole(model.parameters()), scaler.get_scale()]
