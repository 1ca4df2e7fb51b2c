"""How fast an attempt's steps were, without its evaluations and checkpoints."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

from torch import nn

from stages.lib.model import plan
from stages.lib.model.architecture import Architecture
from stages.lib.model.pending import Moment

WARM_STEPS = 2  # of an attempt, in which the compiler and the allocator are still at work


class Pace:
    """Steps between moments that the GPU has passed: it does not matter how far ahead of it the host is.

    All but the first two count, or all, where there are no more.
    """

    def __init__(self) -> None:
        self.begin()
        self.durations: list[float] = []
        self.tokens, self.operations, self.seconds = 0, 0, 0.0

    def begin(self) -> None:
        """The next step begins now: what the host did since the last one does not count."""
        self._since = Moment()

    def add(self, tokens: int, operations: int, ended: Moment) -> None:
        """A step of so many tokens and floating-point operations."""
        if len(self.durations) == WARM_STEPS:
            self.tokens, self.operations, self.seconds = 0, 0, 0.0
        self.durations.append(ended.since(self._since))
        self._since = ended
        self.tokens += tokens
        self.operations += operations
        self.seconds += self.durations[-1]

    @property
    def warm(self) -> bool:
        """Whether the steps that count are such as those to come."""
        return len(self.durations) > WARM_STEPS

    @property
    def mean_step_seconds(self) -> float:
        """Of the steps that count."""
        counted = len(self.durations) - (WARM_STEPS if self.warm else 0)
        return self.seconds / max(counted, 1)

    @property
    def tokens_per_second(self) -> float:
        """Of the steps that count."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def flops_per_second(self) -> float | None:
        """Of the steps that count, where their operations are known."""
        return self.operations / max(self.seconds, 1e-9) if self.operations else None

    def metrics(self) -> dict[str, float | None]:
        """What the manifest says of it."""
        rate = self.flops_per_second
        counted = self.durations[WARM_STEPS:] or self.durations
        return {
            "tokens_per_second": round(self.tokens_per_second, 1),
            "step_seconds": round(statistics.median(counted), 4),
            "train_seconds": round(sum(self.durations), 3),
            "model_flops_per_second": round(rate) if rate else None,
        }


def counter(tuned: Any) -> Callable[[list[int], int], int]:
    """What counts the operations of rows of these lengths and so many learned tokens on this model.

    Always 0 where the model is made of other products than the plan says.
    """
    shape = Architecture.of(tuned.config.to_dict())
    head = tuned.get_base_model().get_output_embeddings()
    frozen = sum(
        module.in_features * module.out_features
        for name, module in tuned.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name and module is not head
    )
    if not shape or shape.frozen != frozen:
        return lambda lengths, learned: 0
    adapter = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    return functools.partial(plan.operations, shape, adapter)
