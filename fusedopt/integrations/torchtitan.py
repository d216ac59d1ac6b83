"""torchtitan: its container of optimizers, which knows those of fusedopt by name.

>>> from fusedopt.integrations.torchtitan import OptimizersContainer
>>> group = ParamGroupConfig(
...     pattern=".*", optimizer_name="fusedopt.AdamW", optimizer_kwargs={"lr": 3e-4}
... )
>>> config = OptimizersContainer.Config(param_groups=[group])
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer as Base

import fusedopt

OPTIMIZERS = [getattr(fusedopt, name) for name in fusedopt.__all__]
NAMES = {
    f"fusedopt.{each.__name__}": each
    for each in OPTIMIZERS
    if isinstance(each, type) and issubclass(each, Optimizer)
}
if not hasattr(Base, "_resolve_optimizer_factory"):  # private to torchtitan
    raise ImportError(
        "torchtitan's OptimizersContainer has no _resolve_optimizer_factory() to extend: this "
        "module is written for torchtitan 0.3"
    )


class OptimizersContainer(Base):  # type: ignore[misc, unused-ignore]
    """torchtitan's, which takes ``"fusedopt.AdamW"`` and all others of fusedopt as names.

    All options of the optimizer go into ``optimizer_kwargs``, those that torch lacks included.
    ``implementation`` makes no difference to them, as every step is fused, but for
    ``"fused_opt_states_bf16"``, which is refused: torchtitan would leave their states as they are.

    torchtitan's Trainer clips by ``training.max_norm`` before each step, 1.0 unless it is told
    otherwise, and logs that norm: leave ``max_grad_norm`` out. It would be by the norm of what one
    optimizer has: not of all stages of a pipeline, nor of optimizers of several types together.

    Raises:
        ValueError: an optimizer of fusedopt under ``implementation="fused_opt_states_bf16"``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Base.Config):  # type: ignore[misc, unused-ignore]
        pass

    def __init__(self, config: Any, *, model_parts: list[Any]) -> None:
        names = {group.optimizer_name for group in config.param_groups} & set(NAMES)
        if names and config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                "implementation='fused_opt_states_bf16' does nothing for "
                f"{', '.join(sorted(names))}: set state_dtype='bfloat16' in optimizer_kwargs"
            )
        super().__init__(config, model_parts=model_parts)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        found: Callable[..., Optimizer] = NAMES.get(name) or Base._resolve_optimizer_factory(name)
        return found
