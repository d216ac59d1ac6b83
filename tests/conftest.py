"""Where tests run: `--device cuda` needs a GPU; `--device emulated`, a build with
FUSEDOPT_CUDA=emulated, steps tensors on the CPU with the code of the CUDA driver. Tests marked
cpu_only are skipped in both, those marked unemulated in the latter."""

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fusedopt import _C


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["cpu", "cuda", "emulated"], default="cpu", help="who steps the tensors"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before collection: tables of cases hold tensors, too."""
    if config.getoption("device") == "emulated":
        if not hasattr(_C, "emulation"):
            raise pytest.UsageError("--device emulated is for builds with FUSEDOPT_CUDA=emulated")
        _C.emulation.use(True)
    if config.getoption("device") != "cuda":
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, but torch sees no GPU here")
    torch.set_default_device("cuda")
    for optimizer in (
        *(torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta),
        *(torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Rprop),
    ):
        optimizer.step = with_default_device("cpu", optimizer.step)


def with_default_device(device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """For torch's optimizers, which put their step counts on the default device."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch.device(device):
            return function(*args, **kwargs)

    return wrapper


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if config.getoption("device") != "cpu":
        reasons["cpu_only"] = "about the CPU, not about CUDA"
    if config.getoption("device") == "emulated":
        reasons["unemulated"] = "the emulation would give the same numbers"
    for item in items:
        for mark, reason in reasons.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Tests that collect garbage need not go through thousands of other tests each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A device mesh of this process alone, for DTensors."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    from support.device import DEVICE

    backend = {"cpu": "gloo", "cuda": "nccl"}[DEVICE]
    file = tmp_path_factory.mktemp(backend) / "init"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=0, world_size=1)
    yield init_device_mesh(DEVICE, (1,))
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Processes for the tests of `on_ranks`."""
    from support.processes import Ranks

    processes = Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lib` is that of bench/."""
    from support.files import ROOT

    monkeypatch.syspath_prepend(str(ROOT / "bench"))


@pytest.fixture(autouse=True)
def _restore_modes() -> Iterator[None]:
    """Tests may set the number of threads, and what becomes of subnormal numbers."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
