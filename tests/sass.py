"""What the compiler made of the CUDA kernels, read from the extension's machine code.

`python tests/sass.py` prints a table: registers, and the accesses and instructions that
tests/test_sass.py demands or forbids.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FORMATS = {"f": "float32", "d": "float64", "NS_8BFloat16E": "bfloat16", "NS_7Float16E": "float16"}

INSTRUCTIONS = {
    "wide loads": r"\bLDG\.\S*\b128\b",
    "wide stores": r"\bSTG\.\S*\b128\b",
    "local": r"\b(?:LDL|STL)\b",
    "generic": r"\b(?:LD|ST)\.E\b",  # of an address space found out at run time
    "double": r"\bD(?:ADD|MUL|FMA|SETP|MNMX)\b|\bMUFU\.\w+64H\b|\.F64\b",
}


@dataclass
class Kernel:
    arch: str
    kind: str  # update, schedule, measure, total or judge
    rule: str
    format: str  # "float32", "mixed float32" ..., empty for kernels that have none
    registers: int
    stack: int  # bytes
    counts: dict[str, int]  # of INSTRUCTIONS

    @property
    def is_double(self) -> bool:
        return self.kind != "update" or "float64" in self.format  # sums of squares end in double

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.kind, self.rule, self.format)))


def find_cuobjdump() -> str | None:
    """From PATH, from the toolkit, or from the triton package, which brings one along."""
    folders = [os.environ.get("PATH", "")]
    folders += [f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def archs_of(cuobjdump: str, library: str) -> list[str]:
    """The architectures with machine code, such as sm_90."""
    said = _run(cuobjdump, "-lelf", library)
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", said)), key=lambda arch: int(arch[3:6]))


def kernels_of(cuobjdump: str, library: str, arch: str) -> Iterator[Kernel]:
    """Every kernel of the library for one architecture."""
    usage = _run(cuobjdump, "-arch", arch, "-res-usage", library)
    resources = dict(re.findall(r"Function (\w+):\s+(REG:\d+ STACK:\d+)", usage))
    sass = _run(cuobjdump, "-arch", arch, "-sass", library)
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        symbol = part.split(maxsplit=1)[0]
        kind = re.search(r"\d([a-z]+)_kernel", symbol)[1]
        family = re.search(r"_kernelINS_\d+(\w+?)Family", symbol)
        rule = family[1] if family else ""
        format_ = re.search(r"(Uniform|Mixed|kernel)I(f|d|NS_8BFloat16E|NS_7Float16E)E", symbol)
        mixed = "mixed " if format_ and format_[1] == "Mixed" else ""
        registers, stack = re.findall(r"\d+", resources[symbol])
        yield Kernel(
            arch,
            kind,
            rule,
            mixed + FORMATS[format_[2]] if format_ else "",
            int(registers),
            int(stack),
            {what: len(re.findall(which, part)) for what, which in INSTRUCTIONS.items()},
        )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    from fusedopt import _C

    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise SystemExit("there is no cuobjdump here; pip install triton brings one")
    columns = ["registers", "stack", *INSTRUCTIONS]
    print(f"{'':34}" + "".join(f"{column:>12}" for column in columns))
    for arch in archs_of(cuobjdump, _C.__file__):
        for kernel in sorted(kernels_of(cuobjdump, _C.__file__, arch), key=lambda k: k.name):
            numbers = [kernel.registers, kernel.stack, *kernel.counts.values()]
            title = f"{kernel.arch:7}{kernel.name:27}"
            print(title + "".join(f"{number:12}" for number in numbers))


if __name__ == "__main__":
    main()
