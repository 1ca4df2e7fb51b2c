"""The ways to end: the one table of exit codes, for `error.json`, documents and batch services."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ending:
    """A way to end: its exit code, its name for programs, what it means, and what to do about it."""

    code: int
    slug: str
    meaning: str
    hint: str
    retry: bool = False


AGAIN = "run the same command again; it goes on"
ENDINGS = (
    Ending(0, "done", "the artifact is complete and verified, or was already", "-"),
    Ending(2, "usage", "a wrong flag, setting or preset", "correct what the message names"),
    Ending(65, "bad-data", "bad rows or files; a corrupt or foreign artifact", "mend what the message names"),
    Ending(66, "missing-input", "an input is not there", "run the stage or give what the message names"),
    Ending(70, "fault", "our own fault, with a traceback", "report the traceback"),
    Ending(70, "no-progress", "three attempts got nowhere", "mend what the attempts say, then run it again"),
    Ending(73, "cannot-write", "the disk is full or cannot be written", "make room, or choose another folder"),
    Ending(75, "stopped", "stopped by a signal or MAX_RUNTIME, the state safe", AGAIN, True),
    Ending(75, "try-again", "a hiccup of the hub, the volume or the machine", AGAIN, True),
    Ending(75, "in-use", "another process works here", "wait for it, or choose another RUN_DIR", True),
    Ending(77, "no-permission", "a gated model, or a missing or wrong token", "accept the terms, set HF_TOKEN"),
    Ending(78, "cannot-run", "impossible here, or the run has other settings", "change what the message names"),
    Ending(80, "diverged", "the loss or a gradient is not finite", "lower LEARNING_RATE"),
    Ending(81, "out-of-memory", "the GPU is too small for the least setting", "lower what the message names"),
    Ending(82, "gate-failed", "a result is not what was asked for", "look at the result, or lower the gate"),
    Ending(130, "interrupted", "a second Ctrl-C", AGAIN),
    Ending(137, "killed", "SIGKILL: the grace was over, or the memory", AGAIN, True),
    Ending(143, "terminated", "SIGTERM before it was listened to, or a second one", AGAIN, True),
)  # fmt: skip


def ending(slug: str) -> Ending:
    """The row of the table with this name."""
    return next(row for row in ENDINGS if row.slug == slug)


def table() -> str:
    """All of them in Markdown."""
    rows = [
        ("code", "name", "meaning", "what to do", "retry"),
        ("---",) * 5,
        *((row.code, row.slug, row.meaning, row.hint, "yes" if row.retry else "no") for row in ENDINGS),
    ]  # fmt: skip
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
