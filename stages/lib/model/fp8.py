"""8-bit floating point for frozen weights: e4m3, one scale a row, in the forward and in the backward product.

A product in FP8 is about twice as fast as in bf16. Weights are rounded once, activations and gradients at every
product, row by row; sums are in fp32. What is learned is never rounded: the adapter has its own branch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from stages.lib.model.casting import cast
from stages.lib.run import gpu

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LEAST = 1e-12  # of a row's largest value, so that a row of zeros stays zeros
ALIGNMENT = 16  # of both sides of a weight: the GPU's product asks for it
CAPABILITY = gpu.FP8


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, K] as e4m3 [M, K] and scales fp32 [M, 1]: rows = e4m3 * scales, but for the rounding."""
    scales = rows.abs().amax(-1, keepdim=True).float().clamp(min=LEAST) / LARGEST
    return _cast(rows.float() * scales.reciprocal()), scales


def powers(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantise`, with scales that are powers of two; e4m3 keeps its three bits at any of them."""
    largest = rows.abs().amax(-1, keepdim=True).float().clamp(min=LEAST)
    scales = torch.exp2(torch.ceil(torch.log2(largest / LARGEST)))
    return _cast(rows.float() / scales), scales


def quantise_together(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise` of matrices [M, size] side by side, without a copy of them side by side."""
    largest = parts[0].abs().amax(-1, keepdim=True)
    for more in parts[1:]:
        largest = torch.maximum(largest, more.abs().amax(-1, keepdim=True))
    scales = largest.float().clamp(min=LEAST) / LARGEST
    inverse = scales.reciprocal()
    return torch.cat([_cast(part.float() * inverse) for part in parts], -1), scales


def _cast(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-LARGEST, LARGEST).to(E4M3)


def product(
    left: torch.Tensor, left_scales: torch.Tensor, right: torch.Tensor, right_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """left @ right.T of two matrices in e4m3.

    Args:
        left: [M, K]. left_scales: fp32 [M, 1]. right: [N, K]. right_scales: fp32 [N, 1]. dtype: of the result.

    Returns:
        [M, N]. The CPU has no FP8 products: there it is the fp32 product of the same numbers.
    """
    if left.is_cuda and dtype == torch.bfloat16:
        return torch._scaled_mm(
            left, right.t(), left_scales, right_scales.t(), out_dtype=dtype, use_fast_accum=True
        )
    return ((left.float() @ right.float().t()) * left_scales * right_scales.t()).to(dtype)


class Weight(NamedTuple):
    """A frozen weight, or several that read one input, one under the other; laid out for both directions.

    Its scales are powers of two, so that the layout of the way back is the same numbers with other exponents:
    no scale of an output has to go into a gradient before that is rounded.

    Attributes:
        rows: e4m3 [N, K]. scales: of the rows, fp32 [N, 1].
        columns: e4m3 [K, N]. column_scales: of its rows, fp32 [K, 1].
    """

    rows: torch.Tensor
    scales: torch.Tensor
    columns: torch.Tensor
    column_scales: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, scales: torch.Tensor) -> "Weight":
        """From one layout."""
        exact = (rows.float() * scales).t().contiguous()
        return cls(rows, scales, *powers(exact))

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """x @ W.T [M, N] for x [M, K]."""
        return product(*quantise(x), self.rows, self.scales, x.dtype)

    def back(self, rows: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """g @ W [M, K] for a gradient g in e4m3 [M, N] with its scales [M, 1]."""
        return product(rows, scales, self.columns, self.column_scales, dtype)


class Product(torch.autograd.Function):
    """x @ W.T for one weight, or for several that read the same x, one under the other."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor,
        column_scales: torch.Tensor, sizes: tuple[int, ...],
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """[M, size] for each weight.

        Args:
            x: [M, K]. rows, scales, columns, column_scales: a `Weight`. sizes: rows of each, N together.
        """
        ctx.save_for_backward(rows, scales, columns, column_scales)
        ctx.dtype = x.dtype
        return Weight(rows, scales, columns, column_scales).times(x).split(sizes, -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """The gradient of x."""
        weight = Weight(*ctx.saved_tensors)
        of_x = weight.back(*quantise_together(grads), ctx.dtype)
        return of_x, None, None, None, None, None


class Fp8Linear(nn.Linear):
    """A frozen projection in e4m3; peft takes it for the linear layer that it is.

    Args:
        source: the projection, in bf16 or fp32; its memory is free once nobody else holds it.
    """

    compute_dtype = torch.bfloat16  # what peft makes an adapter in, instead of the weight's e4m3

    def __init__(self, source: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        weight, scales = powers(source.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scales", scales)
        self.bias = source.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] times the weight."""
        flat = cast(x.reshape(-1, x.shape[-1]))[0]
        if x.requires_grad:
            weight = Weight.of(self.weight, self.scales)
            y = Product.apply(flat, *weight, (self.out_features,))[0]
        else:
            y = product(*quantise(flat), self.weight, self.scales, flat.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def projections(model: Any) -> list[str]:
    """The names of a model's linear layers that can be in e4m3: all but its head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and fits(module)
    ]


def fits(module: nn.Linear) -> bool:
    """Whether a linear layer's sides are such as the GPU's product takes."""
    return not (module.in_features % ALIGNMENT or module.out_features % ALIGNMENT)


def convert(model: Any) -> None:
    """Replace every projection of a model, but its head, one after the other."""
    for name in projections(model):
        parent, _, own = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, own, Fp8Linear(getattr(holder, own)))
