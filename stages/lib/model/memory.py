"""Which bin fits: probed once, before the first step, and recorded."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stages.lib.model import load
from stages.lib.model.loss import Shape, lay_out, nll_sum, to
from stages.lib.model.quick import Quick
from stages.lib.run.exits import OutOfMemory
from stages.lib.run.progress import say

CPU_BIN = 1024  # larger bins gain nothing there, and a signal waits for the end of one
GPU_BIN = 16384


def candidates(
    batch_tokens: int, longest: int, wanted: int | None, recompute: str
) -> list[tuple[int, bool]]:
    """(bin, recompute) from the fastest to the smallest.

    Args:
        batch_tokens: tokens of an optimizer step; a bin divides it. longest: tokens of the longest row.
        wanted: the bin, if it was set; see `check_sizes` of the bins. recompute: `auto`, `none` or `all`.
    """
    most = GPU_BIN if torch.cuda.is_available() else CPU_BIN
    divisors = [d for d in range(batch_tokens, longest - 1, -1) if batch_tokens % d == 0]
    sizes: list[int] = []
    for divisor in [wanted] if wanted else [d for d in divisors if d <= most] or divisors[-1:]:
        if not sizes or divisor <= sizes[-1] / 2:  # a probe each, so not every divisor
            sizes.append(divisor)
    # Recomputing costs a third of the speed, a bin of 4k instead of 16k tokens hardly any.
    quick = [(size, False) for size in sizes if size >= min(sizes[0], 4096)]
    return {
        "none": [(size, False) for size in sizes],
        "all": [(size, True) for size in sizes],
        "auto": [*quick, *((size, True) for size in sizes)],
    }[recompute]


def unpacks(tuned: Any, precision: str) -> bool:
    """Whether an NF4 base is dequantised for good: where its bf16 form takes a quarter of what is free."""
    if precision != "nf4" or not torch.cuda.is_available():
        return False
    sizes = [p.numel() for p in tuned.parameters() if not p.requires_grad]
    return 4 * 2 * 2 * sum(sizes) < torch.cuda.mem_get_info()[0]


def fit(
    quick: Quick, lengths: npt.NDArray[np.int64], choices: list[tuple[int, bool]]
) -> tuple[int, bool]:
    """The first choice whose full bin passes forward and backward on this GPU; on the CPU the first.

    The model is left as that choice wants it. `lengths`: tokens of all rows that it will see, [rows].

    Raises:
        OutOfMemory: none does.
    """
    for size, again in choices:
        quick.arrange(again)
        if not torch.cuda.is_available() or _passes(quick, quick.shape(lengths, size), size):
            return size, again
        say(f"a bin of {size} tokens{' with recompute' if again else ''} does not fit this GPU")
    raise OutOfMemory(
        f"not even a bin of {size} tokens fits this GPU; choose BASE_PRECISION=nf4, RECOMPUTE=all, "
        "or a smaller MAX_LENGTH and MICRO_BATCH_TOKENS"
    )


def _passes(quick: Quick, shape: Shape | None, size: int) -> bool:
    """Whether a full bin fits, beside gradients that are held and the optimizer's state.

    Of at least two rows, because they need a mask that one row does not; twice, as in an accumulation.
    """
    tuned = quick.tuned
    length = min(shape.longest if shape else size, -(-size // 2))
    ids = np.arange(size, dtype=np.int64) % tuned.config.vocab_size
    parts = np.split(ids, range(length, size, length))
    batch = to(lay_out([(part, np.ones(len(part), bool)) for part in parts], shape), load.device())
    tuned.train()
    loss = state = None
    try:
        trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        state = torch.empty(2 * trained, dtype=torch.float32, device=load.device())
        for _ in range(2):
            with load.compute(quick.precision):
                loss = nll_sum(tuned, batch)
            loss.backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        tuned.zero_grad(set_to_none=True)
        del loss, state
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
