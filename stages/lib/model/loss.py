"""From rows to a loss: rows laid end to end in one bin, each blind to the others."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from stages.lib.model import cutting, load
from stages.lib.run import preemption, watchdog

QUICK_INPUTS = (
    "input_ids", "position_ids", "kept", "targets", "bounds", "longest", "uniform",
)  # fmt: skip
Row = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]


class Rows(Protocol):
    """Prepared rows: their lengths and learned tokens, int64 [rows], and each one's ids, mask and origin."""

    lengths: npt.NDArray[np.int64]
    trained: npt.NDArray[np.int64]

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Row: ...
    def place(self, row: int) -> dict[str, Any]: ...


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


@dataclass(frozen=True)
class Shape:
    """What is the same for all bins of a run, so that what was compiled for one fits all.

    Args:
        longest: tokens of the longest row. uniform: all rows have that length, and a bin is a multiple of it.
        tokens: of a bin: rows that nobody learns from fill it up; None leaves it as it is.
    """

    longest: int
    uniform: bool = False
    tokens: int | None = None

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64], tokens: int) -> "Shape":
        """Of rows with these lengths [rows] in bins of so many tokens."""
        longest = int(lengths.max())
        return cls(longest, bool((lengths == longest).all()) and tokens % longest == 0, tokens)


def lay_out(rows: Sequence[Row], shape: Shape | None = None) -> dict[str, Any]:
    """A bin as the model takes it.

    Args:
        rows: token ids [tokens] and trained mask [tokens] of each row. shape: for a quick model.

    Returns:
        `input_ids` [1, T]; `position_ids` [1, T], beginning anew with each row, by which attention keeps the
        rows apart; `kept` [N], the positions whose next token is learned; `targets` [N], those tokens. With
        a shape also `bounds`, int32 [rows + 1], where rows begin, and T at the end, and its `longest` and
        `uniform`.
    """
    rows = list(rows)
    if shape and shape.tokens:
        free = shape.tokens - sum(len(ids) for ids, _ in rows)
        while free > 0:
            length = min(free, shape.longest)
            rows.append((np.zeros(length, np.int64), np.zeros(length, bool)))
            free -= length
    bounds = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    ids = np.concatenate([ids for ids, _ in rows])
    trained = np.concatenate([mask for _, mask in rows])
    positions = np.arange(len(ids)) - np.repeat(bounds[:-1], np.diff(bounds))
    learned = np.flatnonzero(trained & (positions > 0))  # a row's first token follows nothing
    batch = {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "kept": torch.from_numpy(learned - 1),
        "targets": torch.from_numpy(ids[learned]),
    }
    if shape:
        batch["bounds"] = torch.from_numpy(bounds.astype(np.int32))
        return batch | {"longest": shape.longest, "uniform": shape.uniform}
    return batch


def unlearned(row: Row) -> Row:
    """The same tokens, of which none is learned."""
    return row[0], np.zeros(len(row[0]), bool)


def nll_sum(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Summed negative log-likelihood of a bin's targets, in nats, fp32; logits exist for them at most."""
    if "bounds" in batch:  # laid out for a quick model, whose forward pass ends in the loss
        return torch.as_tensor(model(**{name: batch[name] for name in QUICK_INPUTS}))
    logits = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        logits_to_keep=batch["kept"],
        use_cache=False,
    ).logits[0]
    return F.cross_entropy(logits.float(), batch["targets"], reduction="sum")


def pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch in memory that a GPU reads without the host waiting for it; as it is, without a GPU."""
    if not torch.cuda.is_available():
        return batch
    return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def to(batch: dict[str, Any], place: torch.device) -> dict[str, Any]:
    """A batch on a device, in the order of the work there."""
    return {
        k: v.to(place, non_blocking=True) if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
    }


@torch.no_grad()
def mean_nll(
    model: Any,
    precision: str,
    bins: Iterable[Sequence[Row]],
    after_bin: Callable[[int], None] = lambda tokens: None,
    shape: Shape | None = None,
    whole: Callable[[float, float], tuple[float, float]] = lambda total, count: (total, count),
    check: Callable[[], object] = preemption.check,
    every: bool = False,
) -> float:
    """Mean negative log-likelihood of a learned token over bins of rows, in nats; only sums are kept.

    `after_bin` is told how many tokens each bin had; `shape` is for a quick model; `whole` makes the sums of
    all processes from those of this one. `check` is called before each bin, and may stop all; `every` bin is
    computed, also one with nothing learned.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    place = load.device()
    for rows in bins:
        check()
        watchdog.alive()
        batch = to(lay_out(rows, shape), place)
        if every or len(batch["targets"]):
            with load.compute(precision):
                total += nll_sum(model, batch).double().cpu()
            count += len(batch["targets"])
        after_bin(batch["input_ids"].numel())
    model.train(was_training)
    found, learned = whole(float(total), count)
    return found / max(learned, 1)


def evaluation_bins(plan: Plan, lengths: npt.NDArray[np.int64]) -> list[list[int]]:
    """The held-out rows that an evaluation of a run looks at, in bins; `lengths`: tokens of each, [rows]."""
    limit = cutting.evaluated(plan.total_bins * plan.capacity)
    return held_out_bins(lengths, plan.capacity, limit)


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
