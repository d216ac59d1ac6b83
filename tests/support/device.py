"""Where the tests' tensors lie: on torch's default device, which `pytest --device` chooses."""

from typing import Any

import torch
from torch import Tensor

from fusedopt import _C

DEVICE = torch.get_default_device().type

# A driver for CUDA decides beside the host whether to skip a step for GradScaler: by then the host
# has made state, moved `step` and bumped versions. The emulated driver does so with CPU tensors.
STEPS_ON_DEVICE = DEVICE == "cuda" or _C.is_emulated()


def on_host(data: Any, **options: Any) -> Tensor:
    """A tensor that is on the CPU however the tests are run: a step count, a learning rate."""
    return torch.tensor(data, device="cpu", **options)
