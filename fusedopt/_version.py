"""Refuses a torch that is too old and a package that is not built, before anything is used."""

import importlib.util
import re
from pathlib import Path

MIN_TORCH = (2, 10)


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
    """Raise ImportError if the package has no compiled extension."""
    if importlib.util.find_spec("fusedopt._C") is not None:
        return
    folder = Path(__file__).resolve().parent
    is_source = (folder.parent / "setup.py").exists()
    advice = (
        f"it was imported from its sources in {folder.parent}, where it has not been built for "
        f"this Python: run `pip install -e {folder.parent}`, or start Python in another folder to "
        "use an installed fusedopt"
        if is_source
        else f"{folder} has no compiled extension for this Python; install it again with pip"
    )
    raise ImportError(f"fusedopt is not built: {advice}")
