"""What happens around the steps of a run: progress, evaluations, checkpoints, and numbers that are none."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.lib.model.account import FIRST_SAVE_SECONDS, SAVE_SECONDS, Account, evaluation_steps
from stages.lib.model.loss import Plan
from stages.lib.model.pending import Numbers
from stages.lib.run import failpoints
from stages.lib.run.exits import Diverged

# A loss has strayed when it is so many times its level, the median of the steps before, for so many steps.
STRAY, STRAY_STEPS, LEVEL_STEPS, LEVEL_LEAST = 3.0, 20, 50, 5


class Steps(Protocol):
    """The run's bins, step by step."""

    plan: Plan

    def work(self, step: int) -> tuple[int, int]: ...
    def places(self, step: int, bins: Collection[int]) -> list[dict[str, Any]]: ...


class Conduct(TrainerCallback):
    """Watches the loop: progress, evaluations, checkpoints, and losses that must be finite.

    A step's numbers are read when the next step has been handed to the GPU, so that the host need not wait in
    between; but before an evaluation, a checkpoint and the end, so that nothing is kept of a step that failed.

    Args:
        evaluates: there are held-out rows. saved: see `train`. account: told of all that happens.
        numbers: of the step that was just handed over, on the device: its loss, the norm of its gradient, each
            bin's share of the loss, and what more there is.
        judged: told of a step's number, its loss, and what more there was; what the log is to remember of it.
        words: of the model's vocabulary.
    """

    def __init__(
        self,
        bins: Steps,
        evaluates: bool,
        saved: Callable[[Path, int, float | None], None],
        account: Account,
        numbers: Callable[[], torch.Tensor],
        judged: Callable[[int, float, Sequence[float]], dict[str, Any]],
        words: int,
    ) -> None:
        self.bins, self.evaluates, self.saved, self.account = bins, evaluates, saved, account
        self.numbers, self.judged, self.words = numbers, judged, words
        self.pending: deque[Numbers] = deque()
        self.evaluate_at = evaluation_steps(bins.plan.steps)
        self.held_out_loss: dict[int, float] = {}
        self.saved_step = 0
        self.next_save = time.monotonic() + FIRST_SAVE_SECONDS

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.account.begin()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rate = float(kwargs["lr_scheduler"].get_last_lr()[0])
        self.pending.append(Numbers(state.global_step + 1, rate, self.numbers()))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        failpoints.reach("train.step")
        if state.global_step in self.evaluate_at:
            control.should_evaluate = self.evaluates
            control.should_save = True
        elif time.monotonic() >= self.next_save:
            control.should_save = True
        self.settle(state, 0 if control.should_save else 1)
        if control.should_save:
            self.account.pause("evaluating" if control.should_evaluate else "saving")

    def settle(self, state: TrainerState, but: int = 0) -> None:
        """Read what is pending, but for the last `but` steps; waits until the GPU is through with the others.

        Raises:
            Diverged: a loss or a gradient is not finite, or the loss has strayed. GateFailed: a module has no
                gradient.
        """
        while len(self.pending) > but:
            numbers = self.pending.popleft()
            loss, norm, *rest = numbers.read()
            bins = len(self.bins.plan.step(numbers.step - 1))
            self._check_finite(numbers.step, loss, norm, rest[:bins])
            work = self.bins.work(numbers.step - 1)
            found = {"loss": loss, "grad_norm": norm, "learning_rate": numbers.learning_rate}
            noted = self.judged(numbers.step, loss, rest[bins:]) if rest[bins:] else {}
            measured = self.account.step(numbers.step, *work, numbers.ended, found)
            state.log_history.append(found | measured | noted | {"step": numbers.step})
            check_level(state.log_history, self.words)

    def _check_finite(self, step: int, loss: float, norm: float, shares: Sequence[float]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        # A loss says of which bin it is, the norm of their sum does not.
        bad = [bin for bin, share in enumerate(shares) if not math.isfinite(share)]
        bins = bad or list(range(len(shares)))
        what = (
            f"a gradient of step {step}" if math.isfinite(loss) else f"the loss after step {step}"
        )
        rows = self.bins.places(step - 1, bins)
        raise Diverged(
            f"{what} is not finite; lower LEARNING_RATE, or mend its {len(rows)} rows, which error.json names "
            "(the step was not taken, and the checkpoint before it is kept)",
            step=step,
            bins=bins,
            rows=rows,
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "eval_loss" in logs:
            control.should_evaluate = False  # else Trainer does it again when an epoch ends here
            loss = logs["eval_loss"]
            if not math.isfinite(loss):
                raise Diverged(
                    f"the held-out loss after step {state.global_step} is not finite; lower LEARNING_RATE "
                    "(the checkpoint before it is kept)",
                    step=state.global_step,
                )
            self.held_out_loss[state.global_step] = loss
            state.log_history[-1].update(self.account.evaluated(state.global_step, loss))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        self.account.saving()
        self.saved(
            Path(str(args.output_dir)) / f"checkpoint-{step}", step, self.held_out_loss.get(step)
        )
        self.account.saved()
        self.saved_step, self.next_save = step, time.monotonic() + SAVE_SECONDS

    def owes_evaluation(self, step: int) -> bool:
        """Whether a step was to be evaluated and was not: to go on from there would lose its measure."""
        return self.evaluates and step in self.evaluate_at and step not in self.held_out_loss


def check_level(log: Sequence[dict[str, Any]], words: int) -> None:
    """Refuse to go on where the loss has left its level for good.

    Args:
        log: of all steps so far, of earlier attempts too. words: of the vocabulary.

    Raises:
        Diverged: the last `STRAY_STEPS` losses are each above three times the median of those before, and above
            that of guessing.
    """
    losses = [entry["loss"] for entry in log[-2 * (STRAY_STEPS + LEVEL_STEPS) :] if "loss" in entry]
    last, before = losses[-STRAY_STEPS:], losses[-STRAY_STEPS - LEVEL_STEPS : -STRAY_STEPS]
    if len(before) < LEVEL_LEAST:
        return
    level = statistics.median(before)
    bound = max(STRAY * level, math.log(words))
    if min(last) > bound:
        step = log[-1]["step"]
        raise Diverged(
            f"the loss was above {bound:.2f} in all of the last {STRAY_STEPS} steps, up to step {step}, and "
            f"{level:.2f} before: it diverged; lower LEARNING_RATE or raise WARMUP",
            step=step,
        )
