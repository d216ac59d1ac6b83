"""The files of examples/, as their docstrings say to run them: each learns what it is to learn."""

import contextlib
import importlib.util
import io
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
import torch.distributed as dist

from support.files import ROOT, run_python
from support.processes import on_ranks

# What other packages warn of is not for these tests, which run their examples as a user does.
pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.unsanitized,
    pytest.mark.filterwarnings("ignore"),
]

# Of each example, the packages that it needs beside torch.
EXAMPLES: dict[str, list[str]] = {
    "ddp.py": [],
    "fsdp2.py": [],
    "hf_trainer.py": ["transformers", "accelerate", "peft"],
    "accelerate_loop.py": ["accelerate"],
    "lightning_module.py": ["lightning"],
    "deepspeed_zero.py": ["deepspeed"],
    "torchtitan_optimizer.py": ["torchtitan"],
}
Run: TypeAlias = Callable[..., str]


def path_of(name: str) -> Path:
    for package in EXAMPLES[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"make stacks installs {package}")
    return ROOT / "examples" / name


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Packages leave notes for their next start: in the environment, accelerate in its state."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if "accelerate" in sys.modules:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one in this process, which has imported most of it, in an empty folder."""

    def run(name: str, *arguments: object) -> str:
        path = path_of(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with as_before():
            runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return run


def numbers(what: str, text: str) -> list[float]:
    """All that are printed under a name."""
    return [float(number) for number in re.findall(rf"\b{what}\W+([\d.]+)", text)]


def assert_falls(losses: list[float], to: float) -> None:
    """To this share of the first."""
    assert len(losses) >= 3
    assert losses[-1] < to * losses[0]


def test_every_example_is_run() -> None:
    files = {path.name for path in (ROOT / "examples").glob("*.py")}
    of_the_demo = {"gpt.py", "plot.py", "train_gpt.py"}
    assert files - of_the_demo == set(EXAMPLES)
    table = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[(\w+\.py)\]", table, re.MULTILINE)) == (
        set(EXAMPLES) | {"train_gpt.py"}
    )


# How near two processes are to one, which sees the same batches. Where something is kept in
# bfloat16 it is rounded by draws, which depend on the shard.
SAME = {
    "ddp.py": 1e-4,
    "fsdp2.py": 0.05,
    "deepspeed_zero.py": 1e-3,
    "torchtitan_optimizer.py": 0.02,
}


def assert_same(name: str, together: str, alone: str) -> None:
    assert_falls(numbers("loss", alone), to=0.1)
    for what in ("loss", "grad norm"):
        assert numbers(what, together) == pytest.approx(numbers(what, alone), rel=SAME[name])


def run_in_group(name: str, *arguments: object) -> str:
    """What this process prints, as one of a group that is there already."""
    printed = io.StringIO()
    with (
        as_before(),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
    ):
        patch.setattr(dist, "init_process_group", lambda *_, **__: None)
        patch.setattr(dist, "destroy_process_group", lambda *_: None)
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(path_of(name)), run_name="__main__")
    return printed.getvalue()


@pytest.fixture
def alone(name: str, run: Run) -> str:
    return run(name)


@on_ranks(2)
@pytest.mark.parametrize("name", ["ddp.py", "deepspeed_zero.py", "torchtitan_optimizer.py"])
def test_two_processes_learn_as_one_does(name: str, alone: str) -> None:
    together = run_in_group(name, *(["--stage", 3] if name == "deepspeed_zero.py" else []))
    if dist.get_rank() == 0:
        assert_same(name, together, alone)


@pytest.mark.parametrize("name", ["fsdp2.py"])
def test_torchrun(name: str, alone: str, run: Run, tmp_path: Path) -> None:
    """And that the run goes on as one process, from a checkpoint of two."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    together = run_python(*launcher, path_of(name), "--checkpoint", tmp_path, OMP_NUM_THREADS="1")
    assert_same(name, together, alone)
    more = run(name, "--checkpoint", tmp_path)
    assert numbers("step", together + more) == list(range(40))
    assert max(numbers("loss", more)) < 2 * numbers("loss", together)[-1]


def test_accelerate(run: Run) -> None:
    first = numbers("held-out loss", run("accelerate_loop.py"))
    assert_falls(first, to=0.1)
    more = numbers("held-out loss", run("accelerate_loop.py", "--resume"))
    assert max(more) < first[-2]


@on_ranks(2)
def test_accelerate_in_two_processes(tmp_path: Path) -> None:
    """Which have a batch each, and so make half as many steps."""
    losses = numbers("held-out loss", run_in_group("accelerate_loop.py", "--output", tmp_path))
    if dist.get_rank() == 0:
        assert len(losses) == 5
        assert_falls(losses, to=0.5)
    else:
        assert losses == []


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_hf_trainer(lora: bool, run: Run, tmp_path: Path) -> None:
    out = run("hf_trainer.py", *(["--lora"] if lora else []))
    assert len(numbers("grad_norm", out)) == 6
    assert_falls(numbers("eval_loss", out), to=1.0 if lora else 0.95)
    saved = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "hf-trainer" / saved).exists()
    assert (tmp_path / "hf-trainer/checkpoint-60/optimizer.pt").exists()


def test_lightning(run: Run, tmp_path: Path) -> None:
    (norm,), (loss,) = (
        numbers(what, line)
        for what, line in zip(
            ("grad_norm", "val_loss"), run("lightning_module.py").splitlines()[-2:], strict=True
        )
    )
    assert norm > 0
    assert loss < 0.1
    assert list(tmp_path.rglob("*.ckpt"))
