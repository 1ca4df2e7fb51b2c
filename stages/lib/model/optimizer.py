"""One optimizer step for the whole adapter: its many small tensors are parts of one.

bitsandbytes waits for the GPU after every tensor; the 448 of a 7B shape with all projections cost 28 ms a step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stages.lib.run.exits import Diverged


class Flat:
    """Parameters laid end to end in one, of which they become views.

    Args:
        parameters: of one type, on one device.

    Attributes:
        parameter: [all elements], what an optimizer steps.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parts = list(parameters)
        sizes = [part.numel() for part in self.parts]
        self.parameter = nn.Parameter(torch.cat([part.detach().flatten() for part in self.parts]))
        self.gradient = torch.zeros_like(self.parameter)
        for part, view in zip(self.parts, self.parameter.detach().split(sizes), strict=True):
            part.data = view.view_as(part)
        self._gradients = [
            view.view_as(part)
            for part, view in zip(self.parts, self.gradient.split(sizes), strict=True)
        ]

    def gather(self, *_: Any) -> None:
        """Bring the parts' gradients together, before the step that takes them.

        Raises:
            Diverged: one is not finite; nothing has been changed by it.
        """
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parts]
        torch._foreach_copy_(self._gradients, found)
        if not bool(torch.isfinite(self.gradient.norm())):
            raise Diverged(
                "a gradient is not finite; lower LEARNING_RATE (the checkpoint before it is kept)"
            )
        self.parameter.grad = self.gradient
