"""Whether an adapter is alive: it gets gradients, has moved, is what was saved, and changes what is said."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stages.lib.model import adapter, attention, load, lora
from stages.lib.model.loss import Shape, lay_out, to
from stages.lib.run.exits import GateFailed
from stages.lib.run.progress import phase

Ids = Sequence[int] | npt.NDArray[np.int64]
PROBE = 64  # tokens on which the adapter is switched off and on
NAMED = 3  # modules in a sentence
# What a model takes without targets; the last three where its attention is ours.
INPUTS = ("input_ids", "position_ids", "bounds", "longest", "uniform")


def tells(batch: dict[str, Any]) -> bool:
    """Whether every projection should have a gradient from a bin that was laid out.

    It learns a token with two before it: softmax over a single key has no gradient for query and key.
    """
    return bool((batch["position_ids"][0, batch["kept"]] > 0).any())


class FirstGradients:
    """Whether each adapted projection has a gradient, at the first step of a run that can tell.

    A pair of factors has one if the norm of either is above zero: as long as B is zero, as in a fresh adapter,
    A's gradient is zero by arithmetic. That all are finite the step's own norm says.

    Args:
        quick: the model's decoder is known, so that all its projections see all tokens. Elsewhere what did
            not see a whole bin, such as an expert that no token was sent to, may do without a gradient.
        known: the record of an earlier attempt, which is not asked for again.

    Attributes:
        record: `step`, `modules` (their number), `least` norm and the module `least_in`, and the modules
            `without_input`; None until a step could tell.
    """

    def __init__(self, tuned: Any, quick: bool, known: dict[str, Any] | None) -> None:
        self.record, self.quick = known, quick
        layers = lora.named(tuned)
        self.factors = {
            name: [*layer.lora_A.parameters(), *layer.lora_B.parameters()]
            for name, layer in layers.items()
        }
        self.fed: set[str] = set()  # what saw a whole bin of this step that can tell
        self.told = False  # by a bin of this step
        self.tokens = 0  # of this bin, if it can tell
        self.asked: tuple[set[str], list[str]] | None = (
            None  # what was fed, and whose gradients were there
        )
        self._hooks = [
            layer.register_forward_pre_hook(functools.partial(self._feed, name))
            for name, layer in layers.items()
            if not (known or quick)
        ]

    def _feed(self, name: str, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.tokens and inputs[0].numel() == self.tokens * inputs[0].shape[-1]:
            self.fed.add(name)

    def look(self, batch: dict[str, Any]) -> None:
        """Be told of a bin before its forward pass."""
        if batch["slot"] == 0:
            self.told, self.fed = False, set(self.factors) if self.quick else set()
        self.told |= batch["tells"]
        self.tokens = batch["input_ids"].numel() if batch["tells"] else 0

    def norms(self) -> torch.Tensor | None:
        """The norms of the step's gradients, on the device, to be brought to `judge`; None if none are wanted.

        The only work that this gives the GPU, at one step of a run.
        """
        if self.record or self.asked or not self.told:
            return None
        found = [(n, p.grad) for n, ps in self.factors.items() for p in ps if p.grad is not None]
        if not found:
            name, (factor, *_) = next(iter(self.factors.items()))
            found = [(name, torch.zeros_like(factor))]
        self.asked = self.fed, [name for name, _ in found]
        return torch.stack(list(torch._foreach_norm([gradient for _, gradient in found])))

    def judge(self, step: int, loss: float, norms: Sequence[float]) -> dict[str, Any]:
        """What is to be remembered of a step, by its norms, when they are there.

        Raises:
            GateFailed: a module that had input has no gradient.
        """
        assert self.asked
        fed, names = self.asked
        self.asked = None
        if not loss:
            return {}  # there was nothing left to learn: a later step tells
        squares = dict.fromkeys(self.factors, 0.0)
        for name, norm in zip(names, norms, strict=True):
            squares[name] += norm**2
        without = [name for name, square in squares.items() if not square]
        silent = [name for name in without if name in fed or len(without) == len(squares)]
        if silent:
            raise GateFailed(
                f"{_some(silent, len(squares))} had no gradient at step {step} and will not learn; leave such "
                "modules out of LORA_TARGETS"
            )
        least = min(squares.keys() - set(without), key=lambda name: (squares[name], name))
        self.record = {
            "step": step,
            "modules": len(squares),
            "least": _rounded(math.sqrt(squares[least])),
            "least_in": least,
            "without_input": without,
        }
        for hook in self._hooks:
            hook.remove()
        return {"first_gradients": self.record}


@phase("checking")
def check(
    tuned: Any,
    folder: Path,
    ids: Ids,
    precision: str,
    first: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What an adapter in memory and in its folder is like.

    Args:
        tuned: the base with the adapter of `folder`. ids: of a text. precision: of the base.
        first: what its training recorded of its first gradients; without it a B that is zero may be one
            of a module that never had input, and is only listed.

    Returns:
        `first_gradients`, as given; `b_norms`, by module; `unmoved`, the modules whose B is zero; and
        `logit_change`, the largest that switching it on makes to a logit.

    Raises:
        GateFailed: it is not finite, not what lies in the folder, not trained, or changes nothing.
    """
    saved = adapter.read(folder)
    adapter.check_finite(saved.items(), folder)
    check_same(tuned, saved)
    norms = {
        lora.name_of(name): float(tensor.double().norm())
        for name, tensor in saved.items()
        if ".lora_B." in name
    }
    unmoved = [name for name, norm in norms.items() if not norm]
    _check_moved(unmoved, len(norms), first)
    return {
        "first_gradients": first,
        "b_norms": {name: _rounded(norm) for name, norm in norms.items()},
        "unmoved": unmoved,
        "logit_change": _rounded(_checked_change(tuned, ids, precision)),
    }


def trained(
    tuned: Any, folder: Path, ids: Ids, precision: str, first: dict[str, Any] | None
) -> dict[str, Any]:
    """As `check`, of what training leaves: the best adapter, and in `last/` the one in memory.

    The best is in memory afterwards.
    """
    check_same(tuned, adapter.read(folder / "last"))
    adapter.take(tuned, folder)
    return check(tuned, folder, ids, precision, first)


def beside(tuned: Any, ids: Ids, precision: str) -> None:
    """Pass where another process is at `check`, and needs this one's part of the base."""
    logit_change(tuned, ids, precision)


def check_same(tuned: Any, saved: dict[str, torch.Tensor]) -> None:
    """Hold the adapter in memory against the tensors of its file, to the last bit.

    Raises:
        GateFailed: a tensor differs, or is in one of them alone.
    """
    live = adapter.tensors(tuned)
    odd = sorted(live.keys() ^ saved.keys()) or [
        name for name, tensor in saved.items() if not _same(tensor, live[name])
    ]
    if odd:
        raise GateFailed(
            f"the adapter's {odd[0]} in its file is not what it is in memory; run the stage again, and if "
            "that does not help, the disk or this program is at fault"
        )


def _same(saved: torch.Tensor, live: torch.Tensor) -> bool:
    """By their bytes, for a comparison of numbers knows no sign of zero."""
    if saved.shape != live.shape:
        return False
    one, two = (t.detach().cpu().to(saved.dtype).contiguous() for t in (saved, live))
    return torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def _check_moved(unmoved: list[str], modules: int, first: dict[str, Any] | None) -> None:
    if len(unmoved) == modules:
        raise GateFailed(
            "the adapter changes nothing: no B matrix has moved from zero, so nothing was learned; train it, "
            "with a higher LEARNING_RATE or more EPOCHS"
        )
    odd = [name for name in unmoved if first and name not in first["without_input"]]
    if odd:
        raise GateFailed(
            f"the B matrices of {_some(odd, modules)} are zero, though they had input: they learned nothing; "
            "train again without such modules in LORA_TARGETS"
        )


def _checked_change(tuned: Any, ids: Ids, precision: str) -> float:
    change = logit_change(tuned, ids, precision)
    if not math.isfinite(change):
        raise GateFailed(
            "the model's logits are not finite with the adapter or without; train again"
        )
    if not change:
        raise GateFailed(
            f"switching the adapter on changes nothing: all logits of {len(ids[:PROBE])} tokens stay as "
            f"they are with a base in {precision}; train it with a higher LEARNING_RATE or more EPOCHS"
        )
    return change


def logit_change(tuned: Any, ids: Ids, precision: str) -> float:
    """The largest difference that switching the adapter on makes to a logit of the first 64 tokens."""
    was_training = tuned.training
    tuned.eval()
    try:
        on = _logits(tuned, ids, precision)
        with tuned.disable_adapter():
            off = _logits(tuned, ids, precision)
    finally:
        tuned.train(was_training)
    return float((on - off).abs().max())


@torch.no_grad()
def _logits(tuned: Any, ids: Ids, precision: str) -> torch.Tensor:
    """fp32 [tokens, words], of one row; of a model that was made quick, too."""
    causal = tuned.get_base_model()
    row = np.asarray(ids[:PROBE], np.int64)
    ours = causal.config._attn_implementation == attention.NAME
    shape = Shape(len(row)) if ours else None
    batch = to(lay_out([(row, np.ones(len(row), bool))], shape), causal.device)
    given = {name: batch[name] for name in INPUTS if name in batch}
    # Compiled layers would be compiled anew for a bin of this size: half a minute for two passes.
    with torch.compiler.set_stance("force_eager"), load.compute(precision):
        return torch.as_tensor(tuned(use_cache=False, **given).logits[0]).float()


def _some(names: list[str], of: int) -> str:
    """The first few names, and how many there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} of {of} adapted modules ({', '.join(names[:NAMED])}{more})"


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
