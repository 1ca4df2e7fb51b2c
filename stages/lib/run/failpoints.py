"""Named points in the work at which a test makes it fail; inert unless FAILPOINTS is set.

`FAILPOINTS="publish.file=3:kill, train.step=2:ENOSPC"`: what happens at the third and at the second arrival.
Without a number it is the first one; with `+` behind it also every one after it; with `@1` behind the action it
is in that of several processes alone. `note` says on standard error that a point was reached, and nothing
happens: so a test learns what a command reaches.
"""

import errno
import os
import re
import signal
import sys
import time

from stages.lib.run import environment
from stages.lib.run.exits import BadSetting

POINTS = {
    "scratch": "the run directory is held, scratch is about to be made",
    "lease.take": "before the holder file is created",
    "lease.beat": "before the holder file's counter moves",
    "attempt.record": "before the record of this process is written: at first, with each beat, at the end",
    "heartbeat.write": "before the heartbeat is written: at first, and with each beat of the lease",
    "lease.release": "before the holder file is removed",
    "publish.begin": "before the old artifact is retired",
    "retire.manifest": "an artifact's manifest is gone, its files are not",
    "publish.file": "before a file is copied",
    "publish.block": "a block of a file is written",
    "publish.manifest": "all files are there, the manifest is not",
    "publish.written": "the manifest is written, its folder not flushed",
    "publish.done": "an artifact is published",
    "download.block": "a block of a file of the hub is written",
    "download.whole": "a file of the hub is whole, and not in its place",
    "grow.line": "before a line of a growing file is written",
    "checkpoint.save": "a checkpoint lies whole in scratch",
    "checkpoint.saved": "a checkpoint is published, older ones are still there",
    "checkpoint.prune": "before an older checkpoint is removed",
    "shard.save": "prepared rows lie whole in scratch",
    "shard.saved": "prepared rows are published, their copy in scratch is still there",
    "shard.clear": "the data is published, before a shard is removed",
    "train.bin": "before a forward pass",
    "train.step": "after an optimizer step",
    "train.evaluate": "before the held-out rows are read",
}
ACTIONS = ("kill", "term", "hang", "note")
_FORM = re.compile(r"([a-z._]+)(?:=(\d+)(\+?))?:(\w+)(?:@(\d+))?")
_armed: dict[str, tuple[int, bool, str]] = {}
_reached: dict[str, int] = {}


def arm(rank: int = 0) -> None:
    """Read FAILPOINTS; `rank`: of this process among several.

    Raises:
        BadSetting: it names a point or an action that is none.
    """
    _armed.clear()
    _reached.clear()
    for word in filter(None, map(str.strip, environment.failpoints().split(","))):
        form = _FORM.fullmatch(word)
        if not form or form[1] not in POINTS:
            raise BadSetting(
                f"FAILPOINTS names {word!r}; write POINT=N:ACTION, POINT one of {', '.join(POINTS)}"
            )
        if form[4] not in ACTIONS and not hasattr(errno, form[4]):
            raise BadSetting(
                f"FAILPOINTS names {word!r}; an action is {', '.join(ACTIONS)} or an errno's name"
            )
        if form[5] in (None, str(rank)):
            _armed[form[1]] = (int(form[2] or 1), bool(form[3]), form[4])


def reach(name: str) -> None:
    """What FAILPOINTS says for this arrival at a point: nothing, mostly.

    Raises:
        OSError: an errno was asked for.
    """
    if name not in _armed:
        return
    _reached[name] = _reached.get(name, 0) + 1
    at, onwards, action = _armed[name]
    if _reached[name] != at and not (onwards and _reached[name] > at):
        return
    if action == "hang":
        time.sleep(3600)
    elif action == "note":
        print(f"failpoint {name}", file=sys.stderr, flush=True)
    elif action in ACTIONS:
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGTERM)
    else:
        number = int(getattr(errno, action))
        raise OSError(number, os.strerror(number))
