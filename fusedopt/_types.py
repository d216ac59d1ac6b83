"""Names of the types that optimizers deal in."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed import ProcessGroup
else:  # torch may be built without, and then nobody has one
    ProcessGroup = None

ParamGroup: TypeAlias = dict[str, Any]
Params: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]
State: TypeAlias = dict[str, Any]
NormGroup: TypeAlias = ProcessGroup | Sequence[ProcessGroup] | Literal["world"] | None
