"""Which cut of the work fits the GPU: planned, probed once before the first step, and recorded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stages.lib.model import compiling, cutting, host, load, plan, sharding
from stages.lib.model.architecture import Architecture, Setup
from stages.lib.model.loss import Shape, lay_out, nll_sum, to
from stages.lib.model.offload import Unpinned
from stages.lib.model.plan import Choice
from stages.lib.model.quick import KNOWN, Quick
from stages.lib.model.ranks import Ranks
from stages.lib.run import gpu
from stages.lib.run.exits import CannotRun, OutOfMemory
from stages.lib.run.progress import phase, say

Ints = npt.NDArray[np.int64]


def room() -> int:
    """Bytes of GPU memory that this process has and can still have; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    return int(cutting.SHARE * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()))


def sizes(batch_tokens: int, longest: int, wanted: int | None, sharing: int = 1) -> list[int]:
    """As `cutting.sizes`, for this machine."""
    most = cutting.GPU_BIN if torch.cuda.is_available() else cutting.CPU_BIN
    return cutting.sizes(batch_tokens, longest, wanted, sharing, most)


def precision(
    config: dict[str, Any], setup: Setup, cuts: Sequence[int], recompute: str,
    sharding: str = "none", ranks: Ranks | None = None,
) -> str:  # fmt: skip
    """What `auto` means on this machine, told to the user with its reason.

    Args:
        config: of the base, all keys filled in. cuts, recompute: see `prepare`. sharding: `auto`, `none` or
            `full`. ranks: the processes that train together.
    """
    ranks = ranks or Ranks()
    if not torch.cuda.is_available():
        say("BASE_PRECISION is bf16: there is no GPU")
        return "bf16"
    name, memory = torch.cuda.get_device_name(), f"{room() / 2**30:.0f} GiB"
    capability = torch.cuda.get_device_capability()
    possible = cutting.possible(lambda precision: gpu.lacks(precision, name, capability))
    if possible == ["fp32"]:
        say(f"BASE_PRECISION is fp32: {name} has no bf16")
        return "fp32"
    shape = Architecture.of(config)
    if not shape:
        say(f"BASE_PRECISION is nf4: {config.get('model_type')} is not planned for")
        return "nf4"
    spare = host.room(sharing=ranks.near)
    whole, parts = setup, replace(setup, shared=ranks.count)
    for each in {"none": [whole], "full": [parts], "auto": [whole, parts]}[sharding]:
        found = plan.precision(shape, each, cuts, room(), recompute, possible, spare)
        best = replace(each, precision=found)
        if plan.choices(shape, best, cuts, room(), recompute, spare):
            break
    say(
        f"BASE_PRECISION is {found}: the fastest of {', '.join(possible)} in the {memory} of {name}"
    )
    return found


def shared(
    wanted: str, config: dict[str, Any], setup: Setup, cuts: Sequence[int], recompute: str,
    cut: Choice | None, ranks: Ranks,
) -> int:  # fmt: skip
    """Over how many GPUs the base is sharded; 1: each has all of it.

    Args:
        wanted: `auto`, `none` or `full`. config: of the base, all keys filled in. cuts, recompute, cut: see
            `prepare`.

    Raises:
        CannotRun: it is to be sharded, and is no model that is known here.
    """
    if ranks.count == 1 or wanted == "none":
        return 1
    kind = config.get("model_type")
    if wanted == "full":
        if kind not in KNOWN:
            raise CannotRun(
                f"SHARDING=full needs a decoder known here, and {kind} is none; set none"
            )
        return ranks.count
    shape = Architecture.of(config)
    if not (shape and kind in KNOWN and torch.cuda.is_available()):
        return 1
    free, spare = int(min(ranks.each(room()))), host.room(sharing=ranks.near)
    if ranks.of_first(lambda: plan.fits(shape, setup, cuts, free, recompute, spare, cut)):
        return 1
    gib = free / 2**30
    say(
        f"SHARDING is full: a base in {setup.precision} leaves too little of the {gib:.0f} GiB of a GPU"
    )
    return ranks.count


@phase("probing")
def prepare(
    tuned: Any, setup: Setup, lengths: Ints, cuts: Sequence[int], recompute: str, cut: Choice | None,
    ranks: Ranks | None = None,
) -> tuple[Quick, Choice]:  # fmt: skip
    """The model made quick, and arranged for the fastest cut of the work that fits.

    Args:
        lengths: tokens of all rows that it will see, [rows]. cuts: see `sizes`.
        recompute: `auto`, `none`, `all` or `offload`. cut: the only one that may be, where a run is resumed.
        ranks: the processes that train together, over which the base is sharded where `setup` says so.

    Raises:
        OutOfMemory: none fits.
    """
    ranks = ranks or Ranks()
    sharded = setup.shared > 1
    if sharded:
        sharding.spread(tuned, setup.precision, ranks)
    shape = Architecture.of(tuned.config.to_dict())
    if shape and not sharded and torch.cuda.is_available():
        setup = cutting.unpacked(shape, setup, cuts, room(), recompute)
    quick = Quick(tuned, setup.precision, setup.unpacked, sharded)
    for remark in quick.remarks:
        say(remark)
    found = [cut] if cut else _candidates(quick, shape, setup, cuts, recompute, ranks)
    if not sharded:
        return quick, fit(quick, lengths, found)
    # A pass needs all GPUs: they try the same one, and where it does not fit one of them it ends for all.
    chosen = ranks.of_first(lambda: found[0])
    return quick, fit(quick, lengths, [chosen])


def held(tuned: Any, ranks: Ranks) -> dict[str, Any]:
    """For the manifest: how the base lies on the GPUs, its bytes on this one, and the peak of each."""
    whole, here = sharding.base_bytes(tuned)
    return {
        "sharding": "full" if ranks.joined else "none",
        "base_bytes": whole,
        "base_bytes_here": here,
        "peak_gpu_bytes_each": [int(peak) for peak in ranks.each(load.peak_gpu_bytes() or 0)],
    }


def alike(ranks: Ranks, quick: Quick, lengths: Ints, choice: Choice) -> Choice:
    """What the first process chose, in all of them; the model is left as that wants it.

    Raises:
        OutOfMemory: it does not fit this GPU.
    """
    found = ranks.of_first(lambda: choice)
    return choice if found == choice else fit(quick, lengths, [found])


def _candidates(
    quick: Quick, shape: Architecture | None, setup: Setup, cuts: Sequence[int], recompute: str,
    ranks: Ranks,
) -> list[Choice]:  # fmt: skip
    """Cuts of the work from the fastest to the smallest.

    Raises:
        OutOfMemory: by the plan none fits.
    """
    layers = len(quick.layers) or 1
    if quick.packed and shape and torch.cuda.is_available():
        # What is not compiled computes all of a layer again, and has but its input on the host.
        spare = host.room(sharing=ranks.near) if quick.compiles or recompute == "offload" else 0
        free = int(min(ranks.each(room()))) if setup.shared > 1 else room()
        found = plan.choices(shape, setup, cuts, free, recompute, spare)
        if recompute == "offload":
            if not found:
                say(
                    f"the {spare / 2**30:.1f} GiB that the host can spare are too few to offload to: "
                    "all layers recompute instead"
                )
            found += plan.choices(shape, setup, cuts, free, "all")
        if not found:
            least = plan.predict(shape, setup, cuts[-1], 0 if recompute == "none" else layers)
            raise OutOfMemory(
                f"training takes {least.total / 2**30:.1f} GiB at the least ({least}), of which this GPU has "
                f"{free / 2**30:.1f}; choose BASE_PRECISION=nf4, RECOMPUTE=auto, a smaller MAX_LENGTH and "
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
