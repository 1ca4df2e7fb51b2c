"""What autocast does for torch's own products, for ours."""

import torch


def cast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors of one device in the type that torch's own product would take them in.

    A LayerNorm under autocast hands on fp32 on the GPU, and a function of our own takes that as it is.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)
