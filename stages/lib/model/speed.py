"""How fast a run will be, from what was measured elsewhere. No torch here.

A token's time is that of its products, at a share of the rate that the maker states; of everything else, which
waits for the GPU's memory and goes with what a layer keeps; and of the adapters' own kernels, which read and
write all that they adapt. The three figures are fitted to measured runs by `python -m bench.planning`, which
writes them and the runs to `measured.json`.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from stages.lib.model import plan
from stages.lib.model.architecture import Architecture, Setup
from stages.lib.model.plan import Choice
from stages.lib.run import cards
from stages.lib.run.cards import Card

MEASURED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Rows:
    """What is learned from: tokens of each of some rows, and the share of tokens that are learned."""

    lengths: Sequence[int]
    learned: float = 1.0
    MOST: ClassVar[int] = 100_000  # rows that say what all are like

    @classmethod
    def of(cls, lengths: Any, learned: Any) -> "Rows":
        """From tokens of each row, and learned tokens of each: arrays of int64, [rows]."""
        return cls(lengths[: cls.MOST].tolist(), float(learned.sum() / max(lengths.sum(), 1)))


@functools.cache
def measured() -> dict[str, Any]:
    """`rates`, `start_seconds`, `times` of two GPUs, and the measured `runs`."""
    return dict(json.loads(MEASURED.read_text(encoding="utf-8")))


def work(
    shape: Architecture, setup: Setup, card: Card, rows: Rows
) -> tuple[float, float, float] | None:
    """Seconds of a token: of products at the maker's rate, and of a pass over what layers and adapters keep.

    None where the maker states no rate for this precision.
    """
    fast, plain = card.rate(setup.precision), card.rate("bf16")
    if setup.precision == "fp32":
        plain = fast
    if not fast or not plain:
        return None
    lengths = rows.lengths
    tokens, adapter = sum(lengths), plan.adapter_parameters(shape, setup)
    learned = round(rows.learned * tokens)
    whole = plan.operations(shape, adapter, lengths, learned) / tokens
    frozen = 4 * shape.frozen
    kept = shape.layers * plan.layer_activations(shape, replace(setup, targets=()))
    adapted = setup.element * adapter / setup.rank
    bandwidth = card.bandwidth * 1e9
    return frozen / fast + (whole - frozen) / plain, kept / bandwidth, adapted / bandwidth


def tokens_per_second(
    shape: Architecture, setup: Setup, card: Card, rows: Rows, choice: Choice, batch_tokens: int,
    gpus: int = 1,
) -> float | None:  # fmt: skip
    """Of all GPUs together; None where nothing is known of this precision on such a card.

    Args:
        choice: how the work is cut. batch_tokens: of an optimizer step, shared by so many `gpus`.
    """
    parts = work(shape, setup, card, rows)
    if parts is None:
        return None
    rates = measured()["rates"]
    seconds = sum(
        n * rates[name] for n, name in zip(parts, ("products", "layers", "adapters"), strict=True)
    )
    return several(batch_tokens // choice.tokens, gpus) / (seconds * cost(shape, setup, choice))


def cost(shape: Architecture, setup: Setup, choice: Choice) -> float:
    """Time a token of such a pass, against one without limits; also of a cut that a checkpoint remembers."""
    if choice.offloaded:
        return plan.offloading(shape, setup, choice.tokens, choice.offloaded).cost
    return plan.cost(setup, choice.tokens, choice.recomputed / shape.layers)


def several(passes: int, gpus: int) -> float:
    """How many times as fast so many GPUs are as one, which share the passes of a step."""
    rounds = -(-max(passes, 1) // gpus)
    even = max(passes, 1) / rounds
    return even if gpus == 1 else even * float(measured()["times"]) / 2


def predicted(
    config: Mapping[str, Any], setup: Setup, name: str, rows: Rows, choice: Choice, batch_tokens: int,
    gpus: int,
) -> float | None:  # fmt: skip
    """As `tokens_per_second`, for the GPU of a driver's `name`; None where base or GPU is not planned for."""
    shape, card = Architecture.of(config), cards.known(name)
    if not shape or not card:
        return None
    found = tokens_per_second(shape, setup, card, rows, choice, batch_tokens, gpus)
    return found and round(found, 1)
