"""The files of examples/, as their docstrings say to run them: each learns what it is to learn."""

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fusedopt
from support import examples
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
    "optimizers.py": ["matplotlib"],
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Runs one, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> str:
        for package in EXAMPLES[name]:
            if find_spec(package) is None:
                pytest.skip(f"make stacks installs {package}")
        return examples.run(name, *arguments)

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
    of_the_demo = {"flags.py", "gpt.py", "parallel.py", "plot.py", "train_gpt.py"}
    assert files - of_the_demo == set(EXAMPLES)
    table = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[(\w+\.py)\]", table, re.MULTILINE)) == (
        set(EXAMPLES) | {"train_gpt.py"}
    )


# How near two processes are to one, which sees the same batches. Each sums the grads of its half,
# for a model in bfloat16 in that.
SAME = {
    "ddp.py": 1e-4,
    "fsdp2.py": 0.02,
    "deepspeed_zero.py": 1e-3,
    "torchtitan_optimizer.py": 0.02,
}


def assert_same(name: str, together: str, alone: str) -> None:
    assert_falls(numbers("loss", alone), to=0.1)
    for what in ("loss", "grad norm"):
        assert numbers(what, together) == pytest.approx(numbers(what, alone), rel=SAME[name])


@pytest.fixture
def alone(name: str, run: Callable[..., str]) -> str:
    return run(name)


@on_ranks(2)
@pytest.mark.parametrize("name", ["ddp.py", "deepspeed_zero.py", "torchtitan_optimizer.py"])
def test_two_processes_learn_as_one_does(name: str, alone: str) -> None:
    together = examples.run_in_group(name, *(["--stage", 3] if name == "deepspeed_zero.py" else []))
    if dist.get_rank() == 0:
        assert_same(name, together, alone)


@pytest.mark.parametrize("name", ["fsdp2.py"])
def test_torchrun(name: str, alone: str, run: Callable[..., str], tmp_path: Path) -> None:
    """And that the run goes on as one process, from a checkpoint of two."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    together = run_python(
        *launcher, ROOT / "examples" / name, "--checkpoint", tmp_path, OMP_NUM_THREADS="1"
    )
    assert_same(name, together, alone)
    more = run(name, "--checkpoint", tmp_path)
    assert numbers("step", together + more) == list(range(40))
    assert max(numbers("loss", more)) < 2 * numbers("loss", together)[-1]


def test_accelerate(run: Callable[..., str]) -> None:
    first = numbers("held-out loss", run("accelerate_loop.py"))
    assert_falls(first, to=0.1)
    more = numbers("held-out loss", run("accelerate_loop.py", "--resume"))
    assert max(more) < first[-2]


@pytest.mark.skipif(find_spec("accelerate") is None, reason="make stacks installs it")
@on_ranks(2)
def test_accelerate_in_two_processes(tmp_path: Path) -> None:
    """Which have a batch each, and so make half as many steps."""
    losses = numbers(
        "held-out loss", examples.run_in_group("accelerate_loop.py", "--output", tmp_path)
    )
    if dist.get_rank() == 0:
        assert len(losses) == 5
        assert_falls(losses, to=0.5)
    else:
        assert losses == []


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_hf_trainer(lora: bool, run: Callable[..., str], tmp_path: Path) -> None:
    out = run("hf_trainer.py", *(["--lora"] if lora else []))
    assert len(numbers("grad_norm", out)) == 6
    assert_falls(numbers("eval_loss", out), to=1.0 if lora else 0.95)
    saved = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "hf-trainer" / saved).exists()
    assert (tmp_path / "hf-trainer/checkpoint-60/optimizer.pt").exists()


def test_optimizers(run: Callable[..., str], tmp_path: Path) -> None:
    """And that the picture in docs/ is of what the example has."""
    run("optimizers.py", "--quick", "--plot", tmp_path / "a/b.png", "--json", tmp_path / "c/d.json")
    assert (tmp_path / "a/b.png").stat().st_size > 100_000
    found, committed = (
        json.loads(file.read_text())
        for file in (tmp_path / "c/d.json", ROOT / "bench/results/optimizers-cpu.json")
    )
    of_ours = {name for name in fusedopt.__all__ if is_optimizer(getattr(fusedopt, name))}
    assert {each["name"] for each in found["runs"]} == of_ours - {"SparseAdam"}
    assert set(found) == set(committed)
    assert found["config"] == {**committed["config"], "steps": 20}
    for ours, drawn in zip(found["runs"], committed["runs"], strict=True):
        assert set(ours) == set(drawn)
        assert (ours["name"], ours["options"]) == (drawn["name"], drawn["options"])
        assert ours["path"] == [pytest.approx(point, abs=1e-5) for point in drawn["path"]]
        assert ours["final_value"] < 0.15 * 10.5  # of the value at the start
        assert len(ours["losses"]) == 20
        assert_falls(ours["losses"], to=0.95)
        assert drawn["final_loss"] < 0.55 * drawn["losses"][0]


def is_optimizer(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, torch.optim.Optimizer)


def test_lightning(run: Callable[..., str], tmp_path: Path) -> None:
    (norm,), (loss,) = (
        numbers(what, line)
        for what, line in zip(
            ("grad_norm", "val_loss"), run("lightning_module.py").splitlines()[-2:], strict=True
        )
    )
    assert norm > 0
    assert loss < 0.1
    assert list(tmp_path.rglob("*.ckpt"))
