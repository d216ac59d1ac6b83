"""The tables of docs/, from JSON files that the benchmarks wrote.

Examples:
    python bench/tables.py bench/results/training-step-cpu.json
    python bench/tables.py bench/results/step-cuda{,-sgd-adam}.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.targets import OTHERS, ratio

Figures = dict[str, Any]

CPU_COLUMNS = [
    ("AdamW", "float32", "torch-fused"), ("AdamW", "float32", "torch-foreach"),
    ("AdamW", "bfloat16", "torch-fused"), ("SGD", "float32", "torch-fused"),
]  # fmt: skip
CUDA_COLUMNS = [(o, d) for o in ("AdamW", "SGD") for d in ("float32", "bfloat16")]
# No row for host-1000x1, whose figure is a cost and no ratio.
TITLES = {
    "one-64Mi": "1 tensor x 64 Mi", "one-256Mi": "1 tensor x 256 Mi",
    "gpt2-124m": "GPT-2 124M (148 tensors)", "resnet50": "ResNet-50 (161 tensors)",
    "llama-8b-layer": "a layer of Llama-3-8B (9 tensors)",
    "llama-8b-eighth": "Llama-3-8B / 8 (291 tensors, 2 groups)",
    "many-1000x1000": "1000 x 1000", "many-1000x64": "1000 x 64", "many-10000x64": "10000 x 64",
    "groups-400x5000": "400 groups of 1 x 5000", "one-4Mi": "1 tensor x 4 Mi",
}  # fmt: skip
NAMES = {"torch-fused": "`fused=True`", "torch-foreach": "`foreach=True`"}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def step_table(cases: list[Figures]) -> list[str]:
    """A CPU's ratios to torch; what was not measured is a dash, and no row is all dashes."""
    heads = ["work"]
    for optimizer, dtype, baseline in CPU_COLUMNS:
        kind = f"{optimizer} {SHORT[dtype]}: "
        heads.append(NAMES[baseline] if heads[-1].startswith(kind) else kind + NAMES[baseline])
    rows = []
    for work, found in _by_work(cases).items():
        values = [ratio(found.get((o, d)), baseline) for o, d, baseline in CPU_COLUMNS]
        if any(values):
            rows.append([TITLES[work], *map(_digits, values)])
    return markdown(heads, rows)


def others_table(cases: list[Figures]) -> list[str]:
    """Of the optimizers without a fused form in torch: ratios to foreach, and memory's share."""
    found = {(case["optimizer"], case["workload"]): case for case in cases}
    rows = []
    for name in OTHERS:
        model, many = (found.get((name, work)) for work in ("gpt2-124m", "many-1000x1000"))
        if model is None:
            continue
        share = model["candidates"]["fusedopt"]["percent_of_multiply"]
        ratios = (_digits(ratio(case, "torch-foreach")) for case in (model, many))
        rows.append([name, *ratios, f"{share:.0f} %"])
    heads = [
        f"{TITLES[work]}: {NAMES['torch-foreach']}" for work in ("gpt2-124m", "many-1000x1000")
    ]
    return markdown(["optimizer, fp32", *heads, "GPT-2, of an in-place multiply"], rows)


def gpu_step_table(cases: list[Figures]) -> list[str]:
    """Ratios to torch's fused step beside the share of a copy's bandwidth on the GPU itself."""
    rows = []
    for work, found in _by_work(cases).items():
        cached = any(case["may_sit_in_l2"] for case in found.values())
        row = [TITLES[work] + (" (fits L2)" if cached else "")]
        for kind in CUDA_COLUMNS:
            cell = _digits(value := ratio(found.get(kind), "torch-fused"))
            if value is not None:
                share = found[kind]["candidates"]["fusedopt"]["gpu"]["percent_of_copy"]
                cell += f" x, {share:.0f} %"
            row.append(cell)
        graphs = ratio(found.get(("AdamW", "float32")), "torch-graph/fusedopt-graph")
        rows.append([*row, _digits(graphs)])
    heads = [f"{optimizer} {SHORT[dtype]}" for optimizer, dtype in CUDA_COLUMNS]
    return markdown(["work", *heads, "AdamW fp32, both in a CUDA graph"], rows)


def _by_work(cases: list[Figures]) -> dict[str, dict[tuple[str, str], Figures]]:
    found: dict[str, dict[tuple[str, str], Figures]] = {}
    for work in TITLES:
        mine = {(c["optimizer"], c["dtype"]): c for c in cases if c["workload"] == work}
        if mine:
            found[work] = mine
    return found


def _digits(value: float | None) -> str:
    """Three, as many as runs agree on."""
    return "-" if value is None else f"{value:.3g}"


def training_table(content: Figures) -> list[str]:
    """One line for each comparison with torch that has a target."""
    rows = []
    for row, found in _with_target(content, against_torch=True):
        mine, other = (row["candidates"][found[key]] for key in ("of", "against"))
        rows.append([
            row["title"], f"{mine['dtype']} `{mine['what']}`",
            f"torch, {other['dtype']} `{other['what']}`",
            f"{found['value']['median']:.3g} x", f">= {found['target']:g} x{_missed(found)}",
        ])  # fmt: skip
    return markdown(["work", "fusedopt", "against", "measured", "target"], rows)


def settings_table(content: Figures) -> list[str]:
    """What a setting costs beside another one: by the bytes that it moves, or by time."""
    rows = []
    for row, found in _with_target(content, against_torch=False):
        is_by_time = found["by"] == "time"
        name = f", {found['of']}" if is_by_time and len(row["comparisons"]) > 2 else ""
        other = {"fusedopt-fp32": "plain fp32"}.get(found["against"], found["against"])
        rows.append([
            row["title"] + name, f"{other}, by {'time' if is_by_time else 'bytes'}",
            f"{found['value']['median']:.0%}", f">= {found['target']:.0%}{_missed(found)}",
        ])  # fmt: skip
    return markdown(["setting", "beside", "speed", "target"], rows)


def _with_target(content: Figures, against_torch: bool) -> Iterator[tuple[Figures, Figures]]:
    for row in content["rows"]:
        for found in row.get("comparisons", ()):
            is_wanted = (found["against"] == "torch") == against_torch
            if is_wanted and found["target"] is not None:
                yield row, found


def _missed(found: Figures) -> str:
    return "" if found["good"] else ", missed"


def gpu_training_table(content: Figures) -> list[str]:
    """How near each setting comes to a copy, and to torch for the same work."""
    rows = []
    for row in content["rows"]:
        for name, mine in row.get("candidates", {}).items():
            about = [found for found in row["comparisons"] if found["of"] == name]
            times = [f"{c['value']['median']:.3g}" for c in about if c["against"] == "torch"]
            targets = [
                (f">= {c['target']:g}" if c["by"] == "time"
                 else f">= {c['target']:.0%} of fp32's bytes/s") + _missed(c)
                for c in about if c["target"] is not None
            ]  # fmt: skip
            if times:
                share = f"{mine['percent_of_copy']:.0f} %"
                cells = [row["title"], f"{mine['dtype']} `{mine['what']}`", share, times[0]]
                rows.append([*cells, "; ".join(targets) or "-"])
    heads = ["work", "fusedopt", "share of a copy", "torch's time / fusedopt's", "target"]
    return markdown(heads, rows)


def shares_table(content: Figures) -> list[str]:
    """By the GPU's own time. A tensor is one of 256 Mi elements where a row says nothing else."""
    works = {name: title for name, title in TITLES.items() if name != "one-256Mi"}
    rows = []
    for row in content["shares"]:
        name = row["name"]
        for work, title in works.items():
            name = name.replace(work, title)
        mark = "" if row["hidden"] else " *"
        rows.append([name + mark, f"{row['bytes_per_element']:.4g}", f"{row['share']:.1%}",
                     f"{row['ms']:.3g}"])  # fmt: skip
    return markdown(["AdamW, if nothing else is said", "bytes", "share of a copy", "ms"], rows)


def precision_table(content: Figures) -> list[str]:
    """Columns in which everything is zero are left out."""
    settings = content["settings"]
    parts = [part for part in settings[0]["bytes"] if any(row["bytes"][part] for row in settings)]
    heads = ["setting", *parts, "final loss", "against fp32"]
    columns = {"final_loss": ".4f", "against_fp32": "+.4f"}
    if "averages_loss" in settings[0]:
        heads += ["weights, test loss", "averages"]
        columns |= {"weights_loss": ".4f", "averages_loss": ".4f"}
    rows = []
    for row in settings:
        cells = [row["name"], *(f"{row['bytes'][part]:.3g}" for part in parts)]
        for key, shape in columns.items():
            deviation = row[key]["stdev"]
            around = "" if deviation is None else f" ± {deviation:.4f}"
            cells.append(f"{row[key]['mean']:{shape}}{around}")
        rows.append(cells)
    return markdown(heads, rows)


def accuracy_table(content: Figures) -> list[str]:
    """Errors are means over the seeds; the largest update is that of the worst seed."""
    falls = {"none": "", "all": ", after all have fallen", "half": ", after every second one has"}
    rows = []
    for row in content["accuracy"]:
        cases = row["cases"]
        errors = [sum(case["errors"]) / len(case["errors"]) for case in cases]
        largest = max(cases[-1]["largest"])
        rows.append([row["name"], *map(_two_digits, [*errors, largest])])
    heads = [f"sigma {case['spread']}{falls[case['fall']]}" for case in cases]
    last = f"sigma {cases[-1]['spread']}: largest update over the true largest"
    return markdown(["states", *heads, last], rows)


def _two_digits(value: float) -> str:
    found = f"{value:.2g}"
    return f"{float(found):,.0f}".replace(",", " ") if "e" in found else found


def tables_of(contents: list[Figures]) -> list[list[str]]:
    """Of one file, or of several of one kind and device."""
    first = contents[0]
    on_cpu = first["machine"]["device"] == "cpu"
    if "shares" in first:
        return [shares_table(first)]
    if "settings" in first:
        return [precision_table(first)]
    if "accuracy" in first:
        return [accuracy_table(first)]
    if "rows" in first:
        both = [training_table(first), settings_table(first)]
        return both if on_cpu else [gpu_training_table(first)]
    cases = [case for content in contents for case in content["cases"]]
    if all(case["optimizer"] in (*OTHERS, "SparseAdam") for case in cases):
        return [others_table(cases)]
    return [step_table(cases) if on_cpu else gpu_step_table(cases)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON files, of one device")
    contents = [json.loads(path.read_text()) for path in parser.parse_args().results]
    if len({content["machine"]["device"] for content in contents}) > 1:
        parser.error("the files are of several devices")
    print("\n\n".join("\n".join(lines) for lines in tables_of(contents)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
