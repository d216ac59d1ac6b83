"""Adam and AdamW."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ._docs import described_as
from ._optimizer import FusedOptimizer
from ._options import given_options, notes_given, option_defaults
from ._types import NormGroup, ParamGroup, Params


class Adam(FusedOptimizer):
    r"""Adam, as ``torch.optim.Adam``, with the whole step in one pass over memory.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \gamma \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    for a parameter :math:`p`, its grad :math:`g` and its number of steps :math:`t`, this one
    included. Kingma and Ba, "Adam: A Method for Stochastic Optimization" (arXiv 1412.6980).

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    >>> model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Arguments, attributes and methods that are not described here are those of ``AdamW``.

    Args:
        weight_decay (float | Tensor, default 0): :math:`\lambda`, at least 0, an L2 penalty,
            :math:`g \leftarrow g + \lambda p`, unless ``decoupled_weight_decay``. A tensor is read
            as that of ``lr``, where torch's fused step reads on the host.
        decoupled_weight_decay (bool, default False): decay the parameter instead of adding to the
            grad: :math:`p \leftarrow (1 - \gamma \lambda) p` before the update, which is AdamW.

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        exp_avg, exp_avg_sq: the moments :math:`m, v`, of the parameter's dtype unless
            ``state_dtype`` says otherwise. In float16, small second moments are 0: set it then.
            Where :math:`\beta_1` is the number 0, ``exp_avg`` would be the grad: there is none, a
            step reads and writes less, and ``state_dict()`` has zeros for it. Where that changes,
            it starts from zeros.
        max_exp_avg_sq: the largest second moment so far, as ``exp_avg_sq``, with ``amsgrad``.
    """

    _row = "Adam"

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | Literal["float32", "bfloat16", "q8"] | None = None,
        master_weights: Literal["float32", "split", "split8"] | None = None,
        stochastic_rounding: bool | None = None,
        rounding_seed: int = 0,
        max_grad_norm: float | Tensor | None = None,
        norm_group: NormGroup = None,
        error_if_nonfinite: bool = False,
        ema_decay: float | Tensor | None = None,
        ema_bias_correction: bool = False,
        lr_independent_weight_decay: bool = False,
        cautious_update: bool = False,
        cautious_weight_decay: bool = False,
    ) -> None:
        super().__init__(params, given_options(locals()), norm_group)

    _option_defaults = option_defaults(__init__)


class AdamW(Adam):
    r"""Adam with decoupled weight decay, as ``torch.optim.AdamW``, in one pass over memory.

    .. math::
        p &\leftarrow (1 - \gamma \lambda) p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \gamma \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    for a parameter :math:`p`, its grad :math:`g` and its number of steps :math:`t`, this one
    included. Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101).

    >>> model = torch.nn.Linear(8, 1)
    >>> optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0, ema_decay=0.99)
    >>> model(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()
    >>> with optimizer.swap_ema():
    ...     loss = model(torch.randn(4, 8)).square().mean()

    All arguments but ``params`` are options: their values are the defaults of the param groups,
    which may set them for themselves and be changed between steps. Those from ``state_dtype`` on
    are not in torch's groups, nor in these unless they are given; ``norm_group`` never is.

    Args:
        params (iterable): parameters, (name, parameter) pairs, or param groups: dicts with
            ``params`` and any of the options below. Dense tensors of float32, float64, bfloat16,
            float16 or complex dtype, of any shape and strides, on the CPU or on NVIDIA GPUs.
        lr (float | Tensor, default 1e-3): learning rate :math:`\gamma`, at least 0. A tensor has
            one element. One on the parameters' GPU is read there, in the step; its value is then
            not checked.
        betas (tuple[float | Tensor, float | Tensor], default (0.9, 0.999)): decay rates
            :math:`\beta_1, \beta_2` of the moments, each in [0, 1). A :math:`\beta_2` of 1 set
            later keeps the second moment as it is; where that is above 0, the params then change by
            their decay only. Tensors are read as that of ``lr``, where torch's fused step reads on
            the host.
        eps (float | Tensor, default 1e-8): :math:`\epsilon`, at least 0, added to the denominator.
            If it is above 0, the denominator is, too. A tensor is read as that of ``lr``, where
            torch's fused step reads on the host.
        weight_decay (float | Tensor, default 1e-2): :math:`\lambda`, at least 0, the share of the
            parameter that a step takes away, times ``lr`` unless ``lr_independent_weight_decay``. A
            tensor is read as that of ``lr``, where torch's fused step reads on the host.
        amsgrad (bool, default False): divide by the largest second moment so far (Reddi et al., "On
            the Convergence of Adam and Beyond", 2018), which is one more state.
        maximize (bool, default False): ascend along the grads instead of descending.
        foreach (bool | None, default None): accepted for torch's sake: every step is fused,
            whatever this says. Excludes ``fused=True`` if it is True.
        capturable (bool, default False): allow ``step()`` to be captured into a CUDA graph.
            ``step`` of the state, if there is one, then lies on the GPU, and options that are
            tensors on the GPU may change between replays. It makes no difference on the CPU.
        differentiable (bool, default False): must be False: autograd does not record the step.
        fused (bool | None, default None): every step is fused, whatever this says. True lets
            ``torch.amp.GradScaler`` leave unscaling and skipping to ``step()``, and excludes
            ``foreach=True``.
        state_dtype (torch.dtype | Literal["float32", "bfloat16", "q8"] | None, default None): dtype
            of the states, ``torch.float32`` or ``torch.bfloat16`` or its name, whatever that of
            their parameter, which must be real; None: that of the parameter. ``"q8"``: codes of 8
            bits with a float32 scale for each 64 elements, 2.125 bytes for both moments, of
            parameters of float32, bfloat16 and float16 with two dims or more and 4096 elements or
            more; others have float32. Param groups and state dicts hold the name; a group may be
            given either later. A step goes by what is in the state, ``load_state_dict()`` and new
            parameters by the option.
        master_weights (Literal["float32", "split", "split8"] | None, default None): keep the
            weights of 16-bit parameters in float32, or in 24 bits of it, so that updates too small
            for their dtype are not lost. ``"float32"``: in ``master_param`` of the state, 4 bytes
            each; wider parameters need none and get none. ``"split"``, for bfloat16 only: the
            parameter and ``param_remainder`` of the state, 2 bytes, are the weight together,
            exactly; the parameter is the nearest bfloat16, with ties away from zero. ``"split8"``:
            the same with ``param_remainder8``, 1 byte, for a weight of 24 bits, the upper ones of a
            float32, to which each step rounds it stochastically. What is written to a parameter
            between steps (a loaded model, a clamp) is its weight from then on, to within the
            remainder: where it is not what the float32 weight rounds to. Writes through ``.data``
            are not counted by torch and not noticed: ``load_fp32_params()`` or ``reset_masters()``
            take them over.
        stochastic_rounding (bool | None, default None): round what is kept in bfloat16 up or down
            with the probabilities that make the mean right, instead of to the nearest. None:
            ``exp_avg_sq``, which to the nearest stands still where a step would change it by less
            than half a unit (with a beta2 of 0.999, 1000 steps after grads have fallen to a tenth,
            its root is 1.67 times too large then, and right to half a percent if it is rounded
            stochastically), all states in 8 bits, and weights of 24 bits. True: all states, and
            parameters without master weights, too; not for float16 parameters. False: nothing, as
            in torch.
        rounding_seed (int, default 0): 0 to 2**32 - 1. The draws follow from it, from the step, the
            element's place in its tensor (in the whole of a DTensor that is sharded by rows, by its
            first dim) and its new weight, or the new state for 8 bits: the same in every run, on
            every device and for any number of processes.
        max_grad_norm (float | Tensor | None, default None): above 0; grads are multiplied by
            ``min(1, max_grad_norm / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` does,
            but ``.grad`` is not written to. The norm is the L2 norm of all grads of all groups
            (and, of DTensors, of all their shards; see ``norm_group`` for parts of a model that are
            plain tensors). Its bits depend on no order, and not on how grads are sharded. A group
            with None is not clipped, its grads count; infinity only measures. A step whose norm is
            infinite or NaN is skipped. A tensor is read on the host in every step, which waits for
            one on a GPU.
        norm_group (NormGroup, default None): the processes whose optimizers step the other parts of
            a model in plain tensors, a ``torch.distributed.ProcessGroup`` or several, or "world"
            for all: FSDP1's shards, partitions of ``ZeroRedundancyOptimizer``, stages of a
            pipeline. What ``max_grad_norm`` and ``fusedopt.GradScaler`` need to know of the grads
            is added up over them, so all of them have to make the step or none: a scaler that has
            unscaled must have found the same on each. Whether and by what they clip is compared
            before their first step, which raises ValueError on all of them if it differs. Without
            it, a norm over FSDP1's shards is refused; others cannot be told from a whole model.
            DTensors need none for what they are sharded over. It is the optimizer's, not an option
            of param groups, and not saved; ``ZeroRedundancyOptimizer`` keeps it, and can be saved
            with "world" only.
        error_if_nonfinite (bool, default False): raise RuntimeError instead of skipping a step for
            its norm, but not for the overflows that ``fusedopt.GradScaler`` looks for, or torch's
            with ``fused=True``. No effect where no group has a ``max_grad_norm``. Waits for the
            GPU, and cannot be captured into a CUDA graph.
        ema_decay (float | Tensor | None, default None): keep an exponential moving average of the
            weights, ``ema_param`` of the state, with this decay in [0, 1); see ``swap_ema()``. The
            first step sets it, as ``torch.optim.swa_utils.AveragedModel`` does. A decay that is set
            later may be 1: the average rests then. A tensor is read as that of ``max_grad_norm``.
        ema_bias_correction (bool, default False): weigh all steps as if they had been there from
            the start, with ``(1 - decay) / (1 - decay**t)`` in place of ``1 - decay``. No effect
            without ``ema_decay``.
        lr_independent_weight_decay (bool, default False): decoupled decay multiplies the weights by
            ``1 - weight_decay`` instead of ``1 - lr * weight_decay``, unless ``lr`` is 0.
        cautious_update (bool, default False): update only the elements of a parameter whose update
            has the sign of their grad, an L2 penalty included (Liang et al., "Cautious Optimizers",
            arXiv 2411.16085). The others do no more than decay, and all states are kept up. What
            moves is not scaled up for what rests, as in the paper, which would take another pass:
            raise ``lr`` for that.
        cautious_weight_decay (bool, default False): decoupled decay leaves alone the elements that
            the update takes away from 0 (Chen et al., "Cautious Weight Decay", arXiv 2510.12402).

    State of a parameter, in ``state[param]``, of its shape where nothing else is said:
        step: float32 (float64 if that is torch's default dtype), one element, on the CPU; on the
            parameter's GPU with ``capturable``, with options that are tensors there, and where a
            GradScaler leaves unscaling to the step.
        exp_avg, exp_avg_sq: the moments :math:`m, v`, of the parameter's dtype unless
            ``state_dtype`` says otherwise. In float16, small second moments are 0: set it then.
            Where :math:`\beta_1` is the number 0, ``exp_avg`` would be the grad: there is none, a
            step reads and writes less, and ``state_dict()`` has zeros for it. Where that changes,
            it starts from zeros.
        max_exp_avg_sq: the largest second moment so far, as ``exp_avg_sq``, with ``amsgrad``.
        exp_avg_q8, exp_avg_scale, exp_avg_sq_q8, exp_avg_sq_scale, max_exp_avg_sq_q8 ...: in place
            of these with ``state_dtype="q8"``: int8 or, of what is never negative, uint8 codes, and
            float32 scales of shape (first dim, elements of a row / 64), or, where rows are no
            multiple of 64 elements, of (elements / 64,). Their names are not torch's, so that
            nobody takes codes for numbers.
        master_param: float32, of a 16-bit parameter with ``master_weights="float32"``.
        param_remainder: int16, of a bfloat16 parameter with ``master_weights="split"``. State dicts
            have the same bits, in the same memory, as bfloat16, which processes can send each
            other: they are no numbers there.
        param_remainder8: int8, of a bfloat16 parameter with ``master_weights="split8"``.
        ema_param: float32 for a 16-bit parameter, else of the parameter's dtype, with
            ``ema_decay``.

    Beside those of ``torch.optim.Optimizer`` (``param_groups``, ``state``, ``step()``,
    ``zero_grad()``, ``state_dict()`` ...) there are

    Attributes:
        grad_norm (Tensor | None): L2 norm of all grads of the latest step, before clipping; None if
            neither ``max_grad_norm`` nor ``fusedopt.GradScaler`` asked for it.
        nonfinite_grads (Tensor | None): how many of their elements were infinite or NaN; None as
            ``grad_norm``.
        skipped (Tensor): whether the latest step changed nothing because of such grads.

    Methods:
        memory(): bytes of parameters, grads and states.
        fp32_params(): copies of all weights, in float32 where parameters are narrower.
        load_fp32_params(weights): sets parameters and master weights to such copies.
        swap_ema(): a context in which the parameters hold the averages of ``ema_decay``.
        reset_ema(): lets the averages begin anew with the next step.
        reset_masters(): lets the next step make the master weights from the parameters.

    Raises:
        TypeError: a keyword is unknown, or a hyper-parameter is neither a number nor a tensor.
        ValueError: a hyper-parameter is NaN, infinite or out of range, options contradict each
            other, a parameter is given twice, or ``differentiable`` is True. What param groups set
            for themselves, and what is set later, may leave torch's ranges as long as a step can
            compute with it. What does not fit a parameter's dtype is refused in its first step.
        RuntimeError: ``fused`` and ``foreach`` are both True.
    """

    @notes_given
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | Literal["float32", "bfloat16", "q8"] | None = None,
        master_weights: Literal["float32", "split", "split8"] | None = None,
        stochastic_rounding: bool | None = None,
        rounding_seed: int = 0,
        max_grad_norm: float | Tensor | None = None,
        norm_group: NormGroup = None,
        error_if_nonfinite: bool = False,
        ema_decay: float | Tensor | None = None,
        ema_bias_correction: bool = False,
        lr_independent_weight_decay: bool = False,
        cautious_update: bool = False,
        cautious_weight_decay: bool = False,
    ) -> None:
        options = given_options(locals())
        super().__init__(params, **options, norm_group=norm_group, decoupled_weight_decay=True)

    _option_defaults = option_defaults(__init__)

    # A checkpoint may be an Adam's, or of a torch without the option.
    _fixed_options: ClassVar[ParamGroup] = {"decoupled_weight_decay": True}


described_as(AdamW)(Adam)
