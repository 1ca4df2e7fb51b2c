"""One optimizer step for the whole adapter: its many small tensors are parts of one. It waits for no GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes
import torch
from torch import nn

# What a step changes of an optimizer's state on the device; all of it begins at zero.
MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")


class Flat:
    """Parameters laid end to end in one, of which they become views.

    Args:
        parameters: of one type, on one device. longest: norm to which a longer gradient is cut.
        loss: the loss that the gradient is of, a scalar on the device.
        beside: numbers that lie behind the gradient in one tensor, so that one sum over processes serves both.
        summed: called when the gradient is there, and what lies beside it may be written.

    Attributes:
        parameter: [all elements], what an optimizer steps.
        buffer: [all elements + beside], the gradient and what lies `beside` it.
        norm: scalar, of the last gradient, before it was cut.
        sound: scalar, bool: all losses and gradients so far were finite.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        longest: float,
        loss: Callable[[], torch.Tensor] | None = None,
        beside: int = 0,
        summed: Callable[[], None] | None = None,
    ) -> None:
        self.summed = summed
        self.parts, self.longest, self.loss = list(parameters), longest, loss
        sizes = [part.numel() for part in self.parts]
        self.parameter = nn.Parameter(torch.cat([part.detach().flatten() for part in self.parts]))
        self.buffer = self.parameter.detach().new_zeros(self.parameter.numel() + beside)
        self.gradient, self.beside = self.buffer.split([self.parameter.numel(), beside])
        self.norm = self.gradient.new_zeros(())
        self.sound = torch.ones_like(self.norm, dtype=torch.bool)
        self._before: dict[str, torch.Tensor] | None = None
        for part, view in zip(self.parts, self.parameter.detach().split(sizes), strict=True):
            part.data = view.view_as(part)
        self._gradients = [
            view.view_as(part)
            for part, view in zip(self.parts, self.gradient.split(sizes), strict=True)
        ]

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer's steps take the parts' gradients, and none from the first that is not sound on.

        Whether it is, the host would have to wait to know. So every step is taken, and on the device what
        was there before is put back: neither a weight nor a moment ever holds anything of such a gradient.
        """
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    def gather(self) -> None:
        """Bring the parts' gradients together and cut them."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parts]
        torch._foreach_copy_(self._gradients, found)
        if self.summed:
            self.summed()
        self.parameter.grad = self.gradient
        self.norm = nn.utils.clip_grad_norm_(self.parameter, self.longest)

    def spread(self) -> None:
        """Bring back to the parts what `summed` made of their gradients, before it is cut."""
        for part, whole in zip(self.parts, self._gradients, strict=True):
            part.grad = whole.clone()

    def _begin(self, optimizer: Any, *_: Any) -> None:
        self.gather()
        loss = self.norm if self.loss is None else self.loss()
        self.sound = self.sound & torch.isfinite(self.norm) & torch.isfinite(loss)
        # A paged state belongs to the host, which waits for such a step anyway.
        if getattr(optimizer, "is_paged", False) and bool(self.sound):
            self._before = None
            return
        self._before = {name: t.clone() for name, t in self._changing(optimizer).items()}

    def _changing(self, optimizer: Any) -> dict[str, torch.Tensor]:
        state = optimizer.state.get(self.parameter, {})
        moments = {name: state[name] for name in MOMENTS if name in state}
        return moments | {"": self.parameter.detach()}

    @torch.no_grad()
    def _end(self, optimizer: Any, *_: Any) -> None:
        if self._before is None:
            return
        for name, tensor in self._changing(optimizer).items():
            before = self._before.get(name, 0)  # no moments: this was the first step
            tensor.copy_(torch.where(self.sound.to(tensor.device), tensor, before))
        self._before = None


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
