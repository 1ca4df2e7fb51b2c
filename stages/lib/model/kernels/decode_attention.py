"""Triton kernels of attention of one token a row over a cache, as in Flash-Decoding (Dao et al. 2023).

Where there are fewer rows than a GPU has room for, a row's keys are cut into parts, which are joined after.
"""

import torch
import triton
import triton.language as tl

FEW = 16  # rows of a product on tensor cores, at least
BLOCK = 64  # keys at a time


@triton.jit
def _attend_kernel(
    q, keys, values, starts, slots, out, sums, pool_rows, scale, several: tl.constexpr,
    heads: tl.constexpr, head: tl.constexpr, wide: tl.constexpr, tall: tl.constexpr,
    block: tl.constexpr, parts: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """The query heads of a row that share a key head, over one of `parts` parts of its keys."""
    row = tl.program_id(0)
    shared = tl.program_id(1)
    part = tl.program_id(2)
    start = tl.load(starts + row)
    length = tl.load(slots + row) - start + 1
    size = tl.cdiv(tl.cdiv(length, parts), block) * block
    first = part * size
    last = tl.minimum(first + size, length)
    g = tl.arange(0, tall)
    d = tl.arange(0, wide)
    own = (g < several)[:, None] & (d < head)[None, :]
    number = shared * several + g
    at = (row * heads + number)[:, None].to(tl.int64) * head + d[None, :]
    query = tl.load(q + at, own, other=0.0)
    pool = (shared.to(tl.int64) * pool_rows + start) * head
    most = tl.full([tall], float("-inf"), tl.float32)
    total = tl.zeros([tall], tl.float32)
    found = tl.zeros([tall, wide], tl.float32)
    n = tl.arange(0, block)
    precision: tl.constexpr = "ieee" if exact else "tf32"
    for begin in range(first, last, block):
        there = begin + n < last
        place = pool + (begin + n)[:, None] * head + d[None, :]
        mask = there[:, None] & (d < head)[None, :]
        key = tl.load(keys + place, mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=precision) * scale
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        less = tl.exp(most - higher)
        total = total * less + tl.sum(weight, 1)
        value = tl.load(values + place, mask, other=0.0)
        found = found * less[:, None] + tl.dot(
            weight.to(value.dtype), value, input_precision=precision
        )
        most = higher
    if parts == 1:
        tl.store(out + at, (found / total[:, None]).to(out.dtype.element_ty), own)
    else:
        rows = tl.num_programs(0)
        into = (part * rows * heads + row * heads + number).to(tl.int64)
        tl.store(out + into[:, None] * head + d[None, :], found, own)
        tl.store(sums + into * 2, most, g < several)
        tl.store(sums + into * 2 + 1, total, g < several)


@triton.jit
def _join_kernel(
    partial, sums, out, head: tl.constexpr, wide: tl.constexpr, parts: tl.constexpr,
    padded: tl.constexpr,
):  # fmt: skip
    """A head of a row a program: its parts, which have different maxima, become one."""
    number = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    p = tl.arange(0, padded)
    d = tl.arange(0, wide)
    there = p < parts
    most = tl.load(sums + (p * count + number) * 2, there, other=float("-inf"))
    total = tl.load(sums + (p * count + number) * 2 + 1, there, other=0.0)
    weight = tl.exp(most - tl.max(most, 0))
    weight = tl.where(there & (total > 0), weight, 0.0)
    at = (p * count + number)[:, None] * head + d[None, :]
    found = tl.load(partial + at, there[:, None] & (d < head)[None, :], other=0.0)
    result = tl.sum(found * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + number * head + d, result.to(out.dtype.element_ty), d < head)


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor,
    slots: torch.Tensor, heads: tuple[int, int, int], scale: float, parts: int,
) -> torch.Tensor:  # fmt: skip
    """See `stages.lib.model.decode_ops.attend`."""
    queries, shared, head = heads
    rows, several = len(q), queries // shared
    wide = triton.next_power_of_2(head)
    out = torch.empty_like(q)
    partial, sums = out, out
    if parts > 1:
        partial = torch.empty(parts, rows, queries, head, dtype=torch.float32, device=q.device)
        sums = torch.empty(parts, rows, queries, 2, dtype=torch.float32, device=q.device)
    _attend_kernel[(rows, shared, parts)](
        q, keys, values, starts, slots, partial, sums, keys.shape[1], scale, several=several,
        heads=queries, head=head, wide=wide, tall=max(FEW, triton.next_power_of_2(several)),
        block=BLOCK, parts=parts, exact=q.dtype == torch.float32, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(rows * queries,)](
            partial, sums, out, head=head, wide=wide, parts=parts,
            padded=triton.next_power_of_2(parts), num_warps=1,
        )  # fmt: skip
    return out
