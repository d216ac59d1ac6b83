"""The benchmarks time what they say, and what they start exists. No test here looks at a time."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from support.files import ROOT
from support.processes import run_fork

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized, pytest.mark.usefixtures("bench")]

CPU = torch.device("cpu")


def test_fresh_grads_are_new_objects_in_the_same_memory() -> None:
    from lib.timing import fresh_grads

    param = torch.ones(3, requires_grad=True)
    param.grad = kept = torch.arange(3.0)
    fresh_grads([param, torch.ones(1, requires_grad=True)])()
    assert param.grad is not kept
    assert param.grad.data_ptr() == kept.data_ptr()
    assert param.grad.tolist() == [0, 1, 2]


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_what_comes_before_a_step_comes_before_every_timed_one(
    cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``t`` is a look at the clock, ``b`` the renewal of grads, ``f`` the reading of other memory,
    ``s`` the step."""
    from lib import timing

    events = ""
    seconds = 0.0

    def event(name: str, took: float) -> float:
        nonlocal events, seconds
        events += name
        seconds += took
        return seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: event("t", 0))
    monkeypatch.setattr(timing, "_cache_flush", lambda _: lambda: event("f", 100))
    candidate = timing.Candidate("", lambda: event("s", 1.5e-3), 1, before=lambda: event("b", 10))
    clock = timing.Clock(CPU, 1, "fresh", cache)
    clock.begin(candidate)
    assert candidate.inner == 2
    events = ""
    sample = clock.sample(candidate)
    assert events == {"warm": "s" + "btst" * 2, "cold": "bftst" * 2}[cache]
    assert sample["wall"] == pytest.approx(1.5e-3)


def test_every_candidate_runs_once_a_round_and_not_always_after_the_same() -> None:
    from lib import timing

    order = ""

    def step(name: str) -> None:
        nonlocal order
        order += name

    class Clock(timing.Clock):
        def begin(self, candidate: Any) -> None:
            pass

    names = ("a", "b", "c")
    candidates = [timing.Candidate(name, lambda name=name: step(name), 1) for name in names]
    large = timing.CACHED_BYTES + 1  # no warming step
    timing.run_interleaved(Clock(CPU, large, "fresh", "warm"), candidates, 5, 60.0)
    rounds = re.findall("...", order)
    assert rounds == ["abc", "bca", "cab"] * 2  # the first one warms up
    assert {len(candidate.samples["wall"]) for candidate in candidates} == {5}


def test_another_update_is_seen() -> None:
    from lib.baselines import BASELINES, Baseline, who_can_take_part

    def without_decay(groups: list[dict[str, Any]], _: str) -> Any:
        return torch.optim.SGD(groups, momentum=0.8).step

    wrong, right = Baseline("wrong", without_decay), BASELINES["fusedopt"]
    elsewhere = BASELINES["torch-graph"]
    notes, skipped = who_can_take_part([wrong, right, elsewhere], "SGD", torch.float32, CPU)
    assert "NOT the same update" in notes[wrong]
    assert notes[right] == ""
    assert skipped == {"torch-graph": "runs on cuda only"}


@pytest.mark.parametrize(("options", "same"), [({"max_grad_norm": 1.0}, True), ({}, False)])
def test_another_configuration_is_seen(options: dict[str, float], same: bool) -> None:
    from lib.configs import difference_between, ours, theirs

    assert (difference_between(ours(**options), theirs(clip=1.0), CPU) == "") is same


def test_only_some_grads_are_unusual() -> None:
    from lib.configs import COMPARISONS, parameters

    configs = COMPARISONS["values-fp32"].configs
    grads = [params[0].grad for params in parameters(configs, [(8,)], CPU)]
    assert [config.name for config in configs][-2:] == ["nans", "ordinary"]
    assert grads[-2].isnan().all()
    assert ((grads[-1] >= 0.05) & (grads[-1] <= 0.1)).all()


def test_bytes_of_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that shows shares of a copy counts them as the one that has targets."""
    from lib.configs import ours

    monkeypatch.syspath_prepend(str(ROOT / "bench/gpu"))
    from shares import ROWS

    rows = [row for row in ROWS if row.optimizer == "AdamW" and "amsgrad" not in row.options]
    assert len(rows) > 30
    for row in rows:
        config = ours("setting", row.dtype, grad_dtype=row.grad_dtype, **row.options)
        assert row.moved == config.bytes_per_element, row.name


def test_targets_of_cases() -> None:
    """A bar just kept, one just missed, and what was not measured."""
    from lib.targets import TARGETS

    def case(workload: str, fused: float) -> dict[str, Any]:
        rows = {"fusedopt": 1.0, "torch-fused": fused, "torch-foreach": 24.0}
        candidates = {name: {"ratio": {"median": value}} for name, value in rows.items()}
        key = {"optimizer": "AdamW", "dtype": "float32", "workload": workload}
        return key | {"base": "fusedopt", "candidates": candidates}

    cases = [case("many-1000x1000", 8.0), case("many-1000x64", 9.9)]
    lines, good = TARGETS["cpu"].compare(cases)
    verdicts = [line.split()[0] for line in lines if not line.endswith("not measured")]
    assert verdicts == ["pass", "pass", "MISS", "MISS"]
    assert not good
    assert "AdamW  float32   5 workloads not measured" in lines[4]
    assert TARGETS["cpu"].compare(cases[:1])[1]


def test_results_say_how_they_were_measured(tmp_path: Path) -> None:
    shapes = ("--quick", "--threads", "1", "--shapes", "many-1000x64")
    axes = ("--grads", "kept", "--cache", "cold")
    candidates = ("--candidates", "fusedopt", "torch-fused")
    file = tmp_path / "step.json"
    run_fork(ROOT / "bench/step.py", *shapes, *axes, *candidates, "--json", file)
    (case,) = json.loads(file.read_text())["cases"]
    assert (case["grads"], case["cache"], case["rounds"]) == ("kept", "cold", 5)
    assert list(case["candidates"]) == ["fusedopt", "torch-fused"]


def test_ncu_looks_at_all_kernels_that_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench/gpu"))
    from logs import UPDATES

    kernels = (ROOT / "csrc/cuda/kernels.cuh").read_text()
    taking_updates = r"(\w+)\(const __grid_constant__ UpdateArguments"
    assert sorted(re.findall(taking_updates, kernels)) == sorted(UPDATES)


def test_all_that_a_gpu_run_starts_exists() -> None:
    shown = run_fork(ROOT / "bench/gpu/run_all.py", "--dry-run")
    programs = set(re.findall(r"python (\S+\.py)", shown))
    assert len(programs) == 5
    for path in programs:
        assert (ROOT / path).is_file()
        assert "usage:" in run_fork(ROOT / path, "--help")
