"""Settings of precision, one row each: how params, states and weights are kept between steps."""

from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from support import oracles
from support.optimizers import Case, step_with
from support.oracles import assert_rounded_once
from support.snapshots import FROM_STEP, results
from support.tensors import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, dtype_id

FLOATS = (FLOAT32, BFLOAT16, FLOAT16, FLOAT64)
# What is rounded stochastically by default.
SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf")
# What master weights add to the state.
WEIGHTS = ("master_param", "param_remainder", "param_remainder8")
OF_24_BITS = 2.0**-15  # from 1 to the next weight of 24 bits


# What the options that torch lacks are unless given.
OFF: dict[str, Any] = {
    "state_dtype": None,
    "master_weights": None,
    "stochastic_rounding": None,
    "rounding_seed": 0,
    "max_grad_norm": None,
    "error_if_nonfinite": False,
    "ema_decay": None,
    "ema_bias_correction": False,
    "lr_independent_weight_decay": False,
    "cautious_update": False,
    "cautious_weight_decay": False,
    "decoupled_weight_decay": False,
}


@dataclass(frozen=True)
class Setting:
    """Options, and the dtypes of params for which they mean something."""

    id: str
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def but(self, **options: Any) -> "Setting":
        return replace(self, options={**self.options, **options})

    def masters(self, dtype: torch.dtype) -> str | None:
        """Params of 32 bits and more are their own master weights."""
        return self.options.get("master_weights") if dtype.itemsize == 2 else None

    def is_stochastic(self, name: str, stored: torch.dtype) -> bool:
        """Whether the param or the state of that name is, if it is kept in that dtype."""
        asked = self.options.get("stochastic_rounding")
        return stored == BFLOAT16 and (name in SECOND_MOMENTS if asked is None else asked)

    def state_dtypes(
        self, case: Case, dtype: torch.dtype, saved: torch.dtype | None = None
    ) -> dict[str, torch.dtype]:
        """Everything in the state of a param of that dtype; loaded states stay as saved."""
        oracle = case.oracle(torch.zeros(1))
        oracle.step(torch.zeros(1))
        states = oracle.results().keys() - {"param"}
        found = dict.fromkeys(states, self.options.get("state_dtype") or saved or dtype)
        averages = self.options.get("ema_decay") is not None
        if averages:
            found["ema_param"] = FLOAT32 if dtype.itemsize == 2 else dtype
        if self.masters(dtype) == "float32":
            found["master_param"] = FLOAT32
        if self.masters(dtype) == "split":
            found["param_remainder"] = torch.int16
        if self.masters(dtype) == "split8":
            found["param_remainder8"] = torch.int8
        asked = self.options.get("stochastic_rounding")
        cuts = self.masters(dtype) == "split8" and asked is not False
        counts = oracle.counts_steps or averages or asked or cuts
        return {**found, "step": FLOAT32} if counts else found

    def assert_state_of(
        self, optimizer: Any, case: Case, param: Tensor, saved: torch.dtype | None = None
    ) -> None:
        """The names, dtypes and shapes are as specified."""
        state = optimizer.state[param]
        found = {name: entry.dtype for name, entry in state.items()}
        assert found == self.state_dtypes(case, param.dtype, saved)
        for name, entry in state.items():
            assert entry.shape == (() if name == "step" else param.shape), name

    def assert_stored(self, name: str, value: Tensor, expected: oracles.Array) -> None:
        units = 1 if self.is_stochastic(name, value.dtype) else 0.5
        eps = torch.finfo(value.dtype).eps
        if name in ("param", "ema_param") and self.options.get("master_weights") == "split8":
            # The average is of the weight as it is stored.
            units = 0.5 if self.options.get("stochastic_rounding") is False else 1
            eps = OF_24_BITS if name == "param" else eps
        assert_rounded_once(value, expected, units, eps)


_F32_STATES, _BF16_STATES = {"state_dtype": FLOAT32}, {"state_dtype": BFLOAT16}
_MASTERS, _SPLIT = {"master_weights": "float32"}, {"master_weights": "split"}
_SPLIT8 = {"master_weights": "split8"}
_STOCHASTIC = {"stochastic_rounding": True, "rounding_seed": 7}
_NEAREST = {"stochastic_rounding": False}

SETTINGS = [
    Setting("plain"),
    Setting("float32-states", _F32_STATES, (BFLOAT16, FLOAT16, FLOAT64)),
    Setting("bfloat16-states", _BF16_STATES, (FLOAT32, FLOAT16, FLOAT64)),
    Setting("masters", _MASTERS),
    Setting("masters-float32-states", {**_MASTERS, **_F32_STATES}, (BFLOAT16, FLOAT16)),
    Setting("masters-bfloat16-states", {**_MASTERS, **_BF16_STATES}, (FLOAT32, FLOAT16)),
    Setting("split", _SPLIT, (BFLOAT16,)),
    Setting("split-float32-states", {**_SPLIT, **_F32_STATES}, (BFLOAT16,)),
    Setting("split8", _SPLIT8, (BFLOAT16,)),
    Setting("split8-float32-states", {**_SPLIT8, **_F32_STATES}, (BFLOAT16,)),
    Setting("stochastic", _STOCHASTIC, (BFLOAT16, FLOAT32)),
    Setting("stochastic-float32-states", {**_STOCHASTIC, **_F32_STATES}, (BFLOAT16,)),
    Setting("stochastic-bfloat16-states", {**_STOCHASTIC, **_BF16_STATES}, (FLOAT32, FLOAT64)),
    Setting("stochastic-masters", {**_STOCHASTIC, **_MASTERS}, (BFLOAT16,)),
    Setting("stochastic-split", {**_STOCHASTIC, **_SPLIT}, (BFLOAT16,)),
    Setting("stochastic-split8", {**_STOCHASTIC, **_SPLIT8}, (BFLOAT16,)),
    Setting("nearest", _NEAREST, (BFLOAT16,)),
    Setting("nearest-split8", {**_NEAREST, **_SPLIT8}, (BFLOAT16,)),
    Setting("nearest-bfloat16-states", {**_NEAREST, **_BF16_STATES}, (FLOAT32,)),
]
BY_ID = {setting.id: setting for setting in SETTINGS}
EMAS: dict[str, dict[str, Any]] = {
    "no-ema": {},
    "ema": {"ema_decay": 0.9},
    "ema-corrected": {"ema_decay": 0.99, "ema_bias_correction": True},
}
Row: TypeAlias = tuple[Setting, torch.dtype]
ROWS: list[Row] = [(setting, dtype) for setting in SETTINGS for dtype in setting.dtypes]


def _row_id(row: Row) -> str:
    return f"{row[0].id}-of-{dtype_id(row[1])}"


each_row = pytest.mark.parametrize("row", ROWS, ids=_row_id)
each_ema = pytest.mark.parametrize("ema", EMAS.values(), ids=EMAS)
each_bfloat16_setting = pytest.mark.parametrize(
    "setting", [s for s, dtype in ROWS if dtype == BFLOAT16], ids=lambda setting: setting.id
)


def suited(case: Case, row: Row) -> Case:
    return case.suited_to(row[1])


def build(case: Case, row: Row, params: Any, **more: Any) -> Any:
    """The optimizer of a row; any, because torch's class lacks the methods of ours."""
    return suited(case, row).ours(params, **row[0].but(**more).options)


class Honest:
    """Unfused torch, with everything rounded to where it is kept after each step."""

    def __init__(self, case: Case, row: Row, param: Tensor, decay: float) -> None:
        self.setting, self.dtype = row
        self.weight = param.to("cpu", FLOAT64 if self.dtype == FLOAT64 else FLOAT32, copy=True)
        self.twin, self.decay = suited(case, row).theirs([self.weight]), decay
        self.ema_param = self.weight
        self.generator = torch.Generator().manual_seed(1)

    def step(self, grad: Tensor, is_first: bool) -> None:
        step_with(self.twin, [grad.to("cpu", self.weight.dtype)])
        masters = self.setting.masters(self.dtype)
        if masters is None:
            self._store("param", self.weight, self.dtype)
        elif masters == "split8":
            self._cut(self.weight)
        for name, state in self.twin.state[self.weight].items():
            if name not in FROM_STEP:
                self._store(name, state, self.setting.options.get("state_dtype") or self.dtype)
        weight = self.weight.clone()
        self.ema_param = weight if is_first else self.ema_param.lerp(weight, 1 - self.decay)

    def results(self) -> dict[str, Tensor]:
        return {"ema_param": self.ema_param, **results(self.twin, self.weight)}

    def _store(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        if not self.setting.is_stochastic(name, dtype):
            value.copy_(value.to(dtype))
            return
        self._draw(value, 65536)

    def _cut(self, weight: Tensor) -> None:
        if self.setting.options.get("stochastic_rounding") is False:
            weight.copy_(nearest_of_24_bits(weight))
        else:
            self._draw(weight, 256)

    def _draw(self, value: Tensor, unit: int) -> None:
        integers = value.to(FLOAT32).view(torch.int32)
        draws = torch.randint(
            unit, value.shape, generator=self.generator, dtype=torch.int32, device="cpu"
        )
        value.copy_(((integers + draws) & -unit).view(FLOAT32))


def nearest_ties_away(weight: Tensor) -> Tensor:
    """The bfloat16 nearest to each float32, away from zero where two are: for all but NaN."""
    numbers = weight.view(torch.int32).to(torch.int64)
    return ((numbers + 0x8000) >> 16).to(torch.int16).view(BFLOAT16)


def nearest_of_24_bits(weight: Tensor) -> Tensor:
    """Of numbers that are not close to the largest ones: with ties to even."""
    numbers = weight.view(torch.int32).to(torch.int64)
    rounded = (numbers + 0x7F + ((numbers >> 8) & 1)) & -256
    return rounded.to(torch.int32).view(FLOAT32)


def assert_param_is_rounded_weight(param: Tensor, weight: Tensor, masters: str | None) -> None:
    """For NaN: that both are."""
    if masters is None:
        expected = weight
    else:
        is_split = masters in ("split", "split8")
        expected = nearest_ties_away(weight) if is_split else weight.to(param.dtype)
    assert torch.equal(param.isnan(), weight.isnan())
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[param.element_size()]
    same = param.detach().contiguous().view(integer) == expected.to(param.dtype).view(integer)
    assert (same | param.isnan()).all()


def entries(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    """Of an optimizer of one param, what the oracle knows: the weight and the states."""
    state = optimizer.state.get(param, {})
    has_masters = any(name in state for name in WEIGHTS)
    weight = optimizer.fp32_params()[0] if has_masters else param.detach().clone()
    return {"param": weight, **{k: v for k, v in state.items() if k not in {*WEIGHTS, *FROM_STEP}}}


def assert_one_step(
    optimizer: Any, case: Case, row: Row, ema: dict[str, Any], grad: Tensor, steps: int = 3
) -> None:
    """The next step of an optimizer of one param, after so many, against the oracle.

    It begins in the same state, so that nothing but the rounding to each operand's dtype is left.
    """
    setting, dtype = row
    (param,) = optimizer.param_groups[0]["params"]
    oracle, before = suited(case, row).oracle(param, **ema), entries(optimizer, param)
    for name, value in before.items():
        setattr(oracle, name, oracles.exact(value))
    oracle.steps, average = steps, oracles.exact(before.get("ema_param", before["param"]))
    oracle.ema_param = average  # an average that begins late begins with the weight
    step_with(optimizer, [grad])
    oracle.step(grad)
    found = entries(optimizer, param)
    if ema:  # it is of the weight as it is kept
        oracle.average_anew(average, oracles.exact(found["param"]))
    assert found.keys() == oracle.results().keys()
    for name, expected in oracle.results().items():
        setting.assert_stored(name, found[name], expected)
    (weight,) = optimizer.fp32_params()
    assert weight.dtype == (FLOAT64 if dtype == FLOAT64 else FLOAT32)
    assert_param_is_rounded_weight(param, weight, setting.masters(dtype))


def rms(error: oracles.Array) -> float:
    return float(np.sqrt(np.mean(error**2)))
