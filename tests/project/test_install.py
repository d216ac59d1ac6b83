"""The installed package: versions, configuration, what importing it loads, threads, the stub."""

import ast
import re
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import _C, _config, _version
from support.files import PACKAGE, ROOT, run_python
from support.optimizers import ALL_NAMES
from support.processes import run_fork

pytestmark = pytest.mark.cpu_only


def run_strictly(code: str, **environment: str) -> str:
    """Standard output of a fresh process in which warnings are errors."""
    return run_python("-W", "error", "-c", code, **environment)


def project() -> dict[str, Any]:
    """Name and requirements of pyproject.toml; tomllib came with Python 3.11."""
    text = (ROOT / "pyproject.toml").read_text()
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads(text)["project"]
    name = re.search(r'^name = "(.*)"$', text, re.M)
    dependencies = re.search(r"^dependencies = \[(.*)\]$", text, re.M)
    assert name
    assert dependencies
    return {"name": name[1], "dependencies": re.findall(r'"(.*?)"', dependencies[1])}


def test_versions_agree() -> None:
    assert project()["name"] == "fusedopt"
    # A wheel has its metadata beside it. Those of an installation in place may be older than it is.
    beside = [path.name for path in PACKAGE.parent.glob("fusedopt-*.dist-info")]
    assert beside in ([], [f"fusedopt-{fusedopt.__version__}.dist-info"])
    wanted = ".".join(map(str, _version.MIN_TORCH))
    assert f"torch>={wanted}" in project()["dependencies"]


def test_public_names() -> None:
    optimizers = {*ALL_NAMES, "SparseAdam"}
    assert set(fusedopt.__all__) == {*optimizers, "GradScaler", "show_config", "step_in_backward"}
    assert all(hasattr(fusedopt, name) for name in fusedopt.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_show_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEDOPT_ISA", raising=False)
    fusedopt.show_config()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"fusedopt {fusedopt.__version__} (")
    facts = {key.strip(): value for key, value in (line.split(":", 1) for line in lines[1:])}
    assert facts.keys() == {"compiler", "torch", "CPU", "threads", "unchanged tensors", "CUDA"}
    has_fingerprints = _C.build_info()["fingerprints"]
    assert ("by fingerprints" in facts["unchanged tensors"]) == has_fingerprints
    assert torch.__version__ in facts["torch"]
    isas = _C.build_info()["isas"]
    assert facts["CPU"].strip() == f"{isas[-1]} (available: {', '.join(isas)})"
    assert facts["threads"].split()[0] == str(torch.get_num_threads())
    archs = _C.build_info()["cuda_archs"]
    assert facts["CUDA"].strip().startswith(f"built for {archs}" if archs else "no: ")


@pytest.mark.parametrize("isa", _C.build_info()["isas"])
def test_forced_isa(
    isa: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEDOPT_ISA", isa)
    assert _config.cpu_isa() == isa
    fusedopt.show_config()
    assert f"{isa}, forced by FUSEDOPT_ISA" in capsys.readouterr().out
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    fusedopt.SGD([param], lr=1.0).step()
    assert param.tolist() == [0, 0, 0]


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx512 "])
def test_unknown_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_ISA", isa)
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=f"'{isa}' is unknown or not available"):
        fusedopt.SGD([param], lr=1.0).step()
    assert param.tolist() == [1, 1, 1]


def test_isas_rise_from_the_baseline() -> None:
    order = ["baseline", "avx2", "avx512"]
    isas = _C.build_info()["isas"]
    assert isas == order[: len(isas)]


THREADS = """
import os, pathlib, time, torch, fusedopt

def workers():
    return {tid for tid in os.listdir("/proc/self/task") if int(tid) != os.getpid()}

def wake_ups():
    total = 0
    for tid in workers():
        with open(f"/proc/self/task/{tid}/status") as status:
            total += sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)
    return total

def settle():  # until no worker has moved for a while
    last = -1
    while last != wake_ups():
        last = wake_ups()
        time.sleep(0.2)
    return last

torch.set_num_threads(1)
param = torch.nn.Parameter(torch.ones(1 << 20))
param.grad = torch.ones(1 << 20)
optimizer = fusedopt.AdamW([param])
before = workers()
optimizer.step()
print("one", len(workers() - before))
torch.set_num_threads(3)
optimizer.step()
print("three", len(workers() - before))
param.detach().mul_(2)  # torch's own parallel loop finds the workers it needs
print("torch", len(workers() - before))
quiet = settle()
optimizer.step()
print("woken", int(settle() > quiet))
torch.set_num_threads(1)
quiet = settle()
optimizer.step()
print("left alone", int(settle() == quiet))
runtimes = fusedopt._config._openmp_runtimes()
print("runtimes", len(runtimes))
bundled = {str(path) for path in pathlib.Path(torch.__file__).parent.glob("lib/libgomp*")}
print("foreign", int(bool(bundled) and runtimes != sorted(bundled)))
"""


@pytest.mark.unsanitized  # counts threads and wake-ups
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
def test_threads() -> None:
    """A step of n threads uses the caller and n - 1 workers, which it shares with torch."""
    if not _C.build_info()["openmp"]:
        pytest.skip("built without OpenMP")
    out = run_strictly(THREADS, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    facts = {name: int(value) for name, value in (line.rsplit(" ", 1) for line in out.splitlines())}
    assert facts == {
        "one": 0, "three": 2, "torch": 2, "woken": 1, "left alone": 1, "runtimes": 1, "foreign": 0,
    }  # fmt: skip


IMPORTS = """
import sys, torch
torch.zeros((), requires_grad=True).backward()  # the first one imports some of torch
found, torch.__version__ = torch.__version__, "2.9.1"
try:
    import fusedopt
except ImportError as error:
    print(error)
torch.__version__ = found
before = set(sys.modules)
import fusedopt
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.unsanitized  # imports, and no more
def test_import_is_light_and_checks_torch_first() -> None:
    """Importing takes in nothing heavy: dynamo alone costs a second."""
    error, modules = run_strictly(IMPORTS).splitlines()
    assert re.search(r"needs torch >= 2\.10.*2\.9\.1.*pip install -U torch", error)
    assert "fusedopt._C" in modules.split()
    assert [name for name in modules.split() if not name.startswith("fusedopt")] == []
    assert "fusedopt.integrations" not in modules.split()


@pytest.mark.unsanitized  # imports, and no more
def test_import_without_torch_says_what_to_do() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "try:\n    import fusedopt\n"
        "except ImportError as error:\n    print(error)"
    )
    assert re.search(r"needs torch >= 2\.10; run: pip install torch", run_strictly(code))


TRY_IMPORT = """
import sys, torch
import importlib.util as util

class Lender:  # as an installation in place has one: it knows fusedopt's modules from other sources
    def find_spec(self, name, path=None, target=None):
        return util.spec_from_loader(name, self) if name == "fusedopt._C" else None

    def create_module(self, spec):
        print("a lent extension was imported")

    def exec_module(self, module):
        pass

sys.meta_path.append(Lender())
torch.__version__ = sys.argv[1]
try:
    import fusedopt
except ImportError as error:
    print(error)
    print("cause:", repr(error.__cause__))
"""


def import_unbuilt(folder: Path, *extensions: str, torch_version: str = "2.10.0") -> str:
    """What an import says, where the package has these files in the place of its extension."""
    package = folder / "fusedopt"
    package.mkdir()
    for path in PACKAGE.glob("*.py*"):
        shutil.copy(path, package)
    for name in extensions:
        (package / name).write_text("no library")
    script = folder / "try_import.py"
    script.write_text(TRY_IMPORT)
    return run_fork(script, torch_version)


@pytest.mark.unsanitized  # imports, and no more
@pytest.mark.parametrize("kind", ["sources", "installed"])
@pytest.mark.parametrize(
    ("extension", "problem", "cause"),
    [
        (None, "is not built: ", "ModuleNotFoundError"),
        ("_C.cpython-27-other.so", "is not built for this Python: ", "ModuleNotFoundError"),
        (f"_C{EXTENSION_SUFFIXES[0]}", "does not load: ", "ImportError"),
    ],
    ids=["never built", "for another Python", "broken"],
)
def test_import_without_a_build_says_what_to_do(
    kind: str, extension: str | None, problem: str, cause: str, tmp_path: Path
) -> None:
    """Started in a folder of sources, whose package hides the one that is installed."""
    if kind == "sources":
        (tmp_path / "setup.py").touch()
    said = import_unbuilt(tmp_path, *([extension] if extension else []))
    advice = (
        "Leave that folder",
        f"`pip install -e {tmp_path}`",
        "`python setup.py build_ext --inplace`",
    )
    assert problem in said
    assert extension is None or extension in said
    assert [text in said for text in advice] == [kind == "sources"] * 3
    assert ("Install it again with pip." in said) == (kind == "installed")
    assert f"\ncause: {cause}(" in said
    assert "lent" not in said
    assert "partially initialized" not in said


@pytest.mark.unsanitized  # imports, and no more
def test_torch_is_checked_before_the_build(tmp_path: Path) -> None:
    said = import_unbuilt(tmp_path, torch_version="2.9.1")
    assert "needs torch >= 2.10" in said
    assert "built" not in said


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def stub() -> ast.Module:
    return ast.parse((PACKAGE / "_C.pyi").read_text())


def names_in(body: list[ast.stmt]) -> set[str]:
    """Of functions, classes and variables."""
    defined = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return defined | {ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)}


def test_stub_names_match_the_extension() -> None:
    assert names_in(stub().body) - {"BuildInfo", "emulation"} == public(vars(_C)) - {"emulation"}


@pytest.mark.parametrize("name", ["Plan", "PendingStep", "StateSpec", "emulation"])
def test_stub_members_match_the_extension(name: str) -> None:
    if name == "emulation" and not hasattr(_C, name):
        pytest.skip("in builds with FUSEDOPT_CUDA=emulated")
    (declared,) = [node for node in stub().body if getattr(node, "name", "") == name]
    assert isinstance(declared, ast.ClassDef)
    assert names_in(declared.body) - {"__init__"} == public(vars(getattr(_C, name)))


def arguments(function: ast.FunctionDef) -> list[str]:
    return [arg.arg for arg in function.args.args if arg.arg != "self"]


def test_stub_arguments_match_the_extension() -> None:
    """pybind11 writes signatures into docstrings."""
    functions = {node.name: node for node in ast.walk(stub()) if isinstance(node, ast.FunctionDef)}
    places = [*([_C.emulation] if hasattr(_C, "emulation") else []), _C.PendingStep, _C.Plan, _C]
    found = {name: value for place in places for name, value in vars(place).items()}
    if not hasattr(_C, "emulation"):
        for name in ("use", "is_used", "begin_capture", "end_capture", "replay"):
            del functions[name]
    for name, node in functions.items():
        signature = str(found[name].__doc__).split(" -> ")[0]
        names = re.findall(r"(\w+): ", signature)
        assert [name for name in names if name != "self"] == arguments(node), signature


def test_stub_of_build_info() -> None:
    (info,) = [node for node in stub().body if getattr(node, "name", "") == "BuildInfo"]
    assert isinstance(info, ast.ClassDef)
    keys = [node.target.id for node in info.body if isinstance(node, ast.AnnAssign)]  # type: ignore[union-attr]
    assert keys == list(_C.build_info())


def test_extension_links_no_torch() -> None:
    """One binary for every torch: nothing of libtorch or of its Python binding is named in it."""
    binary = Path(_C.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"torch_python"):
        assert library not in binary


@pytest.mark.parametrize("version", ["2.9.1", "2.9.0+cu128", "1.13.1", "2.1.0a0+git1234", "2"])
def test_torch_that_is_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"torch >= 2\.10.*{re.escape(version)}.*pip install"):
        _version.check_torch()


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234", "2.13.1+cu130", "3.0", "10.1"])
def test_torch_that_is_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    _version.check_torch()
