"""Triton kernels of the adapters' first factors: their input is read once, and no dropped copy of it is made.

`count` adapters read one input. What drops an element is `stages.lib.model.dropout`'s, its hashes of rows and
columns come as tables, int32 [2, count, rows] and [columns]. A compiled graph hands a kernel its `scale` in
fp64, of which PTX would read the lower half as fp32: so each kernel casts it first.
"""

import torch
import triton
import triton.language as tl

from stages.lib.model import dropout
from stages.lib.model.kernels.second_factors import ROOMY, SHARED, parts

FLAT, WIDE = 32, 128  # of a tile; found on an H200, as are the rest
TILES = 4  # of a program
PARTS = 16  # of the rows; their sums are added last, in order: the same to the last bit every time


@triton.jit
def _of_rows(row_hashes, i: tl.constexpr, count: tl.constexpr, m, rows):
    """Factors and summands of an adapter's rows, uint32, the shape of `m`."""
    factors = tl.load(row_hashes + i * rows + m, m < rows)
    summands = tl.load(row_hashes + (count + i) * rows + m, m < rows)
    return factors.to(tl.uint32, bitcast=True), summands.to(tl.uint32, bitcast=True)


@triton.jit
def _of_columns(column_hashes, c, width):
    """uint32, a row."""
    return tl.load(column_hashes + c, c < width).to(tl.uint32, bitcast=True)[None, :]


@triton.jit
def _drop(tile, hashes, threshold: tl.constexpr):
    """A bf16 tile without what is dropped.

    Two elements at once: the upper halves of their hashes, without the sign, are compared as fp16 numbers,
    whose order is that of their bits, and a number that is none is above all.
    """
    least: tl.constexpr = threshold << 16 | threshold
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 both;
        prmt.b32 both, $2, $3, 0x7632;
        abs.f16x2 both, both;
        set.geu.u32.f16x2 both, both, $4;
        and.b32 $0, both, $1;
        }""",
        "=r,r,r,r,r,r", [tile, hashes, least], dtype=tl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _add(total, more, scale, twice, threshold: tl.constexpr):
    """total + more * scale where it is kept; of twice the hashes, the bits that decide are the highest."""
    least: tl.constexpr = threshold << 17
    return tl.inline_asm_elementwise(
        """{
        .reg .pred kept;
        setp.hs.u32 kept, $4, $5;
        mov.f32 $0, $1;
        @kept fma.rn.f32 $0, $2, $3, $1;
        }""",
        "=f,f,f,f,r,r", [total, more, scale, twice, least], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _down_kernel(
    x, factors, row_hashes, column_hashes, out, rows, scale, width: tl.constexpr, count: tl.constexpr,
    rank: tl.constexpr, padded: tl.constexpr, threshold: tl.constexpr, tall: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """`tall` rows of the input times every factor."""
    scale = tl.cast(scale, tl.float32)
    m = (tl.program_id(0) * tall + tl.arange(0, tall))[:, None]
    r = tl.arange(0, padded)[None, :]
    start = m.to(tl.int64)
    sums = ()
    of_rows = ()
    for i in tl.static_range(count):
        sums = sums + (tl.zeros([tall, padded], tl.float32),)  # noqa: RUF005
        if threshold > 0:
            of_rows = of_rows + (_of_rows(row_hashes, i, count, m, rows),)  # noqa: RUF005
    for first in range(0, width, wide):
        c = first + tl.arange(0, wide)
        tile = tl.load(x + start * width + c[None, :], (m < rows) & (c < width)[None, :], other=0.0)
        near = (r < rank) & (c < width)[:, None]
        if threshold > 0:
            of_columns = _of_columns(column_hashes, c, width)
        found = ()
        for i in tl.static_range(count):
            kept = tile
            if threshold > 0:
                kept = _drop(tile, of_columns * of_rows[i][0] + of_rows[i][1], threshold)
            factor = tl.load(factors + (i * rank + r) * width + c[:, None], near, other=0.0)
            found = found + (tl.dot(kept, factor, sums[i]),)  # noqa: RUF005
        sums = found
    for i in tl.static_range(count):
        to = out + start * (count * rank) + i * rank + r
        tl.store(to, (sums[i] * scale).to(tl.bfloat16), (m < rows) & (r < rank))


@triton.jit
def _factor_kernel(
    lows, x, row_hashes, column_hashes, out, rows, scale, part, width: tl.constexpr,
    count: tl.constexpr, rank: tl.constexpr, padded: tl.constexpr, threshold: tl.constexpr,
    tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Gradient of `wide` columns of every factor, summed over one part of the rows."""
    scale = tl.cast(scale, tl.float32)
    c = (tl.program_id(0) * wide + tl.arange(0, wide))[None, :]
    r = tl.arange(0, padded)[:, None]
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, rows)
    if threshold > 0:
        at = tl.program_id(0) * wide + tl.arange(0, wide)
        of_columns = _of_columns(column_hashes, at, width)
    sums = ()
    for _ in tl.static_range(count):
        sums = sums + (tl.zeros([padded, wide], tl.float32),)  # noqa: RUF005
    for first in range(begin, end, tall):
        m = first + tl.arange(0, tall)
        start = m.to(tl.int64)
        tile = tl.load(x + start[:, None] * width + c, (m < end)[:, None] & (c < width), other=0.0)
        near = (r < rank) & (m < end)[None, :]
        found = ()
        for i in tl.static_range(count):
            kept = tile
            if threshold > 0:
                times, plus = _of_rows(row_hashes, i, count, m[:, None], rows)
                kept = _drop(tile, of_columns * times + plus, threshold)
            low = tl.load(lows + start[None, :] * (count * rank) + i * rank + r, near, other=0.0)
            found = found + (tl.dot(low, kept, sums[i]),)  # noqa: RUF005
        sums = found
    for i in tl.static_range(count):
        row = (tl.program_id(1) * count + i) * rank + r
        tl.store(out + row * width + c, sums[i] * scale, (r < rank) & (c < width))


@triton.jit
def _input_kernel(
    lows, factors, row_hashes, column_hashes, base, out, rows, scale, width: tl.constexpr,
    count: tl.constexpr, rank: tl.constexpr, padded: tl.constexpr, threshold: tl.constexpr,
    tall: tl.constexpr, wide: tl.constexpr, tiles: tl.constexpr, based: tl.constexpr,
):  # fmt: skip
    """Gradient of `tiles` tiles of the input, added to what `base` has of it, if there is one."""
    scale = tl.cast(scale, tl.float32)
    m = (tl.program_id(0) * tall + tl.arange(0, tall))[:, None]
    r = tl.arange(0, padded)
    start = m.to(tl.int64)
    low = ()
    of_rows = ()
    for i in tl.static_range(count):
        mine = tl.load(
            lows + start * (count * rank) + i * rank + r[None, :],
            (m < rows) & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        low = low + (mine,)  # noqa: RUF005
        if threshold > 0:
            of_rows = of_rows + (_of_rows(row_hashes, i, count, m, rows),)  # noqa: RUF005
    for tile in range(tiles):
        c = (tl.program_id(1) * tiles + tile) * wide + tl.arange(0, wide)
        at = start * width + c[None, :]
        inside = (m < rows) & (c < width)[None, :]
        if threshold > 0:
            of_columns = _of_columns(column_hashes, c, width)
        if based:
            total = tl.load(base + at, inside, other=0.0).to(tl.float32)
        else:
            total = tl.zeros([tall, wide], tl.float32)
        for i in tl.static_range(count):
            factor = tl.load(
                factors + (i * rank + r)[:, None] * width + c[None, :],
                (r < rank)[:, None] & (c < width)[None, :], other=0.0,
            )  # fmt: skip
            more = tl.dot(low[i], factor)
            if threshold > 0:
                twice = of_columns * (of_rows[i][0] * 2) + of_rows[i][1] * 2
                total = _add(total, more, scale, twice, threshold)
            else:
                total += more * scale
        tl.store(out + at, total.to(tl.bfloat16), inside)


def _hashes(
    seeds: torch.Tensor, rows: int, columns: int, threshold: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if not threshold:
        return seeds, seeds  # nobody reads them
    return dropout.row_hashes(seeds, rows), dropout.column_hashes(columns, seeds.device)


def _warps(sums: int) -> int:
    """So many that `sums` numbers of fp32 a tile stay in registers."""
    return min(8, max(2, triton.next_power_of_2(sums // 4096)))


def _layout(factors: torch.Tensor, count: int, threshold: int) -> dict[str, int]:
    rank = len(factors) // count
    padded = max(16, triton.next_power_of_2(rank))
    return {
        "width": factors.shape[1], "count": count, "rank": rank, "padded": padded,
        "threshold": threshold, "wide": WIDE,
    }  # fmt: skip


def down(
    x: torch.Tensor, factors: torch.Tensor, seeds: torch.Tensor, count: int, threshold: int,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """See `stages.lib.model.low_rank.down`."""
    out = x.new_empty(len(x), len(factors))
    layout = _layout(factors, count, threshold)
    ranks = count * layout["padded"]
    _down_kernel[(triton.cdiv(len(x), FLAT),)](
        x, factors, *_hashes(seeds, *x.shape, threshold), out, len(x), scale, **layout, tall=FLAT,
        num_warps=_warps(2 * FLAT * ranks), num_stages=3 if ranks <= 128 or SHARED >= ROOMY else 2,
    )  # fmt: skip
    return out


def of_factors(
    lows: torch.Tensor, x: torch.Tensor, seeds: torch.Tensor, count: int, threshold: int,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """See `stages.lib.model.low_rank.of_factors`."""
    rank, width = lows.shape[1], x.shape[1]
    part, number = parts(len(x), PARTS, FLAT)
    out = torch.empty(number, rank, width, device=x.device)
    layout = _layout(out[0], count, threshold)
    _factor_kernel[(triton.cdiv(width, WIDE), number)](
        lows, x, *_hashes(seeds, *x.shape, threshold), out, len(x), scale, part, **layout, tall=FLAT,
        num_warps=_warps(WIDE * count * layout["padded"]), num_stages=3,
    )  # fmt: skip
    return out.sum(0)


def of_input(
    lows: torch.Tensor, factors: torch.Tensor, seeds: torch.Tensor, base: torch.Tensor | None,
    count: int, threshold: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """See `stages.lib.model.low_rank.of_input`."""
    out = lows.new_empty(len(lows), factors.shape[1])
    layout = _layout(factors, count, threshold)
    grid = (triton.cdiv(len(lows), FLAT), triton.cdiv(factors.shape[1], TILES * WIDE))
    _input_kernel[grid](
        lows, factors, *_hashes(seeds, *out.shape, threshold), lows if base is None else base, out,
        len(lows), scale, based=base is not None, **layout, tall=FLAT, tiles=TILES,
        num_warps=4,
    )  # fmt: skip
    return out
