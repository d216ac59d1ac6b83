"""What the extension asks of torch: tensor subclasses, memory, numbers on a GPU."""

import math
import sys
from typing import Any

import torch
from torch.nn.parameter import is_lazy

# Wrappers of weights that multiply in fewer bits, by the attribute with the weights themselves. An
# update of these is the update of the wrapper. FSDP2 has them inside its DTensors.
WEIGHTS_OF = {
    "torchao.float8.fsdp_utils.WeightWithDynamicFloat8CastTensor": "_tensor",
    "torchao.prototype.moe_training.tensor.TrainingWeightWrapperBaseTensor": "_data",
    "torchao.prototype.quantized_training.bitnet.BitNetTrainingLinearWeight": "_data",
    "torchao.prototype.quantized_training.int8_mixed_precision."
    "Int8MixedPrecisionTrainingLinearWeight": "_data",
}


def wrapping(tensor_type: type[torch.Tensor]) -> tuple[str | None, bool, str | None]:
    """How tensors of this type wrap others: a name, whether it is that of a method, and another.

    The attribute of the first name, or what the method returns, is the tensor to look at instead.
    (None, False, None) for tensors that wrap nothing: the memory is their own. A ``DTensor``
    (FSDP2) holds this rank's shard in ``_local_tensor``; an element-wise update of the shards is
    the update of the whole. The second name is that of the attribute with its layout over devices.
    A collective that is still under way is waited for. Wrappers of ``WEIGHTS_OF`` hold the weights.
    Raises TypeError for other subclasses that only wrap tensors: they have no memory of their own
    to write to.
    """
    if is_dtensor(tensor_type):
        return "_local_tensor", False, "_spec"
    collectives: Any = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is not None and issubclass(tensor_type, collectives.AsyncCollectiveTensor):
        return "trigger_wait", True, None
    if (weights := _attribute_of_weights(tensor_type)) is not None:
        return weights, False, None
    # Subclasses with a dispatch of their own (fake, functional, quantized tensors) are not memory.
    if tensor_type.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{tensor_type.__module__}.{tensor_type.__qualname__}, a tensor subclass with a "
            "__torch_dispatch__ of its own, and may have no memory of its own; fusedopt steps "
            "plain tensors and DTensors of plain tensors, and torchao's wrappers of weights that "
            "are trained in float8"
        )
    return None, False, None


def is_dtensor(tensor_type: type[torch.Tensor]) -> bool:
    return all(hasattr(tensor_type, name) for name in ("_local_tensor", "_spec", "to_local"))


def _attribute_of_weights(tensor_type: type[torch.Tensor]) -> str | None:
    if tensor_type in (torch.Tensor, torch.nn.Parameter):
        return None
    names = (f"{each.__module__}.{each.__qualname__}" for each in tensor_type.__mro__)
    return next((WEIGHTS_OF[name] for name in names if name in WEIGHTS_OF), None)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; other tensors are whole. The weights of what wraps them."""
    known: Any = tensor
    shard: torch.Tensor = known._local_tensor if is_dtensor(type(tensor)) else tensor
    weights = _attribute_of_weights(type(shard))
    return shard if weights is None else getattr(shard, weights).detach()


def without_wrapper(tensor: torch.Tensor) -> torch.Tensor:
    """The weights of a wrapper of ``WEIGHTS_OF``, in its memory; of others, the tensor itself.

    What torch makes in the likeness of a tensor may be such a wrapper, too.
    """
    if not is_dtensor(type(tensor)):
        return local(tensor)
    sharded: Any = tensor
    if _attribute_of_weights(type(sharded._local_tensor)) is None:
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local(tensor), sharded.device_mesh, sharded.placements, run_check=False,
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


def largest_shard(tensor: torch.Tensor) -> int:
    """How many elements a rank has of a DTensor at most, which all ranks know; else of all."""
    if not is_dtensor(type(tensor)):
        return tensor.numel()
    known: Any = tensor
    shape = list(known.shape)
    for at, placement in enumerate(known.placements):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            shape[dim] = -(-shape[dim] // known.device_mesh.size(at))
    return math.prod(shape)


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's values, contiguous and in memory of the CPU: a copy if need be."""
    return local(tensor.detach()).cpu().resolve_neg().contiguous()


def why_unreadable(tensor: torch.Tensor) -> str | None:
    """Why a tensor has no values of its own, worded to follow "... is"; None if it has them."""
    try:
        wrapping(type(tensor))
    except TypeError as error:
        return str(error)
    own = local(tensor)
    if own.layout != torch.strided:
        return f"sparse ({own.layout}), but must be dense; call to_dense()"
    if own.is_meta:
        return "on the meta device and has no values"
    if own.is_quantized:
        return f"quantized ({own.dtype}); call dequantize()"
    if own._is_zerotensor():
        return "a tensor of zeros without memory; clone() it first"
    if is_emptied(own):
        return "without memory: its storage has been emptied"
    return None


def why_unwritable(tensor: torch.Tensor) -> str | None:
    """Why torch writes no values into a tensor, worded to follow "... is"; None if it does."""
    own = local(tensor)
    if own.is_inference() and not torch.is_inference_mode_enabled():
        return "an inference tensor, which can only be written to in torch.inference_mode()"
    if any(size > 1 and step == 0 for size, step in zip(own.shape, own.stride(), strict=True)):
        return "expanded: several of its elements are in one place in memory; clone() it first"
    return why_unreadable(tensor)


def is_emptied(tensor: torch.Tensor) -> bool:
    """Whether the memory of a dense tensor has been freed (FSDP1 does so with parameters)."""
    if tensor.numel() == 0 or tensor._is_zerotensor():
        return False
    return tensor.untyped_storage().nbytes() == 0


def memory_of(tensor: torch.Tensor) -> int:
    """The address of a dense tensor's storage, that of its shard for a DTensor."""
    own = local(tensor)
    name, is_method, _ = wrapping(type(own))
    if name is not None and is_method:
        own = getattr(own, name)()
    return own.untyped_storage().data_ptr()


def bytes_of(tensor: torch.Tensor) -> int:
    """Of a tensor's elements; of a DTensor's shard; of a sparse tensor's indices and values.

    Parameters of lazy modules have none before the first forward.
    """
    if is_lazy(tensor):
        return 0
    own = local(tensor)
    if own.layout == torch.sparse_coo:
        return bytes_of(own._indices()) + bytes_of(own._values())
    return own.numel() * own.element_size()


def count_writes(tensor: torch.Tensor) -> int:
    """How often a tensor, or the shard that it holds, has been written to; -1 if nobody counts."""
    try:
        return tensor._version + (local(tensor)._version if is_dtensor(type(tensor)) else 0)
    except RuntimeError:  # of inference tensors
        return -1


def align(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """The tensor with the placements of a DTensor param, so that the local parts fit.

    A grad can be sharded or partial where its param is not (SequenceParallel leaves partial grads
    on replicated weights). Raises TypeError if one of the two is a DTensor and the other is not.
    """
    are_dtensors = is_dtensor(type(tensor)), is_dtensor(type(param))
    if are_dtensors == (False, False):
        return tensor
    if are_dtensors != (True, True):
        raise TypeError("param and grad must both be DTensors, or neither of them")
    sharded: Any = tensor
    target: Any = param
    if sharded.device_mesh == target.device_mesh and sharded.placements == target.placements:
        return tensor
    aligned: torch.Tensor = sharded.redistribute(target.device_mesh, target.placements)
    return aligned


def hit_rows(grad: torch.Tensor, param: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows (slices along the first dim) that a grad is of: their values and their numbers.

    A sparse grad is of the rows that it holds, a dense one of those that are not zero. Raises
    ValueError or TypeError, worded to follow "grad of ... is", for what has no rows of the param.
    """
    if grad.shape != param.shape:
        raise ValueError(f"of shape {tuple(grad.shape)}, its parameter of {tuple(param.shape)}")
    if grad.dim() == 0:
        raise ValueError("of a parameter without dims, which has no rows")
    if is_dtensor(type(grad)) or is_dtensor(type(param)):
        raise TypeError("a DTensor's, whose rows cannot be told")
    grad = grad.detach()
    if grad.layout == torch.strided:
        if is_emptied(grad):
            raise ValueError("without memory: its storage has been emptied")
        is_hit = grad != 0
        for _ in range(1, grad.dim()):
            is_hit = is_hit.any(dim=1)
        rows = is_hit.nonzero().reshape(-1)
        return grad.index_select(0, rows), rows
    if grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
        kind = f", with {grad.sparse_dim()} sparse dims" if grad.layout == torch.sparse_coo else ""
        raise TypeError(f"{grad.layout}{kind}, but must be dense or sparse in its first dim alone")
    grad = grad.coalesce()
    rows = grad.indices()[0].contiguous()
    # Whoever makes a tensor may say that it is coalesced.
    if (rows.diff(prepend=rows.new_tensor([-1]), append=rows.new_tensor([len(grad)])) <= 0).any():
        raise ValueError(
            "said to be coalesced, but its rows are not in rising order, each of them once and "
            f"from 0 to {len(grad) - 1}: leave that to coalesce()"
        )
    return grad.values().contiguous(), rows


def first_element(tensor: torch.Tensor) -> int:
    """The number, in the whole of a DTensor, of the first element that this rank has of it.

    The elements of a shard of rows follow each other from there on.
    """
    sharded: Any = tensor.detach()
    chunk = sharded.__create_chunk_list__()[0]  # what torch.distributed.checkpoint asks for
    number = 0
    for size, offset in zip(tensor.shape, chunk.offsets, strict=True):
        number = number * size + offset
    return int(number)


def allocate(device: str, size: int, kind: str) -> torch.Tensor:
    """Memory of ``size`` bytes for the CUDA driver; ``kind`` as in ``Memory`` of core/gpu.h."""
    if kind == "page-locked":
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device != "cpu")
    new = torch.zeros if kind == "zeros" else torch.empty
    return new(size, dtype=torch.uint8, device=device)


def float_on_gpu(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor as float32 on that GPU, itself if it is that already; nothing waits."""
    return tensor.detach().to(device, torch.float32, non_blocking=True)
