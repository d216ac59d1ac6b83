"""Names of the types that optimizers deal in."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

ParamGroup: TypeAlias = dict[str, Any]
Params: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]
State: TypeAlias = dict[str, Any]
