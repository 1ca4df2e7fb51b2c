"""Between the projections of attention and attention: adapters are added and heads are rotated, and back."""

from typing import NamedTuple

import torch

from stages.lib.model import fp8, low_rank


class Heads(NamedTuple):
    """Of a layer: of queries, of keys and as many of values, and the width of each."""

    queries: int
    keys: int
    width: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        return self.queries * self.width, self.keys * self.width, self.keys * self.width


def _half(x: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def _half_back(x: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((right, -left), -1)


def turn(
    y: torch.Tensor, lows: torch.Tensor, ups: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    heads: Heads, places: tuple[int, int, int],
) -> torch.Tensor:  # fmt: skip
    """q, k and v of the base with their adapters; q and k rotated, as Su et al. 2021 in Llama's layout.

    Args:
        y: [T, q + k + v]. lows: of the adapters, [T, count * rank]. cos, sin: [T, width].
        ups: the adapters' second factors under each other, [q + k + v, rank], zeros where there is none.
        places: of q's, k's and v's adapter among `lows`, or -1.

    Returns:
        As y.
    """
    if low_rank.fits(y, ups.shape[1]):
        from stages.lib.model.kernels import rotary

        return rotary.turn(y, lows, ups, cos, sin, heads, ups.shape[1], places)
    rank, found = ups.shape[1], []
    pieces = zip(y.split(heads.sizes, 1), ups.split(heads.sizes), places, strict=True)
    for number, (part, up, place) in enumerate(pieces):
        if place >= 0:
            part = part + lows[:, place * rank : (place + 1) * rank] @ up.t()
        part = part.unflatten(1, (-1, heads.width))
        if number < 2:
            part = part * cos[:, None] + _half(part) * sin[:, None]
        found.append(part.flatten(1))
    return torch.cat(found, 1).to(y.dtype)


def turn_back(
    of_q: torch.Tensor, of_k: torch.Tensor, of_v: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, kept: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradient before the rotation: as it is, and quantised.

    Args:
        of_q, of_k, of_v: [T, heads, width]. cos, sin: [T, width].
        kept: which of q, k and v are wanted as they are.

    Returns:
        [T, q + k + v], of which only those are to be read; e4m3 [T, q + k + v] and its scales, fp32 [T, 1].
    """
    if of_q.is_cuda and of_q.dtype == torch.bfloat16:
        from stages.lib.model.kernels import rotary

        return rotary.turn_back(of_q, of_k, of_v, cos, sin, kept)
    turned = [g * cos[:, None] + _half_back(g * sin[:, None]) for g in (of_q, of_k)]
    plain = torch.cat([g.flatten(1).to(of_q.dtype) for g in (*turned, of_v)], 1)
    return plain, *fp8.quantise(plain)
