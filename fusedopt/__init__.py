"""Drop-in torch optimizers whose whole step is one pass over memory.

>>> model = torch.nn.Linear(8, 1)
>>> optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4)  # was torch.optim.AdamW

Signatures, param groups, state and state dicts are those of ``torch.optim``.
"""

from typing import Any

from ._version import check_build, check_torch

check_torch()
check_build()

from ._config import show_config  # noqa: E402
from ._grad_scaler import GradScaler  # noqa: E402
from ._step_in_backward import step_in_backward  # noqa: E402
from .adadelta import Adadelta  # noqa: E402
from .adagrad import Adagrad  # noqa: E402
from .adam import Adam, AdamW  # noqa: E402
from .adamax import Adamax  # noqa: E402
from .asgd import ASGD  # noqa: E402
from .lion import Lion  # noqa: E402
from .nadam import NAdam  # noqa: E402
from .radam import RAdam  # noqa: E402
from .rmsprop import RMSprop  # noqa: E402
from .rprop import Rprop  # noqa: E402
from .sgd import SGD  # noqa: E402
from .sparse_adam import SparseAdam  # noqa: E402

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "GradScaler",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "show_config",
    "step_in_backward",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Submodules that are imported when they are asked for."""
    if name in ("compat", "integrations"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
