"""Dropout as a pure function of a seed and a position: the same on every device, made anew and never stored.

A row and a column have a thorough hash each; an element's bits are a product of the two joined, which is cheap.
One element's bits serve two places: each takes 16 of them.
"""

import torch
from torch import nn

HALF = 16  # bits that decide for one place
SPREAD = 0x9E3779B1  # 2**32 over the golden ratio: its products with near numbers are far apart
ROWS = 0x5BF03635  # keeps the rows' hashes apart from the columns'
_FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)  # of "lowbias32" (Chris Wellons, 2018), as int32


def threshold(p: float) -> int:
    """An element is dropped if its 16 bits are below this."""
    return round(p * 2**HALF)


def bits(seed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Random bits, int32, the shape of `like` [..., columns]; its other sides are rows, one after the other.

    Args:
        seed: int32, any.
    """
    columns = like.shape[-1]
    at = torch.arange(max(columns, like.numel() // columns), dtype=torch.int32, device=like.device)
    column = mixed(at[:columns] ^ seed)
    row = mixed(at[: like.numel() // columns] ^ mixed(seed ^ ROWS))
    x = (row[:, None] ^ column) * (SPREAD - 2**32)
    return (x ^ _right(x, HALF)).view(like.shape)


def keep(seed: torch.Tensor, like: torch.Tensor, p: float, half: int = 0) -> torch.Tensor:
    """Which elements stay, bool, the shape of `like`; each is dropped with probability p.

    Args:
        seed: int32, any. half: 0 or 1; the halves of one seed are as good as two seeds.
    """
    found = bits(seed, like)
    found = _right(found, HALF) if half else found & (2**HALF - 1)
    return found >= threshold(p)


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
        place: number of this one; 2 n and 2 n + 1 share random bits.
    """

    def __init__(self, p: float, seed: torch.Tensor, place: int) -> None:
        super().__init__()
        self.p, self.half = p, place % 2
        mine = torch.tensor([offset(place // 2)], dtype=torch.int32, device=seed.device)
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
        return torch.where(keep(self.seeds(), x, self.p, self.half), x * (1 / (1 - self.p)), 0.0)
