"""How much there is to learn: from the prepared data of a run where that is there, else from the settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.model import cutting
from stages.lib.model.speed import Rows
from stages.lib.run import artifact

PACKED = 200_000  # rows that are packed to count steps; of more the room that is lost is nothing
FORWARD = 1 / 3  # of a step's work: what an evaluation does with a token


@dataclass(frozen=True)
class Amount:
    """What a run reads.

    Attributes:
        tokens: of all steps, None is not known. steps: of the optimizer. longest: tokens of the longest row.
        evaluated: held-out tokens that all evaluations read together. at_most: the true figures may be lower.
        source: where this is from, a sentence.
    """

    tokens: int | None
    steps: int | None
    longest: int
    rows: Rows
    evaluated: int
    at_most: bool
    source: str

    @property
    def work(self) -> float | None:
        """Tokens that training for as long would see."""
        return None if self.tokens is None else self.tokens + FORWARD * self.evaluated

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "tokens": self.tokens, "steps": self.steps, "longest_row": self.longest,
            "evaluated_tokens": self.evaluated, "at_most": self.at_most, "source": self.source,
        }  # fmt: skip


def find(run_dir: Path, given: dict[str, Any], sources: int) -> Amount:
    """Of a run with these settings of `train` and `prepare-data`; `sources`: data sets that DATASET names."""
    made = artifact.load(run_dir / "data")
    return _of_data(made, given) if made else _of_settings(given, sources)


def _of_settings(given: dict[str, Any], sources: int) -> Amount:
    longest = min(given["max_length"], given["batch_tokens"])
    rows, steps, batch = given["max_rows"], given["max_steps"], given["batch_tokens"]
    told = f"rows of {given['max_length']:,} tokens, the most that MAX_LENGTH allows"
    tokens = None
    if steps:
        tokens, source = steps * batch, f"MAX_STEPS {steps:,} of {batch:,} tokens, BATCH_TOKENS"
    elif rows:
        kept = rows * max(sources, 1) * (1 - given["validation_fraction"])
        tokens = round(kept * given["epochs"] * given["max_length"])
        source = (
            f"{round(kept):,} {told}, as nothing is prepared yet: MAX_ROWS without what is held out"
        )
        steps = -(-tokens // batch)
    else:
        source = (
            "nothing is prepared yet and MAX_ROWS is not set: run `prepare-data`, then `plan` again"
        )
    held_out = tokens and given["validation_fraction"]
    evaluated = cutting.EVALUATIONS * cutting.evaluated(tokens) if tokens and held_out else 0
    return Amount(tokens, steps, longest, Rows([longest]), evaluated, True, source)


def _changed(made: artifact.Artifact, given: dict[str, Any]) -> str:
    """What has changed since the data was prepared, as far as it says how much there is."""
    was = {
        name: made.setting(name.upper())
        for name in ("max_rows", "max_length", "validation_fraction")
    }
    said = [
        f"{n.upper()} was {old}, is now {given[n]}" for n, old in was.items() if old != given[n]
    ]
    base = made.manifest["inputs"]["base"]["name"]
    if base != given["base_model"]:
        said.append(f"it was prepared for {base}")
    return ", ".join(said)


def _of_data(made: artifact.Artifact, given: dict[str, Any]) -> Amount:
    import numpy as np

    from stages.lib.data import bins, lengths

    rows, held_out = (lengths.of_part(made.path, part) for part in lengths.PARTS)
    longest, total, batch = int(rows.max()), int(rows.sum()), given["batch_tokens"]
    size = cutting.sizes(batch, longest, given["micro_batch_tokens"], given["num_gpus"])[0]
    bins.check_sizes(batch, given["micro_batch_tokens"], longest, given["num_gpus"])
    epochs, most, seed = given["epochs"], given["max_steps"], given["seed"]
    if len(rows) <= PACKED:
        plan = bins.Schedule(rows, size, batch // size, epochs, most, seed)
        space = plan.total_bins * size
        steps, (whole, rest) = plan.steps, divmod(plan.total_bins, plan.bins_per_epoch)
        last = (plan.rows(whole * plan.bins_per_epoch + number) for number in range(rest))
        tokens = whole * total + sum(int(rows[found].sum()) for found in last)
    else:
        tokens = most * batch if most else round(total * epochs)
        steps, space = most or -(-tokens // batch), tokens
    metrics = made.metrics
    learned = metrics["trainable_tokens"] / max(metrics["tokens"], 1)
    some = np.random.default_rng(0).permutation(rows)[: Rows.MOST]
    read = min(cutting.evaluated(space), int(held_out.sum()))
    source = f"{len(rows):,} rows and {total:,} tokens in {made.path}, {tokens / total:.3g} times"
    if changed := _changed(made, given):
        source += f"; but {changed}: run `prepare-data` again"
    return Amount(
        tokens, steps, longest, Rows(some.tolist(), learned),
        cutting.EVALUATIONS * read, False, source,
    )  # fmt: skip
