"""What is told of a training while it goes on: history, display, tracker, and the time that is left."""

import time
from typing import Any

from stages.lib.model import ceiling
from stages.lib.model.cutting import EVALUATIONS
from stages.lib.model.load import peak_gpu_bytes
from stages.lib.model.pace import Pace
from stages.lib.model.pending import Moment
from stages.lib.run import fields
from stages.lib.run.progress import Progress

FIRST_SAVE_SECONDS, SAVE_SECONDS = 100.0, 600.0
FORWARD = 1 / 3  # of a training step's time, for as many tokens


def evaluation_steps(steps: int) -> set[int]:
    """The last step and up to three before it, evenly: behind these is evaluated and saved."""
    return {-(-steps * i // EVALUATIONS) for i in range(1, EVALUATIONS + 1)}


class Untracked:
    """No tracker."""

    def note(self, step: int, entry: dict[str, Any]) -> None:
        """Nowhere."""

    def catch_up(self) -> None:
        """There is nothing to wait for."""


class Account:
    """Keeps the time of steps, evaluations and checkpoints, and tells of them.

    Args:
        steps: of the run. done: before this attempt. attempt: its number.
        ceiling: FLOP/s of large products on one of the `gpus`, where known.
        held_out: tokens of an evaluation; 0 where nothing is held out.
        compiles: the first step is compiled. tracker: told of each entry of the history.
    """

    def __init__(
        self,
        steps: int,
        done: int = 0,
        *,
        attempt: int = 0,
        ceiling: float | None = None,
        gpus: int = 1,
        held_out: int = 0,
        compiles: bool = False,
        tracker: Any = None,
    ) -> None:
        self.steps, self.attempt, self.ceiling, self.gpus = steps, attempt, ceiling, gpus
        self.held_out, self.tracker = held_out, tracker or Untracked()
        self.pace = Pace()
        # Until a step is through, all that is known is that it was begun.
        name = "compiling" if compiles else "starting"
        self.progress = Progress(steps, "steps", done, name, self.remaining)
        self._evaluation: float | None = None
        self._save = 0.0
        self._stopped = done  # the last step behind which is nothing left to evaluate and save
        self._since = time.monotonic()

    def begin(self) -> None:
        """The next step begins now."""
        self.pace.begin()

    def step(
        self, number: int, tokens: int, operations: int, ended: Moment, found: dict[str, Any]
    ) -> dict[str, Any]:
        """A step is through, with what was `found` of it; what is to be remembered beside."""
        self.pace.add(tokens, operations, ended)
        seconds = self.pace.durations[-1]
        measured = self._measured() | {"tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}
        share = ceiling.share(operations / max(seconds, 1e-9), self.ceiling, self.gpus)
        self.tracker.note(number, found | measured | ({"ceiling_share": share} if share else {}))
        self.progress.become("training")
        self.progress.update(number, **found, **self._speed())
        return measured

    def _speed(self) -> dict[str, Any]:
        """Nothing before there is a pace: the first steps say how long compiling took."""
        if not self.pace.warm:
            return {"tokens_per_second": None, "ceiling_share": None}
        share = ceiling.share(self.pace.flops_per_second, self.ceiling, self.gpus)
        return {"tokens_per_second": self.pace.tokens_per_second, "ceiling_share": share}

    def _measured(self) -> dict[str, Any]:
        used = peak_gpu_bytes()
        memory = {"rss_bytes": fields.resident()} if used is None else {"gpu_bytes": used}
        return {"at": round(time.time(), 3), "attempt": self.attempt} | memory

    def pause(self, name: str) -> None:
        """The steps pause, for what is called so."""
        self._since = time.monotonic()
        self.progress.become(name)

    def evaluated(self, number: int, loss: float) -> dict[str, Any]:
        """The held-out loss was measured behind a step; what is to be remembered beside."""
        self._evaluation = time.monotonic() - self._since
        self.pause("saving")
        measured = self._measured()
        self.tracker.note(number, {"held_out_loss": loss} | measured)
        self.progress.update(number, held_out_loss=loss)
        self.pace.begin()
        return measured

    def saving(self) -> None:
        """What a checkpoint holds is to be in the curves, too: the process may be killed behind it."""
        self.tracker.catch_up()

    def saved(self) -> None:
        """A checkpoint is published."""
        self._save = time.monotonic() - self._since
        self._stopped = self.progress.done
        self.pause("training")
        self.pace.begin()

    def remaining(self) -> float | None:
        """Seconds until the last step is saved; None before there is a pace.

        Steps, evaluations and checkpoints to come, each as long as the last ones took; an evaluation that there
        was none of yet as long as a forward pass should take.
        """
        if not self.pace.warm:
            return None
        done = self.progress.done
        stops = sum(step > self._stopped for step in evaluation_steps(self.steps))
        training = (self.steps - done) * self.pace.mean_step_seconds
        evaluation = self._evaluation
        if evaluation is None:
            evaluation = FORWARD * self.held_out / max(self.pace.tokens_per_second, 1e-9)
        saves = stops + int(training // SAVE_SECONDS)
        return training + stops * evaluation * bool(self.held_out) + saves * self._save
