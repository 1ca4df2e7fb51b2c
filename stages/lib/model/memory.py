"""Which cut of the work fits the GPU: planned, probed once before the first step, and recorded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stages.lib.model import compiling, fp8, host, load, plan
from stages.lib.model.architecture import Architecture, Setup
from stages.lib.model.loss import Shape, lay_out, nll_sum, to
from stages.lib.model.offload import Unpinned
from stages.lib.model.plan import Choice
from stages.lib.model.quick import Quick
from stages.lib.model.ranks import Ranks
from stages.lib.run import gpu
from stages.lib.run.exits import OutOfMemory
from stages.lib.run.progress import phase, say

Ints = npt.NDArray[np.int64]
CPU_BIN = 1024  # larger bins gain nothing there, and a signal waits for the end of one
GPU_BIN = 16384
SHARE = 0.95  # of the GPU's memory that is planned for: the allocator needs some, and the plan may be off


def room() -> int:
    """Bytes of GPU memory that this process has and can still have; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    return int(SHARE * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()))


def sizes(batch_tokens: int, longest: int, wanted: int | None, sharing: int = 1) -> list[int]:
    """Tokens of a forward pass that divide a step, from the largest; at most twice as far apart as need be.

    Args:
        batch_tokens: of an optimizer step. longest: of the longest row. wanted: the size, if it was set.
        sharing: the processes that share a step, each of which gets as many passes, if that can be.
    """
    most = GPU_BIN if torch.cuda.is_available() else CPU_BIN
    divisors = [d for d in range(batch_tokens // sharing, longest - 1, -1) if batch_tokens % d == 0]
    divisors = (
        [d for d in divisors if batch_tokens // d % sharing == 0] or divisors or [batch_tokens]
    )
    found: list[int] = []
    for divisor in [wanted] if wanted else [d for d in divisors if d <= most] or divisors[-1:]:
        if not found or divisor <= found[-1] / 2:
            found.append(divisor)
    return found


def precision(config: dict[str, Any], setup: Setup, cuts: Sequence[int], recompute: str) -> str:
    """What `auto` means on this machine, told to the user with its reason.

    Args:
        config: of the base, all keys filled in. cuts, recompute: see `prepare`.
    """
    if not torch.cuda.is_available():
        say("BASE_PRECISION is bf16: there is no GPU")
        return "bf16"
    name, memory = torch.cuda.get_device_name(), f"{room() / 2**30:.0f} GiB"
    if gpu.lacks("bf16", name, torch.cuda.get_device_capability()):
        say(f"BASE_PRECISION is fp32: {name} has no bf16")
        return "fp32"
    shape = Architecture.of(config)
    if not shape:
        say(f"BASE_PRECISION is nf4: {config.get('model_type')} is not planned for")
        return "nf4"
    possible = ["bf16", "nf4"]
    if torch.cuda.get_device_capability() >= fp8.CAPABILITY:
        possible.insert(0, "fp8")
    found = plan.precision(shape, setup, cuts, room(), recompute, possible, host.room())
    say(
        f"BASE_PRECISION is {found}: the fastest of {', '.join(possible)} in the {memory} of {name}"
    )
    return found


@phase("probing")
def prepare(
    tuned: Any, setup: Setup, lengths: Ints, cuts: Sequence[int], recompute: str, cut: Choice | None
) -> tuple[Quick, Choice]:
    """The model made quick, and arranged for the fastest cut of the work that fits.

    Args:
        lengths: tokens of all rows that it will see, [rows]. cuts: see `sizes`.
        recompute: `auto`, `none`, `all` or `offload`. cut: the only one that may be, where a run is resumed.

    Raises:
        OutOfMemory: none fits.
    """
    shape = Architecture.of(tuned.config.to_dict())
    unpacked = replace(setup, unpacked=True)
    if setup.precision == "nf4" and shape and torch.cuda.is_available():
        best = plan.choices(shape, unpacked, cuts, room(), recompute)[:1]
        if best and best[0].tokens == cuts[0] and not best[0].recomputed:
            setup = unpacked
    quick = Quick(tuned, setup.precision, setup.unpacked)
    for remark in quick.remarks:
        say(remark)
    found = [cut] if cut else _candidates(quick, shape, setup, cuts, recompute)
    return quick, fit(quick, lengths, found)


def alike(ranks: Ranks, quick: Quick, lengths: Ints, choice: Choice) -> Choice:
    """What the first process chose, in all of them; the model is left as that wants it.

    Raises:
        OutOfMemory: it does not fit this GPU.
    """
    found = ranks.of_first(lambda: choice)
    return choice if found == choice else fit(quick, lengths, [found])


def _candidates(
    quick: Quick, shape: Architecture | None, setup: Setup, cuts: Sequence[int], recompute: str
) -> list[Choice]:
    """Cuts of the work from the fastest to the smallest.

    Raises:
        OutOfMemory: by the plan none fits.
    """
    layers = len(quick.layers) or 1
    if quick.packed and shape and torch.cuda.is_available():
        # What is not compiled computes all of a layer again, and has but its input on the host.
        spare = host.room() if quick.compiles or recompute == "offload" else 0
        found = plan.choices(shape, setup, cuts, room(), recompute, spare)
        if recompute == "offload":
            if not found:
                say(
                    f"the {spare / 2**30:.1f} GiB that the host can spare are too few to offload to: "
                    "all layers recompute instead"
                )
            found += plan.choices(shape, setup, cuts, room(), "all")
        if not found:
            least = plan.predict(shape, setup, cuts[-1], 0 if recompute == "none" else layers)
            raise OutOfMemory(
                f"training takes {least.total / 2**30:.1f} GiB at the least ({least}), of which this GPU has "
                f"{room() / 2**30:.1f}; choose BASE_PRECISION=nf4, RECOMPUTE=auto, a smaller MAX_LENGTH and "
                "MICRO_BATCH_TOKENS, or a larger GPU"
            )
        return found
    # Without a plan: recomputing costs a third of the speed, a pass of 4k instead of 16k tokens hardly any.
    none, every = ([Choice(size, number) for size in cuts] for number in (0, layers))
    fast = [choice for choice in none if choice.tokens >= min(cuts[0], 4096)]
    away = [Choice(size, 0, offloaded=layers) for size in cuts] if quick.packed else every
    return {"none": none, "all": every, "auto": [*fast, *every], "offload": away}[recompute]


def fit(quick: Quick, lengths: Ints, found: Sequence[Choice]) -> Choice:
    """The first choice whose full bin passes forward and backward on this GPU; on the CPU the first.

    The model is left as that choice wants it. `lengths`: tokens of all rows that it will see, [rows].

    Raises:
        OutOfMemory: none does.
    """
    for choice in found:
        if not torch.cuda.is_available():
            quick.arrange(choice.recomputed, choice.offloaded, choice.lean)
            return choice
        if _passes(quick, lengths, choice):
            return choice
        say(
            f"{choice} does not fit this machine, next to what else is on it; trying the next smaller one"
        )
    expected = f" ({found[-1].memory})" if found[-1].memory else ""
    raise OutOfMemory(
        f"not even a pass of {found[-1].tokens} tokens fits this GPU{expected}; choose BASE_PRECISION=nf4, "
        "RECOMPUTE=offload, or a smaller MAX_LENGTH and MICRO_BATCH_TOKENS"
    )


def _passes(quick: Quick, lengths: Ints, choice: Choice) -> bool:
    """Whether a full bin fits, compiled if that can be done."""
    try:
        quick.arrange(choice.recomputed, choice.offloaded, choice.lean)
        return _fits(quick, quick.shape(lengths, choice.tokens), choice.tokens)
    except torch._dynamo.exc.TorchDynamoException as error:
        why = compiling.reason(error)
        say(f"the layers cannot be compiled here ({why}): they run as they are, and slower")
        quick.compiles = False
        quick.arrange(choice.recomputed, choice.offloaded, choice.lean)
        return _fits(quick, quick.shape(lengths, choice.tokens), choice.tokens)


def _fits(quick: Quick, shape: Shape | None, size: int) -> bool:
    """Whether a full bin fits twice, as in an accumulation, beside gradients and the optimizer's state."""
    tuned = quick.tuned
    batch = to(full_bin(size, shape, tuned.config.vocab_size), load.device())
    tuned.train()
    loss = state = None
    try:
        trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        state = torch.empty(3 * trained, dtype=torch.float32, device=load.device())
        for _ in range(2):
            with load.compute(quick.precision):
                loss = nll_sum(tuned, batch)
            loss.backward()
        return True
    except (torch.OutOfMemoryError, Unpinned):
        return False
    finally:
        tuned.zero_grad(set_to_none=True)
        del loss, state
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def full_bin(size: int, shape: Shape | None, words: int) -> dict[str, Any]:
    """A bin of `size` tokens below `words`, all learned.

    Of at least two rows, because they need a mask that one row does not.
    """
    length = min(shape.longest if shape else size, -(-size // 2))
    ids = np.arange(size, dtype=np.int64) % words
    parts = np.split(ids, range(length, size, length))
    return lay_out([(part, np.ones(len(part), bool)) for part in parts], shape)
