"""The FP8 MLP of a Llama-like layer as one function: only gate(x) and up(x) are kept for the way back."""

from typing import Any

import torch
import torch.nn.functional as F

from stages.lib.model import fp8


def forward(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up, quantised.

    Args:
        both: [M, 2 * width], gate and then up.

    Returns:
        e4m3 [M, width] and its scales, fp32 [M, 1].
    """
    if both.is_cuda:
        from stages.lib.model import kernels

        return kernels.swiglu(both)
    gate, up = both.chunk(2, -1)
    return fp8.quantise(F.silu(gate) * up)


def backward(
    gradient: torch.Tensor, both: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of gate and up, times a factor a column, quantised with one scale a row for both.

    Args:
        gradient: of silu(gate) * up, [M, width]. both: [M, 2 * width], gate and then up.
        factors: fp32 [2 * width].

    Returns:
        e4m3 [M, 2 * width] and its scales, fp32 [M, 1].
    """
    if both.is_cuda:
        from stages.lib.model import kernels

        return kernels.swiglu_backward(gradient, both, factors)
    gate, up = both.float().chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    of_gate = gradient.float() * up * sigmoid * (1 + gate * (1 - sigmoid))
    return fp8.quantise(torch.cat([of_gate, gradient.float() * gate * sigmoid], -1) * factors)


class Mlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) of frozen FP8 weights."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, wide: torch.Tensor, wide_t: torch.Tensor, wide_scales: torch.Tensor,
        wide_ones: torch.Tensor, down: torch.Tensor, down_t: torch.Tensor, down_scales: torch.Tensor,
        down_ones: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """[M, K].

        Args:
            x: [M, K]. wide: of gate and up, one under the other, e4m3 [N, K]. wide_t: the same as [K, N].
            wide_scales: of its rows, fp32 [N, 1]. wide_ones: fp32 [K, 1]. down and the rest: of down.
        """
        rows, scales = fp8.quantise(x)
        both = fp8.product(rows, scales, wide, wide_scales, x.dtype)
        ctx.save_for_backward(both, wide_t, wide_scales, wide_ones, down_t, down_scales, down_ones)
        hidden, hidden_scales = forward(both)
        return fp8.product(hidden, hidden_scales, down, down_scales, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Of x."""
        both, wide_t, wide_scales, wide_ones, down_t, down_scales, down_ones = ctx.saved_tensors
        rows, scales = fp8.quantise(gradient.float() * down_scales.t())
        of_hidden = fp8.product(rows, scales, down_t, down_ones, gradient.dtype)
        of_both, both_scales = backward(of_hidden, both, wide_scales[:, 0])
        of_x = fp8.product(of_both, both_scales, wide_t, wide_ones, gradient.dtype)
        return of_x, None, None, None, None, None, None, None, None
