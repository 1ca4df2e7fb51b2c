"""Base against tuned, in one load: the adapter switched off and on."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from stages.lib.model.answer import Speaker
from stages.lib.model.loss import Rows, held_out_bins, mean_nll
from stages.lib.model.said import Stops
from stages.lib.run.exits import GateFailed
from stages.lib.run.progress import Progress


def compare(
    tuned: Any,
    tokens: Any,
    precision: str,
    held_out: Rows,
    capacity: int,
    questions: Sequence[dict[str, Any]],
    stops: Stops,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Held-out loss and answers of both sides.

    Args:
        capacity: tokens of a forward pass. questions: with `question`, `prompt` (rendered), its `ids` and
        `reference`.

    Returns:
        `base` and `tuned`, each with `loss` (nats a learned token), `perplexity`, `stop_rate` (share of answers
        that ended by themselves) and `answer_tokens` (mean); `answers`, a question each with what both said.
        Where there is nothing held out, the numbers are None.
    """
    bins = held_out_bins(held_out.lengths, capacity)
    sides: dict[str, dict[str, Any]] = {}
    answers = [{key: q[key] for key in ("question", "prompt", "reference")} for q in questions]
    work = 2 * (int(held_out.lengths.sum()) + max_new_tokens * len(questions))
    speaker = Speaker(tuned, precision, tokens, stops, max_new_tokens)
    with Progress(work, "tokens") as progress:
        for side in ("base", "tuned"):
            with tuned.disable_adapter() if side == "base" else contextlib.nullcontext():
                loss = None
                if bins:
                    rows = ([held_out[row] for row in b] for b in bins)
                    loss = mean_nll(tuned, precision, rows, progress.advance)
                    if not math.isfinite(loss):
                        raise GateFailed(
                            f"the held-out loss of the {side} model is not finite; train again"
                        )
            spoken = {}
            asked = [question["ids"] for question in questions]
            for place, one in speaker.each(asked, adapted=side == "tuned"):
                spoken[place] = one
                progress.advance(max_new_tokens)
            found = [spoken[place] for place in range(len(questions))]
            for entry, said in zip(answers, found, strict=True):
                entry[side] = {"text": said.text, "tokens": said.tokens, "finish": said.finish}
            sides[side] = {
                "loss": loss,
                "perplexity": None if loss is None or loss > 700 else math.exp(loss),
                "stop_rate": _mean([said.finish == "stop" for said in found]),
                "answer_tokens": _mean([said.tokens for said in found]),
            }
    counts = {"held_out_rows": len(held_out), "held_out_tokens": int(held_out.trained.sum())}
    return sides | counts | {"answers": answers}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
