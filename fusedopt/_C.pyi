from collections.abc import Callable, Mapping
from typing import Any, TypedDict

class BuildInfo(TypedDict):
    compiler: str
    isas: list[str]
    openmp: int
    fingerprints: bool
    cuda_unavailable: str | None

class Plan:
    def __init__(self, optimizer: str, isa: str, chunk_elements: int = 0) -> None: ...
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: Mapping[Any, Any],
        grad_scale: float,
        create_state: Callable[[list[tuple[int, int]]], Callable[[], None]],
        num_threads: int,
    ) -> None: ...
    def bookkeeping_bytes(self) -> int: ...

def check_group(optimizer: str, group: dict[str, Any], index: int) -> None: ...
def build_info() -> BuildInfo: ...
