"""examples/train_gpt.py with a tiny model: alone and in two processes, interrupted and resumed."""

import dataclasses
import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import fusedopt
from support import examples
from support.files import ROOT
from support.processes import on_ranks
from support.tensors import by_id

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.unsanitized,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

STEPS, HALF = 6, 3
SETTINGS: dict[str, list[str]] = {
    "compared": [],
    "clipped by the optimizer": ["--max-grad-norm", "0.5"],
    "everything": [
        *("--dtype", "bfloat16", "--master-weights", "split", "--state-dtype", "bfloat16"),
        *("--max-grad-norm", "0.5", "--ema-decay", "0.9", "--ema-bias-correction"),
        *("--lr", "3e-3", "--betas", "0.9", "0.98"),
    ],
}


@contextmanager
def tiny() -> Iterator[None]:
    """A smaller model, which also writes less, in what programs of examples/ find beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import gpt

        config = dataclasses.replace(gpt.Config(), context=8, width=16, layers=2, heads=2)
        generate = gpt.GPT.generate
        patch.setattr(gpt, "Config", lambda: config)
        patch.setattr(gpt.GPT, "generate", lambda model, text, _: generate(model, text, 4))
        yield


def train(folder: Path, *arguments: object, run: Any = examples.run) -> dict[str, Any]:
    """What it writes as --json; the first of several processes does."""
    result = folder / "result.json"
    with tiny():
        run("train_gpt.py", "--steps", STEPS, "--no-plot", "--json", result, *arguments)
    meet()
    found: dict[str, Any] = json.loads(result.read_text())
    meet()
    return found


def meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def losses(result: dict[str, Any]) -> dict[str, list[float]]:
    return {run["name"]: run["losses"] for run in result["runs"]}


def assert_resumes(folder: Path, *arguments: object, run: Any = examples.run) -> Any:
    """With the same losses as a run that was not interrupted, which are returned."""
    keep = ("--checkpoint", folder / "checkpoint", *arguments)
    straight = losses(train(folder, *keep, "--save-every", HALF, run=run))
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(folder / f"checkpoint/step-{STEPS:06}")
    meet()
    resumed = losses(train(folder, *keep, "--resume", run=run))
    assert resumed == straight
    assert {len(each) for each in straight.values()} == {STEPS}
    return straight


@pytest.mark.parametrize("options", **by_id(SETTINGS))
def test_resumes(options: list[str], tmp_path: Path) -> None:
    found = assert_resumes(tmp_path, *options)
    assert ("torch.optim (default)" in found) == ("--ema-decay" not in options)


@pytest.fixture
def alone(options: list[str], tmp_path: Path) -> Any:
    return losses(train(tmp_path, *options))


@on_ranks(2)
@pytest.mark.parametrize("how", ["--ddp", "--fsdp"])
@pytest.mark.parametrize(
    "options", [SETTINGS["compared"], SETTINGS["everything"]], ids=["compared", "everything"]
)
def test_two_processes(how: str, options: list[str], alone: Any, tmp_path: Path) -> None:
    """They learn as one does, each with a part of the batches."""
    found = assert_resumes(tmp_path, how, *options, run=examples.run_in_group)
    assert list(found) == list(alone)
    rel = 0.01 if "bfloat16" in options else 1e-4
    for name, expected in alone.items():
        assert found[name] == pytest.approx(expected, rel=rel)


def test_result_is_as_that_which_is_committed(tmp_path: Path) -> None:
    found = train(tmp_path)
    committed = json.loads((ROOT / "bench/results/train-gpt-cpu.json").read_text())
    assert set(found) <= set(committed)
    assert [set(run) for run in found["runs"]] == [set(run) for run in committed["runs"]]
    assert set(found["apart"]) == set(committed["apart"])
    assert found["apart"]["good"]


@pytest.mark.parametrize("options", [[], ["--ema-decay", "0.9"]], ids=["compared", "alone"])
def test_plots(options: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with tiny():
        examples.run("train_gpt.py", "--steps", 2, "--plot", tmp_path / "picture.png", *options)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_every_setting_is_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import flags

    arguments = set(inspect.signature(fusedopt.AdamW).parameters)
    assert arguments - set(flags.SETTINGS) == {"params", "differentiable", "norm_group"}
    assert set(flags.SETTINGS) <= arguments


REFUSED: dict[str, tuple[list[str], str]] = {
    "resumes nothing": (["--resume"], "--save-every need --checkpoint"),
    "no such folder": (["--resume", "--checkpoint", "none"], "there is no checkpoint in none"),
    "of another optimizer": (["--optimizer", "SGD", "--eps", "1"], "SGD has no eps"),
    "no steps": (["--save-every", "0"], "must be at least 1"),
}


@pytest.mark.parametrize(("arguments", "words"), **by_id(REFUSED))
def test_refuses(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as error:
        train(tmp_path, *arguments)
    assert words in capsys.readouterr().err + str(error.value)
