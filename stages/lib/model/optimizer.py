"""One optimizer step for the whole adapter: its many small tensors are parts of one. It waits for no GPU."""

from collections.abc import Sequence
from typing import Any

import bitsandbytes
import torch
from torch import nn


class Flat:
    """Parameters laid end to end in one, of which they become views.

    Args:
        parameters: of one type, on one device. longest: norm to which a longer gradient is cut.

    Attributes:
        parameter: [all elements], what an optimizer steps.
        norm: scalar, of the last gradient, before it was cut.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], longest: float) -> None:
        self.parts, self.longest = list(parameters), longest
        sizes = [part.numel() for part in self.parts]
        self.parameter = nn.Parameter(torch.cat([part.detach().flatten() for part in self.parts]))
        self.gradient = torch.zeros_like(self.parameter)
        self.norm = self.gradient.new_zeros(())
        for part, view in zip(self.parts, self.parameter.detach().split(sizes), strict=True):
            part.data = view.view_as(part)
        self._gradients = [
            view.view_as(part)
            for part, view in zip(self.parts, self.gradient.split(sizes), strict=True)
        ]

    def gather(self, *_: Any) -> None:
        """Bring the parts' gradients together and cut them, before the step that takes them.

        Whether they are finite is not asked here: to know it, the host would have to wait.
        """
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parts]
        torch._foreach_copy_(self._gradients, found)
        self.parameter.grad = self.gradient
        self.norm = nn.utils.clip_grad_norm_(self.parameter, self.longest)


class AdamW(bitsandbytes.optim.AdamW):
    """That of bitsandbytes, without its wait for the GPU after every tensor."""

    initialized: bool

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; a paged state, which the host may read, is waited for."""
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if not self.state[parameter]:
                    self.init_state(group, parameter, number, place)
                self.prefetch_state(parameter)
                self.update_step(group, parameter, number, place)
        if self.is_paged and torch.cuda.is_available():
            torch.cuda.synchronize()


def unhurried(kind: Any) -> Any:
    """The optimizer class to take for this one."""
    return AdamW if kind is bitsandbytes.optim.AdamW else kind
