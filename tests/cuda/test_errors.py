"""What the CUDA driver refuses: the cause is named, and nothing has changed."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.device import IS_CUDA, needs_driver, needs_gpu
from support.optimizers import CASES, Case, some_cases
from support.sides import GPU, Results, Side, on_both_drivers
from support.snapshots import record, refused
from support.tensors import by_id, draw, set_grads

pytestmark = needs_driver


def make_optimizer(stepped: bool, **options: Any) -> Any:
    params = draw([8, 4, 700], GPU.device)
    optimizer = CASES["adamw"].ours([{"params": params[:1]}, {"params": params[1:]}], **options)
    if stepped:
        set_grads(params, 0)
        optimizer.step()
    set_grads(params, 1)
    return optimizer


def broken(optimizer: Any) -> Any:
    """The parameter that goes wrong. Another comes before it and one behind."""
    return optimizer.param_groups[1]["params"][0]


def bad_option(**options: Any) -> Callable[[Any], None]:
    return lambda optimizer: optimizer.param_groups[1].update(options)


def share_params(optimizer: Any) -> None:
    broken(optimizer).data = optimizer.param_groups[0]["params"][0].data[2:6]


def share_states(optimizer: Any) -> None:
    first = optimizer.state[optimizer.param_groups[0]["params"][0]]
    optimizer.state[broken(optimizer)]["exp_avg"] = first["exp_avg"][:4]


def put_param_on_cpu(optimizer: Any) -> None:
    broken(optimizer).data = broken(optimizer).data.cpu()


def put_state_on_cpu(optimizer: Any) -> None:
    state = optimizer.state[broken(optimizer)]
    state["exp_avg_sq"] = state["exp_avg_sq"].cpu()


ONE_NUMBER = "must be one float32 or float64 number"
ONE_ELEMENT = "found_inf and grad_scale must be tensors of one element"
# What is wrong, and what the ValueError says.
BAD: dict[str, tuple[Callable[[Any], None], str]] = {
    "integer lr": (
        bad_option(lr=GPU.tensor(1, torch.int64)),
        f"lr is torch.int64.*{ONE_NUMBER}.*group 1",
    ),
    "half lr": (
        bad_option(lr=GPU.tensor(1.0, torch.float16)),
        f"lr is torch.float16.*{ONE_NUMBER}.*group 1",
    ),
    "two rates": (bad_option(lr=GPU.tensor([0.1, 0.1])), rf"lr is .*\[2\].*{ONE_NUMBER}.*group 1"),
    "no decay": (
        bad_option(weight_decay=GPU.tensor([])),
        rf"weight_decay is .*\[0\].*{ONE_NUMBER}.*group 1",
    ),
    "two betas": (
        bad_option(betas=(0.9, GPU.tensor([0.0, 0.0]))),
        rf"betas\[1\] is .*\[2\].*{ONE_NUMBER}.*group 1",
    ),
    "found_inf of two": (
        lambda optimizer: setattr(optimizer, "found_inf", GPU.tensor([0.0, 0.0])),
        ONE_ELEMENT,
    ),
    "grad_scale of two": (
        lambda optimizer: setattr(optimizer, "grad_scale", GPU.tensor([1.0, 1.0])),
        ONE_ELEMENT,
    ),
    "shared params": (share_params, "group 0, index 0.*group 1, index 0.*share memory"),
    "shared states": (share_states, "exp_avg of .*exp_avg of .*share memory"),
    "short grad": (
        lambda optimizer: setattr(broken(optimizer), "data", GPU.tensor([1.0] * 5)),
        r"grad of .*group 1, index 0.*\[4\].*\[5\]",
    ),
    "half step": (
        lambda o: o.state[broken(o)].update(step=GPU.tensor(1.0, torch.float16)),
        "step of .*group 1, index 0.*float16",
    ),
}
if IS_CUDA:
    BAD |= {
        "param on the CPU": (put_param_on_cpu, r"group 1, index 0.*on cuda:0.*on cpu"),
        "state on the CPU": (put_state_on_cpu, r"exp_avg_sq of .*on cpu.*on cuda:0"),
    }


def assert_refused(optimizer: Any, damage: Callable[[Any], None], pattern: str) -> None:
    """And nothing changes."""
    damage(optimizer)
    with refused(optimizer, ValueError, f"(?s){pattern}"):
        optimizer.step()


@pytest.mark.parametrize(("damage", "pattern"), **by_id(BAD))
def test_refused(damage: Callable[[Any], None], pattern: str) -> None:
    assert_refused(make_optimizer(stepped=True, capturable=True), damage, pattern)


NEED_STATE = ("shared states", "half step", "state on the CPU")
AT_FIRST = {name: row for name, row in BAD.items() if name not in NEED_STATE}


@pytest.mark.parametrize(("damage", "pattern"), **by_id(AT_FIRST))
def test_refused_at_first(damage: Callable[[Any], None], pattern: str) -> None:
    """No state is left behind."""
    optimizer = make_optimizer(stepped=False, capturable=True)
    assert_refused(optimizer, damage, pattern)
    assert not optimizer.state


@needs_gpu
@pytest.mark.parametrize("name", [name for name in BAD if name.endswith(("lr", "rates"))])
def test_refused_without_capturable(name: str) -> None:
    assert_refused(make_optimizer(stepped=True), *BAD[name])


@some_cases("momentum", "adamw")
@on_both_drivers
def test_steps_after_an_error(side: Side, case: Case) -> Results:
    """The refused step leaves no trace in the driver's tables."""
    params = draw([8, 4, 700], side.device)
    optimizer = case.ours(params)
    for seed in range(4):
        set_grads(params, seed)
        if seed % 2:
            good, params[1].data = params[1].data, params[0].data[:4]
            with pytest.raises(ValueError, match="share memory"):
                optimizer.step()
            params[1].data = good
        optimizer.step()
    return record(optimizer)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("on_one", ["lr", "weight_decay"])
def test_option_on_another_gpu(on_one: str) -> None:
    optimizer = make_optimizer(stepped=False, capturable=True)
    optimizer.param_groups[1][on_one] = torch.tensor(0.1, device="cuda:1")
    with refused(optimizer, ValueError, r"param group 1 .*cuda:1.*is on cuda:0"):
        optimizer.step()


# A kernel of torch's fails; after that every call must, too.
ASYNCHRONOUS = """
import sys, time, torch, fusedopt
param = torch.ones(64, device="cuda")
param.grad = torch.ones_like(param)
optimizer = fusedopt.AdamW([param], capturable=sys.argv[1] == "capturable")
optimizer.step()
torch.cuda.synchronize()
index = torch.full((1,), 1 << 20, device="cuda")
torch.ones(4, device="cuda")[index]
if sys.argv[2] == "noticed by the step":
    time.sleep(3)
try:
    optimizer.step()
    if sys.argv[2] == "noticed by the step":
        print("swallowed")
    torch.cuda.synchronize()
except RuntimeError as error:
    print("raised", error)
else:
    print("swallowed")
"""


@needs_gpu
@pytest.mark.parametrize("when", ["noticed by the step", "noticed later"])
@pytest.mark.parametrize("kind", ["plain", "capturable"])
def test_asynchronous_errors_are_not_swallowed(kind: str, when: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASYNCHRONOUS, kind, when],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("raised"), done.stdout + done.stderr
    if when == "noticed by the step":
        assert "failed on cuda:" in done.stdout
        assert "device-side assert" in done.stdout
        assert "an earlier kernel of the program" in done.stdout
