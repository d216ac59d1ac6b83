"""The torch-free C++ tests of the core and the drivers, and what the compiler makes of csrc/."""

import ast
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.files import ROOT

# It runs compilers, and brings sanitizers of its own.
pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

HEADERS = sorted(str(path.relative_to(ROOT / "csrc")) for path in ROOT.glob("csrc/**/*.h"))
SUITES = [
    *("dtypes", "codes", "rules", "step_scalars", "power", "branch_free", "chunks", "layout"),
    *("overlap", "norm", "driver", "grid", "usual", "host_mirror", "table", "gpu", "counters"),
    "huge",
]
TESTS = sorted(ROOT.glob("tests/cpp/*.cpp"))
EMULATED = [ROOT / f"csrc/cuda/emulated{part}.cpp" for part in ("_float", "_double", "")]
CUDA = [*EMULATED, *(ROOT / f"csrc/cuda/{name}.cpp" for name in ("table", "driver"))]
# What is always inlined takes many minutes to compile with sanitizers. It is inlined for the sake
# of objects of other instruction sets, which have none.
KERNELS = [*EMULATED, ROOT / "csrc/cpu/isa_baseline.cpp"]
FAST = {source: ["-Dalways_inline=unused"] for source in KERNELS}
SANITIZE = ["-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover"]


def setup_constants() -> dict:
    """The flags in setup.py, without running it."""
    wanted = {"X86_64", "MACOS", "COMMON", "EXACT", "OPENMP", "ISA_FLAGS"}
    tree = ast.parse((ROOT / "setup.py").read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id in wanted]
    found = {"platform": platform, "sys": sys}
    exec(compile(tree, "setup.py", "exec"), found)
    return found


SETUP = setup_constants()
COMMON = [*SETUP["COMMON"], *SETUP["OPENMP"], "-Itests/cpp"]
ISAS = list(SETUP["ISA_FLAGS"]) if SETUP["X86_64"] else ["baseline"]
each_isa = pytest.mark.parametrize("isa", ISAS)


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def must_run(*command: object, **options: object) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def compiler() -> str:
    name = os.environ.get("CXX", "c++")
    if not shutil.which(name):
        pytest.skip(f"no C++ compiler: {name} is not there")
    return name


def object_of(program: Path, source: Path) -> Path:
    return program.with_name(f"{source.parent.name}_{source.stem}.o")


def built_object(folder: Path, source: Path) -> Path:
    return folder / f"{source.parent.name}_{source.name}.o"


def isa_source(isa: str) -> Path:
    return ROOT / f"csrc/cpu/isa_{isa}.cpp"


@contextmanager
def shared_folder(name: str, factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For what one worker of pytest-xdist builds for all, while those that need it wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def build(
    compiler: str, sources: dict[Path, list[str]], target: Path, built: Iterable[Path] = ()
) -> None:
    """Compiles each source with its flags beside `target` and links them with what is built."""
    objects = {source: object_of(target, source) for source in sources}

    def compile_one(source: Path) -> None:
        must_run(compiler, *COMMON, *sources[source], "-c", source, "-o", objects[source])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))
    link = [*SETUP["OPENMP"], *(f for f in next(iter(sources.values())) if "sanitize" in f)]
    must_run(compiler, *objects.values(), *built, *link, "-o", target)


@pytest.fixture(scope="session")
def emulated_build(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The objects of the build that `make test` has made for --device emulated; made if need be."""
    for tool in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(tool, reason=f"{tool} is a build requirement only")
    folder = Path("build/emulated")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", folder]
    environment = {**os.environ, "FUSEDOPT_CUDA": "emulated", "CXX": compiler}
    with shared_folder("emulated_build", tmp_path_factory):
        must_run(*command, "--build-lib", folder / "lib", env=environment)
    python = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    return ROOT / folder / f"temp.{python}"


@pytest.fixture(scope="session")
def as_built(compiler: str, emulated_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests with every instruction set, as setup.py compiles it."""
    sources = [*(isa_source(isa) for isa in ISAS), ROOT / "csrc/cpu/driver.cpp", *CUDA]
    built = [built_object(emulated_build, source) for source in sources]
    defines = ["-DFUSEDOPT_X86_64"] if SETUP["X86_64"] else []
    flags = [*SETUP["EXACT"], *defines, "-O1"]
    with shared_folder("as_built", tmp_path_factory) as folder:
        target = folder / "test_core"
        if not target.exists():
            build(compiler, dict.fromkeys(TESTS, flags), target, built)
    return target


@pytest.fixture(scope="session")
def sanitized(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same under ASan and UBSan, for the instruction set that every machine has."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text("int main() {}")
    if run(compiler, *SANITIZE, folder / "probe.cpp", "-o", folder / "probe").returncode != 0:
        pytest.skip(f"{compiler} has no address and undefined-behaviour sanitizers here")
    flags = [*SETUP["EXACT"], *SANITIZE]
    cpu = [isa_source("baseline"), ROOT / "csrc/cpu/driver.cpp"]
    sources = {source: [*flags, *FAST.get(source, [])] for source in [*CUDA, *cpu, *TESTS]}
    with shared_folder("sanitized", tmp_path_factory) as folder:
        target = folder / "test_core"
        if not target.exists():
            build(compiler, sources, target)
    return target


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(
    "program", ["as_built", pytest.param("sanitized", marks=pytest.mark.builds_sanitized)]
)
def test_core(program: str, suite: str, request: pytest.FixtureRequest) -> None:
    must_run(request.getfixturevalue(program), suite)


def test_no_suite_is_left_out() -> None:
    main = (ROOT / "tests/cpp/test_core.cpp").read_text()
    assert re.findall(r'\{"(\w+)", test_\1\}', main) == SUITES


@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone(compiler: str, header: str) -> None:
    includes = []
    if header.startswith("bindings/"):
        pybind11 = pytest.importorskip("pybind11", reason="pybind11 is a build requirement only")
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = [*SETUP["COMMON"], *includes, "-fsyntax-only", "-x", "c++", "-"]
    done = run(compiler, *flags, input=f'#include "{header}"\n')
    assert done.returncode == 0, done.stderr


def require(tool: str) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} (binutils) is not there")


@each_isa
def test_object_exports_its_entry_alone(emulated_build: Path, isa: str) -> None:
    # A weak symbol (an inline function or a template of a library) could be the copy that the
    # linker keeps for all: AVX-512 code on a machine without it.
    require("nm")
    built = built_object(emulated_build, isa_source(isa))
    lines = must_run("nm", "--defined-only", "--extern-only", built)
    symbols = [line.split()[-2:] for line in lines.splitlines()]
    assert len(symbols) == 1, symbols
    kind, name = symbols[0]
    assert kind == "T"
    assert f"kernels_{isa}" in name


@pytest.mark.parametrize(("isa", "register"), [("avx2", "ymm"), ("avx512", "zmm")])
def test_loops_are_vectorised(emulated_build: Path, isa: str, register: str) -> None:
    # A square root is in every loop of Adam and of the rules that choose at run time, and in
    # nothing else. What encodes groups of codes shifts the bits of floats.
    # What is left of a tensor is computed in whole registers too, so there is no other width.
    require("objdump")
    if isa not in ISAS:
        pytest.skip(f"no {isa} in builds for {platform.machine()}")
    built = built_object(emulated_build, isa_source(isa))
    code = must_run("objdump", "-dC", "--no-show-raw-insn", built)
    roots = {}
    shifts = {}
    for function in re.split(r"\n\n", code):
        name = re.search(
            r"<.*\bupdate\w*<fusedopt::(Adam|OneOf)(?:<[^()]*>)?, (float|double)(?:, \w+)?>\(.*>:",
            function,
        )
        codes = re.search(r"<.*\bencode<fusedopt::(\w+)>\(.*>:", function)
        found = re.findall(r"\bv?sqrt([ps][sd])\s.*%([xyz]mm)", function)
        assert name or not found, function[:300]
        if name:
            roots.setdefault(name.groups(), set()).update(found)
        if codes:
            shifts.setdefault(codes[1], set()).update(
                re.findall(r"\bvpslld\s.*%([xyz]mm)", function)
            )
    suffixes = {"float": "ps", "double": "pd"}
    assert roots == {
        (rule, t): {(suffixes[t], register)} for rule in ("Adam", "OneOf") for t in suffixes
    }
    assert shifts == {kind: {register} for kind in ("SignedCode", "PositiveCode")}
