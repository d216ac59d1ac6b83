"""Square roots and divisions of the CUDA kernels against IEEE's, by a program for the GPU."""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from support.device import needs_gpu
from support.files import ROOT

SOURCE = ROOT / "tests/cuda/branch_free.cu"


def flags() -> list[str]:
    """Those of setup.py for kernels that compute in float."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    named = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign)}
    return ["-std=c++17", "-O3", "-Icsrc", "-ftz=true", *ast.literal_eval(named["CUDA_EXACT"])]


def compiled(target: Path, *options: str) -> Path:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not there")
    command = [nvcc, *flags(), *options, str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.cpu_only
@pytest.mark.unsanitized  # it runs compilers
def test_the_program_compiles(tmp_path: Path) -> None:
    assert compiled(tmp_path / "branch_free.o", "-c", "-arch=sm_90").exists()


@needs_gpu
def test_all_roots_and_billions_of_quotients(tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    program = compiled(tmp_path / "branch_free", f"-arch=sm_{major}{minor}")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
