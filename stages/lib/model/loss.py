"""From rows to a loss: rows laid end to end in one bin, each blind to the others."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from stages.lib.model import load
from stages.lib.run import preemption

Row = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]


class Rows(Protocol):
    """Prepared rows: their lengths and learned tokens, int64 [rows], and each one's ids and mask."""

    lengths: npt.NDArray[np.int64]
    trained: npt.NDArray[np.int64]

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Row: ...


class Plan(Protocol):
    """The bins of a run, in order; see `stages.lib.data.bins.Schedule`."""

    capacity: int
    bins_per_step: int
    bins_per_epoch: int
    total_bins: int

    @property
    def filled(self) -> float: ...
    @property
    def steps(self) -> int: ...
    def rows(self, number: int) -> Any: ...
    def step(self, number: int) -> range: ...


def lay_out(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """A bin as the model takes it; nothing is padded.

    Args:
        rows: token ids [tokens] and trained mask [tokens] of each row.

    Returns:
        `input_ids` [1, T]; `position_ids` [1, T], beginning anew with each row, by which attention keeps the
        rows apart; `kept` [N], the positions whose next token is learned; `targets` [N], those tokens.
    """
    lengths = [len(ids) for ids, _ in rows]
    ids = np.concatenate([ids for ids, _ in rows])
    trained = np.concatenate([mask for _, mask in rows])
    starts = np.cumsum([0, *lengths[:-1]])
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    learned = np.flatnonzero(trained & (positions > 0))  # a row's first token follows nothing
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "kept": torch.from_numpy(learned - 1),
        "targets": torch.from_numpy(ids[learned]),
    }


def nll_sum(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed negative log-likelihood of a bin's targets, in nats, fp32; logits exist for them alone."""
    logits = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        logits_to_keep=batch["kept"],
        use_cache=False,
    ).logits[0]
    return F.cross_entropy(logits.float(), batch["targets"], reduction="sum")


@torch.no_grad()
def mean_nll(
    model: Any,
    precision: str,
    bins: Iterable[Sequence[Row]],
    after_bin: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Mean negative log-likelihood of a learned token over bins of rows, in nats; only sums are kept.

    `after_bin` is told how many tokens each bin had.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    place = load.device()
    for rows in bins:
        preemption.check()
        batch = {name: tensor.to(place) for name, tensor in lay_out(rows).items()}
        if len(batch["targets"]):
            with load.compute(precision):
                total += nll_sum(model, batch).double().cpu()
            count += len(batch["targets"])
        after_bin(batch["input_ids"].numel())
    model.train(was_training)
    return float(total / max(count, 1))


def held_out_bins(
    lengths: npt.NDArray[np.int64], capacity: int, limit: int | None = None
) -> list[list[int]]:
    """Rows in order, laid into bins of `capacity` tokens.

    Args:
        lengths: tokens of each row, [rows]. limit: stop at so many tokens, though not before one row.
    """
    bins: list[list[int]] = []
    free, seen = 0, 0
    for row, length in enumerate(lengths.tolist()):
        if limit and bins and seen + length > limit:
            break
        if not bins or length > free:
            bins.append([])
            free = max(capacity, length)
        bins[-1].append(row)
        free, seen = free - length, seen + length
    return bins
