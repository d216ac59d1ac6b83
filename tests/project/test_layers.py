"""The layers of csrc/: what each folder must not know of, as words that must not occur there."""

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

import fusedopt
from support.files import ROOT
from support.tensors import by_id

# Of the sources and the build alone.
pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

SOURCES = sorted(path for path in ROOT.glob("csrc/**/*") if path.is_file())


def code_of(path: Path) -> str:
    """The file without comments and string literals; includes stay."""
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", " ", text)
    return re.sub(r'^(?!\s*#)(.*?)"(?:[^"\\\n]|\\.)*"', r"\1 ", text, flags=re.MULTILINE)


PYTHON = r"pybind11|\bPy[A-Z]\w*|\bpy::|Python\.h|DLPack|DLTensor|dlpack"
OPENMP = r"#\s*pragma\s+omp|\bomp_|<omp\.h>|_OPENMP"
CUDA_RUNTIME = (
    r"\bcuda[A-Z]\w*|cuda_runtime|<<<|\b(?:blockIdx|threadIdx|blockDim|gridDim)\b"
    r"|__(?:global|grid_constant|launch_bounds|shared)__"
)
FORMULAS = r"\b(?:sqrt|fma|pow|exp|log|rsqrt)[fl]?\s*\("

# clang-format sets pointers apart from products: `T* x` and `a * b`. The states of an element are
# an array, and so are the scalars of a rule alone.
MEMORY = (
    r"\w\*|\b(?!(?:state|own)\[)\w+\[|\bnew\b|malloc|mem(?:cpy|set)|std::vector"
    r"|\b(?:load|store)\s*[<(]"
)
TORCH = r"#\s*include\s*[<\"](?:torch|ATen|c10|caffe2)/|\b(?:at|c10|torch)::|\b(?:TORCH|C10)_\w+"
KERNELS = r"isa_kernels|cpu/isa\.h"

# What several numbers in a register have in the place of the operators of one.
OPERATIONS = {"vec.h"}

# What must not occur, where, and why.
RULES = {
    "rules-no-memory": ("core/rules", MEMORY),
    "rules-no-dtypes": ("core/rules", r"\bDType\b|BFloat16|Float16|Storage|dtypes\.h"),
    "rules-no-threads": ("core/rules", f"thread|atomic|mutex|{OPENMP}|{CUDA_RUNTIME}"),
    "core-no-python": ("core", PYTHON),
    "core-no-openmp": ("core", OPENMP),
    "core-no-cuda-runtime": ("core", CUDA_RUNTIME),
    "cpu-no-formulas": ("cpu", FORMULAS),
    "cpu-no-python": ("cpu", PYTHON),
    "cpu-no-cuda-runtime": ("cpu", CUDA_RUNTIME),
    "cuda-no-formulas": ("cuda", FORMULAS),
    "cuda-no-python": ("cuda", PYTHON),
    "bindings-no-formulas": ("bindings", FORMULAS),
    "bindings-no-kernels": ("bindings", f"{OPENMP}|{CUDA_RUNTIME}|{KERNELS}"),
    "no-torch": (".", TORCH),
}


@pytest.mark.parametrize(("folder", "forbidden"), **by_id(RULES))
def test_layer(folder: str, forbidden: str) -> None:
    files = [path for path in SOURCES if path.is_relative_to(ROOT / "csrc" / folder)]
    assert files
    for path in files:
        if forbidden is FORMULAS and path.name in OPERATIONS:
            continue
        found = re.findall(forbidden, code_of(path))
        assert not found, f"{path.relative_to(ROOT)}: {found}"


LAYERS = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "bindings": {"core", "bindings"},
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "csrc")))
def test_includes_go_down(path: Path) -> None:
    includes = re.findall(r'#\s*include\s*"(\w+)/', path.read_text())
    assert set(includes) <= LAYERS[path.relative_to(ROOT / "csrc").parts[0]]


def test_rules_include_no_more_than_arithmetic() -> None:
    for path in ROOT.glob("csrc/core/rules/*.h"):
        includes = re.findall(r'#\s*include\s*[<"](.*?)[>"]', path.read_text())
        allowed = {"two_float.h", "hyper.h", "lanes.h", "macros.h", "normal.h", "power.h"}
        allowed |= {"state_kind.h"}
        allowed |= {"rules/caution.h", "rules/moments.h", "rules/shared_scalars.h"}
        if path.name == "cautious.h":  # made of rules
            allowed |= {"rules/adam.h", "rules/sgd.h"}
        assert set(includes) <= {"cmath", *(f"core/{name}" for name in allowed)}, path.name


def test_one_macro() -> None:
    macros = {m for path in SOURCES for m in re.findall(r"#\s*define\s+(\w+)", code_of(path))}
    assert macros == {"FUSEDOPT_HD"}


def test_the_cuda_runtime_is_for_device_sources() -> None:
    # All else of the driver is plain C++, which runs under sanitizers without a GPU.
    for path in ROOT.glob("csrc/cuda/*"):
        found = re.findall(CUDA_RUNTIME, code_of(path))
        if path.suffix in (".cpp", ".h"):
            assert not found, f"{path.name}: {found}"
    assert re.search(CUDA_RUNTIME, code_of(ROOT / "csrc/cuda/runtime.cu"))


def test_where_host_and_device_differ() -> None:
    # In conversions, accesses, and what takes a branch or a mode elsewhere; formulas are one text.
    differing = {path for path in SOURCES if "__CUDA_ARCH__" in code_of(path)}
    names = {str(path.relative_to(ROOT / "csrc")) for path in differing}
    of_core = {"core/branch_free.h", "core/flush.h", "core/narrow.h"}
    assert "core/narrow.h" in names
    assert names <= of_core | {"cuda/access.h", "cuda/stage.h"}


SECTIONS = {
    "csrc/bindings": "The torch side",
    "csrc/cuda": "The CUDA driver",
    "tests/support": "Tests",
}


@pytest.mark.parametrize(("folder", "section"), SECTIONS.items())
def test_contributing_names_every_file(folder: str, section: str) -> None:
    """And no file that is not there: its tables are how a stranger finds the room for a change."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(\w+\.(?:\w+|\*))`", "\n".join(first_cells)))
    files = {path.name for path in (ROOT / folder).iterdir() if path.name != "__init__.py"}
    files.discard("__pycache__")
    covered = {name: {file for file in files if fnmatch(file, name)} for name in named}
    assert all(covered.values()), covered
    assert set().union(*covered.values()) == files


def needed_libraries() -> list[str]:
    """Names of the libraries that the extension asks the loader for."""
    if not shutil.which("objdump"):
        pytest.skip("objdump (binutils) is not there")
    command = ["objdump", "-p", fusedopt._C.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.findall(r"NEEDED\s+(\S+)", done.stdout)


def test_the_extension_does_not_link_torch() -> None:
    needed = needed_libraries()
    assert any(name.startswith("libstdc++") for name in needed), needed  # else objdump said nothing
    assert not [name for name in needed if re.search("torch|c10|cuda|python", name)], needed


def test_the_extension_shares_torchs_thread_pool() -> None:
    # torch's wheels carry libgomp under its plain name; another OpenMP would be a second pool.
    if not fusedopt._C.build_info()["openmp"]:
        pytest.skip("built without OpenMP")
    assert [name for name in needed_libraries() if re.search(r"lib[gi]?omp", name)] == [
        "libgomp.so.1"
    ]
