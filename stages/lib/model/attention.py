"""Attention over rows that lie end to end: each sees itself alone, and no mask of tokens by tokens is built."""

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import library

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
        key, value = _shared(several, key, value)
        return _one_by_one(query, key, value, bounds.tolist(), sliding_window, scaling), None
    if uniform and not sliding_window:
        key, value = _shared(several, key, value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
        return Rows.apply(q, k, v, longest, scale)[None], None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    grouped = {}
    if several > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouped["enable_gqa"] = True
    else:  # torch 2.11
        k, v = _shared(several, k, v)
    before = sliding_window - 1 if sliding_window else -1
    found = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(before, 0), **grouped
    )
    return found[None], None


def hold(module: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What attention reads, marked to be kept for the backward pass where the module says so."""
    held = getattr(module, "held", False)
    return tuple(Held.apply(t) for t in inputs) if held else inputs


def _shared(several: int, *heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys or values [1, heads, tokens, width], each as often as there are queries' heads that share it."""
    if several == 1:  # a repetition by one would be a copy
        return heads
    return tuple(t.repeat_interleave(several, 1) for t in heads)


@library.custom_op("stages::attend_rows", mutates_args=())
def attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention in rows of one length in cuDNN, which is the fastest where nothing is ragged.

    An operation of its own, because the compiler would copy its inputs into another order of their sides.

    Args:
        query, key, value: [T, heads, width]. length: of a row. scale: of the scores.

    Returns:
        [T, heads, width], and for the way back the scores' logarithmic sums.
    """
    q, k, v = (_rows(t, length) for t in (query, key, value))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )
    return _tokens(found[0]), found[1]


@attend_rows.register_fake
def _(query: Any, key: Any, value: Any, length: int, scale: float) -> Any:
    tokens, heads, _ = query.shape
    sums = query.new_empty(tokens // length, heads, length, 1, dtype=torch.float32)
    return query.new_empty(query.shape), sums


@library.custom_op("stages::attend_rows_backward", mutates_args=())
def attend_rows_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    found: torch.Tensor, sums: torch.Tensor, length: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of query, key and value, [T, heads, width] each."""
    given = (_rows(t, length) for t in (gradient, query, key, value, found))
    unused = torch.zeros((), dtype=torch.int64, device=query.device)  # of dropout
    of_inputs = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *given, sums, unused, unused, None, None, None, length, length, 0.0, True, scale=scale
    )
    of_query, of_key, of_value = (_tokens(t) for t in of_inputs)
    return of_query, of_key, of_value


@attend_rows_backward.register_fake
def _(gradient: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


class Rows(torch.autograd.Function):
    """`attend_rows` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, scale: float
    ) -> torch.Tensor:  # fmt: skip
        """[T, heads, width]; the arguments are `attend_rows`'."""
        found, sums = attend_rows(query, key, value, length, scale)
        ctx.save_for_backward(query, key, value, found, sums)
        ctx.length, ctx.scale = length, scale
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Of query, key and value."""
        saved = ctx.saved_tensors
        of_inputs = attend_rows_backward(gradient, *saved, ctx.length, ctx.scale)
        return *of_inputs, None, None


def _rows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """[T, heads, width] as cuDNN has it, [rows, heads, length, width]."""
    return tokens.unflatten(0, (-1, length)).transpose(1, 2)


def _tokens(rows: torch.Tensor) -> torch.Tensor:
    return rows.transpose(1, 2).flatten(0, 1).contiguous()


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
