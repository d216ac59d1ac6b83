"""Refuses a torch that is too old and a package that is not built, before anything is used."""

import importlib
import platform
import re
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

MIN_TORCH = (2, 10)
EXTENSION = f"{__package__}._C"


def check_torch() -> None:
    """Raise ImportError unless torch is installed and at least MIN_TORCH."""
    wanted = ".".join(map(str, MIN_TORCH))
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"fusedopt needs torch >= {wanted}; run: pip install torch") from error
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < MIN_TORCH:
        raise ImportError(
            f"fusedopt needs torch >= {wanted} (it reads tensors through DLPack's C exchange API), "
            f"but torch {torch.__version__} is installed; run: pip install -U torch"
        )


def check_build() -> None:
    """Raise ImportError unless the compiled extension in this folder can be loaded."""
    folder = Path(__file__).absolute().parent
    try:
        # A plain import would also take the extension of other sources, where these are installed
        # in place (pip install -e).
        if PathFinder.find_spec(EXTENSION, [str(folder)]) is None:
            raise ModuleNotFoundError(f"No module named {EXTENSION!r}", name=EXTENSION)
        importlib.import_module(EXTENSION)
    except ImportError as error:
        raise ImportError(f"{_what_is_wrong(folder, error)} {_what_to_do(folder)}") from error


def _what_is_wrong(folder: Path, error: ImportError) -> str:
    if error.name != EXTENSION or not isinstance(error, ModuleNotFoundError):
        return f"The compiled extension of fusedopt in {folder} does not load: {error}."
    if others := sorted(path.name for path in folder.glob("_C.*so")):
        return (
            f"fusedopt is not built for this Python: {folder} has {', '.join(others)}, and Python "
            f"{platform.python_version()} needs _C{EXTENSION_SUFFIXES[0]}."
        )
    return f"fusedopt is not built: {folder} has no compiled extension."


def _what_to_do(folder: Path) -> str:
    root = folder.parent
    if not (root / "setup.py").exists():
        return "Install it again with pip."
    return (
        "These are its sources, which hide an installed fusedopt from a Python that is started in "
        f"{root} or has it on PYTHONPATH. Leave that folder to use the installed one, or build in "
        f"it: `pip install -e {root}`, or there `python setup.py build_ext --inplace`."
    )
