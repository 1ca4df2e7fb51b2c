"""The adapter folded into its base, and the proof that the result says the same.

Both go weight by weight, so a model of any size needs the memory of its largest part, twice: see `shards`,
`folding` and `proving`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stages.lib.model import load, proving, shards
from stages.lib.model.base import Base
from stages.lib.model.folding import Folded, Pairs, Trained, Weights, empty
from stages.lib.model.shards import Shards
from stages.lib.run import preemption
from stages.lib.run.exits import BadData, CannotRun, GateFailed
from stages.lib.run.progress import Progress, say

# Rounding the merged weights to bf16 moves the distribution by far less; a fold gone wrong by far more, or by
# as much as the adapter does. Where that has hardly learned, it moves less than rounding.
MOST_KL, SHARE, LEAST_KL = 1e-2, 0.1, 1e-4
KINDS = ("original", "dequantized")
REPORT = "merge_report.json"
QUANTISED = ("nf4", "int8", "fp8")


class Merge:
    """A base, an adapter for it, and the model that they make.

    Args:
        base: fetched with its weights. adapter: its folder. precision: of the run that trained it.
        kind: one of `KINDS`: the base as published, or as it was trained on.

    Raises:
        CannotRun: the adapter is more than factor pairs. BadData: it is for another base.
    """

    def __init__(self, base: Base, adapter: Path, precision: str, kind: str) -> None:
        self.base, self.adapter, self.precision, self.kind = base, adapter, precision, kind
        self.pairs = Pairs(adapter)
        if not self.pairs.simple:
            raise CannotRun(
                f"the adapter in {adapter} is more than pairs of factors of one scale, as with DoRA or several "
                "ranks; merge it with peft's merge_and_unload"
            )
        published = Shards(base.folder)
        absent = self.pairs.missing(published)
        if absent:
            raise BadData(
                f"the adapter in {adapter} was made for another base: {base.name} has no {absent[0]}"
            )
        self.bases: dict[str, Weights] = {
            "original": published, "dequantized": Trained(published, empty(base.folder), precision)
        }  # fmt: skip
        one = self.bases["dequantized"].dtype if kind == "dequantized" else None  # type: ignore[attr-defined]
        self.type = one or next(iter(published.types.values()))
        self.sizes = {
            name: count * (one or published.types[name]).itemsize
            for name, count in published.elements.items()
        }

    def write(self, folder: Path, done: Callable[[Path], object]) -> None:
        """Write its weights in shards.

        Args:
            folder: for a shard at a time. done: is given each when it is whole, and may take it away.

        Raises:
            GateFailed: a weight is not finite.
        """
        folded = Folded(self.bases[self.kind], self.pairs)
        with Progress(len(self.sizes), "tensors") as progress:

            def tensor(name: str) -> torch.Tensor:
                preemption.check()
                found = folded[name]
                if not bool(found.isfinite().all()):
                    raise GateFailed(
                        f"{name} is not finite once merged, so it was not published; look for NaN in the "
                        "adapter, or use MERGE_BASE=dequantized for a base in fp16"
                    )
                progress.advance(1)
                return found

            shards.write(self.sizes, tensor, folder, done)

    def prove(self, written: Path, rows: Sequence[Sequence[int]], most_kl: float) -> dict[str, Any]:
        """Hold the written model against base plus adapter, on rows of token ids.

        Args:
            written: folder of the weights. most_kl: from base plus adapter as trained, nats a token.

        Returns:
            What `merge_report.json` says.

        Raises:
            GateFailed: they differ by more than rounding, or by more than `most_kl`.
        """
        place = load.device()

        def logits(weights: Weights, adapter: Path | None) -> torch.Tensor:
            preemption.check()
            model = proving.streamed(self.base.folder, weights, adapter, place)
            return proving.logits(model, rows, place)

        say(f"comparing on {sum(map(len, rows))} tokens of {len(rows)} rows")
        merged, chosen = logits(Shards(written), None), self.bases[self.kind]
        beside = logits(chosen, self.adapter)
        fold = proving.difference(merged, beside, rows)
        effect = proving.difference(logits(chosen, None), beside, rows)
        most = max(min(MOST_KL, SHARE * effect.kl), LEAST_KL)
        if not fold.kl <= most:
            raise GateFailed(
                f"the merged model differs from base plus adapter by KL {fold.kl:.3g} nats a token, at most "
                f"{most:.3g} is rounding (the adapter itself moves {effect.kl:.3g}), so it was not published; "
                "look for NaN in the adapter, or another base"
            )
        wanted = logits(self.bases["dequantized"], self.adapter)
        found = {self.kind: proving.difference(merged, wanted, rows)}
        for kind in KINDS:
            if kind not in found and self.precision in QUANTISED:
                other = logits(Folded(self.bases[kind], self.pairs), None)
                found[kind] = proving.difference(other, wanted, rows)
        if not found[self.kind].kl <= most_kl:
            raise GateFailed(
                f"the merged model differs from what was trained (KL {found[self.kind].kl:.3g} nats a token, "
                f"MERGE_MOST_KL is {most_kl:g}), so it was not published; "
                + closer(found, self.precision)
            )
        return {
            "base": self.kind, "trained_in": self.precision, "rows": len(rows),
            "tokens": sum(map(len, rows)), "fold": asdict(fold), "effect": asdict(effect),
            "perplexity_as_trained": proving.perplexity(wanted, rows),
            "from_as_trained": {kind: asdict(one) for kind, one in found.items()},
            "closer": closer(found, self.precision),
        }  # fmt: skip


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report a manifest has: against base plus adapter as trained, and of the fold alone."""
    found = report["from_as_trained"][report["base"]]
    return {
        "mean_kl": found["kl"], "top1_agreement": found["agreement"], "fold_kl": report["fold"]["kl"],
        "perplexity": found["perplexity"], "perplexity_as_trained": report["perplexity_as_trained"],
        "compared_tokens": report["tokens"],
    }  # fmt: skip


def closer(found: dict[str, proving.Difference], precision: str) -> str:
    """A sentence on which base the merged model should have."""
    if len(found) < 2:
        return f"A base that was trained in {precision} is merged as it was published."
    near, far = sorted(found, key=lambda kind: found[kind].kl)
    return (
        f"MERGE_BASE={near} is closer to what was trained in {precision}: KL {found[near].kl:.3g} nats a "
        f"token, and {found[far].kl:.3g} with MERGE_BASE={far}."
    )


def describe(merge: Merge, stops: Sequence[int], folder: Path) -> None:
    """Write the config and the generation config of a merged model.

    Args:
        stops: ids of the tokens that end an answer.
    """
    config = dict(merge.base.config)
    config.pop("torch_dtype", None)
    config |= {"dtype": str(merge.type).removeprefix("torch."), "use_cache": True}
    _write(config, folder / "config.json")
    path = merge.base.folder / "generation_config.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    if stops:
        known["eos_token_id"] = list(stops) if len(stops) > 1 else stops[0]
    _write(known, folder / path.name)


def _write(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
