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

from stages.lib.model import exact, host, load, proving, shards
from stages.lib.model.base import Base
from stages.lib.model.folding import Folded, Pairs, Trained, Weights, empty
from stages.lib.model.shards import Shards
from stages.lib.run import preemption
from stages.lib.run.exits import GateFailed
from stages.lib.run.progress import Progress, phase, say

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
        parts: the adapters that this one is the sum of, and how much of each; itself alone, if not given.

    Raises:
        CannotRun, BadData, GateFailed: see `Pairs.check`.
    """

    def __init__(
        self, base: Base, adapter: Path, precision: str, kind: str,
        parts: Sequence[tuple[Path, float]] = (),
    ) -> None:  # fmt: skip
        self.base, self.adapter, self.precision, self.kind = base, adapter, precision, kind
        host.give_back()  # reading a 7B in pieces in 4 bit grew by gigabytes
        self.parts = parts or [(adapter, 1.0)]
        self.pairs = Pairs(adapter)
        published = Shards(base.folder)
        self.pairs.check(published, base.name)
        self.bases: dict[str, Weights] = {
            "original": published, "dequantized": Trained(published, empty(base.folder), precision)
        }  # fmt: skip
        one = self.bases["dequantized"].dtype if kind == "dequantized" else None  # type: ignore[attr-defined]
        self.type = one or next(iter(published.types.values()))
        self.sizes = {
            name: count * (one or published.types[name]).itemsize
            for name, count in published.elements.items()
        }

    def write(
        self, folder: Path, done: Callable[[Path], object],
        there: Callable[[str], bool] = lambda file: False,
    ) -> None:  # fmt: skip
        """Write its weights in shards.

        Args:
            folder: for a shard at a time. done: is given each when it is whole, and may take it away.
            there: whether a shard of this name is whole already.

        Raises:
            GateFailed: a weight is not finite.
        """
        folded = Folded(self.bases[self.kind], self.pairs)
        with Progress(len(self.sizes), "tensors", name="merging") as progress:

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

            shards.write(self.sizes, tensor, folder, done, there)

    @phase("checking")
    def check(self, written: Path) -> dict[str, Any]:
        """Hold each written weight against base plus adapters; see `exact.check`."""
        chosen = self.bases[self.kind]
        say(f"comparing {len(chosen)} weights")
        return exact.check(self.base.folder, Shards(written), chosen, self.parts)

    @phase("proving")
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
            model = proving.model(self.base.folder, weights, adapter, place)
            return proving.logits(model, rows, place)

        chosen = self.bases[self.kind]
        say(f"comparing on {sum(map(len, rows))} tokens of {len(rows)} rows")
        merged = logits(Shards(written), None)
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
        before = proving.perplexity(wanted, rows)
        return {
            "base": self.kind, "trained_in": self.precision, "rows": len(rows),
            "tokens": sum(map(len, rows)), "fold": asdict(fold), "effect": asdict(effect),
            "perplexity_as_trained": before,
            "perplexity_change": found[self.kind].perplexity / before - 1,
            "from_as_trained": {kind: asdict(one) for kind, one in found.items()},
            "closer": closer(found, self.precision), "answers": [],
        }  # fmt: skip

    @phase("comparing")
    def answers(
        self, written: Path, prompts: Sequence[Sequence[int]], stops: Sequence[int],
        decode: Callable[[Sequence[int]], str],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """What the written model says to prompts, beside what base plus adapter as trained says.

        Args:
            written: folder of the weights. prompts: token ids. stops: ids that end an answer.

        Returns:
            For each prompt its text, both greedy answers (that of base plus adapter up to the first token that
            differs), the tokens of the merged model's, and how many of them are equal until then.
        """
        place = load.device()
        say(f"comparing greedy answers to {len(prompts)} prompts")
        merged = proving.model(self.base.folder, Shards(written), None, place)
        said = proving.speak(merged, prompts, stops, place)
        del merged
        trained = proving.model(self.base.folder, self.bases["dequantized"], self.adapter, place)
        own = proving.follow(trained, prompts, said, place)
        return [
            {
                "prompt": decode(prompt), "merged": decode(one), "as_trained": decode(other),
                "tokens": len(one),
                "equal_tokens": len(other) - (other != one),
            }
            for prompt, one, other in zip(prompts, said, own, strict=True)
        ]  # fmt: skip


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report a manifest has: against base plus adapter as trained, and of the fold alone."""
    found = report["from_as_trained"][report["base"]]
    return {
        "mean_kl": found["kl"], "top1_agreement": found["agreement"], "fold_kl": report["fold"]["kl"],
        "perplexity": found["perplexity"], "perplexity_as_trained": report["perplexity_as_trained"],
        "perplexity_change": report["perplexity_change"], "compared_tokens": report["tokens"],
        "answers_equal": share_equal(report["answers"]),
    }  # fmt: skip


def share_equal(answers: Sequence[dict[str, Any]]) -> float | None:
    """Share of the answers' tokens before the first that differs in each; None without answers."""
    tokens = sum(entry["tokens"] for entry in answers)
    return sum(entry["equal_tokens"] for entry in answers) / tokens if tokens else None


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
