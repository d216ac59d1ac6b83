"""What codes of 8 bits mean, written down a second time from their definition, in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.optimizers import CASES, Case
from support.tensors import BFLOAT16, FLOAT16, FLOAT32, draw, params_of, some_dtypes, values

GROUP = 64
# Shapes with groups along rows, along the flat tensor with a short last one, and with float32
# states: a vector, and what is small.
ROWS, FLAT, MANY_DIMS, VECTOR, SMALL = (40, 128), (61, 71), (8, 16, 5, 8), (5000,), (63, 64)
SHAPES = (ROWS, FLAT, MANY_DIMS, VECTOR, SMALL)
CODED_SHAPES = (ROWS, FLAT, MANY_DIMS)

# Of the optimizers that have codes.
CODED_CASES: dict[str, Case] = {
    name: case
    for name, case in CASES.items()
    if case.optimizer not in ("Adagrad", "ASGD", "Rprop") and not case.options.get("centered")
}
FEW_CODED = ("momentum", "nesterov-l2", "adam-amsgrad", "adam-no-beta1", "adamw", "lion-decay")
each_coded_case = pytest.mark.parametrize("case", CODED_CASES.values(), ids=CODED_CASES)
few_coded_cases = pytest.mark.parametrize(
    "case", [CODED_CASES[name] for name in FEW_CODED], ids=FEW_CODED
)
CASE = Case("AdamW", {"lr": 0.01})
each_narrow = some_dtypes(FLOAT32, BFLOAT16, FLOAT16)


def of_q8(case: Case, params: Any, **more: Any) -> Any:
    return case.ours(params, state_dtype="q8", **more)


def one_step(optimizer: Any, grads: list[Tensor]) -> None:
    for param, grad in zip(params_of(optimizer), grads, strict=True):
        param.grad_dtype = None  # whatever is assigned
        param.grad = grad
    optimizer.step()


def grads_for(params: Any, seed: int) -> list[Tensor]:
    return [values(*p.shape, dtype=p.dtype, seed=100 * seed + i) for i, p in enumerate(params)]


def trained(case: Case, dtype: torch.dtype, steps: int = 3, **more: Any) -> Any:
    params = draw(SHAPES, dtype=dtype)
    optimizer = of_q8(case.suited_to(dtype), params, **more)
    for step in range(steps):
        one_step(optimizer, grads_for(params, step))
    return optimizer


def coded_names(entries: Any) -> list[str]:
    return [name.removesuffix("_q8") for name in entries if name.endswith("_q8")]


def have_codes(states: dict[Any, Any]) -> bool:
    return any(coded_names(entries) for entries in states.values())


def _levels(*codes_in_binades: int) -> Any:
    """How far the places of codes are from the first one, over how far the last one is."""
    places = [1.0]
    for binade, codes in enumerate(codes_in_binades):
        places += [2.0**binade * (1 + j / codes) for j in range(1, codes + 1)]
    distances = np.array(places[:-1]) - 1
    return distances / distances[-1]


LEVELS = {
    torch.int8: _levels(*[16] * 4, *[32] * 2),
    torch.uint8: _levels(*[8] * 4, *[16] * 2, *[32] * 6),
}


def levels(codes: Tensor) -> Any:
    """What the codes stand for, over their scale. Those with a sign have it in the upper bit."""
    byte = codes.cpu().numpy().astype(np.int64) & 0xFF
    is_signed = codes.dtype == torch.int8
    number = byte & 0x7F if is_signed else byte
    sign = np.where(is_signed & (byte >= 0x80), -1.0, 1.0)
    return sign * LEVELS[codes.dtype][number]


def spread(scales: Tensor, like: Tensor) -> Any:
    """The scale of each element."""
    flat = np.repeat(scales.cpu().numpy().reshape(-1).astype(np.float64), GROUP)
    return flat[: like.numel()].reshape(like.shape)


def decoded(entries: Any, name: str) -> Any:
    codes = entries[f"{name}_q8"]
    return levels(codes) * spread(entries[f"{name}_scale"], codes)


def numbers_of(entries: Any) -> dict[str, Tensor]:
    """A state with float32 numbers, under their names and on their device, in place of codes."""
    found = {name: entry for name, entry in entries.items() if not name.endswith(("_q8", "_scale"))}
    for name in coded_names(entries):
        numbers = torch.from_numpy(decoded(entries, name)).float()
        found[name] = numbers.to(entries[f"{name}_q8"].device)
    return found


def largest_of_groups(values: Any) -> Any:
    flat = np.abs(np.asarray(values, np.float64)).reshape(-1)
    padded = np.pad(flat, (0, -len(flat) % GROUP)).reshape(-1, GROUP)
    return padded.max(axis=1)


def assert_codes_of(entries: Any, name: str, values: Any, units: float) -> None:
    """The codes are those of the values, but for so many units of a code."""
    codes, scales = entries[f"{name}_q8"], entries[f"{name}_scale"]
    values = np.asarray(values, np.float64)
    found_scales = scales.cpu().numpy().reshape(-1).astype(np.float64)
    np.testing.assert_allclose(found_scales, largest_of_groups(values), rtol=1e-5)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nan_to_num(np.abs(values) / spread(scales, codes))
    is_signed = codes.dtype == torch.int8
    # Between two codes it counts how near to their values one is.
    table = LEVELS[codes.dtype]
    ideal = np.interp(share, table, np.arange(len(table)))
    byte = codes.cpu().numpy().astype(np.int64) & 0xFF
    number = byte & 0x7F if is_signed else byte
    is_near = np.abs(number - ideal) <= units + 1e-3
    if is_signed:
        assert is_near.all(), name
        assert ((byte >= 0x80) == (values < 0))[number > 0].all()
    else:  # what is above 0 has code 1 at least
        assert (is_near | ((number == 1) & (ideal < 1))).all(), name
        assert ((number > 0) == (values > 0)).all()
