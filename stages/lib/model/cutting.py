"""How the work may be cut: sizes of a pass, precisions, evaluations. No torch here."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from stages.lib.model import plan
from stages.lib.model.architecture import Architecture, Setup

CPU_BIN = 1024  # larger bins gain nothing there, and a signal waits for the end of one
GPU_BIN = 16384
SHARE = 0.95  # of the GPU's memory that is planned for: the allocator needs some, and the plan may be off
# All evaluations together cost about a tenth of the training: a forward pass is a third of a step.
EVALUATIONS = 4
EVALUATION_SHARE, EVALUATION_LEAST, EVALUATION_MOST = 0.075, 4096, 32768


def sizes(
    batch_tokens: int, longest: int, wanted: int | None, sharing: int = 1, most: int = GPU_BIN
) -> list[int]:
    """Tokens of a forward pass that divide a step, from the largest; at most twice as far apart as need be.

    Args:
        batch_tokens: of an optimizer step. longest: of the longest row. wanted: the size, if it was set.
        sharing: the processes that share a step, each of which gets as many passes, if that can be.
        most: tokens that a pass may have, where fewer will do.
    """
    divisors = [d for d in range(batch_tokens // sharing, longest - 1, -1) if batch_tokens % d == 0]
    divisors = (
        [d for d in divisors if batch_tokens // d % sharing == 0] or divisors or [batch_tokens]
    )
    found: list[int] = []
    for divisor in [wanted] if wanted else [d for d in divisors if d <= most] or divisors[-1:]:
        if not found or divisor <= found[-1] / 2:
            found.append(divisor)
    return found


def possible(lacks: Callable[[str], Any]) -> list[str]:
    """The precisions among which `auto` chooses; `lacks`: why a GPU cannot compute in one, or nothing."""
    if lacks("bf16"):
        return ["fp32"]
    return ["bf16", "nf4"] if lacks("fp8") else ["fp8", "bf16", "nf4"]


def unpacked(
    shape: Architecture, setup: Setup, cuts: Sequence[int], room: int, recompute: str
) -> Setup:
    """With an NF4 base dequantised once, where the largest pass fits beside that and computes nothing twice."""
    if setup.precision != "nf4":
        return setup
    whole = replace(setup, unpacked=True)
    best = plan.choices(shape, whole, cuts, room, recompute)[:1]
    return whole if best and best[0].tokens == cuts[0] and not best[0].recomputed else setup


def evaluated(tokens: float) -> int:
    """Held-out tokens that each evaluation of a run over so many tokens reads at most."""
    return int(min(max(EVALUATION_SHARE * tokens, EVALUATION_LEAST), EVALUATION_MOST))
