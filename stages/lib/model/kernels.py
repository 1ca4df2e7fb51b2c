"""Triton kernels of SwiGLU with its FP8 quantisation: a row stays on the chip between its maximum and its cast.

The compiler's own read and compute a row twice, and take two to three times as long (docs/decisions.md).
What is not a number stays so: a clamp would otherwise make one of it, and the divergence would go unseen.
"""

import torch
import triton
import triton.language as tl

from stages.lib.model import fp8

LARGEST = tl.constexpr(fp8.LARGEST)
LEAST = tl.constexpr(fp8.LEAST)


@triton.jit
def _forward_kernel(
    both, out, scales, width: tl.constexpr, block: tl.constexpr, pieces: tl.constexpr
):  # fmt: skip
    """One row a program: `pieces` times `block` columns are held in registers."""
    row = tl.program_id(0).to(tl.int64)
    gates = both + row * 2 * width
    held = ()
    largest = tl.zeros([block], tl.float32)
    for i in tl.static_range(pieces):
        at = i * block + tl.arange(0, block)
        gate = tl.load(gates + at, at < width, other=0.0).to(tl.float32)
        up = tl.load(gates + width + at, at < width, other=0.0).to(tl.float32)
        silu = (gate * tl.sigmoid(gate)).to(tl.bfloat16).to(tl.float32)  # as torch rounds it
        hidden = (silu * up).to(tl.bfloat16)
        largest = tl.maximum(largest, tl.abs(hidden.to(tl.float32)))
        held = held + (hidden,)  # noqa: RUF005
    scale = tl.maximum(tl.max(largest, 0), LEAST) / LARGEST
    tl.store(scales + row, scale)
    inverse = 1.0 / scale
    for i in tl.static_range(pieces):
        at = i * block + tl.arange(0, block)
        value = tl.clamp(held[i].to(tl.float32) * inverse, -LARGEST, LARGEST, tl.PropagateNan.ALL)
        tl.store(out + row * width + at, value.to(tl.float8e4nv), at < width)


@triton.jit
def _backward_kernel(
    gradient, both, factors, out, scales, width: tl.constexpr, block: tl.constexpr, pieces: tl.constexpr
):  # fmt: skip
    """One row a program: both halves of it are held in registers."""
    row = tl.program_id(0).to(tl.int64)
    gates = both + row * 2 * width
    held_gate = ()
    held_up = ()
    largest = tl.zeros([block], tl.float32)
    for i in tl.static_range(pieces):
        at = i * block + tl.arange(0, block)
        inside = at < width
        upstream = tl.load(gradient + row * width + at, inside, other=0.0).to(tl.float32)
        gate = tl.load(gates + at, inside, other=0.0).to(tl.float32)
        up = tl.load(gates + width + at, inside, other=0.0).to(tl.float32)
        gate_factor = tl.load(factors + at, inside, other=0.0)
        up_factor = tl.load(factors + width + at, inside, other=0.0)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        # Both are held in bf16: in fp32 half as many rows would fit a multiprocessor.
        of_up = (upstream * silu * up_factor).to(tl.bfloat16)
        of_gate = upstream * up * sigmoid * (1.0 + gate - silu) * gate_factor
        of_gate = of_gate.to(tl.bfloat16)
        either = tl.maximum(tl.abs(of_up.to(tl.float32)), tl.abs(of_gate.to(tl.float32)))
        largest = tl.maximum(largest, either)
        held_gate = held_gate + (of_gate,)  # noqa: RUF005
        held_up = held_up + (of_up,)  # noqa: RUF005
    scale = tl.maximum(tl.max(largest, 0), LEAST) / LARGEST
    tl.store(scales + row, scale)
    inverse = 1.0 / scale
    for i in tl.static_range(pieces):
        at = i * block + tl.arange(0, block)
        inside = at < width
        of_gate = tl.clamp(
            held_gate[i].to(tl.float32) * inverse, -LARGEST, LARGEST, tl.PropagateNan.ALL
        )
        of_up = tl.clamp(
            held_up[i].to(tl.float32) * inverse, -LARGEST, LARGEST, tl.PropagateNan.ALL
        )
        tl.store(out + row * 2 * width + at, of_gate.to(tl.float8e4nv), inside)
        tl.store(out + row * 2 * width + width + at, of_up.to(tl.float8e4nv), inside)


def _layout(width: int) -> dict[str, int]:
    warps = 8 if width <= 16384 else 16  # else a row does not fit the registers of eight
    block = 256 * warps
    return {"width": width, "block": block, "pieces": -(-width // block), "num_warps": warps}


def swiglu(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `stages.lib.model.swiglu.forward`."""
    rows, width = len(both), both.shape[1] // 2
    out = torch.empty(rows, width, dtype=fp8.E4M3, device=both.device)
    scales = torch.empty(rows, 1, device=both.device)
    _forward_kernel[(rows,)](both, out, scales, **_layout(width))
    return out, scales


def swiglu_backward(
    gradient: torch.Tensor, both: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `stages.lib.model.swiglu.backward`."""
    rows, width = len(both), both.shape[1] // 2
    out = torch.empty(rows, 2 * width, dtype=fp8.E4M3, device=both.device)
    scales = torch.empty(rows, 1, device=both.device)
    _backward_kernel[(rows,)](gradient, both, factors, out, scales, **_layout(width))
    return out, scales
