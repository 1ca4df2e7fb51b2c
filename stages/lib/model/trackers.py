"""Trackers: Trainer's own integrations, in a thread that keeps their errors and their waits to itself.

They are told of the run's settings and its curves, under the names of `fields`, and of nothing else: not of
Trainer's arguments, the model's config, the command line, the host or what is printed.
"""

import contextlib
import queue
import threading
import time
from types import TracebackType
from typing import Any

from transformers import TrainerControl, TrainerState

from stages.lib.model import integrations
from stages.lib.run import preemption, redaction, tracking
from stages.lib.run.exits import NoPermission
from stages.lib.run.fields import FIELDS
from stages.lib.run.progress import say
from stages.lib.run.rundir import Run
from stages.lib.run.tracking import Curves

TOGETHER_SECONDS = 5.0  # entries are handed over together, behind a note of how far they go
CATCH_UP_SECONDS = 2.0
AGAIN_SECONDS = 60.0  # after a tracker has failed
START_SECONDS, END_SECONDS = 60.0, 30.0
MOST = 20_000  # entries that wait; after that the oldest go


def begin(run: Run, kind: str, resumed: int | None) -> "Tracker | None":
    """The tracker of a run, begun; None where there is none.

    Args:
        resumed: the step that the run goes on from.

    Raises:
        NoPermission: it does not let us in.
    """
    if kind == "none":
        return None
    return Tracker(tracking.curves(run, kind, resumed)).begin()


def logs(entry: dict[str, Any]) -> dict[str, float]:
    """What is logged of an entry of the history, as Trainer names it before an integration renames it.

    `rewrite_logs` puts `train/` before a name, and `eval/` in place of `eval_`.
    """
    if "held_out_loss" in entry:
        entry = {"held_out_loss": entry["held_out_loss"]}
    named = {FIELDS[n].tracked: v for n, v in entry.items() if n in FIELDS and v is not None}
    return {
        name.removeprefix("train/").replace("eval/", "eval_"): float(value)
        for name, value in named.items() if name
    }  # fmt: skip


class Tracker:
    """Hands the entries of a history to a tracker; as a context it ends with the steps."""

    def __init__(self, curves: Curves) -> None:
        self.curves = curves
        self._had = curves.step  # of earlier attempts
        self.entries: queue.Queue[tuple[int, dict[str, Any]] | threading.Event | None] = (
            queue.Queue()
        )
        self.said: str | None = None
        self._error: BaseException | None = None
        self._ready, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._callback: Any = None

    def begin(self) -> "Tracker":
        """Open it, and wait until that is done or will take longer.

        Raises:
            NoPermission: it does not let us in; whatever else fails may be better later.
        """
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._ready.wait(0.1) and time.monotonic() < deadline:
            preemption.check()
        if self._error is not None and integrations.is_refusal(self._error):
            raise NoPermission(
                f"TRACKER={self.curves.kind} was refused ({_line(self._error)}); give it another key, or "
                "TRACKER=tensorboard, which needs none"
            ) from self._error
        return self

    def note(self, step: int, entry: dict[str, Any]) -> None:
        """One more entry of the history; waits for nothing."""
        self.entries.put((step, entry))

    def catch_up(self) -> None:
        """Wait until the tracker has what it was told of, though not for long."""
        done = threading.Event()
        self.entries.put(done)
        done.wait(CATCH_UP_SECONDS)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: object) -> None:
        self.entries.put(None)
        left = preemption.left()
        seconds = END_SECONDS if left is None else min(END_SECONDS, left / 2)
        if not self._over.wait(seconds):
            say(
                f"{self.curves.kind} has not taken all curves in {seconds:.0f} s, and is not waited for; the "
                "adapter's manifest has them"
            )

    def _work(self) -> None:
        waiting: list[tuple[int, dict[str, Any]]] = []
        asked: list[threading.Event] = []
        ended, again = False, 0.0
        self._attempt(self._open)
        self._ready.set()
        while not ended:
            ended = self._gather(waiting, asked)
            if waiting and (ended or time.monotonic() >= again):
                if self._attempt(self._hand_over, waiting):
                    waiting.clear()
                else:
                    again = time.monotonic() + AGAIN_SECONDS
                    del waiting[:-MOST]
            for event in asked:
                event.set()
            asked.clear()
        self._attempt(self._close)
        self._over.set()

    def _gather(
        self, waiting: list[tuple[int, dict[str, Any]]], asked: list[threading.Event]
    ) -> bool:
        """Take what comes within a few seconds, or until somebody asks for it; whether that was all."""
        until = time.monotonic() + TOGETHER_SECONDS
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                entry = self.entries.get(timeout=left)
                if entry is None:
                    return True
                if isinstance(entry, threading.Event):
                    asked.append(entry)
                    break
                waiting.append(entry)
        return False

    def _attempt(self, act: Any, *given: Any) -> bool:
        """Whether it went well; what went wrong is said once."""
        with _Hiccup() as hiccup:
            act(*given)
        self._error = hiccup.error
        if hiccup.error is not None and not self.said:
            self.said = _line(hiccup.error)
            say(
                f"{self.curves.kind} failed ({self.said}): the training goes on, its curves may lack a piece"
            )
        return hiccup.error is None

    def _open(self) -> None:
        if self._callback is None:
            self._callback = integrations.of(self.curves)
        self._callback.on_train_begin(None, self._state(0), TrainerControl())

    def _state(self, step: int) -> TrainerState:
        return TrainerState(global_step=step, is_world_process_zero=True)

    def _hand_over(self, waiting: list[tuple[int, dict[str, Any]]]) -> None:
        """Give all that waits to the integration; what it fails at comes again."""
        if self._callback is None or not self._callback.is_open():
            self._open()
        skips = self._callback.keeps_what_it_has
        if (
            skips
        ):  # noted before: after a kill a piece of the curve may lack, and none is there twice
            last = max(_place(*waiting[-1]), self._had)
            self.curves.keep(last, self._callback.run_id())
        while waiting:
            step, entry = waiting[0]
            if not skips or _place(step, entry) > self._had:
                self._callback.at(entry["at"])
                self._callback.on_log(None, self._state(step), TrainerControl(), logs=logs(entry))
            waiting.pop(0)
        self._callback.sync()

    def _close(self) -> None:
        if self._callback is not None:
            self._callback.on_train_end(None, self._state(0), TrainerControl())


def _place(step: int, entry: dict[str, Any]) -> float:
    """Of an entry in a history: an evaluation comes behind its step."""
    return step + 0.5 * ("held_out_loss" in entry)


def _line(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return redaction.said(words if len(words) <= 200 else words[:197] + "...")


class _Hiccup:
    """Keeps whatever a tracker raises away from the training: any of its own errors, which nobody can list."""

    error: BaseException | None = None

    def __enter__(self) -> "_Hiccup":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.error = error
        return True
