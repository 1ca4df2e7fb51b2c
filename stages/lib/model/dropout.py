"""Dropout as a pure function of a seed and a position: the same on every device, made anew and never stored.

An element's bits are the upper ones of factor * column + summand, modulo 2**32 (multiply-shift hashing,
Dietzfelbinger 1996): one instruction. Factor and summand are thorough hashes of the row and the seed, so that
any two elements are independent, whatever the columns' hashes are; those are the same for all.
"""

import torch
from torch import nn

BITS = 15  # that decide for an element: those below the highest of its hash's upper half
OTHER = 0x5BF03635  # keeps apart what is hashed of a row, and rows from columns
MOST = 0.95  # probability up to which the kernels' comparison, of fp16 numbers, is one of integers
_FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)  # of "lowbias32" (Chris Wellons, 2018), as int32


def threshold(p: float) -> int:
    """An element is dropped if its bits are below this."""
    return round(p * 2**BITS)


def row_hashes(seeds: torch.Tensor, rows: int) -> torch.Tensor:
    """int32 [2, seeds, rows]: factors, which are odd, and summands, for `seeds`, int32 [seeds]."""
    at = torch.arange(rows, dtype=torch.int32, device=seeds.device)
    factors = mixed(at ^ mixed(seeds)[:, None])
    return torch.stack((factors | 1, mixed(factors ^ OTHER)))


def column_hashes(columns: int, place: torch.device) -> torch.Tensor:
    """int32 [columns]."""
    return mixed(torch.arange(columns, dtype=torch.int32, device=place) ^ OTHER)


def keep(seeds: torch.Tensor, like: torch.Tensor, p: float) -> torch.Tensor:
    """Which elements stay, bool, the shape of `like` [..., columns]; each is dropped with probability p.

    Args:
        seeds: int32 [1], any. like: its other sides are rows, one after the other.
    """
    columns = like.shape[-1]
    factors, summands = row_hashes(seeds, like.numel() // columns)[:, 0, :, None]
    found = factors * column_hashes(columns, like.device) + summands
    stays = _right(found, 16) & (2**BITS - 1) >= threshold(p)
    return stays.view(like.shape)


def _right(x: torch.Tensor, count: int) -> torch.Tensor:
    """A logical shift: torch's own keeps the sign."""
    return (x >> count) & (2 ** (32 - count) - 1)


def mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijection of int32 after which every bit depends on all bits: neighbours become strangers."""
    x = (x ^ _right(x, 16)) * _FACTORS[0]
    x = (x ^ _right(x, 15)) * _FACTORS[1]
    return x ^ _right(x, 16)


def offset(number: int) -> int:
    """What is added to a run's seed for its seed number so and so, int32."""
    x = (number * 0x9E3779B1 + 0x7F4A7C15) % 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return (x ^ (x >> 16)) - 2**31


class CountedDropout(nn.Module):
    """Dropout of one place in a model.

    Args:
        p: probability. seed: int32 scalar, shared by all places and changed for each bin.
        place: number of this one.
    """

    def __init__(self, p: float, seed: torch.Tensor, place: int) -> None:
        super().__init__()
        self.p = p
        mine = torch.tensor([offset(place)], dtype=torch.int32, device=seed.device)
        self.register_buffer("seed", seed, persistent=False)
        self.register_buffer("offset", mine, persistent=False)

    @property
    def active(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and self.p > 0

    def seeds(self) -> torch.Tensor:
        """Its seed now, int32 [1]."""
        return self.seed + self.offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [...], or in training x / (1 - p) where it stays and 0 where it does not."""
        if not self.active:
            return x
        return torch.where(keep(self.seeds(), x, self.p), x * (1 / (1 - self.p)), 0.0)
