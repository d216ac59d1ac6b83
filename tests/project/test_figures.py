"""Figures in README and docs/ are those of the committed runs."""

import json
from collections import Counter
from typing import Any

import pytest

from support.files import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("benchmarks", "settings")
}
ADAMW = ("AdamW", "float32")
ONE_TENSOR = "one-256Mi"
LARGE = ("one-64Mi", "gpt2-124m")


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "bench/results" / f"{name}.json").read_text())
    return found


def gpu_cases() -> list[dict[str, Any]]:
    return results("step-cuda")["cases"] + results("step-cuda-sgd-adam")["cases"]


def assert_said(*texts: str) -> None:
    """On the page of benchmarks, wherever the lines break."""
    page = " ".join(PAGES["benchmarks"].split())
    for text in texts:
        assert text in page, text


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "name",
    [
        *("step-cpu", "step-cpu-others", "step-cuda"),
        *("training-step-cpu", "training-step-cuda", "shares-cuda"),
        *("precision-cpu", "accuracy-cpu"),
    ],
)
@pytest.mark.usefixtures("bench")
def test_tables(name: str) -> None:
    """What bench/tables.py prints, line for line."""
    import tables

    names = [name, "step-cuda-sgd-adam"] if name == "step-cuda" else [name]
    for lines in tables.tables_of([results(each) for each in names]):
        assert len(lines) > 5
        page = PAGES["settings" if name.startswith(("precision", "accuracy")) else "benchmarks"]
        for line in lines:
            assert line in page.splitlines()
        assert "\n".join(lines) in page


@pytest.mark.cpu_only
def test_readme_has_excerpts() -> None:
    """Its figures are lines of the pages' tables, under the same heads."""
    there = {line for page in PAGES.values() for line in page.splitlines()}
    section = README.partition("## Numbers\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) >= 10
    assert [line for line in lines if line not in there] == []


@pytest.mark.cpu_only
@pytest.mark.usefixtures("bench")
def test_sentences_about_the_cpu() -> None:
    from lib.targets import TARGETS

    cases = results("step-cpu")["cases"]
    fp32 = {c["workload"]: c for c in cases if (c["optimizer"], c["dtype"]) == ADAMW}
    large, groups, host = (
        fp32[work]["candidates"] for work in ("one-64Mi", "groups-400x5000", "host-1000x1")
    )
    missed = [line.split()[1:4] for line in TARGETS["cpu"].compare(cases)[0] if "MISS" in line]
    assert Counter(work for *_, work in missed) == {
        "one-64Mi": 1,
        "many-1000x1000": 2,
        "many-1000x64": 2,
        "groups-400x5000": 1,
        "host-1000x1": 1,
    }
    assert_said(
        f"moves at {large['fusedopt']['percent_of_multiply']:.0f} % of the bandwidth of an "
        "in-place multiply",
        f"move at {groups['fusedopt']['percent_of_copy']:.0f} % of the bandwidth of a copy",
        f"{host['fusedopt']['us_per_tensor']:.1f} us per tensor (torch fused there: "
        f"{host['torch-fused']['us_per_tensor']:.1f} us)",
    )


@pytest.mark.cpu_only
@pytest.mark.usefixtures("bench")
def test_sentences_about_optimizers_without_a_fused_form() -> None:
    from lib.targets import TARGETS, ratio

    content = results("step-cpu-others")
    cases = {(case["optimizer"], case["workload"]): case for case in content["cases"]}
    missed = [
        line.split()[1:4:2]
        for line in TARGETS["cpu"].compare(content["cases"])[0]
        if "MISS" in line
    ]
    assert missed == [["Adagrad", "gpt2-124m"], ["SparseAdam", "embedding-1Mx64"]]
    model, many = (
        ratio(cases["Adagrad", work], "torch-fused") for work in ("gpt2-124m", "many-1000x1000")
    )
    sparse = ratio(cases["SparseAdam", "embedding-1Mx64"], "torch-loop")
    assert_said(
        f"torch's takes {model:.3g} times as long for GPT-2",
        f"and {many:.3g} times for 1000 x 1000",
        f"takes {sparse:.3g} times as long in torch (target: 5, missed)",
    )


@pytest.mark.cpu_only
def test_sentences_about_the_demo() -> None:
    content = results("train-gpt-cpu")
    ours, theirs = content["runs"]
    assert_said(
        f"at most {content['apart']['max']:.0e} in".replace("e-0", "e-")
        + f" {content['config']['steps']} steps",
        f"final loss {ours['final_loss']:.2f} for both",
        f"takes {ours['optimizer_share']:.1%} of a training step instead of "
        f"{theirs['optimizer_share']:.1%}, {ours['optimizer_ms']:.3g} ms instead of "
        f"{theirs['optimizer_ms']:.2g} ms".replace("%", " %"),
    )


@pytest.mark.cpu_only
def test_launches_and_traffic_on_the_gpu() -> None:
    content = results("launches-ncu-cuda")
    rows = {row["workload"]: row["candidates"] for row in content["parts"]["launches"]["launches"]}

    def kernels(work: str) -> list[int]:
        return [
            rows[work][name]["kernels"] for name in ("fusedopt", "torch-fused", "torch-foreach")
        ]

    llama, small, groups = map(kernels, ("llama-8b-eighth", "many-10000x64", "groups-400x5000"))
    assert rows["groups-400x5000"]["fusedopt"]["copies"] == 1
    cases = [c for c in content["parts"]["ncu"]["cases"] if c["workload"] in LARGE]
    more = max(case["read"] / case["expected_read"] - 1 for case in cases)
    assert all(case["written"] <= case["expected_written"] for case in cases)
    sentence = f"was {llama[0]} kernel, where torch's fused takes {llama[1]}."
    assert sentence in " ".join(README.split())
    machine = content["machine"]
    assert_said(
        f"commit {machine['commit'][:7]}, torch {machine['torch']}, driver "
        f"{machine['driver_and_limits'].partition(',')[0]}",
        f"is {llama[0]} kernel, where torch's fused takes {llama[1]} and foreach {llama[2]};",
        f"of 10000 x 64 it is {small[0]} against {small[1]} and {small[2]};",
        f"of 400 groups {groups[0]} and a copy against {groups[1]} and {groups[2]}.",
        f"and at most {100 * more:.2f} % more",
    )


@pytest.mark.cpu_only
@pytest.mark.usefixtures("bench")
def test_sentences_about_the_gpu() -> None:
    from lib.targets import TARGETS

    cases = gpu_cases()
    rows = {(c["optimizer"], c["dtype"], c["workload"]): c["candidates"] for c in cases}

    def host(work: str, unit: str) -> list[float]:
        row = rows["AdamW", "float32", work]
        return [row[name]["host"][unit] for name in ("fusedopt", "torch-fused")]

    def over_all(name: str) -> str:
        us = [c["candidates"][name]["host"]["us"] for c in cases if c["workload"] == ONE_TENSOR]
        return f"{min(us):.0f} to {max(us):.0f}"

    one = host(ONE_TENSOR, "us")
    thousand, many = (host(f"many-{work}", "us_per_tensor") for work in ("1000x1000", "10000x64"))
    large = rows["AdamW", "bfloat16", ONE_TENSOR]
    ours, theirs = (large[name]["gpu"]["percent_of_copy"] for name in ("fusedopt", "optimi"))
    training = {row["row"]: row for row in results("training-step-cuda")["rows"]}
    (split,) = (
        found["value"]["median"]
        for found in training["bf16"]["comparisons"]
        if (found["of"], found["against"]) == ("split", "torch")
    )
    bars = [line.split()[0] for line in TARGETS["cuda"].compare(cases)[0]]
    assert_said(
        f"takes the host {one[0]:.0f} us for one tensor (torch fused {one[1]:.0f}; over all cases "
        f"of one tensor {over_all('fusedopt')} and {over_all('torch-fused')}), "
        f"{thousand[0]:.2f} us a tensor for 1000 ({thousand[1]:.1f}) and {many[0]:.2f} us for "
        f"10000 ({many[1]:.1f})",
        f"AdamW in bf16 stays at {ours:.0f} % of a copy on one large tensor",
        f"reaches {theirs:.0f} %",
        f"take {1 / split:.1f} times as long as torch's plain step in bf16",
        f"{bars.count('pass')} of the {bars.count('pass') + bars.count('MISS')} measured ones",
    )


@pytest.mark.cpu_only
def test_sentences_about_settings_on_the_gpu() -> None:
    shares = {row["name"]: row for row in results("shares-cuda")["shares"]}
    kernels = {row["name"]: row for row in results("profile-ncu-cuda")["kernels"]}
    q8 = kernels.pop("q8, split8")
    waited = [row["stalls"]["no_inst"] for row in kernels.values()]
    executed = [row["instructions_per_element"] for row in kernels.values()]
    assert_said(
        f"q8 with split8 takes {shares['q8, split8']['ms'] / shares['torch fused bf16']['ms']:.2f} "
        "times as long as torch's fused step in bf16",
        f"{100 * min(waited):.0f} to {100 * max(waited):.0f} % of their time for instructions",
        f"{100 * q8['stalls']['no_inst']:.0f} % in the one to which formats were known",
        f"for {min(executed):.0f} to {max(executed):.0f} instructions an element",
    )


@pytest.mark.cpu_only
def test_checks_on_a_gpu() -> None:
    tests = results("tests-cuda-staged")["parts"]["tests"]
    assert_said(
        f"{tests['cuda']['passed']} passed, {tests['cuda']['failed']} failed.",
        f"{tests['others']['passed']} passed, {tests['others']['failed']} failed,",
    )
    parts = results("tests-cuda")["parts"]
    tools = [parts["sanitizer"][name] for name in ("memcheck", "racecheck", "initcheck")]
    assert {tool["errors_in_ours"] for tool in tools} == {0}
    (chosen,) = {tool["passed"] for tool in tools}
    assert_said(
        f"over {chosen} chosen tests: memcheck, racecheck and initcheck with 0 errors",
    )
