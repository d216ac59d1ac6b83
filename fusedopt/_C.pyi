from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    compiler: str
    isas: list[str]
    openmp: int
    fingerprints: bool
    lazy_keys: bool
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
        create_state: Callable[[list[tuple[int, int]], bool], Callable[[], None]],
        num_threads: int,
        checks_grads: bool,
    ) -> list[tuple[int, int]] | None: ...
    @property
    def verdict(self) -> Tensor | None: ...
    def bookkeeping_bytes(self) -> int: ...
    def overlap_checks(self) -> int: ...

def check_group(
    optimizer: str, group: dict[str, Any], index: int, is_construction: bool = False
) -> None: ...
def check_state(
    optimizer: str, state: dict[str, Any], group: dict[str, Any], group_index: int, index: int
) -> None: ...
def build_info() -> BuildInfo: ...
def is_emulated() -> bool: ...

# RuntimeError except in builds with FUSEDOPT_CUDA=emulated.
def emulate(emulate: bool) -> None: ...
def begin_capture() -> None: ...
def end_capture() -> None: ...
def replay() -> None: ...
