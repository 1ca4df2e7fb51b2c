"""Base against tuned: from sums and answers to figures, with how sure they are, and to one sentence."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stages.lib.report import answers, evaluation_page, statistics
from stages.lib.report.answers import SIDES, Answer
from stages.lib.report.preview import visible
from stages.lib.report.statistics import LEVEL, Interval, ratio_intervals, sign_flip
from stages.lib.report.table import table
from stages.lib.run.exits import GateFailed

FILE = "evaluation.json"
SCHEMA = 2
PART_RESAMPLES = 2_000  # of a source or a length, of which there may be many
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Figures = dict[str, Any]


class Sums(Protocol):
    """Of each row; see `stages.lib.model.scoring.Sums`."""

    @property
    def nll(self) -> Floats: ...
    @property
    def hits(self) -> Ints: ...
    @property
    def tokens(self) -> Ints: ...


class Conversations:
    """Sums of conversations, of which a long one may have been split into several rows.

    Args:
        sums: of each row, by side. conversation, lengths, sources: of each row, int64 [rows].

    Attributes:
        rows: all of them. nll, hits: of each conversation, by side, float64 [n]. tokens: learned.
        lengths: of all its rows.
    """

    def __init__(self, sums: Mapping[str, Sums], conversation: Ints, lengths: Ints, sources: Ints):
        _, first, place = np.unique(conversation, return_index=True, return_inverse=True)

        def gathered(values: npt.NDArray[Any]) -> Floats:
            return np.asarray(np.bincount(place, values, len(first)), np.float64)

        self.nll = {side: gathered(sums[side].nll) for side in SIDES}
        self.hits = {side: gathered(sums[side].hits) for side in SIDES}
        self.rows, self.tokens = len(conversation), gathered(sums["base"].tokens)
        self.lengths, self.sources = gathered(lengths).astype(np.int64), sources[first]

    def __len__(self) -> int:
        return len(self.tokens)

    def change(self, kind: dict[str, Floats]) -> Floats:
        """How much more of `nll` or `hits` each conversation has when it is tuned, [n]."""
        return kind["tuned"] - kind["base"]

    def part(self, chosen: npt.NDArray[np.bool_], seed: int) -> Figures:
        """The losses of some conversations, and how sure their difference is."""
        tokens = self.tokens[chosen]
        nll = {side: self.nll[side][chosen] for side in SIDES}
        difference = nll["tuned"] - nll["base"]
        intervals = ratio_intervals(difference[None], tokens, seed, PART_RESAMPLES)
        return {side: _ratio(nll[side], tokens) for side in SIDES} | {
            "difference": _ratio(difference, tokens),
            "interval": intervals[0] if intervals else None,
            "conversations": len(tokens), "tokens": int(tokens.sum()),
        }  # fmt: skip


def _ratio(numerators: Floats, denominators: Floats) -> float | None:
    total = float(denominators.sum())
    return float(numerators.sum()) / total if total else None


def held_out(found: Conversations, names: Sequence[str], seed: int) -> Figures:
    """Loss, perplexity and accuracy of both sides, their differences, and all of it by source and by length.

    Args:
        names: of the sources.

    Raises:
        GateFailed: a loss is not finite.
    """
    for side in SIDES:
        lost = int((~np.isfinite(found.nll[side])).sum())
        if lost:
            raise GateFailed(
                f"the loss of the {side} model is not finite in {lost} of {len(found)} held-out conversations; "
                "look for NaN in its weights, or choose another BASE_PRECISION"
            )
    rows = [*(found.nll[s] for s in SIDES), *(found.hits[s] for s in SIDES)]
    rows += [found.change(found.nll), found.change(found.hits)]
    values = [_ratio(row, found.tokens) for row in rows]
    intervals: Sequence[Interval | None]
    intervals = ratio_intervals(np.stack(rows), found.tokens, seed) or [None] * len(rows)
    result: Figures = {}
    for place, side in enumerate(SIDES):
        loss, bounds = values[place], intervals[place]
        result[side] = {
            "loss": loss, "loss_interval": bounds, "perplexity": perplexity(loss),
            "perplexity_interval": bounds and [perplexity(bound) for bound in bounds],
            "accuracy": values[2 + place], "accuracy_interval": intervals[2 + place],
        }  # fmt: skip
    result["difference"] = {
        name: {
            "value": value,
            "interval": interval,
            "p": sign_flip(row, seed) if len(row) else None,
        }
        for name, row, value, interval in zip(
            ("loss", "accuracy"), rows[4:], values[4:], intervals[4:], strict=True
        )
    }
    parts = [(name, found.sources == number) for number, name in enumerate(names)]
    result["by_source"] = [
        {"source": name} | found.part(chosen, seed) for name, chosen in parts if chosen.any()
    ]
    result["by_length"] = [
        {"from": low, "to": high} | found.part(chosen, seed)
        for low, high, chosen in buckets(found.lengths)
    ]
    return result


def buckets(lengths: Ints) -> list[tuple[int, int, npt.NDArray[np.bool_]]]:
    """Lengths in tokens between powers of two: 65 to 128, 129 to 256 and so on; those up to 64 are one."""
    exponents = np.maximum(np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64), 6)
    return [
        (1 if e == 6 else 2 ** (e - 1) + 1, 2**e, exponents == e)
        for e in np.unique(exponents).tolist()
    ]


def perplexity(loss: float | None) -> float | None:
    """exp of a loss in nats; None where it is too large for a number."""
    return None if loss is None or loss > 700 else math.exp(loss)


def compare(
    found: Conversations, names: Sequence[str], questions: Sequence[dict[str, Any]],
    said: Mapping[str, Sequence[Answer]], marks: Sequence[str], seed: int, made_of: Figures,
) -> Figures:  # fmt: skip
    """What `evaluation.json` holds; docs/evaluating.md explains each figure.

    Args:
        names: of the sources. questions: with `question`, `prompt` (rendered) and `reference`. said: each
            side's answers to them. marks: of the chat format. made_of: what this was made of.
    """
    result = held_out(found, names, seed)
    spoken = {side: [answers.described(one, marks) for one in said[side]] for side in SIDES}
    for side in SIDES:
        result[side] |= answers.measured(spoken[side])
    result["difference"] |= answers.differences(*(spoken[side] for side in SIDES))
    entries = [{key: q[key] for key in ("question", "prompt", "reference")} for q in questions]
    for place, entry in enumerate(entries):
        entry |= {side: spoken[side][place] for side in SIDES}
    verdict, sentence = conclude(result, len(found))
    return {
        "schema": SCHEMA, "verdict": verdict, "sentence": sentence,
        "summary": summary(result, entries), "gate": None,
    } | result | {
        "held_out_conversations": len(found), "held_out_rows": found.rows,
        "held_out_tokens": int(found.tokens.sum()),
        "answers": entries, "made_of": made_of,
        "method": {
            "unit": "conversation", "level": LEVEL, "seed": seed, "fewest": statistics.FEWEST,
            "resamples": statistics.RESAMPLES, "part_resamples": PART_RESAMPLES,
            "flips": statistics.FLIPS, "all_signs_up_to": statistics.EXACT,
        },
    }  # fmt: skip


def conclude(result: Figures, conversations: int) -> tuple[str, str]:
    """The verdict, `better`, `worse`, `equal`, `open` or `unmeasured`, and the same as a sentence."""
    losses = [result[side]["loss"] for side in SIDES]
    change = result["difference"]["loss"]
    rates = [result[side]["stop_rate"] for side in SIDES]
    stops = ""
    if rates[0] is not None:
        stops = f"{rates[1]:.0%} of answers stop by themselves ({rates[0]:.0%} before)"
    if None in losses:
        return (
            "unmeasured",
            f"Nothing is held out, so no loss was measured{stops and '; ' + stops}.",
        )
    told = f"held-out loss {losses[0]:.3f} -> {losses[1]:.3f} nats a token"
    tail = f"{stops and ', ' + stops}."
    if change["value"] == 0:  # of floats: not one token's chance moved
        return "equal", f"The adapter changes nothing: {told}{tail}"
    if not change["interval"]:
        few = (
            f"{conversations} held-out conversation{'s are' * (conversations > 1) or ' is'} too few"
        )
        return "open", f"{few} to tell whether the tuned model is better: {told}{tail}"
    low, high = change["interval"]
    sure = f" (95 %: {low:+.3g} to {high:+.3g}, p {p_words(change['p'])})"
    verdict = "better" if high < 0 else "worse" if low > 0 else "open"
    words = {"open": "It cannot be told whether the tuned model is better"}
    return verdict, f"{words.get(verdict, f'The tuned model is {verdict}')}: {told}{sure}{tail}"


def p_words(p: float) -> str:
    """A p as people write it."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def summary(result: Figures, entries: Sequence[Figures]) -> list[list[str]]:
    """The run in three rows: words, before, after."""
    rows = []
    for name, words, form in (
        ("loss", "held-out loss, nats a token", "{:.3f}"),
        ("stop_rate", "answers that stop by themselves", "{:.0%}"),
    ):
        values = [result[side][name] for side in SIDES]
        if values[0] is not None:
            rows.append([words, *(form.format(value) for value in values)])
    rows += [[e["question"], *(e[side]["text"] for side in SIDES)] for e in entries[:1]]
    return rows


def summary_table(result: Figures) -> str:
    """The `summary`, for a terminal."""
    return table(("", "before", "after"), [[*map(visible, row)] for row in result["summary"]])


def table_of(result: Figures) -> str:
    """The measures of both sides, for a terminal."""
    return table(("evaluation", *SIDES, "change", "p"), evaluation_page.measures(result))


def metrics(result: Figures) -> Figures:
    """What the manifest says of it."""
    kept = (*SIDES, "difference", "verdict", "sentence", "gate", "health")
    return {key: result[key] for key in kept if key in result}


def write(result: Figures, folder: Path) -> None:
    """`evaluation.json`, and the same as `evaluation.md` and `evaluation.html`."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8", errors="replace")
    evaluation_page.write(result, folder)


def read(folder: Path) -> Figures:
    """The result that was written to a folder."""
    return dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
