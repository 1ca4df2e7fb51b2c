"""The account of every row and token, from what was read to what is learned."""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from stages.lib.data.preparation import Outcome
from stages.lib.run.exits import BadData

Ints = npt.NDArray[np.int64]

FILE, REJECTS = "ledger.jsonl", "rejects.jsonl"
SHOWN = 20
QUANTILES = (0, 0.25, 0.5, 0.75, 0.95, 1)
UNTRAINABLE = ("no_answer", "nothing_to_learn")


@dataclass
class Ledger:
    """What became of every row and token.

    Attributes:
        tokens_encoded: of all rows that were tokenised, before anything was cut, dropped or repeated. Always
            `tokens_encoded - tokens_lost + tokens_added == tokens`.
        torn: bad rows after which nothing of their file could be read.
        tokens_added: what a cut or a split puts back (EOS, BOS, the system turn), and rows repeated by weight.
        lengths: tokens of a row -> how many rows of the artifact have so many.
    """

    folder: Path
    keep_text: bool = False
    rows_read: int = 0
    rows_kept: int = 0
    rows_held_out: int = 0
    rows_dropped: Counter[str] = field(default_factory=Counter)
    rows_truncated: int = 0
    rows_split: int = 0
    rows_written: int = 0
    rows_going_on: int = 0
    turns_dropped: int = 0
    tokens_encoded: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    tokens_lost: int = 0
    rows_ending_in_trained_eos: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    too_long: Counter[int] = field(default_factory=Counter)
    torn: int = 0
    bad: list[str] = field(default_factory=list)
    examples: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> "Ledger":
        self._lines: TextIO = (self.folder / FILE).open("w", encoding="utf-8")
        self._rejects: TextIO = (self.folder / REJECTS).open("w", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
        self._rejects.close()

    def lose(self, row: int, where: str, reason: str, tokens: int, **facts: Any) -> None:
        """Note what a row lost, or that it was lost."""
        self.tokens_lost += tokens
        entry = {"row": row, "where": where, "reason": reason, "tokens_lost": tokens} | facts
        self._lines.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def drop(self, row: int, where: str, reason: str, tokens: int = 0, **facts: Any) -> None:
        """Note a row that is not kept."""
        self.rows_dropped[reason] += 1
        self.lose(row, where, reason, tokens, **facts)

    def refuse(self, row: int, where: str, file: str, outcome: Outcome) -> None:
        """Note a row that could not be read, or holds nothing to learn, or does not fit."""
        facts = {"detail": outcome.detail} if outcome.detail else {}
        self.drop(row, where, outcome.reason, outcome.tokens, **facts)
        if outcome.reason != "bad":
            self.examples.setdefault(outcome.reason, f"{where} ({outcome.detail})")
            if outcome.reason == "too_long":
                self.too_long[outcome.tokens] += 1
            return
        self.torn += outcome.last
        if len(self.bad) < SHOWN:
            self.bad.append(f"{where}: {outcome.detail}")
        entry = {
            "row": row, "file": file, "line": outcome.line, "byte": outcome.byte, "reason": outcome.detail,
        }  # fmt: skip
        if self.keep_text:
            entry["text"] = outcome.raw
        self._rejects.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def keep(self, row: int, where: str, outcome: Outcome, part: str) -> None:
        """Note a row that is kept, and what it lost."""
        self.rows_kept += 1
        self.rows_held_out += part == "held_out"
        self.rows_going_on += outcome.going_on
        self.turns_dropped += outcome.turns
        if outcome.turns:
            self.lose(row, where, "unanswered", outcome.unanswered, turns=outcome.turns)
        if outcome.long:
            split = outcome.pieces > 1
            self.rows_split += split
            self.rows_truncated += not split
            self.lose(
                row, where, "split" if split else "truncated", outcome.cut, pieces=outcome.pieces
            )

    def write(self, tokens: Ints, learned: Ints, ended: Ints) -> None:
        """Count rows of the artifact: their tokens, those learned, and whether each ends in a learned stop."""
        self.rows_written += len(tokens)
        self.tokens += int(tokens.sum())
        self.trainable_tokens += int(learned.sum())
        self.rows_ending_in_trained_eos += int(ended.sum())
        self.lengths.update(tokens.tolist())

    def metrics(self) -> dict[str, Any]:
        """For the manifest; `length_quantiles` are tokens of the artifact's rows."""
        names = (
            "rows_read", "rows_kept", "rows_held_out", "rows_truncated", "rows_split", "rows_written",
            "turns_dropped", "tokens_encoded", "tokens", "trainable_tokens", "tokens_lost",
            "rows_ending_in_trained_eos",
        )  # fmt: skip
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        found["rows_dropped"] = dict(self.rows_dropped)
        found["tokens_added"] = self.tokens - self.tokens_encoded + self.tokens_lost
        found["length_quantiles"] = {f"{q:g}": _quantile(self.lengths, q) for q in QUANTILES}
        return found

    def check(
        self, name: str, *, max_bad_rows: int, max_length: int, on_long: str, allowed: Collection[str],
        fail_on_leakage: bool,
    ) -> None:  # fmt: skip
        """Refuse a data set that is not what it should be.

        Raises:
            BadData: and what is the matter with it.
        """
        dropped, read = self.rows_dropped, self.rows_read
        self._check_bad(name, max_bad_rows)
        untrainable = sum(dropped[reason] for reason in UNTRAINABLE)
        if untrainable and "nothing-to-learn" not in allowed:
            example = next(self.examples[reason] for reason in UNTRAINABLE if dropped[reason])
            raise BadData(
                f"{name} has {untrainable} of {read} rows without a trainable token, first {example}; mend "
                "them, or leave them out with ALLOW=nothing-to-learn"
            )
        if dropped["empty_answer"] > 0.01 * read and "empty-answers" not in allowed:
            raise BadData(
                f"{name} has {dropped['empty_answer']} of {read} rows with an empty answer, over 1 %; mend "
                "them, or leave them out with ALLOW=empty-answers"
            )
        if on_long == "error" and dropped["too_long"]:
            raise BadData(
                f"{name} has {dropped['too_long']} of {read} rows over MAX_LENGTH {max_length}, first "
                f"{self.examples['too_long']}; raise it, or choose ON_LONG=truncate, split or drop"
            )
        if dropped["leaked"] and fail_on_leakage:
            raise BadData(
                f"{name} has {dropped['leaked']} rows for training that its test split holds too; remove them, "
                "or have them left out without FAIL_ON_LEAKAGE"
            )
        self._check_left(name, max_length)
        ended, due = self.rows_ending_in_trained_eos, self.rows_written - self.rows_going_on
        if ended < 0.99 * due and "unended" not in allowed:
            raise BadData(
                f"{name}: only {ended} of {due} rows end in a trained EOS, so answers would not stop; mend the "
                "chat template, or accept it with ALLOW=unended"
            )

    def _check_bad(self, name: str, most: int) -> None:
        count = self.rows_dropped["bad"]
        if count <= most and not self.torn:
            return
        more = f"\n  and {count - len(self.bad)} more" if count > len(self.bad) else ""
        listed = "".join(f"\n  {words}" for words in self.bad) + more
        raise BadData(
            f"{name} has {count} bad of {self.rows_read} rows, MAX_BAD_ROWS is {most}:{listed}\n"
            f"mend them{', or raise MAX_BAD_ROWS to leave them out' * (not self.torn)}"
        )

    def _check_left(self, name: str, max_length: int) -> None:
        if self.rows_kept > self.rows_held_out:
            return
        if not self.rows_read:
            raise BadData(f"{name} has no rows; it is empty")
        lost = ", ".join(f"{n} {reason}" for reason, n in self.rows_dropped.items() if n)
        held = f", {self.rows_held_out} held out" if self.rows_held_out else ""
        long = ""
        if self.too_long:
            longest, median = (_quantile(self.too_long, share) for share in (1, 0.5))
            long = (
                f"; of those over MAX_LENGTH {max_length} the longest has {longest} tokens, the median "
                f"{median}"
            )
        raise BadData(
            f"{name} leaves no row to train on: {self.rows_read} read, {lost or 'none dropped'}{held}{long}; "
            "add rows, or mend what drops them"
        )


def _quantile(counted: Counter[int], share: float) -> int:
    """The value below which a share of the counted ones lie."""
    count, passed = counted.total(), 0
    for value in sorted(counted):
        passed += counted[value]
        if passed > min(count - 1, int(share * count)):
            return value
    return 0
