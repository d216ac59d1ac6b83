"""How setup.py finds a CUDA toolkit and chooses architectures; toolkits are shell scripts here."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from support.files import ROOT

# Of the sources and the build alone.
pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

LISTED = "compute_75\ncompute_80\ncompute_90\ncompute_100\n"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs setup.py with these variables and an empty PATH; returns its functions and constants."""
    pytest.importorskip("setuptools", reason="setuptools is a build requirement only")
    if not (ROOT / "setup.py").exists():
        pytest.skip("these tests run beside the sources")

    def run(path: Path = tmp_path, **variables: str) -> dict[str, Any]:
        for name in ("CUDA_HOME", "FUSEDOPT_CUDA", "FUSEDOPT_CUDA_ARCHS", "FUSEDOPT_STRICT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", str(path))
        monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
        monkeypatch.chdir(ROOT)
        return runpy.run_path(str(ROOT / "setup.py"))

    return run


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def toolkit(folder: Path) -> Path:
    script(folder / "bin/nvcc", f'case "$1" in --list*) printf "{LISTED}";; esac')
    return folder


def hide_usual_places(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.exists
    usual = ("/usr/local/cuda", "/opt/cuda")
    monkeypatch.setattr(Path, "exists", lambda path: not str(path).startswith(usual) and real(path))


def test_cuda_home_comes_first(setup: Any, tmp_path: Path) -> None:
    wanted, other = toolkit(tmp_path / "wanted"), toolkit(tmp_path / "other")
    assert setup(other / "bin", CUDA_HOME=str(wanted))["toolkit"]() == wanted


def test_cuda_home_without_nvcc_is_an_error(setup: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"CUDA_HOME is .*no bin/nvcc"):
        setup(CUDA_HOME=str(tmp_path))["toolkit"]()


def test_wrapper_on_path_leads_to_the_toolkit(setup: Any, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "far/away")
    script(tmp_path / "bin/nvcc", f'echo "#$ TOP={home}/bin/.." >&2')
    assert setup(tmp_path / "bin")["toolkit"]() == home


@pytest.mark.parametrize("mode", ["0", "emulated"])
def test_cuda_can_be_forbidden(setup: Any, tmp_path: Path, mode: str) -> None:
    home = toolkit(tmp_path / "home")
    assert setup(CUDA_HOME=str(home), FUSEDOPT_CUDA=mode)["toolkit"]() is None


def test_without_nvcc_one_line_says_so(
    setup: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    functions = setup()
    hide_usual_places(monkeypatch)
    monkeypatch.setattr(sys, "path", [])
    assert functions["toolkit"]() is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "building for the CPU only" in said[0]


def test_required_cuda_comes_from_wheels_or_fails(
    setup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_usual_places(monkeypatch)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, "nvidia/cu13").exists()])
    asked: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: asked.update(options))
    functions = setup(FUSEDOPT_CUDA="1")
    assert [name.split("==")[0] for name in asked["setup_requires"]] == [
        *("nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-nvvm")
    ]
    with pytest.raises(SystemExit, match="no nvcc was found"):
        functions["toolkit"]()
    setup()
    assert asked["setup_requires"] == []


def test_unknown_mode_is_an_error(setup: Any) -> None:
    with pytest.raises(SystemExit, match="FUSEDOPT_CUDA must be"):
        setup(FUSEDOPT_CUDA="yes")


@pytest.mark.parametrize(
    ("wanted", "archs", "codes"),
    [
        ("90", ["90"], ["90,code=sm_90"]),
        (
            "80;86, 90+PTX",
            ["80", "86", "90+PTX"],
            ["80,code=sm_80", "80,code=sm_86", "80,code=sm_90", "80,code=compute_80"],
        ),
        ("90a", ["90a"], ["90a,code=sm_90a"]),
        ("12.0;8.0", ["120", "80"], ["120,code=sm_120", "80,code=sm_80"]),
        ("9.0;8.0", ["90", "80"], ["80,code=sm_90", "80,code=sm_80"]),
        (
            "9.0;90a;100;120+PTX",
            ["90", "90a", "100", "120+PTX"],
            [
                *("90,code=sm_90", "90a,code=sm_90a"),
                *("100,code=sm_100", "100,code=sm_120", "100,code=compute_100"),
            ],
        ),
    ],
)
def test_chosen_archs(setup: Any, wanted: str, archs: list[str], codes: list[str]) -> None:
    """PTX is made once for all before 10.0, and once for all others."""
    functions = setup(FUSEDOPT_CUDA_ARCHS=wanted)
    assert functions["cuda_archs"](Path("nvcc")) == archs
    flags = functions["arch_flags"](archs)
    assert [flag.removeprefix("-gencode=arch=compute_") for flag in flags] == codes


@pytest.mark.parametrize("wanted", ["sm_90", "90+ptx", "native"])
def test_archs_in_another_form_are_an_error(setup: Any, wanted: str) -> None:
    with pytest.raises(SystemExit, match="FUSEDOPT_CUDA_ARCHS"):
        setup(FUSEDOPT_CUDA_ARCHS=wanted)["cuda_archs"](Path("nvcc"))


def test_archs_of_the_gpus_present(setup: Any, tmp_path: Path) -> None:
    script(tmp_path / "bin/nvidia-smi", 'printf "9.0\\n10.0\\n9.0\\n"')
    home = toolkit(tmp_path / "home")
    assert setup(tmp_path / "bin")["cuda_archs"](home / "bin/nvcc") == ["90", "100"]


def test_all_archs_on_a_machine_with_a_gpu(setup: Any, tmp_path: Path) -> None:
    script(tmp_path / "bin/nvidia-smi", 'printf "9.0\\n"')
    home = toolkit(tmp_path / "home")
    archs = setup(tmp_path / "bin", FUSEDOPT_CUDA_ARCHS="all")["cuda_archs"](home / "bin/nvcc")
    assert archs == ["80", "90", "100+PTX"]


def test_archs_without_a_gpu_are_those_the_compiler_knows(setup: Any, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "home")
    assert setup()["cuda_archs"](home / "bin/nvcc") == ["80", "90", "100+PTX"]
