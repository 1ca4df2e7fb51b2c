"""What happens around the steps of a run: progress, evaluations, checkpoints, and numbers that are none."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.lib.model.loss import Plan
from stages.lib.run.exits import Diverged
from stages.lib.run.progress import Progress

EVALUATIONS = 4
WARM_STEPS = 2  # of an attempt, in which the compiler and the allocator are still at work
FIRST_SAVE_SECONDS, SAVE_SECONDS = 100.0, 600.0


class Steps(Protocol):
    """The run's bins, step by step."""

    plan: Plan

    def tokens(self, step: int) -> int: ...


class Conduct(TrainerCallback):
    """Watches the loop: progress, evaluations, checkpoints, and losses that must be finite."""

    def __init__(
        self,
        bins: Steps,
        evaluates: bool,
        saved: Callable[[Path, int, float | None], None],
        progress: Progress,
    ) -> None:
        self.bins, self.evaluates, self.saved, self.progress = bins, evaluates, saved, progress
        # The last step and up to three before it, evenly.
        self.evaluate_at = {
            -(-bins.plan.steps * i // EVALUATIONS) for i in range(1, EVALUATIONS + 1)
        }
        self.held_out_loss: dict[int, float] = {}
        self.saved_step = 0
        self.steps, self.tokens, self.seconds, self.warming = 0, 0, 0.0, 0.0
        self.next_save = time.monotonic() + FIRST_SAVE_SECONDS
        self.began = time.monotonic()  # the step that is running

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        now = time.monotonic()
        self.steps += 1
        if self.steps == WARM_STEPS + 1:
            self.warming, self.tokens, self.seconds = self.seconds, 0, 0.0
        self.tokens += self.bins.tokens(step - 1)
        self.seconds, self.began = self.seconds + now - self.began, now
        if step in self.evaluate_at:
            control.should_evaluate = self.evaluates
            control.should_save = True
        elif now >= self.next_save:
            control.should_save = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        loss = logs.get("eval_loss", logs.get("loss", 0.0))
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss after step {state.global_step} is not finite; lower LEARNING_RATE "
                "(the checkpoint before it is kept)"
            )
        if "eval_loss" in logs:
            self.held_out_loss[state.global_step] = logs["eval_loss"]
            self.progress.update(state.global_step, held_out_loss=logs["eval_loss"])
            self.began = time.monotonic()
        elif "loss" in logs:
            self.progress.update(
                state.global_step,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                tokens_per_second=self.tokens / max(self.seconds, 1e-9),
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        self.saved(
            Path(str(args.output_dir)) / f"checkpoint-{step}", step, self.held_out_loss.get(step)
        )
        self.began = time.monotonic()
        self.saved_step, self.next_save = step, self.began + SAVE_SECONDS

    def owes_evaluation(self, step: int) -> bool:
        """Whether a step was to be evaluated and was not: to go on from there would lose its measure."""
        return self.evaluates and step in self.evaluate_at and step not in self.held_out_loss
