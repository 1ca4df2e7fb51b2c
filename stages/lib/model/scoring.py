"""How well a tuned model, and its base, predict rows that nobody learned: over the quick path that trains.

Nothing is kept but the sums of each row. They lie on the device and are read once, behind the last bin: the
host never waits for a bin, and lays the next one out while one is computed.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from stages.lib.model import compiling, cross_entropy, load, memory, plan, shortage
from stages.lib.model.architecture import Architecture, Setup
from stages.lib.model.loss import Row, Rows, held_out_bins, lay_out, pinned, to
from stages.lib.model.quick import PROBE, Quick
from stages.lib.run import preemption
from stages.lib.run.exits import OutOfMemory
from stages.lib.run.progress import phase, say

LEAST = 4096  # tokens of a pass on a GPU, where larger ones gain hardly anything
# Sums are of whole numbers of 2**-30 nats, so that they do not depend on the order in which a GPU adds.
UNIT = 2.0**30
# Of a token in nats, on average, in fp32 and in bf16: seeing another row's end is far more.
LEAKS = {True: 1e-3, False: 5e-2}


@dataclass(frozen=True)
class Sums:
    """Of each row: negative log-likelihood in nats, float64 [rows], NaN where a token's is not finite; learned
    tokens that were the first choice, and all of them, int64 [rows]."""

    nll: npt.NDArray[np.float64]
    hits: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    @classmethod
    def of(cls, total: torch.Tensor) -> "Sums":
        """From int64 [rows, 4]: in units, hits, tokens, and tokens that are not finite."""
        nll, hits, tokens, bad = total.cpu().numpy().T
        return cls(np.where(bad > 0, np.nan, nll / UNIT), hits.copy(), tokens.copy())

    def lists(self) -> list[list[float]]:
        """As JSON holds them, where all are finite."""
        return [self.nll.tolist(), self.hits.tolist(), self.tokens.tolist()]

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[float]]) -> "Sums":
        """What `lists` was made of."""
        nll, hits, tokens = lists
        return cls(np.array(nll), np.array(hits, np.int64), np.array(tokens, np.int64))


class Scorer:
    """A tuned model that reads rows, quick where that is known. As a context it leaves the model as it was.

    Args:
        tuned: with its adapter. precision: of its base. lengths: tokens of all rows, [rows]; where they are
            those of training, what was compiled there serves here. tokens: of a pass, if that fits.

    Raises:
        OutOfMemory: not even a pass of the longest row fits.
    """

    def __init__(
        self, tuned: Any, precision: str, lengths: npt.NDArray[np.int64], tokens: int
    ) -> None:
        self.tuned, self.precision, self.lengths = tuned, precision, lengths
        self.tokens, self.piece, self.alone = tokens, cross_entropy.judge, False
        self._before = contextlib.ExitStack()

    @phase("probing")
    def __enter__(self) -> "Scorer":
        self._before.enter_context(_left_as_it_was(self.tuned))
        with self._before:
            self.quick = Quick(
                self.tuned, self.precision, _unpacks(self.tuned, self.precision, self.tokens)
            )
            for remark in self.quick.remarks:
                say(remark)
            if self.quick.compiles:
                self.piece = compiling.tried(self.piece, "the loss", dynamic=True)
            self._fit()
            self.alone = not self.quick.packed and self._leaks()
            self._before = self._before.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._before.close()

    @torch.no_grad()
    def sums(
        self, rows: Rows, adapted: bool, after_bin: Callable[[int], object] = lambda tokens: None
    ) -> Sums:
        """Each row's sums, with the adapter or as the base alone; `after_bin` is told a bin's tokens."""
        bins = held_out_bins(rows.lengths, 0 if self.alone else self.tokens)
        place = load.device()
        total = torch.zeros(len(rows), 4, dtype=torch.int64, device=place)
        side = contextlib.nullcontext() if adapted else self.tuned.disable_adapter()
        with shortage.explained(self._doing, shortage.WITHOUT_TRAINING), side:
            for numbers, batch in self._laid_out(rows, bins):
                preemption.check()
                if len(batch["targets"]):
                    total.index_add_(0, batch["owners"], self._judged(batch))
                after_bin(int(rows.lengths[numbers].sum()))
        return Sums.of(total)

    def _doing(self) -> str:
        longest = int(self.lengths.max())
        return (
            f"a pass of {self.tokens} tokens, the longest row {longest}, base in {self.precision}"
        )

    def _laid_out(
        self, rows: Rows, bins: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Bins on the device, each laid out by a thread while the one before it is computed."""
        place = load.device()

        def lay(numbers: list[int]) -> dict[str, Any]:
            return pinned(owned(numbers, [rows[row] for row in numbers], self.shape))

        with ThreadPoolExecutor(1, "bins") as thread:
            ahead = [thread.submit(lay, numbers) for numbers in bins[:1]]
            for place_of, numbers in enumerate(bins):
                batch = ahead.pop().result()
                ahead += [thread.submit(lay, next_) for next_ in bins[place_of + 1 : place_of + 2]]
                yield numbers, to(batch, place)

    def _judged(self, batch: dict[str, Any]) -> torch.Tensor:
        """What each learned token adds to its row's sums, int64 [N, 4]."""
        with load.compute(self.precision):
            nll, hits = self.judge(batch)
        finite = nll.isfinite()
        units = (torch.where(finite, nll, 0.0).double() * UNIT).round().long()
        return torch.stack([units, hits.long(), torch.ones_like(units), (~finite).long()], 1)

    def judge(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each learned token of a bin: its negative log-likelihood in nats, [N], and whether it is the first
        choice, [N]. Logits exist for a chunk of them at a time; a model that is not quick makes them itself."""
        targets = batch["targets"]
        given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        if self.quick.packed:
            kept, head = self.quick.hidden(batch), self.quick.causal.get_output_embeddings()
            kept = kept.to(head.weight.dtype)
        else:
            kept = self.tuned(**given, logits_to_keep=batch["kept"], use_cache=False).logits[0]
        nll, hits = (torch.empty_like(targets, dtype=kind) for kind in (torch.float32, torch.bool))
        for first in range(0, len(targets), cross_entropy.CHUNK):
            part = slice(first, first + cross_entropy.CHUNK)
            logits = kept[part]
            if self.quick.packed:
                logits = F.linear(logits, head.weight, head.bias)
            nll[part], hits[part] = self.piece(logits, targets[part])
        return nll, hits

    def _fit(self) -> None:
        """Take the largest pass that fits, compiled if that can be done."""
        longest = int(self.lengths.max())
        self.tokens = max(self.tokens, longest)
        if not torch.cuda.is_available():
            self._arrange()
            return
        self.tokens = max(self.tokens, LEAST)
        with self.tuned.disable_adapter():
            pass  # behind it peft has the adapter ask for gradients, and what was compiled before is of no use
        while not self._passes():
            if self.tokens == longest:
                raise OutOfMemory(
                    f"not even a pass of {longest} tokens, the longest row, fits this GPU; use a larger one"
                )
            say(f"a pass of {self.tokens} tokens does not fit this GPU; trying half of it")
            self.tokens = max(self.tokens // 2, longest)

    def _arrange(self) -> None:
        self.quick.arrange(0)
        self.shape = self.quick.shape(self.lengths, self.tokens)

    @torch.no_grad()
    def _passes(self) -> bool:
        """Whether a full bin fits."""
        self._arrange()
        try:
            self._judged(self._full())
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return False
        except torch._dynamo.exc.TorchDynamoException as error:
            why = compiling.reason(error)
            say(f"the layers cannot be compiled here ({why}): they run as they are, and slower")
            self.quick.compiles = False
            return self._passes()
        return True

    def _full(self) -> dict[str, Any]:
        words = self.tuned.config.vocab_size
        return to(memory.full_bin(self.tokens, self.shape, words), load.device())

    @torch.no_grad()
    def _leaks(self) -> bool:
        """Whether a model that is not known lets a row see the one before it in a bin."""
        rows = [(np.arange(3, 3 + n), np.arange(n) > 0) for n in PROBE]
        together, *each = (
            self.judge(to(lay_out(some), load.device()))[0] for some in (rows, *([r] for r in rows))
        )
        off = float((together - torch.cat(each)).abs().mean())
        if leaks := off > LEAKS[self.precision == "fp32"]:
            say("rows are read one by one: side by side, this model lets them see each other")
        return leaks


def owned(numbers: Sequence[int], rows: Sequence[Row], shape: Any) -> dict[str, Any]:
    """A bin, laid out, with `owners` [N]: the number of the row that each learned token belongs to."""
    counts = [int(mask[1:].sum()) for _, mask in rows]  # a row's first token follows nothing
    return lay_out(rows, shape) | {"owners": torch.from_numpy(np.repeat(numbers, counts))}


def _unpacks(tuned: Any, precision: str, tokens: int) -> bool:
    """Whether an NF4 base is dequantised once: where that fits beside a pass that keeps no layer's work."""
    shape = Architecture.of(tuned.config.to_dict())
    if precision != "nf4" or not shape or not torch.cuda.is_available():
        return False
    setup = Setup(precision, 1, ("all-linear",), unpacked=True)
    return plan.predict(shape, setup, max(tokens, LEAST), shape.layers).total <= memory.room()


@contextlib.contextmanager
def _left_as_it_was(tuned: Any) -> Iterator[None]:
    """Evaluating within, and as before behind it: a model is made quick by giving its modules a `forward`."""
    config, training = tuned.get_base_model().config, tuned.training
    attention = config._attn_implementation
    learned = {p: p.requires_grad for p in tuned.parameters()}
    forwards = {module: module.__dict__.get("forward") for module in tuned.modules()}
    tuned.eval()
    try:
        yield
    finally:
        for module, own in forwards.items():
            module.__dict__.pop("forward", None)
            # What only the quick path reads would be missing where a cache or a benchmark wants room.
            module._buffers.pop("unpacked", None)
            module._modules.pop("together", None)
            if own is not None:
                module.forward = own
        for parameter, wanted in learned.items():
            parameter.requires_grad_(wanted)
        config._attn_implementation = attention
        tuned.train(training)
        torch.cuda.empty_cache()
