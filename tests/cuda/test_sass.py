"""The machine code of the CUDA kernels, for every architecture that was built: no GPU is needed."""

import functools

import pytest

from fusedopt import _C
from support.sass import (
    ELEMENTS,
    RULES,
    SETTINGS,
    USUAL,
    USUAL_SETTINGS,
    Kernel,
    all_kernels_of,
    find_cuobjdump,
    kernel_of,
)

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

# Four blocks of four warps for an SM; three of those that compute in double or with codes, two
# with both.
MOST_REGISTERS = 128
MOST_REGISTERS_IN_DOUBLE = MOST_REGISTERS_OF_CODES = 168
MOST_REGISTERS_OF_CODES_IN_DOUBLE = 255

UPDATES = ("update", "codes", "usual")  # kinds of kernels

# For an element, on the shortest ordinary way of Adam. In usual kernels that is AdamW's own; in
# those that know all formats it is that without decay, or with L2, which is one to three shorter.
# At full bandwidth, an H100 has room for 276 in fp32 and 138 in bf16, an H200 for 220 and 110, a
# B200 for 142 and 71; formats between lie between.
MOST_INSTRUCTIONS = {
    "fp32": 55,
    "bf16": 55,
    "bf16, stochastic": 72,
    "split, bf16 states": 62,
    "split8, bf16 states, stochastic": 91,
    "fp32 masters": 68,
    "fp32, bf16 states": 67,
    "split8, q8 states": 119,
    "split8, q8 states, stochastic": 125,
    # Kernels that know all formats; those with codes are named here.
    "usual": 61,
    "usual bf16, average, stochastic": 64,
    "usual split, bf16 states, average, stochastic": 67,
    "usual split8, q8 states": 91,
    "usual split8, q8 states, stochastic": 96,
    "usual bf16, q8 states, stochastic": 86,
    "usual fp32, q8 states, stochastic": 92,
}
MOST_BRANCHES = {
    "fp32": 4,
    "bf16": 4,
    "bf16, stochastic": 4,
    "split, bf16 states": 5,
    "split8, bf16 states, stochastic": 8.5,
    "fp32 masters": 7,
    "fp32, bf16 states": 6,
    "split8, q8 states": 9.3,
    "split8, q8 states, stochastic": 9.3,
    "usual": 2.3,
}

# For an element, to find the norm of the grads, which are the only memory that this reads.
MOST_NORM_INSTRUCTIONS = {"fp32": 14, "bf16": 12, "fp16": 12}
MOST_NORM_REGISTERS = 64  # eight blocks of four warps for an SM

# That an SM's threads have asked for: the bandwidth for an SM times the latency, and half as much
# again.
LEAST_KIB_UNDER_WAY = {
    "sm_80": 48,
    "sm_86": 24,
    "sm_89": 24,
    "sm_90": 48,
    "sm_100": 64,
    "sm_120": 24,
}


LEAST_KIB_OF_CODES = 90  # of three blocks for an SM; more than the above


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    if _C.build_info()["cuda_archs"] in ("", "emulated"):
        pytest.skip("built without CUDA")
    found = find_cuobjdump()
    if found is None:
        pytest.skip("there is no cuobjdump here; pip install triton brings one")
    return found


@functools.cache
def all_kernels(cuobjdump: str) -> list[Kernel]:
    return all_kernels_of(cuobjdump, _C.__file__)


def offenders(kernels: list[Kernel], what: str) -> list[str]:
    return [f"{k.arch} {k.name}: {k.counts[what]}" for k in kernels if k.counts[what] != 0]


def test_every_kernel_is_there_for_every_arch(cuobjdump: str) -> None:
    kernels = all_kernels(cuobjdump)
    built = _C.build_info()["cuda_archs"].replace("+PTX", "").split(";")
    assert {kernel.arch for kernel in kernels} == {f"sm_{arch}" for arch in built}
    of_updates = [f"{kind} {{}} {of}" for kind in UPDATES[:2] for of in ("float32", "float64")]
    for_a_rule = (*of_updates, "step_scalars {}")
    expected = [name.format(rule) for rule in RULES for name in for_a_rule]
    expected += [f"usual Adam float32 {number}" for number in range(len(USUAL))]
    expected += [
        "sum_squares float32",
        "sum_squares float64",
        "finalize",
    ]
    for arch in built:
        names = [kernel.name for kernel in kernels if kernel.arch == f"sm_{arch}"]
        assert sorted(names) == sorted(expected)


def test_accesses_are_128_bits_wide(cuobjdump: str) -> None:
    updates = [kernel for kernel in all_kernels(cuobjdump) if kernel.kind == "update"]
    assert updates
    for kernel in updates:
        # The stores of each operand are written out for each format.
        assert kernel.counts["wide copies"] >= 2, kernel.name
        assert kernel.counts["wide stores"] >= 2 * (2 if kernel.rule == "Sgd" else 3), kernel.name
    for kernel in all_kernels(cuobjdump):
        assert kernel.kind != "sum_squares" or kernel.counts["wide loads"] >= 4, kernel.name


def test_the_norm_takes_few_instructions(cuobjdump: str) -> None:
    kernels = [kernel for kernel in all_kernels(cuobjdump) if kernel.name == "sum_squares float32"]
    assert kernels
    for kernel in kernels:
        assert kernel.registers <= MOST_NORM_REGISTERS
        found = kernel.norm_ways()
        assert found.keys() == MOST_NORM_INSTRUCTIONS.keys()
        for name, most in MOST_NORM_INSTRUCTIONS.items():
            assert found[name] <= most, (kernel.arch, name, found[name])


def adam(cuobjdump: str, setting: str) -> list[Kernel]:
    found = [k for k in all_kernels(cuobjdump) if k.name == kernel_of(setting)]
    assert found
    return found


@pytest.mark.parametrize("setting", [*SETTINGS, *USUAL_SETTINGS])
def test_the_ordinary_way_is_short(cuobjdump: str, setting: str) -> None:
    for kernel in adam(cuobjdump, setting):
        instructions, branches = kernel.ordinary_way(setting)
        usual = "usual" if setting in USUAL_SETTINGS else setting
        most = MOST_INSTRUCTIONS.get(setting) or MOST_INSTRUCTIONS[usual]
        assert instructions <= most * ELEMENTS, (kernel.arch, instructions)
        assert branches <= MOST_BRANCHES[usual] * ELEMENTS, (kernel.arch, branches)


@pytest.mark.parametrize("setting", [*SETTINGS, *USUAL_SETTINGS])
def test_enough_bytes_are_under_way(cuobjdump: str, setting: str) -> None:
    for kernel in adam(cuobjdump, setting):
        least = LEAST_KIB_UNDER_WAY.get(kernel.arch, 24)
        if kernel.kind == "codes":
            least = LEAST_KIB_OF_CODES
        assert kernel.under_way(setting) >= least * 1024, kernel.arch


def test_no_local_memory(cuobjdump: str) -> None:
    kernels = all_kernels(cuobjdump)
    assert not offenders(kernels, "local")
    assert not [kernel for kernel in kernels if kernel.stack != 0]


def test_no_double_in_kernels_that_compute_in_float(cuobjdump: str) -> None:
    kernels = all_kernels(cuobjdump)
    assert not offenders([kernel for kernel in kernels if not kernel.is_double], "double")
    in_double = [k for k in kernels if k.kind in UPDATES and k.is_double]
    assert len(offenders(in_double, "double")) == len(in_double)  # else nothing was recognised


def test_updates_know_the_address_space(cuobjdump: str) -> None:
    kernels = [k for k in all_kernels(cuobjdump) if k.kind in (*UPDATES, "sum_squares")]
    assert not offenders(kernels, "generic")


def test_registers(cuobjdump: str) -> None:
    for kernel in all_kernels(cuobjdump):
        in_double = kernel.kind == "update" and kernel.is_double
        most = MOST_REGISTERS_IN_DOUBLE if in_double else MOST_REGISTERS
        if kernel.kind == "codes":
            doubles = MOST_REGISTERS_OF_CODES_IN_DOUBLE
            most = doubles if kernel.is_double else MOST_REGISTERS_OF_CODES
        assert kernel.registers <= most, kernel.name
