"""What a type checker makes of a user's code: types allow what works, and nothing else."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.files import PACKAGE, ROOT

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]


SENSIBLE = """
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fusedopt

model = torch.nn.Linear(4, 1).to(torch.bfloat16)
number = torch.tensor(0.5)
sgd = fusedopt.SGD(
    model.parameters(),
    lr=number,
    momentum=number,
    dampening=number,
    weight_decay=number,
    nesterov=False,
    maximize=True,
    foreach=None,
    differentiable=False,
    fused=True,
    capturable=False,
    decoupled_weight_decay=True,
    state_dtype="float32",
    master_weights="split",
    stochastic_rounding=True,
    rounding_seed=1,
    max_grad_norm=number,
    error_if_nonfinite=True,
    ema_decay=number,
    ema_bias_correction=True,
    lr_independent_weight_decay=True,
    cautious_update=True,
    cautious_weight_decay=True,
)
groups: list[dict[str, Any]] = [
    {"params": [model.weight], "lr": 0.1, "max_grad_norm": 1.0},
    {"params": [model.bias], "master_weights": None, "ema_decay": 0.5},
]
adam = fusedopt.Adam(
    groups,
    lr=number,
    betas=(number, 0.99),
    eps=number,
    weight_decay=number,
    amsgrad=True,
    maximize=False,
    foreach=False,
    capturable=True,
    differentiable=False,
    fused=None,
    decoupled_weight_decay=True,
    state_dtype=torch.bfloat16,
    master_weights="float32",
    stochastic_rounding=False,
    rounding_seed=2**32 - 1,
    max_grad_norm=None,
    error_if_nonfinite=False,
    ema_decay=None,
    ema_bias_correction=False,
    lr_independent_weight_decay=False,
    cautious_update=False,
    cautious_weight_decay=False,
)
adamw = fusedopt.AdamW(
    params=model.named_parameters(),
    lr=0.1,
    betas=(0.9, number),
    eps=0.0,
    weight_decay=0,
    amsgrad=False,
    maximize=False,
    foreach=None,
    capturable=False,
    differentiable=False,
    fused=None,
    state_dtype=None,
    master_weights=None,
    stochastic_rounding=None,
    rounding_seed=0,
    max_grad_norm=1.0,
    error_if_nonfinite=True,
    ema_decay=0.9,
    ema_bias_correction=True,
    lr_independent_weight_decay=True,
    cautious_update=True,
    cautious_weight_decay=True,
)
fusedopt.SGD([{"params": model.parameters(), "lr": 0.1}])
others: list[torch.optim.Optimizer] = [
    fusedopt.RMSprop(model.parameters(), number, 0.99, number, number, number, True, True),
    fusedopt.Adagrad(model.parameters(), number, 0.1, number, 0.5, number, None),
    fusedopt.Adadelta(model.parameters(), number, 0.9, number, number, capturable=True),
    fusedopt.Adamax(model.parameters(), number, (number, 0.99), number, number),
    fusedopt.NAdam(model.parameters(), number, (0.9, number), number, number, 0.004, True),
    fusedopt.RAdam(model.parameters(), number, (0.9, 0.99), number, number, True),
    fusedopt.ASGD(model.parameters(), number, 0.01, 0.75, 1e6, number),
    fusedopt.Rprop(model.parameters(), number, (0.5, 1.2), (1e-6, 50), maximize=True),
    fusedopt.SparseAdam(model.parameters(), number, (number, 0.99), number),
    fusedopt.Lion(model.named_parameters(), number, (0.9, number), number, cautious_update=True),
]
base: torch.optim.Optimizer = adamw
torch.optim.lr_scheduler.StepLR(adamw, step_size=1)


def closure() -> float:
    base.zero_grad()
    loss = model(torch.ones(2, 4, dtype=torch.bfloat16)).square().mean()
    loss.backward()
    return float(loss.detach())


def saved(optimizer: fusedopt.Adam) -> dict[str, Any]:
    return optimizer.state_dict()


def averaged() -> Iterator[Tensor]:
    with adamw.swap_ema():
        yield from model.parameters()


loss: float = adamw.step(closure)
sgd.step()
adam.step()
norm: Tensor | None = adamw.grad_norm
count: Tensor | None = adamw.nonfinite_grads
flag: Tensor = adamw.skipped
weights: list[Tensor] = sgd.fp32_params()
sgd.load_fp32_params(weight.clone() for weight in weights)
adamw.load_state_dict(saved(adamw))
adamw.add_param_group({"params": [("more", torch.nn.Parameter(number))], "lr": number})
averages = [average.clone() for average in averaged()]
scaler = fusedopt.GradScaler("cpu")
scaler.scale(model(torch.ones(2, 4, dtype=torch.bfloat16)).sum()).backward()
scaler.step(adam)
scaler.update()
fusedopt.show_config()
"""

# Each on its own line, and what mypy calls it.
WRONG = {
    'fusedopt.SGD(model.parameters(), master_weights="spilt")': "arg-type",
    'fusedopt.Adam(model.parameters(), state_dtype="float16")': "arg-type",
    'fusedopt.AdamW(model.parameters(), ema_decay="0.9")': "arg-type",
    "fusedopt.Adam(model.parameters(), betas=0.9)": "arg-type",
    "fusedopt.AdamW(model.parameters(), max_norm=1.0)": "call-arg",
    "fusedopt.AdamW(model.parameters(), decoupled_weight_decay=True)": "call-arg",
    "fusedopt.SGD(model.parameters(), 0.1, 0.9, 0.0, 0.0, False, True)": "call-arg",
    "fusedopt.Rprop(model.parameters(), etas=0.5)": "arg-type",
    "fusedopt.RMSprop(model.parameters(), cautious_update=True)": "call-arg",
    "fusedopt.SparseAdam(model.parameters(), ema_decay=0.9)": "call-arg",
    "sgd.load_fp32_params(1)": "arg-type",
}


def test_sensible_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "user"}
    exec(compile(SENSIBLE, "user.py", "exec"), names)
    assert capsys.readouterr().out.startswith("fusedopt")


@pytest.mark.parametrize("line", WRONG)
def test_wrong_code_raises(line: str) -> None:
    names: dict[str, object] = {"__name__": "user"}
    exec(SENSIBLE.partition("groups:")[0], names)
    with pytest.raises((TypeError, ValueError)):
        exec(line, names)


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy_strict(tmp_path: Path) -> None:
    """Nothing to say of the one, an error for every line of the other."""
    # A copy, since mypy ignores PYTHONPATH and editable installs may be of other sources.
    (tmp_path / "fusedopt").mkdir()
    for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*.pyi"), PACKAGE / "py.typed"]:
        shutil.copy(path, tmp_path / "fusedopt")
    (tmp_path / "user.py").write_text(SENSIBLE + "\n".join(WRONG) + "\n")
    first = SENSIBLE.count("\n") + 1
    cache = ROOT / ".mypy_cache" / "user"  # of torch, mostly
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={cache}", "user.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = done.stdout + done.stderr
    found = re.findall(r"^(.*?):(\d+): error: .*\[([\w-]+)\]$", said, re.MULTILINE)
    expected = [("user.py", str(first + at), code) for at, code in enumerate(WRONG.values())]
    assert found == expected, said
