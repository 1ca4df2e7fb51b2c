"""Triton kernels of a decoder that says one token at a time: all that lies between its large products.

Rows are tokens, each of another answer: [rows, ...]. Where an adapter is at work its first factors' outputs
come with the projections (`lows`), and their second factors, [rank, out], are added here, where the output is
read anyway.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from stages.lib.model.kernels.swiglu import LARGEST, LEAST, _cast

WIDE = 1024  # columns of a program of `gate`
# Columns of a strip of a weight: on an H100 one such row, or two in e4m3, a program read 3.0 TB/s of the 3.1
# that there are, and of 4,096 rows 2.7 (the best of 60 sizes and shapes; cuBLAS: 2.0 to 2.7).
LONG = 4096


@triton.jit
def _second(
    found, lows, ups, strength, at, here, columns, rank: tl.constexpr, out_type: tl.constexpr
):
    """`found` with what an adapter adds to it: lows [rank] times ups [rank, columns]."""
    scale = tl.load(strength)
    more = tl.zeros_like(found)
    for r in range(rank):
        low = tl.load(lows + r).to(tl.float32)
        more += low * tl.load(ups + r * columns + at, here, other=0.0).to(tl.float32)
    return found + (more * scale).to(out_type).to(tl.float32)


@triton.jit
def _add_norm_kernel(
    x, y, y_row, lows, lows_row, ups, strength, weight, out, eps, width: tl.constexpr,
    block: tl.constexpr, rank: tl.constexpr, adapted: tl.constexpr, added: tl.constexpr,
):  # fmt: skip
    """A row a program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    here = at < width
    kind: tl.constexpr = out.dtype.element_ty
    hidden = tl.load(x + row * width + at, here, other=0.0).to(tl.float32)
    if added:
        more = tl.load(y + row * y_row + at, here, other=0.0).to(tl.float32)
        if adapted:
            more = _second(more, lows + row * lows_row, ups, strength, at, here, width, rank, kind)
        hidden = (hidden + more.to(kind).to(tl.float32)).to(kind).to(tl.float32)
        tl.store(x + row * width + at, hidden.to(kind), here)
    size = tl.sum(hidden * hidden, 0) / width
    normed = (hidden * tl.rsqrt(size + eps)).to(kind)
    scaled = normed.to(tl.float32) * tl.load(weight + at, here, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, scaled.to(kind), here)


@triton.jit
def _place_kernel(
    y, y_row, lows, lows_row, ups, strength, cos, sin, q_norm, k_norm, positions, slots, out, keys,
    values, pool_rows, eps, queries: tl.constexpr, shared: tl.constexpr, head: tl.constexpr,
    block: tl.constexpr, rank: tl.constexpr, of_q: tl.constexpr, of_k: tl.constexpr,
    of_v: tl.constexpr, normed: tl.constexpr,
):  # fmt: skip
    """A head of a row a program; `of_q` and the others: where its adapter begins among `lows`, or -1."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1)
    half: tl.constexpr = head // 2
    width: tl.constexpr = (queries + 2 * shared) * head
    kind: tl.constexpr = out.dtype.element_ty
    c = tl.arange(0, block)
    here = c < half
    at = number * head + c
    left = tl.load(y + row * y_row + at, here, other=0.0).to(tl.float32)
    right = tl.load(y + row * y_row + at + half, here, other=0.0).to(tl.float32)
    of = tl.where(number < queries, of_q, tl.where(number < queries + shared, of_k, of_v))
    if of >= 0:
        low = lows + row * lows_row + of
        left = _second(left, low, ups, strength, at, here, width, rank, kind)
        right = _second(right, low, ups, strength, at + half, here, width, rank, kind)
    left = left.to(kind).to(tl.float32)
    right = right.to(kind).to(tl.float32)
    if number < queries + shared:
        if normed:
            own = q_norm + c
            if number >= queries:
                own = k_norm + c
            size = (tl.sum(left * left, 0) + tl.sum(right * right, 0)) / head
            scale = tl.rsqrt(size + eps)
            left = (left * scale).to(kind).to(tl.float32) * tl.load(own, here, other=0.0).to(
                tl.float32
            )
            right = (right * scale).to(kind).to(tl.float32) * tl.load(
                own + half, here, other=0.0
            ).to(tl.float32)
        turn = tl.load(positions + row).to(tl.int64) * head + c
        cosine = tl.load(cos + turn, here, other=1.0).to(tl.float32)
        sine = tl.load(sin + turn, here, other=0.0).to(tl.float32)
        turned = left * cosine - right * sine
        right = right * cosine + left * sine
        left = turned
    slot = tl.load(slots + row).to(tl.int64)
    if number < queries:
        target = out + row * queries * head + number * head + c
    elif number < queries + shared:
        target = keys + ((number - queries).to(tl.int64) * pool_rows + slot) * head + c
    else:
        target = values + ((number - queries - shared).to(tl.int64) * pool_rows + slot) * head + c
    tl.store(target, left.to(kind), here)
    tl.store(target + half, right.to(kind), here)


@triton.jit
def _gate_kernel(
    y, y_row, lows, lows_row, ups, strength, out, width: tl.constexpr, block: tl.constexpr,
    rank: tl.constexpr, of_gate: tl.constexpr, of_up: tl.constexpr,
):  # fmt: skip
    """`block` columns of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    here = at < width
    kind: tl.constexpr = out.dtype.element_ty
    gate = tl.load(y + row * y_row + at, here, other=0.0).to(tl.float32)
    up = tl.load(y + row * y_row + width + at, here, other=0.0).to(tl.float32)
    low = lows + row * lows_row
    if of_gate >= 0:
        gate = _second(gate, low + of_gate, ups, strength, at, here, 2 * width, rank, kind)
    if of_up >= 0:
        up = _second(up, low + of_up, ups, strength, width + at, here, 2 * width, rank, kind)
    gate = gate.to(kind).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32)
    tl.store(out + row * width + at, (silu * up.to(kind).to(tl.float32)).to(kind), here)


@triton.jit
def _vector_kernel(
    x, weight, scales, bias, out, rows, columns: tl.constexpr, tall: tl.constexpr,
    block: tl.constexpr, scaled: tl.constexpr, biased: tl.constexpr,
):  # fmt: skip
    """`tall` rows of a weight times one vector; loads of a whole strip are under way at once.

    With a weight in e4m3 each program rounds the vector, too, as `fp8.quantise` does.
    """
    n = tl.program_id(0) * tall + tl.arange(0, tall)
    k = tl.arange(0, block)
    inside = (n < rows)[:, None]
    sums = tl.zeros([tall, block], tl.float32)
    step = 1.0
    if scaled:
        largest = tl.zeros([block], tl.float32)
        for i in tl.static_range((columns + block - 1) // block):
            at = i * block + k
            values = tl.load(x + at, at < columns, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(values))
        step = tl.maximum(tl.max(largest, 0), LEAST) / LARGEST
    for i in tl.static_range((columns + block - 1) // block):
        at = i * block + k
        here = at < columns
        strip = tl.load(
            weight + n[:, None].to(tl.int64) * columns + at[None, :], inside & here[None, :],
            other=0.0, eviction_policy="evict_first",
        )  # fmt: skip
        vector = tl.load(x + at, here, other=0.0).to(tl.float32)
        if scaled:
            vector = _cast(vector, 1.0 / step).to(tl.float32)
        sums += strip.to(tl.float32) * vector[None, :]
    found = tl.sum(sums, 1)
    if scaled:
        found *= tl.load(scales + n, n < rows, other=0.0) * step
    if biased:
        found = found.to(out.dtype.element_ty).to(tl.float32) + tl.load(
            bias + n, n < rows, other=0.0
        ).to(tl.float32)
    tl.store(out + n, found.to(out.dtype.element_ty), n < rows)


@triton.jit
def _quantise_kernel(x, out, scales, width: tl.constexpr, block: tl.constexpr):
    """A row a program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    here = at < width
    values = tl.load(x + row * width + at, here, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), LEAST) / LARGEST
    tl.store(scales + row, scale)
    tl.store(out + row * width + at, _cast(values, 1.0 / scale), here)


def _warps(elements: int) -> int:
    return min(max(elements // 512, 1), 16)


def add_norm(
    x: torch.Tensor, y: torch.Tensor | None, lows: torch.Tensor | None, ups: Any,
    strength: torch.Tensor, weight: torch.Tensor, eps: float,
) -> torch.Tensor:  # fmt: skip
    """See `stages.lib.model.decode_ops.add_norm`."""
    out = torch.empty_like(x)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    adapted = lows is not None
    _add_norm_kernel[(len(x),)](
        x, x if y is None else y, 0 if y is None else y.stride(0), lows if adapted else x,
        lows.stride(0) if lows is not None else 0, ups if adapted else x, strength, weight, out, eps,
        width=width, block=block, rank=len(ups) if adapted else 1, adapted=adapted,
        added=y is not None, num_warps=_warps(block),
    )  # fmt: skip
    return out


def place(
    y: torch.Tensor, lows: torch.Tensor | None, ups: Any, columns: tuple[int, ...],
    strength: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], norms: Any, eps: float,
    positions: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    heads: tuple[int, int, int],
) -> torch.Tensor:  # fmt: skip
    """See `stages.lib.model.decode_ops.place`."""
    queries, shared, head = heads
    out = torch.empty(len(y), queries * head, dtype=keys.dtype, device=y.device)
    adapted = lows is not None
    _place_kernel[(len(y), queries + 2 * shared)](
        y, y.stride(0), lows if adapted else y, lows.stride(0) if lows is not None else 0,
        ups if adapted else y, strength, *turns, *(norms or (y, y)), positions, slots, out, keys,
        values, keys.shape[1], eps, queries=queries, shared=shared, head=head,
        block=triton.next_power_of_2(head // 2), rank=len(ups) if adapted else 1,
        of_q=columns[0], of_k=columns[1], of_v=columns[2], normed=norms is not None, num_warps=1,
    )  # fmt: skip
    return out


def gate(
    y: torch.Tensor, lows: torch.Tensor | None, ups: Any, columns: tuple[int, ...],
    strength: torch.Tensor, width: int,
) -> torch.Tensor:  # fmt: skip
    """See `stages.lib.model.decode_ops.gate`."""
    out = torch.empty(len(y), width, dtype=y.dtype, device=y.device)
    adapted = lows is not None
    _gate_kernel[(len(y), triton.cdiv(width, WIDE))](
        y, y.stride(0), lows if adapted else y, lows.stride(0) if lows is not None else 0,
        ups if adapted else y, strength, out, width=width, block=WIDE,
        rank=len(ups) if adapted else 1, of_gate=columns[0], of_up=columns[1], num_warps=4,
    )  # fmt: skip
    return out


def vector(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [1, columns] @ weight.T, [1, rows]; weight: [rows, columns], perhaps e4m3 with `scales` [rows, 1]."""
    rows, columns = weight.shape
    tall = 1 if scales is None else 2
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    _vector_kernel[(triton.cdiv(rows, tall),)](
        x, weight, x if scales is None else scales, x if bias is None else bias, out, rows,
        columns=columns, tall=tall, block=min(LONG, triton.next_power_of_2(columns)),
        scaled=scales is not None, biased=bias is not None, num_warps=4,
    )  # fmt: skip
    return out


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `stages.lib.model.fp8.quantise`."""
    width = rows.shape[1]
    out = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty(len(rows), 1, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(width)
    _quantise_kernel[(len(rows),)](
        rows, out, scales, width=width, block=block, num_warps=_warps(block)
    )
    return out, scales
