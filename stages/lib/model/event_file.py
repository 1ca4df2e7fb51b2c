"""TensorBoard's event file, written as it comes, without threads: an error is raised where it is made."""

from pathlib import Path
from typing import Any


class EventFile:
    """An event file of its own for each attempt, as Trainer's callback takes a writer.

    Args:
        first: what an earlier attempt has written of this step and later ones, a reader drops. at: when what
            is added was measured, UNIX seconds.
    """

    def __init__(self, folder: Path, attempt: int, first: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self.at = 0.0
        self._writer = EventsWriter(str(folder / "events"), f".attempt-{attempt:04d}")
        self._event = Event
        self._write(step=first, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **content: Any) -> None:
        import time

        self._writer.write_event(self._event(wall_time=self.at or time.time(), **content))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve."""
        from tensorboardX.summary import scalar

        self._write(step=step, summary=scalar(name, value))

    def add_text(self, name: str, content: str, step: int = 0) -> None:
        """A text, in Markdown."""
        from tensorboardX.summary import text

        self._write(step=step, summary=text(name, content))

    def flush(self) -> None:
        """Nothing: after every step that would be a wait for the disk; `sync` is for the last of several."""

    def sync(self) -> None:
        """Have all of it on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """End it."""
        self._writer.close()
