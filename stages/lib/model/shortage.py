"""When the GPU's memory is over: what was being done, what was asked for and free, and what to change first."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from stages.lib.model import memory
from stages.lib.model.loss import Plan, Rows
from stages.lib.model.quick import Quick
from stages.lib.run.exits import OutOfMemory

WITHOUT_TRAINING = (
    "what else is on this GPU", "BATCH_PROMPTS", "MAX_NEW_TOKENS", "the GPU, for a larger one",
)  # fmt: skip


@contextlib.contextmanager
def explained(doing: Callable[[], str], changes: Sequence[str]) -> Iterator[None]:
    """Say all that is known where the memory ends.

    Args:
        doing: what is done at that moment, in words. changes: what may help, the first one first.

    Raises:
        OutOfMemory: there.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # "CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has a total capacity of ... of which ... is free."
        told = ". ".join(str(error).split(". ")[1:3]).strip(". ") or str(error)
        first, *others = changes
        then = f", then {', '.join(others)}" if others else ""
        raise OutOfMemory(
            f"the GPU ran out of memory in {doing()} ({told}); change first {first}{then}"
        ) from error


def of_training(quick: Quick, plan: Plan, rows: Rows) -> str:
    """The shape of the work, in words."""
    layers = len(quick.layers) or quick.tuned.config.num_hidden_layers
    kept = f"{quick.offloaded} offloaded" if quick.offloaded else f"{quick.recomputed} recomputed"
    return (
        f"a pass of {plan.capacity} tokens, the longest row {int(rows.lengths.max())}, base in "
        f"{quick.precision}, of {layers} layers {kept}"
    )


def remedies(quick: Quick, plan: Plan, rows: Rows, optimizer: str) -> list[str]:
    """What to change, from what costs least."""
    longest, batch = int(rows.lengths.max()), plan.capacity * plan.bins_per_step
    smaller = [s for s in memory.sizes(batch, longest, None) if s < plan.capacity]
    layers = len(quick.layers) or 1
    found = [f"MICRO_BATCH_TOKENS={smaller[0]}"] if smaller else []
    if not quick.offloaded and quick.recomputed < layers:
        found.append("RECOMPUTE=all")
    if quick.precision != "nf4":
        found.append("BASE_PRECISION=nf4")
    if optimizer == "adamw_torch":
        found.append("OPTIMIZER=adamw_8bit")
    return [*found, "a smaller MAX_LENGTH", "a larger GPU"]
