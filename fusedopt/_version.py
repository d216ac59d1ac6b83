"""Refuses a torch that is too old, before anything of it is used."""

import re

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
