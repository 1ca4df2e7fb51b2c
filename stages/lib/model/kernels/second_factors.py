"""Triton kernels of the adapters' second factors: an output's gradient is read once for both of its uses."""

import torch
import triton
import triton.language as tl

TALL, WIDE = 64, 128  # of a tile; found on an H200, as are the rest
ROOMY = 200 * 2**10  # bytes of shared memory that large tiles need; consumers' GPUs have 99 KiB
SHARED = (
    torch.cuda.get_device_properties().shared_memory_per_block_optin
    if torch.cuda.is_available()
    else 0
)


@triton.jit
def _ups_kernel(
    gradient, lows, factor, of_lows, of_factor, rows, part, token: tl.constexpr, width: tl.constexpr,
    lows_width: tl.constexpr, rank: tl.constexpr, padded: tl.constexpr, tall: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """`wide` columns of one part of an output's gradient: what they give the lows, and the factor."""
    c = tl.program_id(0) * wide + tl.arange(0, wide)
    r = tl.arange(0, padded)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, rows)
    near = (r < rank)[None, :]
    up = tl.load(factor + c[:, None] * rank + r[None, :], (c < width)[:, None] & near, other=0.0)
    total = tl.zeros([wide, padded], tl.float32)
    for first in range(begin, end, tall):
        m = first + tl.arange(0, tall)
        start = m.to(tl.int64)[:, None]
        here = (m < end)[:, None]
        tile = tl.load(
            gradient + start * token + c[None, :], here & (c < width)[None, :], other=0.0
        )
        low = tl.load(lows + start * lows_width + r[None, :], here & near, other=0.0)
        total = tl.dot(tl.trans(tile), low, total)
        to = of_lows + (tl.program_id(0).to(tl.int64) * rows + start) * rank + r[None, :]
        tl.store(to, tl.dot(tile, up), here & near)
    to = of_factor + (tl.program_id(1) * width + c[:, None]) * rank + r[None, :]
    tl.store(to, total, (c < width)[:, None] & near)


@triton.jit
def _up_kernel(
    y, lows, ups, out, rows, width: tl.constexpr, lows_width: tl.constexpr, rank: tl.constexpr,
    padded: tl.constexpr, first: tl.constexpr, second: tl.constexpr, tall: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """A tile of either half of y; `first` and `second`: where its adapter is among the lows, or -1."""
    m = (tl.program_id(0) * tall + tl.arange(0, tall))[:, None]
    half = tl.program_id(2)
    c = tl.program_id(1) * wide + tl.arange(0, wide)
    r = tl.arange(0, padded)
    at = m.to(tl.int64) * (2 * width) + half * width + c[None, :]
    inside = (m < rows) & (c < width)[None, :]
    tile = tl.load(y + at, inside, other=0.0).to(tl.float32)
    place = tl.where(half == 0, first, second)
    if place >= 0:
        low = tl.load(
            lows + m.to(tl.int64) * lows_width + place * rank + r[None, :],
            (m < rows) & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        up = tl.load(
            ups + place * width * rank + c[None, :] * rank + r[:, None],
            (c < width)[None, :] & (r < rank)[:, None], other=0.0,
        )  # fmt: skip
        tile = tl.dot(low, up, tile)
    tl.store(out + at, tile.to(tl.bfloat16), inside)


def parts(rows: int, most: int, tall: int) -> tuple[int, int]:
    """Rows in one of `most` parts, a multiple of a tile's; and how many parts that makes."""
    part = triton.cdiv(triton.cdiv(rows, most), tall) * tall
    return part, triton.cdiv(rows, part)


def of_up(
    gradient: torch.Tensor, lows: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `stages.lib.model.low_rank.of_up`."""
    (rows, width), rank = gradient.shape, factor.shape[1]
    padded = max(16, triton.next_power_of_2(rank))
    wide, most = (512, 16) if width > 8192 else (256, 32)
    if SHARED < ROOMY:
        wide, most = 128 if padded < 64 else 64, 32
    wide = min(wide, 8192 // padded)
    part, count = parts(rows, most, TALL)
    blocks = triton.cdiv(width, wide)
    of_lows = torch.empty(blocks, rows, rank, device=lows.device)
    of_factor = torch.empty(count, width, rank, device=lows.device)
    _ups_kernel[(blocks, count)](
        gradient, lows, factor, of_lows, of_factor, rows, part, token=gradient.stride(0),
        width=width, lows_width=lows.stride(0), rank=rank, padded=padded,
        tall=TALL, wide=wide, num_warps=4, num_stages=3,
    )  # fmt: skip
    return of_lows.sum(0).to(lows.dtype), of_factor.sum(0)


def up(y: torch.Tensor, lows: torch.Tensor, factors: list[torch.Tensor | None]) -> torch.Tensor:
    """y [M, 2 * width] with what the adapters of its two halves add; see `stages.lib.model.fused`."""
    out = torch.empty_like(y)
    there = [factor for factor in factors if factor is not None]
    first = 0 if factors[0] is not None else -1
    second = first + 1 if factors[1] is not None else -1
    width, rank = y.shape[1] // 2, there[0].shape[1]
    _up_kernel[(triton.cdiv(len(y), TALL), triton.cdiv(width, WIDE), 2)](
        y, lows, torch.cat(there), out, len(y), width=width, lows_width=lows.shape[1], rank=rank,
        padded=max(16, triton.next_power_of_2(rank)), first=first, second=second, tall=TALL,
        wide=WIDE, num_warps=4,
    )  # fmt: skip
    return out
