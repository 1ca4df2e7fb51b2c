"""The display of a stage on a terminal: what it does and how far it is in a line, its figures in a second one.

Both fit the terminal as it is at that moment, whatever its width: figures that do not fit are left out, the
least interesting first.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stages.lib.run import fields

WIDEST = 100  # a terminal that is made narrower breaks the lines of the last frame, unless they were short
BAR, LEAST_BAR = 30, 6
TURNS = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
FRAMES_A_SECOND = 4


class Display:
    """Two lines that are written over and over.

    Args:
        stage: its name. state: see `progress.state`.
    """

    def __init__(self, stage: str, state: Callable[[], dict[str, Any]]) -> None:
        self.stage, self.state = stage, state
        console = Console(stderr=True, highlight=False)
        # What is meant for a pipe must not be led to the terminal.
        self.live = Live(
            self, console=console, refresh_per_second=FRAMES_A_SECOND, transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip

    def start(self) -> None:
        """Begin to show."""
        self.live.start()

    def end(self, leave: bool, last: bool) -> None:
        """A phase ends: leave its last frame where it stands, if it counted; stop if it was the last."""
        frame = list(self.lines(self.live.console.width)) if leave else []
        if last:
            self.live.stop()
        for line in frame:
            self.live.console.print(line)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield from self.lines(options.max_width)

    def lines(self, width: int) -> Iterator[Any]:
        """The frame for a terminal of so many columns."""
        now = self.state()
        width = min(width, WIDEST) - 1  # a full last column would wrap on some terminals
        yield self._first(now, width)
        figures = _fitting([fields.shown(name, now.get(name)) for name in fields.FIELDS], width - 2)
        if figures and now["done"] is not None:
            yield Text(f"  {figures}", no_wrap=True, overflow="crop")

    def _first(self, now: dict[str, Any], width: int) -> Any:
        head = f"{self.stage}: {now['phase'] or 'ending'}"
        turn = TURNS[int(time.monotonic() * FRAMES_A_SECOND) % len(TURNS)]
        if now["done"] is None:
            text = f"{turn} {head} {_clock(now['phase_seconds'])}"
            return Text(text, no_wrap=True, overflow="crop")
        total = f"/{now['total']:,}" if now["total"] else ""
        count = f"{now['done']:,}{total} {now['unit']}"
        left = now["eta_seconds"]
        rest = f"{_clock(left)} left" if left is not None else _clock(now["phase_seconds"])
        if len(f"{head}  {count}  {rest}") > width:
            head = now["phase"] or "ending"
        text = _fitting([head, count, rest], width)
        room = min(width - len(text) - 2, BAR)
        if not now["total"] or room < LEAST_BAR or rest not in text:
            return Text(text, no_wrap=True, overflow="crop")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            Text(text.removesuffix(rest).strip(), no_wrap=True),
            ProgressBar(total=now["total"], completed=now["done"], width=room),
            Text(rest, no_wrap=True),
        )
        return grid


def _fitting(words: list[str], width: int) -> str:
    """As many of them from the first on as `width` has room for, two blanks between."""
    text = ""
    for word in filter(None, words):
        longer = f"{text}  {word}" if text else word
        if len(longer) > width:
            break
        text = longer
    return text


def _clock(seconds: float) -> str:
    """0:07, 12:34 or 3:07:12."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
