"""Triton kernels of the adapters' first factors: their input is read once, and no dropped copy of it is made.

`count` adapters read one input. Adapter i drops by half (slot + i) % 2 of the bits of seed (slot + i) // 2.
"""

import torch
import triton
import triton.language as tl

TALL, WIDE = 64, 128  # of a tile of the input
UP_WIDE, UP_PARTS = 256, 16  # of an output's gradient
FLAT = 32  # rows of a tile where a program has no sum over many
PARTS = (
    8  # of the rows, whose sums are added last and in order: the same to the last bit every time
)


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _random(rows, columns, seed):
    """32 bits for each element of a tile; see `stages.lib.model.dropout.bits`."""
    start = seed.to(tl.uint32, bitcast=True)
    row = _mixed(rows.to(tl.uint32) ^ _mixed(start ^ 0x5BF03635))
    x = (row ^ _mixed(columns.to(tl.uint32) ^ start)) * 0x9E3779B1
    return x ^ (x >> 16)


@triton.jit
def _drop(tile, bits, half: tl.constexpr, threshold: tl.constexpr):
    if threshold == 0:
        return tile
    stays = (bits >> 16 if half else bits & 0xFFFF) >= threshold
    return tl.where(stays, tile, 0.0)


@triton.jit
def _down_kernel(
    x, factors, seeds, out, rows, scale, width: tl.constexpr, count: tl.constexpr, rank: tl.constexpr,
    padded: tl.constexpr, slot: tl.constexpr, threshold: tl.constexpr, tall: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """`tall` rows of the input times every factor."""
    m = (tl.program_id(0) * tall + tl.arange(0, tall))[:, None]
    r = tl.arange(0, padded)[None, :]
    start = m.to(tl.int64)
    sums = ()
    for _ in tl.static_range(count):
        sums = sums + (tl.zeros([tall, padded], tl.float32),)  # noqa: RUF005
    for first in range(0, width, wide):
        c = first + tl.arange(0, wide)
        tile = tl.load(x + start * width + c[None, :], (m < rows) & (c < width)[None, :], other=0.0)
        near = (r < rank) & (c < width)[:, None]
        bits = 0
        found = ()
        for i in tl.static_range(count):
            if threshold > 0 and ((slot + i) % 2 == 0 or i == 0):
                bits = _random(m, c[None, :], tl.load(seeds + (slot + i) // 2))
            factor = tl.load(factors + (i * rank + r) * width + c[:, None], near, other=0.0)
            found = found + (tl.dot(_drop(tile, bits, (slot + i) % 2, threshold), factor, sums[i]),)  # noqa: RUF005
        sums = found
    for i in tl.static_range(count):
        to = out + start * (count * rank) + i * rank + r
        tl.store(to, (sums[i] * scale).to(tl.bfloat16), (m < rows) & (r < rank))


@triton.jit
def _factor_kernel(
    lows, x, seeds, out, rows, scale, part, width: tl.constexpr, count: tl.constexpr,
    rank: tl.constexpr, padded: tl.constexpr, slot: tl.constexpr, threshold: tl.constexpr,
    tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Gradient of `wide` columns of every factor, summed over one part of the rows."""
    c = (tl.program_id(0) * wide + tl.arange(0, wide))[None, :]
    r = tl.arange(0, padded)[:, None]
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, rows)
    sums = ()
    for _ in tl.static_range(count):
        sums = sums + (tl.zeros([padded, wide], tl.float32),)  # noqa: RUF005
    for first in range(begin, end, tall):
        m = first + tl.arange(0, tall)
        start = m.to(tl.int64)
        tile = tl.load(x + start[:, None] * width + c, (m < end)[:, None] & (c < width), other=0.0)
        near = (r < rank) & (m < end)[None, :]
        bits = 0
        found = ()
        for i in tl.static_range(count):
            if threshold > 0 and ((slot + i) % 2 == 0 or i == 0):
                bits = _random(m[:, None], c, tl.load(seeds + (slot + i) // 2))
            low = tl.load(lows + start[None, :] * (count * rank) + i * rank + r, near, other=0.0)
            found = found + (tl.dot(low, _drop(tile, bits, (slot + i) % 2, threshold), sums[i]),)  # noqa: RUF005
        sums = found
    for i in tl.static_range(count):
        row = (tl.program_id(1) * count + i) * rank + r
        tl.store(out + row * width + c, sums[i] * scale, (r < rank) & (c < width))


@triton.jit
def _input_kernel(
    lows, factors, seeds, base, out, rows, scale, width: tl.constexpr, count: tl.constexpr,
    rank: tl.constexpr, padded: tl.constexpr, slot: tl.constexpr, threshold: tl.constexpr,
    tall: tl.constexpr, wide: tl.constexpr, based: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of the input, added to what `base` has of it, if there is one."""
    m = (tl.program_id(0) * tall + tl.arange(0, tall))[:, None]
    c = tl.program_id(1) * wide + tl.arange(0, wide)
    r = tl.arange(0, padded)
    start = m.to(tl.int64)
    at = start * width + c[None, :]
    inside = (m < rows) & (c < width)[None, :]
    total = tl.zeros([tall, wide], tl.float32)
    if based:
        total += tl.load(base + at, inside, other=0.0).to(tl.float32)
    bits = 0
    for i in tl.static_range(count):
        if threshold > 0 and ((slot + i) % 2 == 0 or i == 0):
            bits = _random(m, c[None, :], tl.load(seeds + (slot + i) // 2))
        low = tl.load(
            lows + start * (count * rank) + i * rank + r[None, :],
            (m < rows) & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        factor = tl.load(
            factors + (i * rank + r)[:, None] * width + c[None, :],
            (r < rank)[:, None] & (c < width)[None, :], other=0.0,
        )  # fmt: skip
        total += _drop(tl.dot(low, factor), bits, (slot + i) % 2, threshold) * scale
    tl.store(out + at, total.to(tl.bfloat16), inside)


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


def _layout(factors: torch.Tensor, count: int, slot: int, threshold: int) -> dict[str, int]:
    rank = len(factors) // count
    padded = max(16, triton.next_power_of_2(rank))
    return {
        "width": factors.shape[1], "count": count, "rank": rank, "padded": padded,
        "slot": slot, "threshold": threshold, "wide": WIDE,
    }  # fmt: skip


def down(
    x: torch.Tensor, factors: torch.Tensor, seeds: torch.Tensor, count: int, slot: int,
    threshold: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """See `stages.lib.model.low_rank.down`."""
    out = x.new_empty(len(x), len(factors))
    layout = _layout(factors, count, slot, threshold)
    _down_kernel[(triton.cdiv(len(x), FLAT),)](
        x, factors, seeds, out, len(x), scale, **layout, tall=FLAT, num_warps=2, num_stages=3
    )
    return out


def of_factors(
    lows: torch.Tensor, x: torch.Tensor, seeds: torch.Tensor, count: int, slot: int,
    threshold: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """See `stages.lib.model.low_rank.of_factors`."""
    rank, width = lows.shape[1], x.shape[1]
    part = triton.cdiv(triton.cdiv(len(x), PARTS), TALL) * TALL
    parts = triton.cdiv(len(x), part)
    out = torch.empty(parts, rank, width, device=x.device)
    layout = _layout(out[0], count, slot, threshold)
    _factor_kernel[(triton.cdiv(width, WIDE), parts)](
        lows, x, seeds, out, len(x), scale, part, **layout, tall=TALL, num_warps=4, num_stages=3
    )
    return out.sum(0)


def of_input(
    lows: torch.Tensor, factors: torch.Tensor, seeds: torch.Tensor, base: torch.Tensor | None,
    count: int, slot: int, threshold: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """See `stages.lib.model.low_rank.of_input`."""
    out = lows.new_empty(len(lows), factors.shape[1])
    layout = _layout(factors, count, slot, threshold)
    grid = (triton.cdiv(len(lows), FLAT), triton.cdiv(factors.shape[1], WIDE))
    _input_kernel[grid](
        lows, factors, seeds, lows if base is None else base, out, len(lows), scale,
        based=base is not None, **layout, tall=FLAT, num_warps=2,
    )  # fmt: skip
    return out


def of_up(
    gradient: torch.Tensor, lows: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `stages.lib.model.low_rank.of_up`."""
    (rows, width), rank = gradient.shape, factor.shape[1]
    part = triton.cdiv(triton.cdiv(rows, UP_PARTS), TALL) * TALL
    parts, blocks = triton.cdiv(rows, part), triton.cdiv(width, UP_WIDE)
    of_lows = torch.empty(blocks, rows, rank, device=lows.device)
    of_factor = torch.empty(parts, width, rank, device=lows.device)
    _ups_kernel[(blocks, parts)](
        gradient, lows, factor, of_lows, of_factor, rows, part, token=gradient.stride(0),
        width=width, lows_width=lows.stride(0), rank=rank, padded=max(16, triton.next_power_of_2(rank)),
        tall=TALL, wide=UP_WIDE, num_warps=8, num_stages=3,
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
