"""For those who come from bitsandbytes: reads states of its Adam and AdamW, 8-bit and 32-bit."""

import torch
from torch import Tensor

from .._optimizer import FusedOptimizer
from .._types import State
from ._reader import SavedState, convert

# state_dict() of bitsandbytes puts its entries into a dict below this key, to hide them from FSDP.
WRAPPED = "__bnb_optimizer_quant_state__"
BLOCK_SIZES = (256, 2048)  # since version 0.45, and before
UNUSED = ("step", "bias_correction", "alpha", "t_alpha", "t_beta3")  # keys of its param groups


def convert_state_dict(state_dict: State, optimizer: FusedOptimizer) -> State:
    """What ``state_dict()`` of bitsandbytes' Adam or AdamW returned, for ``load_state_dict()``.

    ``optimizer`` is a ``fusedopt.Adam`` or ``AdamW`` over the same parameters in the same order;
    ``AdamW`` for both, since bitsandbytes' Adam decouples the decay, too. The 8-bit kinds, the
    paged ones as well, have codes in ``state1`` and ``state2``: an element of a moment is the
    number that ``qmap`` has for its code, times ``absmax`` of its block of 256 elements (2048
    before version 0.45), as bitsandbytes computes it, in float32. Elements are taken in the order
    in which they lie in memory, as its CUDA kernels take them, which matters for states that kept
    the strides of a channels_last parameter. Other state dicts, of fusedopt and torch, are returned
    unchanged.

    Raises TypeError or ValueError, which name the parameter, where the state is of another kind:
    without scales, of ``block_wise=False``, of AdEMAMix or of an optimizer with one state.
    """
    state = {key: _unwrapped(entries) for key, entries in state_dict.get("state", {}).items()}
    if state:
        state_dict = {**state_dict, "state": state}
    return convert(state_dict, optimizer, "Adam", _read, UNUSED)


def _unwrapped(entries: State) -> State:
    if not isinstance(entries, dict) or WRAPPED not in entries:
        return entries
    return {**{k: v for k, v in entries.items() if k != WRAPPED}, **entries[WRAPPED]}


def _read(saved: SavedState, _: int | None) -> State:
    if "max1" in saved.entries:
        raise saved.fail("max1", "is of block_wise=False, with one scale for all: not supported")
    saved.check_names(
        *("step", "state1", "state2"),
        optional=("qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec"),
    )
    return {
        "step": saved.count("step"),
        "exp_avg": _moment(saved, 1),
        "exp_avg_sq": _moment(saved, 2),
    }


def _moment(saved: SavedState, number: int) -> Tensor:
    param, name = saved.param, f"state{number}"
    elements = _in_memory_order(saved.tensor(name, torch.uint8, torch.float32))
    if elements.dtype == torch.uint8:
        elements = _decode(saved, elements, number)
    # The step of bitsandbytes makes parameters contiguous, and goes through memory: so lie its
    # states, whatever strides their tensors have kept.
    return elements.view(param.shape)


def _decode(saved: SavedState, codes: Tensor, number: int) -> Tensor:
    qmap, absmax = f"qmap{number}", f"absmax{number}"
    saved.check_names(*saved.entries, qmap, absmax)
    numbers = saved.tensor(qmap, torch.float32, shape=torch.Size([256]))
    count = codes.numel()
    blocks = {-(-count // size): size for size in reversed(BLOCK_SIZES)}
    scales = saved.entries[absmax]
    if not isinstance(scales, Tensor) or scales.numel() not in blocks:
        found = scales.numel() if isinstance(scales, Tensor) else scales
        raise saved.fail(
            absmax, f"has {found} scales, but must have {' or '.join(map(str, blocks))}"
        )
    scales = saved.tensor(absmax, torch.float32, shape=torch.Size([scales.numel()]))
    size = blocks[scales.numel()]
    device = codes.device
    repeated = scales.to(device).repeat_interleave(size)[:count]
    return numbers.to(device)[codes.to(torch.int64)] * repeated


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory, in one dim."""
    strides = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, size in strides:
        if size != 1 and stride != expected:
            return tensor.reshape(-1)
        expected *= size
    return tensor.as_strided((tensor.numel(),), (1,))
