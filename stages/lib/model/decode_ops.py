"""What lies between a decoder's products, as one operation each: Triton kernels on a GPU, torch elsewhere.

An adapter's second factors are added in them: `lows` [rows, ranks] are the outputs of the first factors, in the
type of the activations, `ups` [rank, out] the second factors of all projections of one input, side by side,
and `columns` says where a projection's part of `lows` begins, -1 where it has no adapter. `strength`, fp32 [1],
is alpha / rank, or 0 where the adapter is switched off.
"""

import torch
import torch.nn.functional as F

Heads = tuple[int, int, int]  # of queries, of keys, and the width of one


def add_norm(
    x: torch.Tensor, y: torch.Tensor | None, lows: torch.Tensor | None, ups: torch.Tensor | None,
    strength: torch.Tensor, weight: torch.Tensor, eps: float,
) -> torch.Tensor:  # fmt: skip
    """Add y to x in place, both [rows, width], and return the RMS norm of that (Zhang and Sennrich 2019).

    Args:
        y: None adds nothing. weight: [width].
    """
    if x.is_cuda:
        from stages.lib.model.kernels import decode

        return decode.add_norm(x, y, lows, ups, strength, weight, eps)
    if y is not None:
        x += _second(y, lows, ups, strength, 0)
    return _norm(x, weight, eps)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    exact = x.float()
    scale = (exact.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (exact * scale).to(x.dtype) * weight


def _second(
    y: torch.Tensor, lows: torch.Tensor | None, ups: torch.Tensor | None, strength: torch.Tensor,
    column: int,
) -> torch.Tensor:  # fmt: skip
    if lows is None or ups is None or column < 0:
        return y
    low = lows[:, column : column + len(ups)]
    return y + ((low.float() @ ups.float()) * strength).to(y.dtype)


def place(
    y: torch.Tensor, lows: torch.Tensor | None, ups: torch.Tensor | None, columns: tuple[int, ...],
    strength: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor] | None, eps: float, positions: torch.Tensor,
    slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: Heads,
) -> torch.Tensor:  # fmt: skip
    """Rotate q and k (Su et al. 2021), put k and v into the cache, and return q [rows, queries * head].

    Args:
        y: q, k and v side by side, [rows, out]. turns: cosine and sine of all positions, [positions, head].
        norms: of a head of q and of k, [head]. positions: int32 [rows]. slots: where in the cache, int32
            [rows]. keys, values: [key heads, slots, head]. heads: see `Heads`.
    """
    if y.is_cuda:
        from stages.lib.model.kernels import decode

        return decode.place(
            y, lows, ups, columns, strength, turns, norms, eps, positions, slots, keys, values, heads
        )  # fmt: skip
    queries, shared, head = heads
    sizes = [queries * head, shared * head, shared * head]
    parts = y.split(sizes, -1)
    upper = (None,) * 3 if ups is None else ups.split(sizes, -1)
    q, k, v = (
        _second(part, lows, up, strength, column).unflatten(-1, (-1, head))
        for part, up, column in zip(parts, upper, columns, strict=True)
    )
    if norms:
        q, k = _norm(q, norms[0], eps), _norm(k, norms[1], eps)
    cos, sin = (table[positions.long()][:, None] for table in turns)
    keys[:, slots.long()] = _turned(k, cos, sin).transpose(0, 1)
    values[:, slots.long()] = v.transpose(0, 1)
    return _turned(q, cos, sin).flatten(1)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor,
    slots: torch.Tensor, heads: Heads, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attention of one token a row over what the cache has of its answer, [rows, queries * head].

    Args:
        q: [rows, queries * head]. keys, values: [key heads, slots, head]. starts, slots: first and last slot of
            each row's answer, int32 [rows].
    """
    queries, shared, head = heads
    if q.is_cuda:
        from stages.lib.model.kernels import decode_attention

        return decode_attention.attend(
            q, keys, values, starts, slots, heads, scale, _parts(len(q) * shared)
        )
    found = []
    for row, (first, last) in enumerate(zip(starts.tolist(), slots.tolist(), strict=True)):
        own = q[row].view(shared, queries // shared, head)
        k, v = keys[:, first : last + 1], values[:, first : last + 1]
        found.append(F.scaled_dot_product_attention(own, k, v, scale=scale).reshape(-1))
    return torch.stack(found)


def _parts(programs: int) -> int:
    """Parts that the keys of a row are cut into, so that a GPU's multiprocessors all have some."""
    return 1 if programs >= 256 else min(-(-256 // programs), 16)


def gate(
    y: torch.Tensor, lows: torch.Tensor | None, ups: torch.Tensor | None, columns: tuple[int, ...],
    strength: torch.Tensor, width: int,
) -> torch.Tensor:  # fmt: skip
    """SwiGLU (Shazeer 2020) of gate and up side by side, y [rows, 2 * width]: [rows, width]."""
    if y.is_cuda:
        from stages.lib.model.kernels import decode

        return decode.gate(y, lows, ups, columns, strength, width)
    parts = y.split(width, -1)
    upper = (None,) * 2 if ups is None else ups.split(width, -1)
    first, second = (
        _second(part, lows, up, strength, column)
        for part, up, column in zip(parts, upper, columns, strict=True)
    )
    return F.silu(first) * second
