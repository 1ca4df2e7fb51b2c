"""The loss from hidden states, chunk by chunk over learned tokens: full logits never exist."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 2048  # tokens; their logits are the largest tensors here
Piece = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def piece(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood in nats, fp32 scalar, and its gradient in the logits' type.

    Args:
        logits: [N, vocabulary]. targets: [N].
    """
    exact = logits.float()
    normaliser = exact.logsumexp(-1, keepdim=True)
    nll = (normaliser[:, 0] - exact.gather(1, targets[:, None])[:, 0]).sum()
    words = torch.arange(logits.shape[1], device=logits.device)
    gradient = (exact - normaliser).exp() - (words == targets[:, None]).float()
    return nll, gradient.to(logits.dtype)


def judge(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each target its negative log-likelihood in nats, fp32 [N]; whether it is the first choice, bool [N].

    Args:
        logits: [N, vocabulary]. targets: [N].
    """
    exact = logits.float()
    nll = exact.logsumexp(-1) - exact.gather(1, targets[:, None])[:, 0]
    return nll, exact.argmax(-1) == targets


class NllSum(torch.autograd.Function):
    """Summed negative log-likelihood of targets under a frozen head, its gradient found on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None,
        targets: torch.Tensor, piece: Piece,
    ) -> torch.Tensor:  # fmt: skip
        """fp32 scalar, in nats.

        Args:
            hidden: [N, width]. head: [vocabulary, width]. bias: [vocabulary]. targets: [N]. piece: `piece`,
                perhaps compiled.
        """
        total = torch.zeros((), device=hidden.device)
        hidden = hidden.to(head.dtype)  # a LayerNorm under autocast hands on fp32
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for first in range(0, len(hidden), CHUNK):
            part = slice(first, first + CHUNK)
            nll, of_logits = piece(F.linear(hidden[part], head, bias), targets[part])
            total += nll
            if gradient is not None:
                torch.mm(of_logits, head, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        """Of the hidden states."""
        gradient = ctx.saved_tensors[0]
        return gradient * upstream.to(gradient.dtype), None, None, None, None
