"""Builds fusedopt._C with ninja: plain C++ and pybind11, neither torch's headers nor its libraries.

Environment:
    CXX                the C++ compiler (default: c++)
    FUSEDOPT_SANITIZE  a value for -fsanitize=, e.g. "address,undefined" (for development)
"""

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86_64 = platform.machine().lower() in ("x86_64", "amd64")
MACOS = sys.platform == "darwin"

# Results must not depend on the compiler's mood: no contraction, no fast-math. The two flags after
# it change no value; they let square roots and selections be vectorised.
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc"]
EXACT = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
OPENMP = [] if MACOS else ["-fopenmp"]  # Apple's clang has none; the driver then uses one thread
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ],
}


def objects(build_dir: Path) -> list[tuple[Path, list[str]]]:
    """Sources and the flags each is compiled with."""
    import pybind11

    # The bindings as one source: reading pybind11's headers is most of what compiling them takes.
    bindings = build_dir / "bindings.cpp"
    parts = sorted(ROOT.glob("csrc/bindings/*.cpp"))
    text = "".join(f'#include "bindings/{part.name}"\n' for part in parts)
    if not bindings.exists() or bindings.read_text() != text:
        bindings.write_text(text)
    python = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    isas = ISA_FLAGS if X86_64 else {"baseline": []}
    return [
        (bindings, ["-O2", *(f"-isystem{path}" for path in python)]),
        *((Path(f"csrc/cpu/isa_{isa}.cpp"), EXACT + flags) for isa, flags in isas.items()),
        (Path("csrc/cpu/driver.cpp"), EXACT),
        (Path("csrc/cuda/unavailable.cpp"), EXACT),
    ]


def ninja_file(target: Path, build_dir: Path) -> str:
    """The build as ninja reads it, to run from the project's root."""
    compiler = os.environ.get("CXX", "c++")
    defines = ["-DFUSEDOPT_X86_64"] if X86_64 else []
    sanitize = os.environ.get("FUSEDOPT_SANITIZE")
    extra = [f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer"] if sanitize else []
    link = ["-shared", *OPENMP, *extra, *(["-undefined", "dynamic_lookup"] if MACOS else [])]
    common = [*COMMON, *OPENMP, *defines, *extra]

    def quoted(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        f"builddir = {quoted(build_dir)}",
        f"rule compile\n  command = {compiler} {' '.join(common)} $flags -MMD -MF $out.d "
        "-c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler} $in {' '.join(link)} -o $out",
    ]
    outputs = []
    for source, flags in objects(build_dir):
        output = quoted(build_dir / source.with_suffix(".o").name)
        outputs.append(output)
        lines.append(f"build {output}: compile {quoted(source)}\n  flags = {' '.join(flags)}")
    lines.append(f"build {quoted(target)}: link {' '.join(outputs)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """setuptools' build_ext with the compiling left to ninja."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        file = build_dir / "build.ninja"
        file.write_text(ninja_file(target, build_dir))
        command = [sys.executable, "-m", "ninja", "-f", str(file)]
        if self.parallel:
            command.append(f"-j{self.parallel}")
        subprocess.run(command, cwd=ROOT, check=True)


setup(ext_modules=[Extension("fusedopt._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
