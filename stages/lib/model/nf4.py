"""4-bit projections by bitsandbytes' kernels: the weight is dequantised for each product, and kept by nobody.

Each product is one operation that the compiler does not look into, else it would merge the dequantised weight
of the forward and of the backward product into one, and hold it in between for all layers.
"""

import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import library

from stages.lib.model.casting import cast

Stored = list[torch.Tensor]
STORED = 5


def stored(layer: Any) -> Stored:
    """What a double quantised Linear4bit holds: packed weight, block scales, their scales, code, offset."""
    state = layer.weight.quant_state
    inner = state.state2
    return [layer.weight.data, state.absmax, inner.absmax, inner.code, state.offset]


def dequantise(
    kept: Stored, rows: int, block: int, inner_block: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [rows, columns], as bitsandbytes computes it.

    Args:
        kept: see `stored`. block, inner_block: elements of a block of the weight, and of its scales.
    """
    packed, scales, inner, code, offset = kept
    absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
        scales, inner, code, inner_block, torch.float32
    )
    shape = [rows, packed.numel() * 2 // rows]
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax + offset, block, "nf4", shape, dtype
    )


@library.custom_op("lora_stages::nf4_product", mutates_args=())
def nf4_product(
    x: torch.Tensor, bias: torch.Tensor | None, kept: list[torch.Tensor], rows: int, block: int,
    inner_block: int,
) -> torch.Tensor:  # fmt: skip
    """x [..., in] @ W.T + bias, [..., rows], rounded once."""
    return F.linear(x, dequantise(kept, rows, block, inner_block, x.dtype), bias)


@library.custom_op("lora_stages::nf4_gradient", mutates_args=())
def nf4_gradient(
    upstream: torch.Tensor, kept: list[torch.Tensor], rows: int, block: int, inner_block: int
) -> torch.Tensor:
    """upstream [..., rows] @ W, [..., in]."""
    return upstream @ dequantise(kept, rows, block, inner_block, upstream.dtype)


@nf4_product.register_fake
def _(x: Any, bias: Any, kept: Any, rows: int, block: int, inner_block: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@nf4_gradient.register_fake
def _(upstream: Any, kept: Any, rows: int, block: int, inner_block: int) -> torch.Tensor:
    return upstream.new_empty(*upstream.shape[:-1], kept[0].numel() * 2 // rows)


class Product(torch.autograd.Function):
    """x @ W.T + bias; what is kept for the way back is W in 4 bit."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, rows: int, block: int, inner_block: int,
        *kept: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """[..., rows]; see `dequantise`."""
        ctx.save_for_backward(*kept)
        ctx.sizes = rows, block, inner_block
        return nf4_product(x, bias, list(kept), rows, block, inner_block)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        """Of x."""
        of_x = nf4_gradient(upstream, list(ctx.saved_tensors), *ctx.sizes)
        return of_x, None, None, None, None, *[None] * STORED


def linear(plain: torch.nn.Linear, weight: torch.Tensor) -> Any:
    """A projection in NF4, double quantised, as transformers has bitsandbytes make it.

    Args:
        plain: it, for its sizes and bias. weight: [out, in], on the device where it is quantised.
    """
    import bitsandbytes as bnb

    with torch.device("meta"):
        made = bnb.nn.Linear4bit(
            plain.in_features, plain.out_features, bias=False, compute_dtype=torch.bfloat16,
            compress_statistics=True, quant_type="nf4",
        )  # fmt: skip
    made.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
    ).to(weight.device)
    made.bias = plain.bias
    return made


def is_nested(layer: Any) -> bool:
    """Whether a module is a double quantised NF4 projection."""
    import bitsandbytes as bnb

    return isinstance(layer, bnb.nn.Linear4bit) and bool(layer.weight.quant_state.nested)


def layers(model: Any) -> Iterator[Any]:
    """The double quantised NF4 projections of a model."""
    return (layer for layer in model.modules() if is_nested(layer))


def _projections(model: Any) -> Iterator[tuple[Any, tuple[int, int]]]:
    """The same, and the sizes of their blocks."""
    for layer in layers(model):
        state = layer.weight.quant_state
        yield layer, (state.blocksize, state.state2.blocksize)


def whole(layer: Any) -> torch.Tensor:
    """A projection's weight [out, in], dequantised."""
    state = layer.weight.quant_state
    blocks = (state.blocksize, state.state2.blocksize)
    return dequantise(stored(layer), layer.out_features, *blocks, state.dtype)


def lighten(model: Any) -> None:
    """Give every double quantised NF4 projection of a model the product of this module."""
    for layer, blocks in _projections(model):
        for place, tensor in enumerate(stored(layer)):
            layer.register_buffer(f"stored{place}", tensor, persistent=False)
        layer.blocks = blocks
        layer.forward = types.MethodType(_forward, layer)


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    packed, scales, *rest = (getattr(layer, f"stored{place}") for place in range(STORED))
    kept = [packed.view(torch.uint8), scales.view(torch.uint8), *rest]
    (x,) = cast(x)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return Product.apply(x, bias, layer.out_features, *layer.blocks, *kept)


def unpack(model: Any) -> None:
    """Dequantise every NF4 projection of a model once and for all: the same numbers, four times the memory."""
    for layer in layers(model):
        layer.register_buffer("unpacked", whole(layer), persistent=False)
        layer.forward = types.MethodType(_plain, layer)


def _plain(layer: Any, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.unpacked.to(x.dtype), bias)
