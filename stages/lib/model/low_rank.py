"""The first factors of adapters that read one input, with their dropout: no dropped copy of the input is kept.

`Drop` says how the adapters of a call drop. All functions take matrices; a scale goes into what they compute.
"""

from dataclasses import dataclass
from typing import Any

import torch

from stages.lib.model import dropout

MOST = 64  # rank up to which the kernels' tiles fit on a chip


@dataclass(frozen=True)
class Drop:
    """How many adapters read an input, and with which probability each drops an element of it."""

    count: int
    p: float

    @property
    def grown(self) -> float:
        """By which what stays is multiplied."""
        return 1 / (1 - self.p)


def _kept(like: torch.Tensor, seeds: torch.Tensor, drop: Drop, i: int) -> torch.Tensor:
    return dropout.keep(seeds[i : i + 1], like, drop.p)


def fits(x: torch.Tensor, rank: int, p: float = 0.0) -> bool:
    """Whether there are kernels for adapters of this rank and dropout on x."""
    return x.is_cuda and x.dtype == torch.bfloat16 and rank <= MOST and p <= dropout.MOST


def down(
    x: torch.Tensor, factors: torch.Tensor, seeds: torch.Tensor, drop: Drop, scale: float
) -> torch.Tensor:
    """dropout(x) @ factor.T * scale of every adapter.

    Args:
        x: [M, K]. factors: one under the other, [count * rank, K]. seeds: int32 [count].

    Returns:
        [M, count * rank].
    """
    scale *= drop.grown
    if fits(x, len(factors) // drop.count, drop.p):
        from stages.lib.model.kernels import low_rank

        return low_rank.down(x, factors, seeds, drop.count, dropout.threshold(drop.p), scale)
    found = []
    for i, factor in enumerate(factors.chunk(drop.count)):
        dropped = torch.where(_kept(x, seeds, drop, i), x, 0.0) if drop.p else x
        found.append(dropped @ factor.t() * scale)
    return torch.cat(found, 1)


def of_factors(
    lows: torch.Tensor, x: torch.Tensor, seeds: torch.Tensor, drop: Drop, scale: float
) -> torch.Tensor:
    """The gradient of the factors, fp32 [count * rank, K], from that of `down`'s result, [M, count * rank]."""
    scale *= drop.grown
    if fits(x, lows.shape[1] // drop.count, drop.p):
        from stages.lib.model.kernels import low_rank

        return low_rank.of_factors(lows, x, seeds, drop.count, dropout.threshold(drop.p), scale)
    found = []
    for i, low in enumerate(lows.chunk(drop.count, 1)):
        dropped = torch.where(_kept(x, seeds, drop, i), x, 0.0) if drop.p else x
        found.append((low.t() @ dropped) * scale)
    return torch.cat(found)


def of_input(
    lows: torch.Tensor, factors: torch.Tensor, seeds: torch.Tensor, base: torch.Tensor | None,
    drop: Drop, scale: float,
) -> torch.Tensor:  # fmt: skip
    """The gradient of x [M, K] from that of `down`'s result [M, count * rank], added to `base` if given."""
    scale *= drop.grown
    if fits(lows, len(factors) // drop.count, drop.p):
        from stages.lib.model.kernels import low_rank

        return low_rank.of_input(
            lows, factors, seeds, base, drop.count, dropout.threshold(drop.p), scale
        )
    pairs = zip(lows.chunk(drop.count, 1), factors.chunk(drop.count), strict=True)
    for i, (low, factor) in enumerate(pairs):
        more = low @ factor * scale
        more = torch.where(_kept(more, seeds, drop, i), more, 0.0) if drop.p else more
        base = more if base is None else base + more
    assert base is not None
    return base


def of_up(
    gradient: torch.Tensor, lows: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of lows [M, rank] and of the second factor [N, rank], from their product's, [M, N]."""
    if fits(gradient, lows.shape[1]):
        from stages.lib.model.kernels import second_factors

        return second_factors.of_up(gradient, lows, factor)
    return gradient @ factor, gradient.t() @ lows


class Down(torch.autograd.Function):
    """`down`, for one adapter or for several with one input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        factors: torch.Tensor,
        seeds: torch.Tensor,
        p: float,
        scale: float,
    ) -> torch.Tensor:
        """[M, count * rank]; `factors` may be fp32."""
        near = factors.to(x.dtype)
        ctx.save_for_backward(x, near, seeds)
        ctx.drop, ctx.scale = Drop(len(seeds), p), scale
        return down(x, near, seeds, ctx.drop, scale)

    @staticmethod
    def backward(ctx: Any, lows: torch.Tensor) -> Any:
        """Of x and the factors."""
        x, near, seeds = ctx.saved_tensors
        of_near = of_factors(lows.contiguous(), x, seeds, ctx.drop, ctx.scale)
        of_x = of_input(lows.contiguous(), near, seeds, None, ctx.drop, ctx.scale)
        return of_x, of_near, None, None, None
