"""Drop-in torch optimizers whose whole step is one pass over memory.

>>> model = torch.nn.Linear(8, 1)
>>> optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4)  # was torch.optim.AdamW

Signatures, param groups, state and state dicts are those of ``torch.optim``.
"""

from ._version import check_build, check_torch

check_torch()
check_build()

from ._config import show_config  # noqa: E402
from ._grad_scaler import GradScaler  # noqa: E402
from .adam import Adam, AdamW  # noqa: E402
from .sgd import SGD  # noqa: E402

__all__ = ["SGD", "Adam", "AdamW", "GradScaler", "show_config"]
__version__ = "0.1.0"
