"""Dropout as a pure function of a seed and a position: the same on every device, made anew and never stored."""

import torch
from torch import nn

_BITS = 24


def keep(seed: torch.Tensor, like: torch.Tensor, p: float) -> torch.Tensor:
    """Which elements stay, bool, the shape of `like`; each is dropped with probability p.

    Args:
        seed: int32, any. The element's number and the seed go through a mixing function of 32 bits
            ("lowbias32", Chris Wellons, 2018), whose last bits decide.
    """
    number = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    x = _stir(number ^ seed, 16, 0x7FEB352D)
    # Mixed in at the beginning alone, a seed would only number the elements of the one mask in another order.
    x = x ^ _stir(_stir(seed, 16, 0x7FEB352D), 15, 0x846CA68B - 2**32)
    x = _stir(x, 15, 0x846CA68B - 2**32)
    x = x ^ _right(x, 16)
    return (x & (2**_BITS - 1)) >= round(p * 2**_BITS)


def _stir(x: torch.Tensor, bits: int, factor: int) -> torch.Tensor:
    return (x ^ _right(x, bits)) * factor


def _right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift: torch's own keeps the sign."""
    return (x >> bits) & (2 ** (32 - bits) - 1)


class CountedDropout(nn.Module):
    """Dropout of one place in a model.

    Args:
        p: probability. seed: int32 scalar, shared by all places and changed for each bin.
        place: number of this one.
    """

    def __init__(self, p: float, seed: torch.Tensor, place: int) -> None:
        super().__init__()
        self.p = p
        offset = torch.tensor((place * 0x9E3779B1) % 2**31, dtype=torch.int32, device=seed.device)
        self.register_buffer("seed", seed, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [...], or in training x / (1 - p) where it stays and 0 where it does not."""
        if not self.training or not self.p:
            return x
        stays = keep(self.seed + self.offset, x, self.p)
        return torch.where(stays, x * (1 / (1 - self.p)), 0.0)
