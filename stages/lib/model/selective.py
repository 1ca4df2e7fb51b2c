"""A layer that keeps little for its backward pass and computes the rest again, all in one compiled graph.

Kept are the layer's input, attention's output with its normaliser, and perhaps q, k and v as attention took
them; the compiler then leaves out of the second computation whatever none of its gradients needs: attention,
the last projection, and q, k and v where they are kept.
"""

import functools
import logging
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from stages.lib.model.compiling import compiled

ATTENTION = ("attention", "attn", "attend")  # in the name of every operation that computes it


class Held(torch.autograd.Function):
    """The tensor itself, under an operation by which the policy knows it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """x: the compiler would drop a clone or a product with 1; this it fuses into what makes x."""
        return torch.maximum(x, x)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        """Of x."""
        return upstream


def _policy(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    """What becomes of an operation's result."""
    name = str(operation)
    held = name == "aten.maximum.default" and args[0] is args[1]
    if held or any(word in name for word in ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def step(plain: Any, backend: str) -> Any:
    """A layer's forward, compiled so; `plain` as it is."""
    # It warns of operations in place, which would be computed twice: no layer known here has one.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # FP8 projections remember their siblings' outputs until those are asked for, and then nothing.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    forward = functools.partial(_forward, plain)
    return compiled(forward, backend, fullgraph=True, dynamic=False)


def _forward(plain: Any, hidden: torch.Tensor, **options: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(plain, hidden, use_reentrant=False, context_fn=contexts, **options)
