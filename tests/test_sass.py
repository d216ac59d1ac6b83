"""The machine code of the CUDA kernels, for every architecture that was built: no GPU is needed."""

import functools

import pytest
from sass import Kernel, archs_of, find_cuobjdump, kernels_of

from fusedopt import _C

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

# Warps of 32 threads with more registers than this leave less than a quarter of an SM's warps, or
# an eighth, for what is rare.
MOST_REGISTERS = 128
MOST_REGISTERS_OF_MIXED_DOUBLE = 192


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
    library = _C.__file__
    archs = archs_of(cuobjdump, library)
    return [kernel for arch in archs for kernel in kernels_of(cuobjdump, library, arch)]


def offenders(kernels: list[Kernel], what: str) -> list[str]:
    return [f"{k.arch} {k.name}: {k.counts[what]}" for k in kernels if k.counts[what] != 0]


def test_every_kernel_is_there_for_every_arch(cuobjdump: str) -> None:
    kernels = all_kernels(cuobjdump)
    built = _C.build_info()["cuda_archs"].replace("+PTX", "").split(";")
    assert {kernel.arch for kernel in kernels} == {f"sm_{arch}" for arch in built}
    for arch in built:
        names = [kernel.name for kernel in kernels if kernel.arch == f"sm_{arch}"]
        # Rules x (formats and the schedule), and for the norm: in float, in double, sum, verdict.
        assert len(names) == len(set(names)) == 2 * (6 + 1) + 4


def test_accesses_are_128_bits_wide(cuobjdump: str) -> None:
    updates = [kernel for kernel in all_kernels(cuobjdump) if kernel.kind == "update"]
    assert updates
    for kernel in updates:
        # Param and grad are loaded, param is stored: in each of six variants, or once for all.
        times = 1 if kernel.format.startswith("mixed") else 6
        assert kernel.counts["wide loads"] >= times * 2, kernel
        assert kernel.counts["wide stores"] >= times, kernel
    for kernel in all_kernels(cuobjdump):
        assert kernel.kind != "measure" or kernel.counts["wide loads"] >= 4, kernel


def test_no_local_memory(cuobjdump: str) -> None:
    kernels = all_kernels(cuobjdump)
    assert not offenders(kernels, "local")
    assert not [kernel for kernel in kernels if kernel.stack != 0]


def test_no_double_in_kernels_that_compute_in_float(cuobjdump: str) -> None:
    kernels = all_kernels(cuobjdump)
    assert not offenders([kernel for kernel in kernels if not kernel.is_double], "double")
    in_double = [k for k in kernels if k.kind == "update" and k.is_double]
    assert len(offenders(in_double, "double")) == len(in_double)  # else nothing was recognised


def test_updates_know_the_address_space(cuobjdump: str) -> None:
    kernels = [k for k in all_kernels(cuobjdump) if k.kind in ("update", "measure")]
    assert not offenders(kernels, "generic")


def test_registers(cuobjdump: str) -> None:
    for kernel in all_kernels(cuobjdump):
        is_rare = kernel.format == "mixed float64"
        most = MOST_REGISTERS_OF_MIXED_DOUBLE if is_rare else MOST_REGISTERS
        assert kernel.registers <= most, kernel
