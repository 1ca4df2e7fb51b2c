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
def _cast(values, inverse):
    scaled = values.to(tl.float32) * inverse
    return tl.clamp(scaled, -LARGEST, LARGEST, tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def _forward_kernel(
    both, plain, out, scales, width: tl.constexpr, block: tl.constexpr, pieces: tl.constexpr,
    kept: tl.constexpr,
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
        if kept:
            tl.store(plain + row * width + at, hidden, at < width)
        largest = tl.maximum(largest, tl.abs(hidden.to(tl.float32)))
        held = held + (hidden,)  # noqa: RUF005
    scale = tl.maximum(tl.max(largest, 0), LEAST) / LARGEST
    tl.store(scales + row, scale)
    inverse = 1.0 / scale
    for i in tl.static_range(pieces):
        at = i * block + tl.arange(0, block)
        tl.store(out + row * width + at, _cast(held[i], inverse), at < width)


@triton.jit
def _backward_kernel(
    gradient, both, plain, out, scales, width: tl.constexpr, block: tl.constexpr,
    pieces: tl.constexpr, kept: tl.constexpr,
):  # fmt: skip
    """One row a program: both halves of it are held in registers, in bf16, that more rows fit."""
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
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        of_up = (upstream * silu).to(tl.bfloat16)
        of_gate = (upstream * up * sigmoid * (1.0 + gate - silu)).to(tl.bfloat16)
        if kept:
            tl.store(plain + row * 2 * width + at, of_gate, inside)
            tl.store(plain + row * 2 * width + width + at, of_up, inside)
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
        tl.store(out + row * 2 * width + at, _cast(held_gate[i], inverse), inside)
        tl.store(out + row * 2 * width + width + at, _cast(held_up[i], inverse), inside)


def _layout(width: int, warps: int, block: int) -> dict[str, int]:
    """Found on an H200 at 11,008 columns; more than 16,384 do not fit the registers of eight warps."""
    warps = max(warps, 8 if width <= 16384 else 16)
    block = min(max(block, 256 * warps if width > 16384 else 0), triton.next_power_of_2(width))
    return {"width": width, "block": block, "pieces": -(-width // block), "num_warps": warps}


def _room(rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows in e4m3, and their scales."""
    out = torch.empty(len(rows), width, dtype=fp8.E4M3, device=rows.device)
    return out, torch.empty(len(rows), 1, device=rows.device)


def swiglu(
    both: torch.Tensor, kept: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """See `stages.lib.model.swiglu.forward`."""
    width = both.shape[1] // 2
    out, scales = _room(both, width)
    plain = both.new_empty(len(both), width) if kept else None
    _forward_kernel[(len(both),)](
        both, both if plain is None else plain, out, scales, kept=kept, **_layout(width, 8, 2048)
    )
    return plain, out, scales


def swiglu_backward(
    gradient: torch.Tensor, both: torch.Tensor, kept: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """See `stages.lib.model.swiglu.backward`."""
    width = both.shape[1] // 2
    out, scales = _room(both, 2 * width)
    plain = torch.empty_like(both) if kept else None
    _backward_kernel[(len(both),)](
        gradient, both, both if plain is None else plain, out, scales, kept=kept,
        **_layout(width, 16, 2048 if kept else 4096),
    )  # fmt: skip
    return plain, out, scales
