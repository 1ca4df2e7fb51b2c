"""Triton kernels between the projections of attention and attention itself: adapter, rotation, quantisation.

Tokens come one after the other, with the heads of q, k and v side by side: [tokens, (q + k + v) * head].
"""

import math

import torch
import triton
import triton.language as tl

from stages.lib.model import fp8
from stages.lib.model.kernels.swiglu import LARGEST, LEAST, _cast

TALL, FEW, WARPS = 16, 1, 4  # tokens and heads of a program


@triton.jit
def _turn_kernel(
    y, lows, ups, cos, sin, out, rows, queries: tl.constexpr, keys: tl.constexpr,
    head: tl.constexpr, lows_width: tl.constexpr, rank: tl.constexpr, padded: tl.constexpr,
    of_q: tl.constexpr, of_k: tl.constexpr, of_v: tl.constexpr, tall: tl.constexpr,
    few: tl.constexpr,
):  # fmt: skip
    """`few` heads of `tall` tokens; `of_q` and the others: where its adapter is among `lows`, or -1."""
    width: tl.constexpr = (queries + 2 * keys) * head
    half: tl.constexpr = head // 2
    m = (tl.program_id(0) * tall + tl.arange(0, tall))[:, None]
    here = m < rows
    c = tl.arange(0, half)
    r = tl.arange(0, padded)
    number = tl.program_id(1) * few
    kind = tl.where(number < queries, of_q, tl.where(number < queries + keys, of_k, of_v))
    low = tl.load(
        lows + m.to(tl.int64) * lows_width + kind * rank + r[None, :],
        here & (r < rank)[None, :] & (kind >= 0), other=0.0,
    )  # fmt: skip
    turn = m.to(tl.int64) * head + c[None, :]  # both halves have the same angles
    turned = here & (number < queries + keys)
    cosine = tl.load(cos + turn, turned, other=1.0).to(tl.float32)
    sine = tl.load(sin + turn, turned, other=0.0).to(tl.float32)
    for i in range(few):
        first = (number + i) * head
        at = m.to(tl.int64) * width + first + c[None, :]
        left = tl.load(y + at, here, other=0.0).to(tl.float32)
        right = tl.load(y + at + half, here, other=0.0).to(tl.float32)
        if kind >= 0:
            up = ups + (first + c)[None, :] * rank + r[:, None]
            near = (r < rank)[:, None]
            left += tl.dot(low, tl.load(up, near, other=0.0)).to(tl.bfloat16)
            right += tl.dot(low, tl.load(up + half * rank, near, other=0.0)).to(tl.bfloat16)
        tl.store(out + at, (left * cosine - right * sine).to(tl.bfloat16), here)
        tl.store(out + at + half, (right * cosine + left * sine).to(tl.bfloat16), here)


@triton.jit
def _halves(
    gradient, row, token, heads_stride, heads: tl.constexpr, many: tl.constexpr, half: tl.constexpr
):
    h = tl.arange(0, many)[:, None]
    at = gradient + row * token + h * heads_stride + tl.arange(0, half)[None, :]
    left = tl.load(at, h < heads, other=0.0).to(tl.float32)
    return left, tl.load(at + half, h < heads, other=0.0).to(tl.float32)


@triton.jit
def _turn_back(left, right, cos, sin, row, half: tl.constexpr):
    turn = row * 2 * half + tl.arange(0, half)[None, :]
    cos_left = tl.load(cos + turn).to(tl.float32)
    cos_right = tl.load(cos + turn + half).to(tl.float32)
    sin_left = tl.load(sin + turn).to(tl.float32)
    sin_right = tl.load(sin + turn + half).to(tl.float32)
    back = left * cos_left + right * sin_right
    return back.to(tl.bfloat16), (right * cos_right - left * sin_left).to(tl.bfloat16)


@triton.jit
def _most(left, right):
    return tl.max(tl.max(tl.maximum(tl.abs(left), tl.abs(right)).to(tl.float32), 1), 0)


@triton.jit
def _put(
    out, row, first, left, right, width, heads: tl.constexpr, many: tl.constexpr, half: tl.constexpr
):
    h = tl.arange(0, many)[:, None]
    at = out + row * width + (first + h) * 2 * half + tl.arange(0, half)[None, :]
    tl.store(at, left, h < heads)
    tl.store(at + half, right, h < heads)


@triton.jit
def _back_kernel(
    of_q, of_k, of_v, cos, sin, plain, out, scales, q_token, q_head, k_token, k_head, v_token, v_head,
    queries: tl.constexpr, keys: tl.constexpr, head: tl.constexpr, many: tl.constexpr,
    few: tl.constexpr, kept_q: tl.constexpr, kept_k: tl.constexpr, kept_v: tl.constexpr,
):  # fmt: skip
    """One token a program."""
    width: tl.constexpr = (queries + 2 * keys) * head
    half: tl.constexpr = head // 2
    row = tl.program_id(0).to(tl.int64)
    q, q2 = _halves(of_q, row, q_token, q_head, queries, many, half)
    k, k2 = _halves(of_k, row, k_token, k_head, keys, few, half)
    v, v2 = _halves(of_v, row, v_token, v_head, keys, few, half)
    q, q2 = _turn_back(q, q2, cos, sin, row, half)
    k, k2 = _turn_back(k, k2, cos, sin, row, half)
    v, v2 = v.to(tl.bfloat16), v2.to(tl.bfloat16)
    if kept_q:
        _put(plain, row, 0, q, q2, width, queries, many, half)
    if kept_k:
        _put(plain, row, queries, k, k2, width, keys, few, half)
    if kept_v:
        _put(plain, row, queries + keys, v, v2, width, keys, few, half)
    most = tl.maximum(tl.maximum(_most(q, q2), _most(k, k2)), _most(v, v2))
    scale = tl.maximum(most, LEAST) / LARGEST
    tl.store(scales + row, scale)
    inverse = 1.0 / scale
    _put(out, row, 0, _cast(q, inverse), _cast(q2, inverse), width, queries, many, half)
    _put(out, row, queries, _cast(k, inverse), _cast(k2, inverse), width, keys, few, half)
    _put(out, row, queries + keys, _cast(v, inverse), _cast(v2, inverse), width, keys, few, half)


def turn(
    y: torch.Tensor, lows: torch.Tensor, ups: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    heads: tuple[int, int, int], rank: int, places: tuple[int, int, int],
) -> torch.Tensor:  # fmt: skip
    """See `stages.lib.model.rotary.turn`; `places`: of the adapter of q, k and v among `lows`, or -1."""
    queries, keys, head = heads
    out = torch.empty_like(y)
    few = math.gcd(queries, keys, FEW)
    _turn_kernel[(triton.cdiv(len(y), TALL), (queries + 2 * keys) // few)](
        y, lows, ups, cos, sin, out, len(y), queries=queries, keys=keys, head=head,
        lows_width=lows.shape[1], rank=rank, padded=max(16, triton.next_power_of_2(rank)),
        of_q=places[0], of_k=places[1], of_v=places[2], tall=TALL, few=few,
        num_warps=WARPS,
    )  # fmt: skip
    return out


def turn_back(
    of_q: torch.Tensor, of_k: torch.Tensor, of_v: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, kept: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `stages.lib.model.rotary.turn_back`."""
    tokens, queries, head = of_q.shape
    keys = of_k.shape[1]
    width = (queries + 2 * keys) * head
    out = torch.empty(tokens, width, dtype=fp8.E4M3, device=of_q.device)
    scales = torch.empty(tokens, 1, device=of_q.device)
    plain = of_q.new_empty(tokens, width) if any(kept) else of_q
    _back_kernel[(tokens,)](
        of_q, of_k, of_v, cos, sin, plain, out, scales, of_q.stride(0), of_q.stride(1),
        of_k.stride(0), of_k.stride(1), of_v.stride(0), of_v.stride(1), queries=queries, keys=keys,
        head=head, many=triton.next_power_of_2(queries), few=triton.next_power_of_2(keys),
        kept_q=kept[0], kept_k=kept[1], kept_v=kept[2], num_warps=8,
    )  # fmt: skip
    return plain, out, scales
