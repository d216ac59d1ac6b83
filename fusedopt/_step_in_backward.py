"""Steps while the backward still runs, so that grads do not have to be kept till its end."""

import math
import operator
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from ._initial_averages import trains_nothing
from ._norms import are_marked, given_norm
from ._optimizer import FusedOptimizer
from ._ranks import compare_ranks
from ._tensors import largest_shard, local
from ._types import ParamGroup

BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel's


def step_in_backward(
    model: nn.Module,
    optimizer: FusedOptimizer,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    clip_by_previous_norm: bool = False,
    previous_norm: float | Tensor | None = None,
    grads_are_whole: bool = False,
) -> "StepInBackward":
    """Have the backward of a model step its parameters as their grads arrive, and free these.

    Grads then take the memory of a bucket and not that of the model. ``optimizer.step()`` is called
    after the backward as ever: it steps what has got a grad but filled no bucket, and calls hooks.
    All grads are None after it. Without clipping, all results are those of ordinary steps, to the
    bit.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    >>> optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3)
    >>> stepping = fusedopt.step_in_backward(model, optimizer)
    >>> for _ in range(3):
    ...     with stepping.accumulate():  # all micro-batches but the last
    ...         model(torch.randn(4, 8)).square().mean().backward()
    ...     model(torch.randn(4, 8)).square().mean().backward()
    ...     optimizer.step()
    >>> stepping.close()

    Args:
        model (nn.Module): the model, without DistributedDataParallel or FSDP1 around it or in it:
            they bring the grads of processes together after the grads have arrived here. With FSDP2
            (``fully_shard``) grads arrive as they have to.
        optimizer (FusedOptimizer): one of this package, whose parameters are stepped so; those of
            other optimizers keep their grads.
        bucket_bytes (int): of grads, at least 1: how many bytes are stepped together, in one launch
            on a GPU. A parameter with more is a bucket of its own.
        clip_by_previous_norm (bool): clip by ``max_grad_norm``, which must be the same for all
            groups, and by the norm that the grads had in the backward before, as the whole norm is
            not known before the last grad is there. The first step is not clipped, but by
            ``previous_norm``. A bucket whose grads are not all finite is skipped, and its norm does
            not count. Without it, ``max_grad_norm`` is refused.
        previous_norm (float | Tensor | None): what ``grad_norm`` of the returned object was when a
            checkpoint was saved, so that a run that resumes from it goes on with the same bits.
        grads_are_whole (bool): that no other process has a part in the grads of parameters that are
            plain tensors. In a program of several processes it has to be said, since nobody could
            tell.

    Returns:
        What accumulates over several backwards, knows the norm, and ends it all.

    Raises:
        TypeError: the optimizer is not of this package, ``bucket_bytes`` is no int, or
            ``previous_norm`` no real number or tensor.
        ValueError: ``bucket_bytes`` is below 1, ``previous_norm`` is negative or not one number, or
            is given without ``clip_by_previous_norm``, no parameter is both the model's and the
            optimizer's, or grads would be stepped before they are what they are to be: of
            DistributedDataParallel, of FSDP1, of plain tensors in a program of several processes,
            of groups with ``max_grad_norm``.
        RuntimeError: the optimizer steps in the backward already. Later, in the backward: a grad
            arrives for the second time since the last ``optimizer.step()`` (as of a module in
            several segments of torch.utils.checkpoint with ``use_reentrant=True``), or the step
            fails, as ``optimizer.step()`` would; then buckets before it have been stepped. In
            ``optimizer.step()``: a GradScaler is in use, whose scale is not known in the backward.
    """
    if not isinstance(optimizer, FusedOptimizer):
        name = type(optimizer).__name__
        raise TypeError(f"step_in_backward() is for optimizers of fusedopt, got {name}")
    try:
        bucket_bytes = operator.index(bucket_bytes)
    except TypeError:
        raise TypeError(f"bucket_bytes must be an int, got {bucket_bytes!r}") from None
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}")
    if optimizer._in_backward is not None:
        raise RuntimeError("this optimizer steps in the backward already")
    if previous_norm is not None:
        if not clip_by_previous_norm:
            raise ValueError("previous_norm has no use without clip_by_previous_norm=True")
        previous_norm = given_norm(previous_norm, "previous_norm")
    _refuse_wrappers(model)
    return StepInBackward(
        model, optimizer, bucket_bytes, clip_by_previous_norm, previous_norm, grads_are_whole
    )


class StepInBackward:
    """What ``step_in_backward()`` returns. As a context manager it closes itself at the end."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: FusedOptimizer,
        bucket_bytes: int,
        clips: bool,
        previous_norm: float | Tensor | None,
        grads_are_whole: bool,
    ) -> None:
        self._optimizer, self._clips, self._are_whole = optimizer, clips, grads_are_whole
        self._lock = threading.Lock()  # a backward over several GPUs has a thread for each
        self._accumulates = False
        self._arrived: set[Tensor] = set()  # since the last optimizer.step()
        self._squares: list[Tensor] = []  # of the norms of what has been stepped since then
        self._norm: Tensor | None = None  # of the backward before
        in_model = set(model.parameters())
        params: list[Any] = [
            param for param in optimizer._params() if param.requires_grad and param in in_model
        ]
        if not params:
            raise ValueError("the optimizer has no parameter of this model that needs a grad")
        self._refuse_parts(params)
        self._limit()
        if previous_norm is not None:
            device = local(params[0]).device
            self._norm = torch.as_tensor(previous_norm, dtype=torch.float64, device=device)
        # The last ones get their grads first.
        self._buckets = [_Part(optimizer, part) for part in _cut(reversed(params), bucket_bytes)]
        self._rest = _Part(optimizer, [])
        self._bucket_of = {param: bucket for bucket in self._buckets for param in bucket.params}
        # The garbage collector does not look into what autograd holds.
        itself = weakref.ref(self)

        def take(param: Tensor) -> None:
            found = itself()
            if found is not None:
                found._take(param)

        self._handles = [param.register_post_accumulate_grad_hook(take) for param in params]
        optimizer._in_backward = self
        # Else a torch.amp.GradScaler would look for grads where there are none any more, and say so
        # in words that do not help.
        self._supported_scaling = optimizer._step_supports_amp_scaling
        optimizer._step_supports_amp_scaling = True

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, backwards add to the grads and step nothing: for all of a step but the last."""
        before, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = before

    @property
    def grad_norm(self) -> Tensor | None:
        """L2 norm of all grads of the latest step, before clipping.

        A float64 tensor of one element; before the first step ``previous_norm``; None without
        ``clip_by_previous_norm``. A step with learning rates of 0 and grads of zeros, by which
        torch.distributed.checkpoint sets an optimizer up, leaves it as it is.
        """
        return self._norm

    def close(self) -> None:
        """Let the optimizer be as it was. Grads that have not been stepped are ``step()``'s."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._optimizer._in_backward is self:
            self._optimizer._in_backward = None
            self._optimizer._step_supports_amp_scaling = self._supported_scaling

    def __enter__(self) -> "StepInBackward":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, param: Tensor) -> None:
        """What autograd calls when it has added to the grad of a parameter."""
        if self._accumulates:
            return
        with self._lock:
            if param in self._arrived:
                raise RuntimeError(
                    "a grad has arrived twice and was stepped, or would be, after the first time: "
                    "call optimizer.step() after each backward (after one that has failed, "
                    "optimizer.zero_grad()), or have all backwards of a step but the last inside "
                    "accumulate(). torch.utils.checkpoint with use_reentrant=True has a backward "
                    "of its own for each segment: of a module that is in several of them, grads "
                    "arrive several times in any backward, so use_reentrant=False"
                )
            self._arrived.add(param)
            bucket = self._bucket_of[param]
            bucket.num_missing -= 1
            if bucket.num_missing == 0:
                self._step(bucket, bucket.params)

    def finish(self, grad_norm: float | Tensor | None, is_scaled: bool) -> None:
        """What ``optimizer.step()`` does in its own place."""
        if is_scaled:
            raise RuntimeError(
                "a GradScaler cannot be used where the backward steps: it would have been stepped "
                "with grads that are still scaled; train in bfloat16, or close() it"
            )
        if grad_norm is not None:
            raise ValueError("grad_norm= comes too late where the backward has stepped")
        with self._lock:
            optimizer = self._optimizer
            left = [param for param in optimizer._params() if param.grad is not None]
            if left:
                self._step(self._rest, left)
            optimizer._shared.grad_status = None  # of a part
            self._forget_arrivals()
            if self._squares:
                norm = self._whole_norm()
                if self._norm is not None and trains_nothing(optimizer):
                    # torch.distributed.checkpoint steps so to find out what there is to load.
                    norm = torch.where(norm == 0, self._norm.to(norm.device), norm)
                self._norm = norm
                self._squares = []

    def restart(self) -> None:
        """What ``optimizer.zero_grad()`` does beside: what a backward has left is given up."""
        with self._lock:
            self._forget_arrivals()
            self._squares = []

    def _forget_arrivals(self) -> None:
        self._arrived.clear()
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.params)

    def _step(self, part: "_Part", params: list[Tensor]) -> None:
        optimizer = self._optimizer
        optimizer._refuse_swapped("a step")
        self._refuse_parts(params)
        limit = self._limit()
        shared = optimizer._shared
        if shared.compares_ranks:
            compare_ranks(optimizer, shared, is_norm_given=False)
        scale: float | Tensor = 1.0
        if limit is not None and self._norm is not None:
            # As clipping has it: grads are multiplied by limit / (norm + 1e-6) if that is below 1.
            # A norm of grads of which none was finite says nothing of these.
            scale = ((self._norm + 1e-6) / limit).nan_to_num(1.0, posinf=1.0).clamp(min=1.0)
            scale = scale.float() if _C.is_on_gpu(scale) else float(scale)
        shared.found_inf, shared.grad_status, shared.counts_nonfinite = None, None, True
        stepping = part.prepared(params, {} if limit is None else {"max_grad_norm": math.inf})
        stepped = stepping._params()  # others have left the optimizer, and keep their grads
        if not stepped:
            return
        plan = stepping._plan()
        before = plan.num_runs
        try:
            stepping._step_with(scale, None, None)
            if limit is not None:
                norm = stepping.grad_norm
                assert norm is not None
                self._squares.append((norm * scale).square())
            _free_grads(stepped)
        except BaseException:
            if plan.num_runs != before:  # Ctrl-C, after it: nobody may step these grads again
                _free_grads(stepped)
            raise

    def _whole_norm(self) -> Tensor:
        """Of the squares; what is not finite was skipped, and the norm before stays if all were."""
        first = self._squares[0].device
        squares = torch.stack([square.to(first) for square in self._squares])
        finite = squares.isfinite()
        norm = torch.where(finite, squares, 0.0).sum().sqrt()
        before = math.nan if self._norm is None else self._norm.to(first)
        return torch.where(finite.any(), norm, before)

    def _limit(self) -> float | None:
        """What to clip to, or None. Raises ValueError where that is not to be had."""
        groups = self._optimizer.param_groups
        limits = {_C.max_grad_norm(group, index) for index, group in enumerate(groups)}
        if limits == {0}:
            return None
        if not self._clips:
            raise ValueError(
                "max_grad_norm needs all grads before the first of them is stepped: leave it out, "
                "or set clip_by_previous_norm=True"
            )
        if len(limits) > 1:
            raise ValueError(
                "clip_by_previous_norm=True needs the same max_grad_norm in all param groups"
            )
        return limits.pop()

    def _refuse_parts(self, params: list[Tensor]) -> None:
        """Raise if processes may have yet to bring grads together."""
        if are_marked(params):
            raise ValueError(
                "FSDP1 (FullyShardedDataParallel) brings grads together after they have arrived "
                "here: use FSDP2 (fully_shard)"
            )
        distributed = torch.distributed
        is_alone = not (distributed.is_available() and distributed.is_initialized())
        if self._are_whole or is_alone or distributed.get_world_size() == 1:
            return
        if any(not hasattr(param, "device_mesh") for param in params):
            raise ValueError(
                "there are several processes and parameters that are plain tensors: their grads "
                "would be stepped before DistributedDataParallel, say, could bring them together. "
                "Use FSDP2 (fully_shard); or set grads_are_whole=True if no other process has a "
                "part in them"
            )


class _Part:
    """Some of an optimizer's parameters, and an optimizer of its kind that steps just these."""

    def __init__(self, optimizer: FusedOptimizer, params: list[Tensor]) -> None:
        self._whole = optimizer
        self.params = params
        self.num_missing = len(params)
        self._optimizer: FusedOptimizer = object.__new__(type(optimizer))
        self._optimizer.__dict__.update(optimizer.__dict__)
        self._optimizer.__dict__.pop("_plan_", None)  # one of its own
        self._groups: dict[int, ParamGroup] = {}  # those of the whole, by their index

    def prepared(self, params: list[Tensor], options: ParamGroup) -> FusedOptimizer:
        """The optimizer, for these parameters, with the options and states of now."""
        wanted = set(params)
        groups = []
        for at, group in enumerate(self._whole.param_groups):
            places = [i for i, param in enumerate(group["params"]) if param in wanted]
            if not places:
                continue
            mine = self._groups.setdefault(at, {})
            if not mine.keys() <= group.keys() | options.keys():
                mine.clear()
            mine.update(group)
            mine.update(options)
            mine["params"] = [group["params"][i] for i in places]
            if "param_names" in group:
                mine["param_names"] = [group["param_names"][i] for i in places]
            groups.append(mine)
        self._optimizer.param_groups = groups
        self._optimizer.state = self._whole.state
        self._optimizer._shared_ = self._whole._shared
        return self._optimizer


def _free_grads(params: list[Tensor]) -> None:
    for param in params:
        param.grad = None


def _cut(params: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Parts with at most so many bytes, or with one parameter, in this order.

    Grads have the dtypes of their parameters. All ranks of a mesh cut alike, for they take part in
    the norm of each part.
    """
    part: list[Tensor] = []
    size = 0
    for param in params:
        own = largest_shard(param) * param.element_size()
        if part and size + own > most:
            yield part
            part, size = [], 0
        part.append(param)
        size += own
    yield part


def _refuse_wrappers(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "DistributedDataParallel brings grads together after they have arrived here: use "
                "FSDP2 (fully_shard), or step after the backward"
            )
