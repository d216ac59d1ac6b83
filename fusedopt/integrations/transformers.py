"""transformers' ``Trainer``: clipping is the optimizer's, and its averages are what is evaluated.

>>> from fusedopt.integrations.transformers import TrainerMixin
>>> class Trainer(TrainerMixin, transformers.Trainer):
...     pass
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import transformers

from .._optimizer import FusedOptimizer
from ._averages import clips, fused_optimizer, keeps_averages, swap_ema

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:  # so that it can stand before any subclass of Trainer
    Base = object

# Private to the Trainer. Should one be gone, the mixin says so instead of doing nothing.
REPLACED = ("_clip_grad_norm", "_get_grad_norm", "_load_best_model")
CALLED = ("_load_optimizer_and_scheduler",)


class TrainerMixin(Base):  # type: ignore[misc, unused-ignore]
    """Stands before a ``transformers.Trainer`` among the bases of a class.

    Of an optimizer of fusedopt with ``max_grad_norm``, however it has come into the Trainer:

    - The Trainer neither clips nor measures the grads: its own ``max_grad_norm``, which is 1.0
      unless it is told otherwise, is not used.
    - ``grad_norm`` is logged as the Trainer logs its own, before clipping. It is read then only. It
      is left out of a log whose latest step a GradScaler has skipped.

    Of one with ``ema_decay``, from its first step on:

    - ``evaluate()`` and ``predict()`` use the averages.
    - ``save_model()`` and ``push_to_hub()`` save them. Checkpoints hold the weights, and the
      averages in the optimizer's state, so that training can be resumed.
    - ``load_best_model_at_end`` loads the best checkpoint's averages, too, with the rest of the
      optimizer's state.

    With other optimizers and without these options the Trainer does what it always does.

    Raises:
        TypeError: the class is not made of this and, after it, a Trainer.
        RuntimeError: the Trainer lacks what this relies on; it is written for transformers 5.24.
        ValueError: when training begins. DeepSpeed has taken over the params, so these two options
            of the optimizer cannot work; or ``load_best_model_at_end`` cannot find averages, as
            ``save_only_model`` leaves them out.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        after = cls.__mro__[cls.__mro__.index(TrainerMixin) + 1 :]
        if transformers.Trainer not in after:
            raise TypeError(
                f"{cls.__name__}: TrainerMixin has to stand before a transformers.Trainer, as in "
                "class MyTrainer(TrainerMixin, transformers.Trainer)"
            )
        missing = [name for name in REPLACED + CALLED if not hasattr(transformers.Trainer, name)]
        if "_internal_call" not in inspect.signature(transformers.Trainer.save_model).parameters:
            missing.append("save_model(_internal_call=)")
        if missing:
            raise RuntimeError(
                f"TrainerMixin relies on {', '.join(missing)} of transformers.Trainer, which "
                f"transformers {transformers.__version__} does not have: it is written for 5.24"
            )

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        optimizer = super().create_optimizer(*args, **options)
        fused = fused_optimizer(optimizer)
        if fused is not None:
            self._refuse_what_cannot_work(fused)
        return optimizer

    def _refuse_what_cannot_work(self, fused: FusedOptimizer) -> None:
        if self.is_deepspeed_enabled and (clips(fused) or keeps_averages(fused)):
            raise ValueError(
                "DeepSpeed hands the optimizer partitions of its own in the place of the params, "
                "so max_grad_norm and ema_decay cannot work: leave them out, and set "
                "gradient_clipping in DeepSpeed's configuration"
            )
        if self.args.load_best_model_at_end and self.args.save_only_model and keeps_averages(fused):
            raise ValueError(
                "load_best_model_at_end needs the averages of the best checkpoint, which are in "
                "the optimizer's state: they are not saved with save_only_model"
            )

    def _fused_that(self, does: Callable[[FusedOptimizer], bool]) -> FusedOptimizer | None:
        """The optimizer of fusedopt for which ``does`` is true."""
        fused = fused_optimizer(self.optimizer)
        return fused if fused is not None and does(fused) else None

    def _clip_grad_norm(self, model: Any) -> Any:
        return None if self._fused_that(clips) else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return None if self._fused_that(clips) else super()._get_grad_norm(model, grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        fused = self._fused_that(clips)
        if fused is not None and "loss" in logs and not self.accelerator.optimizer_step_was_skipped:
            norm = fused.grad_norm
            if norm is not None:
                logs = {"loss": logs["loss"], "grad_norm": norm.item(), **logs}
        super().log(logs, *args, **options)

    def _averages(self) -> AbstractContextManager[None]:
        return swap_ema(self.optimizer, self.model)

    def evaluate(self, *args: Any, **options: Any) -> Any:
        with self._averages():
            return super().evaluate(*args, **options)

    def predict(self, *args: Any, **options: Any) -> Any:
        with self._averages():
            return super().predict(*args, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # by a checkpoint; or by push_to_hub(), which has swapped already
            super().save_model(output_dir, _internal_call=True)
            return
        with self._averages():
            super().save_model(output_dir)

    def push_to_hub(self, *args: Any, **options: Any) -> Any:
        with self._averages():
            return super().push_to_hub(*args, **options)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._fused_that(keeps_averages):
            self._load_optimizer_and_scheduler(self.state.best_model_checkpoint)
