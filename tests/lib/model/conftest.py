"""A tiny model and rows in memory, for tests of the arithmetic."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.lib.model.loss import Row


class MemoryRows:
    """Rows held in memory, as the trainer takes them."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.lengths = np.array([len(ids) for ids, _ in rows])
        self.trained = np.array([int(mask[1:].sum()) for _, mask in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Row:
        return self.rows[row]

    def place(self, row: int) -> dict[str, Any]:
        return {"row": row}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and wait for them where cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def some_rows() -> Callable[..., MemoryRows]:
    """Rows of given lengths, their first third not learned."""

    def make(*lengths: int) -> MemoryRows:
        generator = np.random.default_rng(0)
        return MemoryRows(
            [(generator.integers(3, 49000, n), np.arange(n) >= max(n // 3, 1)) for n in lengths]
        )

    return make


@pytest.fixture
def attach(tiny: Path) -> Callable[..., Any]:
    """The tiny model with a fresh adapter."""
    from stages.lib.model import adapter, load
    from stages.lib.model.base import Base

    def make(precision: str = "fp32", dropout: float = 0.0, rank: int = 4) -> Any:
        base = Base(str(tiny), None)
        base.fetch()
        model = load.load(base, precision)
        return adapter.attach(model, base, rank, 8, dropout, ("q_proj", "v_proj"), seed=0)

    return make
