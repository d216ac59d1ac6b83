"""What the extension asks of tensor subclasses, once per type."""

import torch


def local_attribute(tensor_type: type[torch.Tensor]) -> str | None:
    """Name of the attribute that holds a subclass's memory, or None if it is the tensor itself.

    A ``DTensor`` (FSDP2) holds this rank's shard in ``_local_tensor``; an element-wise update of
    the shards is the update of the whole. Raises TypeError for other subclasses that only wrap
    tensors: they have no memory of their own to write to.
    """
    if hasattr(tensor_type, "_local_tensor") and hasattr(tensor_type, "to_local"):
        return "_local_tensor"
    # Subclasses with a dispatch of their own (fake, functional, quantized tensors) are not memory.
    if tensor_type.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{tensor_type.__module__}.{tensor_type.__qualname__} is a tensor subclass with a "
            "__torch_dispatch__ of its own; fusedopt steps plain tensors and DTensors"
        )
    return None
