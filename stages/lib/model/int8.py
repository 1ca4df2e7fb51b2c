"""8-bit projections by bitsandbytes' kernels: LLM.int8, Dettmers et al. 2022.

Products are operations that the compiler does not look into: how many columns have outliers, and are multiplied
in 16 bit, only the GPU knows. On the way back the weight is dequantised; bitsandbytes' own function keeps its
input, too.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import library

from stages.lib.model.casting import cast

THRESHOLD = 6.0  # of a column's largest value, above which it is an outlier: transformers' own


def dequantise(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [rows, columns] with scales fp32 [rows] as numbers, as bitsandbytes computes them."""
    return weight.to(dtype, copy=True).mul_(scales[:, None].mul(1.0 / 127.0))


@library.custom_op("lora_stages::int8_product", mutates_args=())
def int8_product(
    x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, scales: torch.Tensor, threshold: float
) -> torch.Tensor:  # fmt: skip
    """x [..., in] @ W.T + bias, [..., rows]; on the GPU in int8, without columns of x above `threshold`."""
    if not x.is_cuda:
        return F.linear(x, dequantise(weight, scales, x.dtype), bias)
    flat = x.reshape(-1, x.shape[-1])
    operations = torch.ops.bitsandbytes
    quantise = operations.int8_vectorwise_quant.default
    values, of_rows, outliers = quantise(flat.to(torch.float16), threshold)
    y: torch.Tensor
    if threshold > 0:
        y, _ = operations.int8_mixed_scaled_mm.default(
            flat, values, weight, of_rows, scales, outliers, bias
        )
    else:
        y = operations.int8_scaled_mm.default(
            values, weight, of_rows, scales, bias=bias, dtype=x.dtype
        )
    return y.view(*x.shape[:-1], -1)


@library.custom_op("lora_stages::int8_gradient", mutates_args=())
def int8_gradient(
    upstream: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """upstream [..., rows] @ W, [..., in], in upstream's type."""
    return upstream @ dequantise(weight, scales, upstream.dtype)


@int8_product.register_fake
def _(x: Any, bias: Any, weight: Any, scales: Any, threshold: float) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@int8_gradient.register_fake
def _(upstream: Any, weight: Any, scales: Any) -> torch.Tensor:
    return upstream.new_empty(*upstream.shape[:-1], weight.shape[1])


class Product(torch.autograd.Function):
    """x @ W.T + bias."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, scales: torch.Tensor,
        threshold: float,
    ) -> torch.Tensor:  # fmt: skip
        """[..., rows]; see `int8_product`."""
        ctx.save_for_backward(weight, scales)
        return int8_product(x, bias, weight, scales, threshold)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        """Of x."""
        return int8_gradient(upstream, *ctx.saved_tensors), None, None, None, None


def linear(plain: torch.nn.Linear, weight: torch.Tensor) -> Any:
    """A projection in LLM.int8, as transformers has bitsandbytes make it.

    Args:
        plain: it, for its sizes and bias. weight: [out, in], on the device where it is quantised.
    """
    import bitsandbytes as bnb

    with torch.device("meta"):
        made = bnb.nn.Linear8bitLt(
            plain.in_features, plain.out_features, bias=False, has_fp16_weights=False,
            threshold=THRESHOLD,
        )  # fmt: skip
    values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    made.weight = bnb.nn.Int8Params(
        values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales
    )
    made.bias = plain.bias
    return made


def lighten(model: Any) -> None:
    """Give every Linear8bitLt of a model the product of this module."""
    import bitsandbytes as bnb

    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear8bitLt) and not layer.state.has_fp16_weights:
            # The layer's first product moves them.
            scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
            layer.register_buffer("stored", layer.weight.data, persistent=False)
            layer.register_buffer("scales", scales, persistent=False)
            layer.forward = types.MethodType(_forward, layer)


@contextlib.contextmanager
def without_outliers(model: Any) -> Iterator[None]:
    """Have every column of x computed in int8: a row's product then depends on no other row of its batch."""
    import bitsandbytes as bnb

    states = [layer.state for layer in model.modules() if isinstance(layer, bnb.nn.Linear8bitLt)]
    before = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, before, strict=True):
            state.threshold = threshold


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    (x,) = cast(x)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return Product.apply(
        x, bias, layer.stored.view(torch.int8), layer.scales, layer.state.threshold
    )
