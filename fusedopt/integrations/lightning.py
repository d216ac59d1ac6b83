"""Lightning: a callback that evaluates with an optimizer's averages and logs its norm of the grads.

>>> from fusedopt.integrations.lightning import FusedOptimizerCallback
>>> trainer = lightning.Trainer(callbacks=[FusedOptimizerCallback()])

For Trainers of ``lightning`` and of ``pytorch_lightning``, which are the same code.
"""

import copy
from contextlib import ExitStack
from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from .._norms import are_marked
from .._optimizer import FusedOptimizer
from ._averages import clips, fused_optimizer, has_averages, keeps_averages, swap_ema

WEIGHTS = "fusedopt_weights"  # the key in a checkpoint whose "state_dict" has averages


class FusedOptimizerCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Averages in evaluation, and the norm of the grads in the log, for optimizers of fusedopt.

    Of one with ``ema_decay``, from its first step on, validation, test and prediction use the
    averages, until they end or raise. Not so ``test(ckpt_path=...)`` and the like, whose weights
    are those of the file.

    Of one with ``max_grad_norm``, the norm before clipping is logged after every step. Nothing
    waits for a GPU until a logger reads it. Under ``precision="16-mixed"`` it is that of the latest
    step that the GradScaler has not skipped.

    With other optimizers and without these options it does nothing.

    Args:
        grad_norm (str | None, default "grad_norm"): name to log under, followed by the optimizer's
            index if there are several; None: nothing is logged.
        averages_in_checkpoints (bool, default False): checkpoints hold the averages as the model,
            for all who load it, and the weights apart from it, from which training is resumed.
            Without this they hold the weights as the model; the averages are in the optimizer's
            state in any case.

    Raises:
        ValueError: when ``fit()`` begins. The Trainer's ``gradient_clip_val`` and an optimizer's
            ``max_grad_norm`` would clip twice. DeepSpeed has taken over the params, so these two
            options of the optimizer cannot work. Or ``averages_in_checkpoints`` meets a sharded
            model, or a checkpoint callback with ``save_weights_only``, which asks no callbacks.
    """

    def __init__(
        self, *, grad_norm: str | None = "grad_norm", averages_in_checkpoints: bool = False
    ) -> None:
        self.grad_norm = grad_norm
        self.averages_in_checkpoints = averages_in_checkpoints
        self._swap: ExitStack | None = None  # while params hold averages
        self._weights_are_loaded = False  # after the latest step: no averages belong to them
        self._logged_step = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._weights_are_loaded = False
        self._logged_step = trainer.global_step
        for optimizer in trainer.optimizers:
            fused = fused_optimizer(optimizer)
            if fused is not None:
                self._refuse_what_cannot_work(trainer, fused, is_wrapped=fused is not optimizer)
        if self.averages_in_checkpoints:
            _refuse_checkpoints_without_averages(trainer, pl_module)

    def _refuse_what_cannot_work(
        self, trainer: Any, fused: FusedOptimizer, is_wrapped: bool
    ) -> None:
        if is_wrapped and (clips(fused) or keeps_averages(fused)):
            raise ValueError(
                "another optimizer (DeepSpeed's) steps partitions of its own in the place of the "
                "params, so max_grad_norm and ema_decay cannot work: leave them out, and set "
                "gradient_clip_val"
            )
        limit = trainer.gradient_clip_val
        if limit is not None and limit > 0 and clips(fused):
            raise ValueError(
                f"the grads would be clipped twice, by the Trainer's gradient_clip_val={limit} and "
                "by the optimizer's max_grad_norm: leave one of them out"
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.grad_norm is None or trainer.global_step == self._logged_step:
            return  # grads are being accumulated
        self._logged_step = trainer.global_step
        for index, optimizer in enumerate(trainer.optimizers):
            norm = optimizer.grad_norm if isinstance(optimizer, FusedOptimizer) else None
            if norm is not None:
                suffix = f"_{index}" if len(trainer.optimizers) > 1 else ""
                pl_module.log(self.grad_norm + suffix, norm)

    def _swap_in(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn != "fit" and trainer.ckpt_path is not None:
            self._weights_are_loaded = True
        if not self._weights_are_loaded:
            self._swap = swapped(trainer, pl_module)

    def _swap_back(self, *_: Any) -> None:
        if self._swap is not None:
            self._swap.close()
            self._swap = None

    on_validation_start = on_test_start = on_predict_start = _swap_in
    on_validation_end = on_test_end = on_predict_end = on_exception = _swap_back

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        has_any = any(map(has_averages, _fused(trainer)))
        if self.averages_in_checkpoints and has_any and not self._weights_are_loaded:
            with swapped(trainer, pl_module):
                averages = copy.deepcopy(trainer.strategy.lightning_module_state_dict())
            checkpoint[WEIGHTS], checkpoint["state_dict"] = checkpoint["state_dict"], averages

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Lightning has loaded the model from "state_dict", and will load the optimizer's state."""
        if trainer.state.fn == "fit" and WEIGHTS in checkpoint:
            pl_module.load_state_dict(checkpoint[WEIGHTS], strict=pl_module.strict_loading)


def swapped(trainer: Any, pl_module: Any) -> ExitStack:
    """The params of all optimizers hold their averages until this is closed."""
    with ExitStack() as stack:  # which closes those that are open if one fails
        for optimizer in _fused(trainer):
            stack.enter_context(swap_ema(optimizer, pl_module))
        return stack.pop_all()


def _fused(trainer: Any) -> list[FusedOptimizer]:
    return [each for each in trainer.optimizers if isinstance(each, FusedOptimizer)]


def _refuse_checkpoints_without_averages(trainer: Any, pl_module: Any) -> None:
    params = list(pl_module.parameters())
    if are_marked(params) or any(hasattr(param, "device_mesh") for param in params):
        raise ValueError(
            "averages_in_checkpoints needs a process that has the whole model, but its parameters "
            "are sharded: leave it out; the averages are in the optimizer's state"
        )
    if any(getattr(each, "save_weights_only", False) for each in trainer.checkpoint_callbacks):
        raise ValueError(
            "averages_in_checkpoints has no effect on a checkpoint callback with "
            "save_weights_only, which calls no other callback: leave one of the two out"
        )
