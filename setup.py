"""Builds fusedopt._C with ninja: plain C++, CUDA and pybind11, no headers or libraries of torch.

Environment:
    CXX                   the C++ compiler (default: c++)
    FUSEDOPT_CUDA         1: build for CUDA or fail; 0: for the CPU only (default: for CUDA if nvcc
                          is found); emulated: CUDA's code on the host (for tests)
    CUDA_HOME             the CUDA toolkit (default: that of nvcc on PATH, then the usual places)
    FUSEDOPT_CUDA_ARCHS   compute capabilities, e.g. "80;90" or "90+PTX", or all: what this nvcc and
                          ALL_ARCHS share (default: those of the machine's GPUs; without one, all)
    FUSEDOPT_STRICT       1: warnings are errors, and so are spills and float64 arithmetic in the
                          float32 kernels (for development)
    FUSEDOPT_SANITIZE     a value for -fsanitize=, e.g. "address,undefined" (for development)
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86_64 = platform.machine().lower() in ("x86_64", "amd64")
MACOS = sys.platform == "darwin"
STRICT = os.environ.get("FUSEDOPT_STRICT") == "1"
SANITIZE = os.environ.get("FUSEDOPT_SANITIZE")

# Results must not depend on the compiler: no contraction, no fast-math. The pragmas that host
# compilers do not know are nvcc's.
COMMON = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
          "-Wno-unknown-pragmas", "-Wno-psabi", "-Icsrc"]  # fmt: skip
# The two flags about mathematics change no value; they let square roots and selections be
# vectorised. GCC does not see that operands which are not there are neither loaded nor used.
EXACT = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-uninitialized"]
ISA = ["-fno-exceptions"]  # whose symbols could be those of another instruction set
OPENMP = [] if MACOS else ["-fopenmp"]  # Apple's clang has none; the driver then uses one thread
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ],
}

CUDA_COMMON = ["-std=c++17", "-O3", "-Icsrc",
               "-Xcompiler=-fPIC,-fvisibility=hidden",
               "-Xcompiler=-Wall,-Wextra,-Wno-unknown-pragmas"]  # fmt: skip
CUDA_EXACT = ["-fmad=false", "-prec-div=true", "-prec-sqrt=true"]
CUDA_STRICT = [
    "-Werror=all-warnings",
    "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage,-Werror",
]
CUDA_NO_DOUBLE = ["-Xptxas=--warn-on-double-precision-use"]
# Computation in float flushes subnormal numbers. Sums of squares begin in it and end in double.
CUDA_WITHOUT_DOUBLE = ("float.cu", "float_codes.cu", "usual.cu", "usual_codes.cu")
CUDA_FLUSHING = (*CUDA_WITHOUT_DOUBLE, "grad_norm.cu")
ALL_ARCHS = ["80", "86", "89", "90", "100", "120"]
# Where a compiler comes from if FUSEDOPT_CUDA=1 asks for one that the machine does not have.
CUDA_WHEELS = ["nvidia-cuda-nvcc==13.0.*", "nvidia-cuda-runtime==13.0.*", "nvidia-cuda-crt==13.0.*",
               "nvidia-nvvm==13.0.*"]  # fmt: skip


def cuda_mode() -> str:
    mode = os.environ.get("FUSEDOPT_CUDA", "")
    if mode not in ("", "0", "1", "emulated"):
        raise SystemExit(f"FUSEDOPT_CUDA must be 0, 1 or emulated, not {mode!r}")
    return mode


def find_toolkit() -> Path | None:
    """The folder with bin/nvcc and the libraries, or None."""
    home = os.environ.get("CUDA_HOME")
    if home and not Path(home, "bin/nvcc").exists():
        raise SystemExit(f"CUDA_HOME is {home}, but there is no bin/nvcc in it")
    if not home and (nvcc := shutil.which("nvcc")):
        # What is on PATH may be a link or a wrapper; nvcc itself says where it is at home.
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", said.stdout + said.stderr, re.MULTILINE)
        home = top[1].strip() if top else None
    wheels = [Path(folder, "nvidia/cu13") for folder in sys.path]
    for folder in [home] if home else ["/usr/local/cuda", "/opt/cuda", *wheels]:
        if Path(folder, "bin/nvcc").exists():
            return Path(folder).resolve()
    return None


def toolkit() -> Path | None:
    """The toolkit to build with, or None for a build without CUDA."""
    if cuda_mode() in ("0", "emulated") or MACOS:
        return None
    found = find_toolkit()
    if found is None and cuda_mode() == "1":
        raise SystemExit("FUSEDOPT_CUDA=1, but no nvcc was found: set CUDA_HOME or PATH")
    if found is None:
        print("fusedopt: no nvcc in CUDA_HOME, on PATH or in the usual places: building for the CPU"
              " only", file=sys.stderr)  # fmt: skip
    return found


def cuda_archs(nvcc: Path) -> list[str]:
    """Compute capabilities to build for, such as "90", the last perhaps with "+PTX"."""
    wanted = os.environ.get("FUSEDOPT_CUDA_ARCHS")
    if wanted and wanted != "all":
        archs = re.split(r"[;, ]+", wanted.replace(".", "").strip())
        if bad := [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch)]:
            raise SystemExit(f"FUSEDOPT_CUDA_ARCHS: {bad[0]!r} is not of the form 90 or 90+PTX")
        return archs
    if wanted != "all" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True)
        if present := re.findall(r"^(\d+)\.(\d)$", said.stdout, re.MULTILINE):
            return sorted({major + minor for major, minor in present}, key=int)
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    archs = [arch for arch in ALL_ARCHS if f"compute_{arch}\n" in known]
    if not archs:
        raise SystemExit(f"{nvcc} knows none of the architectures {', '.join(ALL_ARCHS)}: it is "
                         "too old; use another, or FUSEDOPT_CUDA=0")  # fmt: skip
    return [*archs[:-1], f"{archs[-1]}+PTX"]


def arch_flags(archs: list[str]) -> list[str]:
    """nvcc's flags. Most of its time goes into PTX, which is made once for all from 10.0 on, and
    once for all before: nvcc 13.0 makes the same for them, and the same machine code from it.
    """
    numbers = [arch.removesuffix("+PTX") for arch in archs]
    plain = sorted((number for number in numbers if number.isdigit()), key=int)
    lowest = {int(number) >= 100: number for number in reversed(plain)}
    flags = []
    for arch, number in zip(archs, numbers, strict=True):
        ptx = lowest[int(number) >= 100] if number.isdigit() else number  # 90a shares with none
        ptx = f"compute_{ptx}"
        codes = [f"sm_{number}", *([ptx] if arch.endswith("+PTX") else [])]
        flags += [f"-gencode=arch={ptx},code={code}" for code in codes]
    return flags


def cpp_sources(build_dir: Path, with_cuda: bool) -> list[tuple[Path, list[str]]]:
    """C++ sources and the flags each is compiled with."""
    import pybind11

    # The bindings as one source: reading pybind11's headers is most of what compiling them takes.
    bindings = build_dir / "bindings.cpp"
    parts = sorted(ROOT.glob("csrc/bindings/*.cpp"))
    text = "".join(f'#include "bindings/{part.name}"\n' for part in parts)
    if not bindings.exists() or bindings.read_text() != text:
        bindings.write_text(text)
    python = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    isas = ISA_FLAGS if X86_64 else {"baseline": []}
    cuda = ["table", "driver"] if with_cuda else ["unavailable"]
    if cuda_mode() == "emulated":
        cuda = ["emulated_float", "emulated_double", "table", "driver", "emulated"]
    # With all of an element in one function, a file takes minutes, and with sanitizers more than
    # eight.
    in_pieces = "-Dalways_inline=unused"
    sanitized = ["-Og", in_pieces] if SANITIZE else []
    # For tests: -O2 takes longer to compile than the tests gain by it. And where g++ 12 vectorizes
    # straight code, it loses the rounding of a double to a float (test_first_averages() in
    # tests/cpp/test_gpu.cpp).
    quick = sanitized or ["-O1", in_pieces, "-fno-tree-slp-vectorize"]
    quick = quick if cuda_mode() == "emulated" else []
    # Without NDEBUG, pybind11 asks at every count of references whether the GIL is held.
    binding = ["-O1"] if SANITIZE else ["-O2", "-DNDEBUG"]
    if cuda_mode() == "emulated":
        binding.append("-DFUSEDOPT_EMULATED")
    return [
        (bindings, [*binding, *(f"-isystem{path}" for path in python)]),
        *(
            (Path(f"csrc/cpu/isa_{isa}.cpp"), EXACT + ISA + flags + sanitized)
            for isa, flags in isas.items()
        ),
        (Path("csrc/cpu/driver.cpp"), EXACT),
        *((Path(f"csrc/cuda/{name}.cpp"), EXACT + quick) for name in cuda),
    ]


def cuda_sources(nvcc: Path) -> list[tuple[Path, list[str]]]:
    """CUDA sources and the flags each is compiled with."""
    archs = cuda_archs(nvcc)
    common = [*CUDA_COMMON, *CUDA_EXACT, *arch_flags(archs), *(CUDA_STRICT if STRICT else [])]
    common.append(f"-DFUSEDOPT_CUDA_ARCHS='\"{';'.join(archs)}\"'")
    if "CXX" in os.environ:
        common.append(f"-ccbin={os.environ['CXX']}")
    sources = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/cuda/*.cu"))
    sources.sort(key=lambda path: "float" not in path.name)  # the longest first

    def flags(name: str) -> list[str]:
        flush = f"-ftz={'true' if name in CUDA_FLUSHING else 'false'}"
        return [flush, *(CUDA_NO_DOUBLE if STRICT and name in CUDA_WITHOUT_DOUBLE else [])]

    return [(source, common + flags(source.name)) for source in sources]


def ninja_file(target: Path, build_dir: Path) -> str:
    """The build as ninja reads it, to run from the project's root."""
    compiler = os.environ.get("CXX", "c++")
    defines = ["-DFUSEDOPT_X86_64"] if X86_64 else []
    extra = [f"-fsanitize={SANITIZE}", "-g", "-fno-omit-frame-pointer"] if SANITIZE else []
    link = ["-shared", *OPENMP, *extra, *(["-undefined", "dynamic_lookup"] if MACOS else [])]
    common = [*COMMON, *OPENMP, *defines, *extra, *(["-Werror"] if STRICT else [])]
    home = toolkit()
    sources = [(path, "compile", flags) for path, flags in cpp_sources(build_dir, home is not None)]
    if home is not None:
        nvcc = home / "bin/nvcc"
        sources += [(path, "compile_cuda", flags) for path, flags in cuda_sources(nvcc)]
        libraries = home / ("lib64" if (home / "lib64").exists() else "lib")
        link += [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        link.append("-Wl,--exclude-libs,ALL")

    def quoted(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    depfile = "-MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    lines = [
        f"builddir = {quoted(build_dir)}",
        f"rule compile\n  command = {compiler} {' '.join(common)} $flags {depfile}",
        f"rule link\n  command = {compiler} $in {' '.join(link)} -o $out",
    ]
    if home is not None:
        lines.append(f"rule compile_cuda\n  command = {nvcc} $flags {depfile}")
    outputs = []
    for source, rule, flags in sources:
        output = quoted(build_dir / f"{source.parent.name}_{source.name}.o")
        outputs.append(output)
        lines.append(f"build {output}: {rule} {quoted(source)}\n  flags = {' '.join(flags)}")
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


def index_readme() -> str:
    """README for an index page, which has none of the repository's files.

    Images are left out, and links to files are their words alone.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[.*\]\(.*\)\n\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


setup(
    long_description=index_readme(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("fusedopt._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
    setup_requires=CUDA_WHEELS if cuda_mode() == "1" and find_toolkit() is None else [],
)
