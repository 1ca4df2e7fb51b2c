"""Base against tuned, in one load: the adapter switched off and on."""

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from stages.lib.model.answer import Speaker
from stages.lib.model.loss import Rows
from stages.lib.model.said import Answer
from stages.lib.model.scoring import Scorer, Sums
from stages.lib.run.exits import GateFailed
from stages.lib.run.parts import Done, afresh
from stages.lib.run.progress import Progress, say

SIDES = ("base", "tuned")


def held_out(
    tuned: Any, precision: str, rows: Rows, lengths: Sequence[int], tokens: int, done: Done = afresh
) -> dict[str, Sums]:
    """Each held-out row's sums of both sides.

    Args:
        tuned, precision, lengths, tokens: see `Scorer`. done: see `Parts.of`.

    Raises:
        GateFailed: a loss is not finite.
    """
    if not len(rows):
        return {side: Sums.of(torch.zeros(0, 4)) for side in SIDES}
    tokens_each = int(rows.lengths.sum())
    scorer = Scorer(tuned, precision, np.array(lengths), tokens)
    with scorer, Progress(2 * tokens_each, "tokens", name="scoring") as progress:

        def read(side: str) -> list[list[float]]:
            sums = scorer.sums(rows, side == "tuned", progress.advance)
            if not np.isfinite(sums.nll).all():
                raise GateFailed(
                    f"the held-out loss of the {side} model is not finite; train again"
                )
            return sums.lists()

        found = {}
        for number, side in enumerate(SIDES, 1):
            sums = done(f"held-out rows, {side}", functools.partial(read, side))
            progress.skip(number * tokens_each - progress.done)
            found[side] = Sums.from_lists(sums)
        return found


def spoken(
    speaker: Speaker, prompts: Sequence[Sequence[int]], done: Done = afresh
) -> dict[str, list[Answer]]:
    """Each side's answers to all prompts, token ids each, in the prompts' order.

    Args:
        done: see `Parts.of`.
    """
    found = {}
    with Progress(2 * len(prompts), "answers", name="answering") as progress:

        def speak(side: str) -> list[dict[str, Any]]:
            said = {}
            for place, answer in speaker.each(prompts, adapted=side == "tuned"):
                said[place] = asdict(answer)
                progress.advance(1)
            return [said[place] for place in range(len(prompts))]

        for side in SIDES:
            said = done(f"answers, {side}", functools.partial(speak, side))
            found[side] = [Answer(**one) for one in said]
            progress.skip(len(found) * len(prompts) - progress.done)
    for remark in speaker.remarks:
        say(remark)
    return found
