"""Parts of a Llama-like layer as one function each: frozen FP8 weights and the adapters on them.

Each keeps the least for its way back. An adapter that is not there is None, and so are its factors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from stages.lib.model import fp8, low_rank, rotary, swiglu
from stages.lib.model.low_rank import Drop

Factor: TypeAlias = torch.Tensor | None


def _near(like: torch.Tensor, *factors: Factor) -> list[Factor]:
    return [None if factor is None else factor.to(like.dtype) for factor in factors]


def _up(y: torch.Tensor, lows: torch.Tensor, factors: list[Factor]) -> torch.Tensor:
    """y [M, N] with what the adapters' second factors [size, rank] add to its columns, side by side."""
    count = sum(factor is not None for factor in factors)
    if low_rank.fits(y, lows.shape[1] // count):
        from stages.lib.model.kernels import second_factors

        return second_factors.up(y, lows, factors)
    low = iter(lows.chunk(count, 1))
    parts = zip(y.chunk(len(factors), 1), factors, strict=True)
    return torch.cat([p if f is None else p + next(low) @ f.t() for p, f in parts], 1)


class _Branches(NamedTuple):
    """What adapters of one input had on the way there, and need on the way back."""

    x: torch.Tensor
    seeds: torch.Tensor
    lows: torch.Tensor
    down: torch.Tensor
    ups: list[Factor]
    drop: Drop
    scale: float

    def back(
        self, gradients: Sequence[torch.Tensor], of_x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[Factor]]:
        """Gradients of x, added to `of_x`, of the first and of the second factors, from outputs' [M, size]."""
        of_lows: list[torch.Tensor] = []
        of_ups: list[Factor] = []
        low = iter(self.lows.chunk(self.drop.count, 1))
        for gradient, up in zip(gradients, self.ups, strict=True):
            of_ups.append(None)
            if up is not None:
                of_low, of_ups[-1] = low_rank.of_up(gradient, next(low), up)
                of_lows.append(of_low)
        joined = torch.cat(of_lows, 1)
        of_down = low_rank.of_factors(joined, self.x, self.seeds, self.drop, self.scale)
        of_x = low_rank.of_input(joined, self.down, self.seeds, of_x, self.drop, self.scale)
        return of_x, of_down, of_ups


class Attention(torch.autograd.Function):
    """q, k and v of a layer with their adapters, q and k rotated."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor,
        column_scales: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seeds: torch.Tensor,
        down: Factor, up_q: Factor, up_k: Factor, up_v: Factor, heads: tuple[int, int, int],
        p: float, scale: float,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """[T, heads, width] each.

        Args:
            x: [T, K]. rows, scales, columns, column_scales: `fp8.Weight` of q, k and v.
            cos, sin: [T, width]. seeds: int32 [count]. down: first factors, [count * rank, K].
            up_q, up_k, up_v: second factors. heads: `rotary.Heads`. p: of dropout. scale: alpha / rank.
        """
        sizes = rotary.Heads(*heads)
        ups = _near(x, up_q, up_k, up_v)
        (near,) = _near(x, down)
        y = fp8.Weight(rows, scales, columns, column_scales).times(x)
        drop = Drop(sum(up is not None for up in ups), p)
        lows = every = x.new_zeros(sum(sizes.sizes), 1)  # nobody reads them
        places = (-1, -1, -1)
        if near is not None:
            lows = low_rank.down(x, near, seeds, drop, scale)
            rank = len(near) // drop.count
            every = torch.cat([
                x.new_zeros(size, rank) if up is None else up
                for up, size in zip(ups, sizes.sizes, strict=True)
            ])  # fmt: skip
            there = [i for i, up in enumerate(ups) if up is not None]
            of_q, of_k, of_v = (there.index(i) if i in there else -1 for i in range(3))
            places = (of_q, of_k, of_v)
        turned = rotary.turn(y, lows, every, cos, sin, sizes, places)
        ctx.save_for_backward(
            x, columns, column_scales, cos, sin, seeds, lows if drop.count else None, near, *ups
        )
        ctx.drop, ctx.scale = drop, scale
        return tuple(t.unflatten(1, (-1, sizes.width)) for t in turned.split(sizes.sizes, 1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Of x and of the adapters' factors."""
        x, columns, column_scales, cos, sin, seeds, lows, near, *ups = ctx.saved_tensors
        kept = (ups[0] is not None, ups[1] is not None, ups[2] is not None)
        of_q, of_k, of_v = gradients
        plain, rows, scales = rotary.turn_back(of_q, of_k, of_v, cos, sin, kept)
        of_x = fp8.product(rows, scales, columns, column_scales, x.dtype)
        of_down, of_ups = None, [None, None, None]
        if near is not None:
            parts = plain.split([g[0].numel() for g in gradients], 1)
            branches = _Branches(x, seeds, lows, near, ups, ctx.drop, ctx.scale)
            of_x, of_down, of_ups = branches.back(parts, of_x)
        return of_x, *[None] * 7, of_down, *of_ups, None, None, None


class Projection(torch.autograd.Function):
    """One projection with its adapter."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor,
        column_scales: torch.Tensor, seeds: torch.Tensor, down: torch.Tensor, up: torch.Tensor,
        p: float, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """[M, N] for x [M, K]; the rest as for `Attention`."""
        near, near_up = down.to(x.dtype), up.to(x.dtype)
        ctx.drop, ctx.scale = Drop(1, p), scale
        lows = low_rank.down(x, near, seeds, ctx.drop, scale)
        ctx.save_for_backward(x, columns, column_scales, seeds, lows, near, near_up)
        y = fp8.Weight(rows, scales, columns, column_scales).times(x)
        return y + lows @ near_up.t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Of x and of the adapter's factors."""
        x, columns, column_scales, seeds, lows, near, up = ctx.saved_tensors
        of_x = fp8.product(*fp8.quantise(gradient), columns, column_scales, x.dtype)
        branches = _Branches(x, seeds, lows, near, [up], ctx.drop, ctx.scale)
        of_x, of_down, (of_up,) = branches.back([gradient], of_x)
        return of_x, *[None] * 5, of_down, of_up, None, None


class Mlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), with adapters on any of the three."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor,
        column_scales: torch.Tensor, last_rows: torch.Tensor, last_scales: torch.Tensor,
        last_columns: torch.Tensor, last_column_scales: torch.Tensor, seeds: torch.Tensor,
        down: Factor, up_gate: Factor, up_up: Factor, last_seeds: torch.Tensor, last_down: Factor,
        last_up: Factor, p: float, scale: float, last_p: float, last_scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """[M, K] for x [M, K].

        Args:
            x: [M, K]. rows, scales, columns, column_scales: `fp8.Weight` of gate and up.
            last_rows, last_scales, last_columns, last_column_scales: of down.
            seeds: int32 [count], of gate's and up's dropout. down: their first factors, [count * rank, K].
            up_gate, up_up: second factors, [width, rank]. p: of dropout. scale: alpha / rank.
            last_seeds, last_down, last_up, last_p, last_scale: of down's adapter.
        """
        ups = _near(x, up_gate, up_up)
        near, last_near, last_near_up = _near(x, down, last_down, last_up)
        drop = Drop(sum(up is not None for up in ups), p)
        both = fp8.Weight(rows, scales, columns, column_scales).times(x)
        lows = last_lows = None
        if near is not None:
            lows = low_rank.down(x, near, seeds, drop, scale)
            both = _up(both, lows, ups)
        hidden, values, value_scales = swiglu.forward(both, last_near is not None)
        y = fp8.product(values, value_scales, last_rows, last_scales, x.dtype)
        if last_near is not None and last_near_up is not None:
            last_lows = low_rank.down(hidden, last_near, last_seeds, Drop(1, last_p), last_scale)
            y = y + last_lows @ last_near_up.t()
        ctx.save_for_backward(
            None if near is None else x, both, hidden, columns, column_scales, last_columns,
            last_column_scales, seeds, last_seeds, lows, near, last_lows, last_near, last_near_up, *ups,
        )  # fmt: skip
        ctx.drop, ctx.scale, ctx.last_drop, ctx.last_scale = (
            drop,
            scale,
            Drop(1, last_p),
            last_scale,
        )
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Of x and of the adapters' factors."""
        (
            x, both, hidden, columns, column_scales, last_columns, last_column_scales, seeds,
            last_seeds, lows, near, last_lows, last_near, last_near_up, *ups,
        ) = ctx.saved_tensors  # fmt: skip
        of_down, of_ups, of_last_down, of_last_up = None, [None, None], None, None
        dtype = gradient.dtype
        of_hidden = fp8.product(*fp8.quantise(gradient), last_columns, last_column_scales, dtype)
        if last_near is not None:
            last = _Branches(
                hidden, last_seeds, last_lows, last_near, [last_near_up], ctx.last_drop, ctx.last_scale
            )  # fmt: skip
            of_hidden, of_last_down, (of_last_up,) = last.back([gradient], of_hidden)
        plain, rows, scales = swiglu.backward(of_hidden, both, near is not None)
        of_x = fp8.product(rows, scales, columns, column_scales, dtype)
        if plain is not None:
            first = _Branches(x, seeds, lows, near, ups, ctx.drop, ctx.scale)
            of_x, of_down, of_ups = first.back(plain.chunk(2, 1), of_x)
        return (
            of_x, *[None] * 9, of_down, *of_ups, None, of_last_down, of_last_up, *[None] * 4,
        )  # fmt: skip
