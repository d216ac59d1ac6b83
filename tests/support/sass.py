"""What the compiler made of the CUDA kernels, read from the extension's machine code.

`python tests/support/sass.py` prints a table: registers, the accesses and instructions that
tests/cuda/test_sass.py demands or forbids, and for the update kernels what they have to do for an
element and how much they have under way.

An ordinary step of a setting, AdamW in bfloat16, say, is known by what it must do in the kernel's
main loop: so many loads, stores, conversions and square roots, and nothing that only rare works and
elements have. The shortest way round the loop that does at least that is taken for the ordinary
way. Whatever is added for each element lies on it, branches too.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

RULES = ("Sgd", "Adam", "OneOf")  # of kernels; several share that of OneOf
TYPES = {"f": "float32", "d": "float64"}

INSTRUCTIONS = {
    "wide copies": r"\bLDGSTS\.\S*\b128\b",
    "wide loads": r"\bLDG\.\S*\b128\b",
    "wide stores": r"\bSTG\.\S*\b128\b",
    "local": r"\b(?:LDL|STL)\b",
    "generic": r"\b(?:LD|ST)\.E\b",  # of an address space found out at run time
    "double": r"\bD(?:ADD|MUL|FMA|SETP|MNMX)\b|\bMUFU\.\w+64H\b|\.F64\b",
}

# What a thread does for its elements in the main loop of Adam's kernel, at least, or not at all:
# AdamW, whose text has so many fused multiplications and additions for an element.
ELEMENTS = 8
COPY = r"\bLDGSTS\.\S*128\b"
HALF_COPY = r"\bLDGSTS\.\S*64\b"
WIDE_STORE = r"\bSTG\.E\.128\b"
HALF_STORE = r"\bSTG\.E\.64\b"
PACK = r"\bF2FP\.BF16\b"
UPPER_HALF = r"\b0xffff0000\b"  # one of two numbers in bfloat16, or one that is rounded
FMA = r"\bFFMA\b"
MUL = r"\bFMUL\b"
DRAW = r"\b0x846ca68b\b|-0x7b935975\b"  # a factor of the hash
ENCODED = r"\b0xae000000\b|-0x52000000\b"  # in a line from places to codes
DECODED = r"\b0x51005100\b"  # and in one from codes to places
SHUFFLE = r"\bSHFL\b"
SIGNED_BYTE = r"\bPRMT\b.*\b0x(?:9914|aa24|bb34)\b"  # with copies of its upper bit
# Halves, views at odd places, elements that are done again: nothing of the settings below.
RARE_IN_CODES = r"\bLDG\b|\bF2FP\.F16\b|\bHADD2\b|\bSTG\.E\.U(?:8|16)\b"
RARE = RARE_IN_CODES + r"|\bSTG\.E desc|\bSTG\.E \["
RARE_IN_USUAL = r"\bLDG\b|\bSTG\.E\.U(?:8|16)\b"
ADAMW = {FMA: 14 * ELEMENTS}
WHOLE = ADAMW | {HALF_COPY: 0, HALF_STORE: 0}
Q8 = {COPY: 2, HALF_COPY: 3, WIDE_STORE: 1, HALF_STORE: 3, SHUFFLE: 6,
      ENCODED: 2 * ELEMENTS, DECODED: ELEMENTS, SIGNED_BYTE: 6}  # fmt: skip
SETTINGS = {
    "fp32": WHOLE | {COPY: 8, WIDE_STORE: 6, PACK: 0, UPPER_HALF: 0, DRAW: 0},
    "bf16": WHOLE | {COPY: 4, WIDE_STORE: 3, PACK: 12, UPPER_HALF: 16, DRAW: 0},
    "bf16, stochastic": WHOLE | {COPY: 4, WIDE_STORE: 3, PACK: 12, UPPER_HALF: 24, DRAW: 4},
    "split, bf16 states": WHOLE | {COPY: 5, WIDE_STORE: 4, PACK: 8, UPPER_HALF: 24, DRAW: 0},
    "split8, bf16 states, stochastic": ADAMW
    | {COPY: 4, HALF_COPY: 1, WIDE_STORE: 3, HALF_STORE: 1, PACK: 4, UPPER_HALF: 24, DRAW: 4,
       SIGNED_BYTE: 6},
    "fp32 masters": ADAMW
    | {COPY: 6, HALF_COPY: 2, WIDE_STORE: 6, HALF_STORE: 2, PACK: 4, UPPER_HALF: 4, DRAW: 0},
    "fp32, bf16 states": ADAMW
    | {COPY: 4, HALF_COPY: 4, WIDE_STORE: 2, HALF_STORE: 4, PACK: 8, UPPER_HALF: 8, DRAW: 0},
    # Eight lanes find the largest of a group. Places are found for two elements at a time.
    "split8, q8 states": ADAMW | Q8 | {DRAW: 0},
    "split8, q8 states, stochastic": ADAMW | Q8 | {DRAW: 4},
}  # fmt: skip
# The usual steps of Adam (csrc/cuda/usual.h) by their numbers, and bytes of a stage for a thread.
USUAL = {
    "bf16": 4 * 16,
    "fp16": 4 * 16,
    "fp32, bf16 states": 2 * 32 + 2 * 16,
    "bf16, fp32 states": 2 * 16 + 2 * 32,
    "fp32 masters": 16 + 3 * 32,
    "split, bf16 states": 5 * 16,
    "split8, bf16 states": 5 * 16,
    "bf16, average": 4 * 16 + 32,
    "split, bf16 states, average": 5 * 16 + 32,
    "split8, q8 states, stochastic": 5 * 16,
    "split8, q8 states": 5 * 16,
    "bf16, q8 states, stochastic": 4 * 16,
    "fp32, q8 states, stochastic": 2 * 32 + 2 * 16,
}
# Their ordinary ways; where it is found out at run time, with draws and without.
DRAWN = [name for name in USUAL if "q8" not in name and name not in ("fp16", "fp32 masters")]


def muls(kernel: str) -> int:
    """Multiplications for an element, of which decoupled decay takes one."""
    return (12 if kernel.startswith("fp32") else 11) if "q8" in kernel else 9


USUAL_SETTINGS = {
    f"usual {name}": (
        kernel,
        {FMA: 13 * ELEMENTS, MUL: muls(kernel) * ELEMENTS, DRAW: draws,
         SHUFFLE: 6 if "q8" in name else 0},
    )
    for kernel in USUAL
    for name, draws in (
        [(kernel, 4)]
        if kernel.endswith("stochastic")
        else [(kernel, 0), *([(f"{kernel}, stochastic", 4)] if kernel in DRAWN else [])]
    )
}  # fmt: skip


def kernel_of(setting: str) -> str:
    if setting in USUAL_SETTINGS:
        return f"usual Adam float32 {list(USUAL).index(USUAL_SETTINGS[setting][0])}"
    return f"{'codes' if 'q8' in setting else 'update'} Adam float32"


# What the norm's loops do at a time.
WIDE_LOAD = r"\bLDG\.\S*\b128\b"
NORM_LOADS = 4

# Of a stage, for each thread.
STAGED_BYTES = {
    "fp32": 4 * 32,
    "bf16": 4 * 16,
    "bf16, stochastic": 4 * 16,
    "split, bf16 states": 5 * 16,
    "split8, bf16 states, stochastic": 5 * 16,
    "fp32 masters": 16 + 3 * 32,
    "fp32, bf16 states": 2 * 32 + 2 * 16,
    "split8, q8 states": 5 * 16,
    "split8, q8 states, stochastic": 5 * 16,
}


def tuning(name: str) -> int:
    """A constant of csrc/cuda/tuning.h."""
    text = (Path(__file__).parents[2] / "csrc/cuda/tuning.h").read_text()
    return int(re.search(rf"\b{name} = (\d+);", text)[1])


STAGES, BLOCK_THREADS = tuning("kStages"), tuning("kBlockThreads")
# Of an SM: bytes of shared memory and threads.
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}


@dataclass
class Block:
    """Instructions between one branch and the next."""

    instructions: list[str]
    successors: list[int]


@dataclass
class Kernel:
    arch: str
    kind: str  # update, codes, usual, step_scalars, sum_squares or finalize
    rule: str
    type: str  # "float32", "float64", empty for kernels that have none
    usual: str  # the number of a usual step
    registers: int
    stack: int  # bytes
    counts: dict[str, int]  # of INSTRUCTIONS
    code: list[tuple[int, str]] = field(repr=False)  # addresses and instructions

    @property
    def is_double(self) -> bool:
        return self.kind in ("step_scalars", "finalize") or self.type == "float64"

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.kind, self.rule, self.type, self.usual)))

    @property
    def number(self) -> int:
        return int(re.sub(r"\D", "", self.arch))

    def under_way(self, setting: str) -> int:
        """Bytes that an SM's threads have asked for, in a setting of Adam's."""
        is_usual = setting in USUAL_SETTINGS
        bytes_ = USUAL[USUAL_SETTINGS[setting][0]] if is_usual else STAGED_BYTES[setting]
        stage = bytes_ * BLOCK_THREADS
        block = STAGES * stage + 1024  # that CUDA takes itself
        by_registers = 65536 // (BLOCK_THREADS * -(-self.registers // 8) * 8)
        by_threads = THREADS[self.number] // BLOCK_THREADS
        return STAGES * stage * min(by_registers, by_threads, SHARED[self.number] * 1024 // block)

    def ordinary_way(self, setting: str) -> tuple[int, int]:
        """Instructions and branches for ELEMENTS elements, copies for a later stage included."""
        rare = RARE_IN_CODES if self.kind == "codes" else RARE
        if setting in USUAL_SETTINGS:
            rare = RARE_IN_USUAL
        required = (SETTINGS | {name: way for name, (_, way) in USUAL_SETTINGS.items()})[setting]
        found = shortest_way(*main_loop(self.code), required, rare)
        if found is None:
            raise AssertionError(
                f"{self.arch} {self.name}: no way round the main loop is {setting}"
            )
        return found

    def norm_ways(self) -> dict[str, float]:
        """Instructions for an element in the loops of sum_squares, by their numbers' format."""
        blocks = blocks_of(self.code)
        found = {}
        for first, last, text in loops_of(blocks):
            if len(re.findall(WIDE_LOAD, text)) < NORM_LOADS:
                continue
            inside = {at: block for at, block in blocks.items() if first <= at <= last}
            way = shortest_way(inside, first, {WIDE_LOAD: NORM_LOADS})
            assert way is not None
            of_pairs = {"fp16": r"\bHADD2\b", "bf16": UPPER_HALF}
            names = [name for name, what in of_pairs.items() if re.search(what, text)]
            wide = {"float32": "fp32", "float64": "fp64"}[self.type]
            size = 2 if names else 8 if self.is_double else 4
            found[(names or [wide])[0]] = way[0] * size / (16 * NORM_LOADS)
        return found


def shortest_way(
    blocks: dict[int, Block], first: int, required: dict[str, int], rare: str | None = None
) -> tuple[int, int] | None:
    """Instructions and branches once round a loop that does at least this (0: nothing of it)."""
    ends = []
    ways = {first: {(0,) * len(required): (0, 0)}}  # to each block, by what was done before it
    for at in sorted(blocks):
        text = "\n".join(blocks[at].instructions)
        if rare is not None and re.search(rare, text):
            continue
        counts = [len(re.findall(what, text)) for what in required]
        for done, (length, branches) in ways.get(at, {}).items():
            least = required.values()
            if any(n == 0 and c > 0 for c, n in zip(counts, least, strict=True)):
                continue
            now = tuple(min(d + c, n) for d, c, n in zip(done, counts, least, strict=True))
            jumps = sum("BRA" in each for each in blocks[at].instructions)
            way = (length + len(blocks[at].instructions), branches + jumps)
            for after in blocks[at].successors:
                if after == first and now == tuple(required.values()):
                    ends.append(way)
                if after > at:
                    known = ways.setdefault(after, {}).get(now)
                    if known is None or way < known:
                        ways[after][now] = way
    return min(ends, default=None)


def blocks_of(code: list[tuple[int, str]]) -> dict[int, Block]:
    """The blocks of a kernel, by their addresses.

    Where the threads of a warp have parted (BRA.DIV), they do elsewhere one after the other what
    they would have done together, which is no ordinary way.
    """
    jump = r"(?:@!?U?P\w+ )?BRA(?!\.DIV)\S* .*?\b0x([0-9a-f]+)"
    addresses = [address for address, _ in code]
    starts = {0}
    for (_, text), after in zip(code, [*addresses[1:], None], strict=True):
        if found := re.match(jump, text):
            starts |= {int(found[1], 16), after}
        elif re.match(r"(?:@!?U?P\w+ )?(?:EXIT|RET|BSYNC)\b", text):
            starts.add(after)
    blocks: dict[int, Block] = {}
    current = 0
    for (address, text), after in zip(code, [*addresses[1:], None], strict=True):
        if address in starts:
            current = address
            blocks[current] = Block([], [])
        blocks[current].instructions.append(text)
        if after is None or after in starts:
            found = re.match(jump, text)
            falls = found is None or text.startswith("@") or re.search(r"BRA\S* !?U?P", text)
            ends = re.match(r"(?:EXIT|RET)\b", text)
            successors = [int(found[1], 16)] if found else []
            blocks[current].successors = successors + (
                [after] if falls and not ends and after is not None else []
            )
    return blocks


def loops_of(blocks: dict[int, Block]) -> Iterator[tuple[int, int, str]]:
    """First and last block of loops, and what lies between."""
    for last, block in blocks.items():
        for first in block.successors:
            if first <= last:  # backwards
                inside = (blocks[at].instructions for at in blocks if first <= at <= last)
                yield first, last, "\n".join(text for texts in inside for text in texts)


def main_loop(code: list[tuple[int, str]]) -> tuple[dict[int, Block], int]:
    """The blocks of the largest loop that copies and stores, and where it starts."""
    blocks = blocks_of(code)
    loops = [(last - first, first, last) for first, last, text in loops_of(blocks)
             if "LDGSTS" in text and "STG" in text]  # fmt: skip
    for _, first, last in sorted(loops, reverse=True):
        inside = {at: block for at, block in blocks.items() if first <= at <= last}
        if shortest_way(inside, first, {}) is not None:
            return inside, first
    raise AssertionError("there is no loop that copies and stores")


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
        kind = re.search(r"\d([a-z_]+)_kernel", symbol)[1]
        # One rule, or OneOf several, and a type.
        types = re.search(
            rf"_kernelI(?:NS_\d+({'|'.join(RULES)})(?:I\w+?EEE)?E)?([fd])?(?:Li(\d+)E)?E", symbol
        )
        registers, stack = re.findall(r"\d+", resources[symbol])
        code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", part)
        yield Kernel(
            arch,
            kind,
            types[1] or "" if types else "",
            TYPES.get(types[2] or "", "") if types else "",
            types[3] or "" if types else "",
            int(registers),
            int(stack),
            {what: len(re.findall(which, part)) for what, which in INSTRUCTIONS.items()},
            [(int(address, 16), text) for address, text in code],
        )


def all_kernels_of(cuobjdump: str, library: str) -> list[Kernel]:
    archs = archs_of(cuobjdump, library)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of the time is cuobjdump's
        found = pool.map(lambda arch: list(kernels_of(cuobjdump, library, arch)), archs)
        return [kernel for kernels in found for kernel in kernels]


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(library: str) -> None:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise SystemExit("there is no cuobjdump here; pip install triton brings one")
    columns = ["registers", "stack", *INSTRUCTIONS]
    print(f"{'':34}" + "".join(f"{column:>12}" for column in columns))
    kernels = all_kernels_of(cuobjdump, library)
    kernels.sort(key=lambda kernel: (kernel.number, kernel.name))
    for kernel in kernels:
        numbers = [kernel.registers, kernel.stack, *kernel.counts.values()]
        print(f"{kernel.arch:7}{kernel.name:27}" + "".join(f"{number:12}" for number in numbers))
    print("\nThe ordinary way, for an element, and bytes under way for an SM")
    print(f"{'':34}{'instructions':>14}{'branches':>12}{'KiB':>8}")
    for kernel in kernels:
        for setting in (*SETTINGS, *USUAL_SETTINGS):
            if kernel.name == kernel_of(setting):
                instructions, branches = (n / ELEMENTS for n in kernel.ordinary_way(setting))
                under_way = kernel.under_way(setting) / 1024
                title = f"{kernel.arch:7}Adam {setting:40}"
                print(f"{title}{instructions:14.1f}{branches:12.1f}{under_way:8.0f}")
    print("\nThe norm, for an element")
    print(f"{'':34}{'instructions':>14}")
    for kernel in kernels:
        if kernel.kind == "sum_squares":
            for name, instructions in kernel.norm_ways().items():
                print(f"{kernel.arch:7}norm {name:22}{instructions:14.1f}")


if __name__ == "__main__":
    import sys

    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        from fusedopt import _C

        main(_C.__file__)
