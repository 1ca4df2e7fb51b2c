"""SwiGLU (Shazeer 2020) with the quantisation that follows it, forward and backward."""

import torch
import torch.nn.functional as F

from stages.lib.model import fp8


def forward(
    both: torch.Tensor, kept: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """silu(gate) * up.

    Args:
        both: [M, 2 * width], gate and then up. kept: whether the result is wanted as it is, too.

    Returns:
        [M, width] if wanted; e4m3 [M, width] and its scales, fp32 [M, 1].
    """
    if both.is_cuda:
        from stages.lib.model.kernels import swiglu

        return swiglu.swiglu(both, kept)
    gate, up = both.chunk(2, -1)
    hidden = F.silu(gate) * up
    return hidden if kept else None, *fp8.quantise(hidden)


def backward(
    gradient: torch.Tensor, both: torch.Tensor, kept: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The gradient of gate and up.

    Args:
        gradient: of silu(gate) * up, [M, width]. both: [M, 2 * width], gate and then up.
        kept: whether the result is wanted as it is, too.

    Returns:
        [M, 2 * width] if wanted; e4m3 [M, 2 * width] and its scales, fp32 [M, 1], one a row for both.
    """
    if both.is_cuda:
        from stages.lib.model.kernels import swiglu

        return swiglu.swiglu_backward(gradient, both, kept)
    gate, up = both.float().chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    of_gate = gradient.float() * up * sigmoid * (1 + gate * (1 - sigmoid))
    of_both = torch.cat([of_gate, gradient.float() * gate * sigmoid], -1).to(both.dtype)
    return of_both if kept else None, *fp8.quantise(of_both)
