"""Base against tuned, in one load: the adapter switched off and on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stages.lib.model.answer import Speaker
from stages.lib.model.loss import Rows
from stages.lib.model.said import Answer
from stages.lib.model.scoring import Scorer, Sums
from stages.lib.run.exits import GateFailed
from stages.lib.run.progress import Progress, say

SIDES = ("base", "tuned")


def held_out(
    tuned: Any, precision: str, rows: Rows, lengths: Sequence[int], tokens: int
) -> dict[str, Sums]:
    """Each held-out row's sums of both sides.

    Args:
        tuned, precision, lengths, tokens: see `Scorer`.

    Raises:
        GateFailed: a loss is not finite.
    """
    if not len(rows):
        return {side: Sums.of(torch.zeros(0, 4)) for side in SIDES}
    found = {}
    scorer = Scorer(tuned, precision, np.array(lengths), tokens)
    with scorer, Progress(2 * int(rows.lengths.sum()), "tokens") as progress:
        for side in SIDES:
            found[side] = scorer.sums(rows, side == "tuned", progress.advance)
            if not np.isfinite(found[side].nll).all():
                raise GateFailed(
                    f"the held-out loss of the {side} model is not finite; train again"
                )
    return found


def spoken(speaker: Speaker, prompts: Sequence[Sequence[int]]) -> dict[str, list[Answer]]:
    """Each side's answers to all prompts, token ids each, in the prompts' order."""
    found = {}
    with Progress(2 * len(prompts), "answers") as progress:
        for side in SIDES:
            said = {}
            for place, answer in speaker.each(prompts, adapted=side == "tuned"):
                said[place] = answer
                progress.advance(1)
            found[side] = [said[place] for place in range(len(prompts))]
    for remark in speaker.remarks:
        say(remark)
    return found
