from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from torch import Tensor, dtype

class BuildInfo(TypedDict):
    compiler: str
    isas: list[str]
    openmp: int
    fingerprints: bool
    fingerprint_obstacle: str | None
    lazy_keys: bool
    versions: bool
    cuda_unavailable: str | None
    cuda_archs: str

class Plan:
    def __init__(self, optimizer: str, isa: str, chunk_elements: int = 0) -> None: ...
    def step(
        self,
        param_groups: Iterable[Mapping[str, Any]],
        state: Mapping[Any, Any],
        grad_scale: float | Tensor,
        found_inf: Tensor | None,
        num_threads: int,
        checks_grads: bool,
        norm_groups: list[Any],
        grad_norm: float | Tensor | None,
    ) -> list[tuple[int, int]] | PendingStep | None: ...
    @property
    def grad_status(self) -> Tensor | None: ...
    @property
    def num_runs(self) -> int: ...
    def bookkeeping_bytes(self) -> int: ...
    def overlap_checks(self) -> int: ...

class PendingStep:
    missing: list[tuple[int, int]]
    maybe_written: list[tuple[int, int]]
    counts_on_gpu: bool
    has_run: bool
    def run(self) -> list[tuple[int, int]] | None: ...
    def close(self) -> None: ...

class StateSpec:
    entries: list[tuple[str, str, dtype]]
    omissible: list[tuple[str, str, dtype]]
    unused: list[str]
    codes: dict[str, tuple[str, dtype, str]]
    wants_codes: bool
    starts: dict[str, float]
    counts_steps: bool
    state_dtype: dtype | None
    weight_dtype: dtype

WEIGHTS_IN_STATE: dict[str, str]
CODES_SUFFIX: str
SCALES_SUFFIX: str
GROUP_OF_CODES: int
TOO_MANY_STEPS: float
GRAD_STATUS: dict[str, tuple[int, str]]

def check_group(
    optimizer: str, group: dict[str, Any], index: int, is_construction: bool = False
) -> None: ...
def max_grad_norm(group: dict[str, Any], index: int) -> float: ...
def check_state(
    optimizer: str, state: dict[str, Any], group: dict[str, Any], group_index: int, index: int
) -> None: ...
def state_spec(
    optimizer: str, group: Mapping[str, Any], dtype: dtype, is_strict: bool = True
) -> StateSpec: ...
def state_dtype_name(value: Any) -> str | None: ...
def join_weights(param: Tensor, remainder: Tensor, weight: Tensor) -> None: ...
def split_weights(weight: Tensor, param: Tensor, remainder: Tensor) -> None: ...
def encode(values: Tensor, codes: Tensor, scales: Tensor) -> None: ...
def decode(codes: Tensor, scales: Tensor, values: Tensor) -> None: ...
def names_of_scales(optimizer: str) -> list[str]: ...
def build_info() -> BuildInfo: ...
def is_on_gpu(tensor: Any) -> bool: ...

# Only in builds with FUSEDOPT_CUDA=emulated.
class emulation:  # noqa: N801, a module
    @staticmethod
    def use(emulate: bool) -> None: ...
    @staticmethod
    def is_used() -> bool: ...
    @staticmethod
    def begin_capture() -> None: ...
    @staticmethod
    def end_capture() -> None: ...
    @staticmethod
    def replay() -> None: ...
