"""What a run did, step by step, read back from its last checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.run.fields import MEASURED

if TYPE_CHECKING:  # so that a report, which reads losses alone, does without torch
    from stages.lib.model.loss import Plan, Rows


def steps_done(checkpoint: Path) -> int:
    """The optimizer steps behind a checkpoint."""
    return int(_state(checkpoint)["global_step"])


def so_far(checkpoint: Path) -> dict[str, Any]:
    """What a run did up to a checkpoint: its `history`, `step`, and the `steps` that it is to have."""
    state = _state(checkpoint)
    return {
        "history": _history(state["log_history"]),
        "step": state["global_step"],
        "steps": state["max_steps"],
    }


def first_gradients(checkpoint: Path) -> dict[str, Any] | None:
    """What the run recorded of its first gradients, in whichever attempt; see `health.FirstGradients`."""
    key = "first_gradients"
    return next((entry[key] for entry in _state(checkpoint)["log_history"] if key in entry), None)


def _state(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / "trainer_state.json").read_text()))


def summary(plan: "Plan", rows: "Rows", last: Path) -> dict[str, Any]:
    """What a finished run did, by its plan and its last checkpoint; the losses are in nats a learned token."""
    history = _history(_state(last)["log_history"])
    used = [plan.rows(number) for number in range(plan.total_bins)]
    return {
        "steps": plan.steps,
        "epochs": plan.total_bins / plan.bins_per_epoch,
        "tokens": sum(int(rows.lengths[r].sum()) for r in used),
        "trained_tokens": sum(int(rows.trained[r].sum()) for r in used),
        "bins": plan.total_bins,
        "bins_per_step": plan.bins_per_step,
        "bins_filled": round(plan.filled, 4),
        "loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
        "history": history,
    }


def _history(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps of a run from Trainer's log; of those of a version before this one less is known."""
    names = {
        "loss": "loss",
        "eval_loss": "held_out_loss",
        "learning_rate": "learning_rate",
        "grad_norm": "grad_norm",
    } | dict(zip(MEASURED, MEASURED, strict=True))
    found = []
    for entry in log:
        values = {new: entry[old] for old, new in names.items() if old in entry}
        if "loss" in values or "held_out_loss" in values:
            found.append({"step": entry["step"]} | values)
    return found
