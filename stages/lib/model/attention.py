"""Attention over rows that lie end to end: each sees itself alone, and no mask of tokens by tokens is built."""

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from stages.lib.model.casting import cast
from stages.lib.model.selective import Held

NAME = "packed"
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models ask for beyond the softmax


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
    *, bounds: torch.Tensor, longest: int, uniform: bool, scaling: float | None = None,
    sliding_window: int | None = None, dropout: float = 0.0, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each row, in the form that transformers calls.

    Args:
        query: [1, heads, tokens, width]. key, value: [1, key heads, tokens, width]. attention_mask: none.
        bounds: int32 [rows + 1], where rows begin, and `tokens` at the end. longest: tokens of the longest row.
        uniform: every row has `longest` tokens. sliding_window: tokens that one sees, itself among them.

    Returns:
        [1, tokens, heads, width].
    """
    wanted = [name for name in UNKNOWN if options.get(name) is not None]
    if wanted:
        raise NotImplementedError(f"attention with {wanted[0]}")
    query, key, value = hold(module, *cast(query, key, value))
    several = query.shape[1] // key.shape[1]
    if not query.is_cuda or query.dtype == torch.float32:
        key, value = (t.repeat_interleave(several, 1) for t in (key, value))
        return _one_by_one(query, key, value, bounds.tolist(), sliding_window, scaling), None
    if uniform and not sliding_window:
        key, value = (t.repeat_interleave(several, 1) for t in (key, value))
        return _side_by_side(query, key, value, longest, scaling), None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    grouped = {}
    if several > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouped["enable_gqa"] = True
    else:  # torch 2.11
        k, v = (t.repeat_interleave(several, 1) for t in (k, v))
    before = sliding_window - 1 if sliding_window else -1
    found = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(before, 0), **grouped
    )
    return found[None], None


def hold(module: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What attention reads, marked to be kept for the backward pass where the module says so."""
    held = getattr(module, "held", False)
    return tuple(Held.apply(t) for t in inputs) if held else inputs


def _side_by_side(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, scaling: float | None
) -> torch.Tensor:
    """Rows of one length in cuDNN, which is the fastest where nothing is ragged."""
    rows = query.shape[2] // length
    q, k, v = (t[0].unflatten(1, (rows, length)).transpose(0, 1) for t in (query, key, value))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scaling
    )[0]
    return found.transpose(1, 2).reshape(1, rows * length, q.shape[1], -1)


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int],
    sliding_window: int | None, scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    """Row after row, where there is no kernel for all of them."""
    found = []
    for first, last in pairwise(bounds):
        q, k, v = (t[:, :, first:last] for t in (query, key, value))
        window = None
        if sliding_window and sliding_window < last - first:
            at = torch.arange(last - first, device=query.device)
            behind = at[:, None] - at
            window = (behind >= 0) & (behind < sliding_window)
        causal = window is None
        found.append(
            F.scaled_dot_product_attention(q, k, v, window, is_causal=causal, scale=scaling)
        )
    return torch.cat(found, 2).transpose(1, 2).contiguous()


def register() -> None:
    """Make it known to transformers as `packed`.

    It has no mask function: transformers then makes no mask, and need not ask the GPU whether rows are packed.
    A padding mask would go unheard; but whoever calls without `bounds` is refused.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
