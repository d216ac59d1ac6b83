"""Where the tests' tensors lie: on torch's default device, which `pytest --device` chooses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedopt import _C

DEVICE = torch.get_default_device().type
IS_CUDA = DEVICE == "cuda"

# A driver for CUDA decides beside the host whether to skip a step for GradScaler: by then the host
# has made state, moved `step` and bumped versions. The emulated driver does so with CPU tensors.
EMULATES = hasattr(_C, "emulation") and _C.emulation.is_used()
STEPS_ON_DEVICE = IS_CUDA or EMULATES

needs_driver = pytest.mark.skipif(
    not STEPS_ON_DEVICE, reason="about the CUDA driver: --device cuda or emulated"
)
needs_gpu = pytest.mark.skipif(not IS_CUDA, reason="only a real GPU can tell: --device cuda")


def on_host(data: Any, **options: Any) -> Tensor:
    """A tensor that is on the CPU however the tests are run: a step count, a learning rate."""
    return torch.tensor(data, device="cpu", **options)
