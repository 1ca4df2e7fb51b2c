"""The figures of a run: what each is called, in what unit, and how a line of a terminal shows it.

One name everywhere: in JSON lines, in the heartbeat, in a manifest's history, and behind `train/` or `eval/` in
a tracker.
"""

import contextlib
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of a step's entry in a history: when and how fast, which no two runs have alike.
MEASURED = ("at", "attempt", "tokens_per_second", "gpu_bytes", "rss_bytes")


@dataclass(frozen=True)
class Field:
    """One figure.

    Attributes:
        unit: of its value, in words. shown: of a value, for a person; nothing where it is of no interest there.
        tracked: its name in a tracker.
    """

    unit: str
    shown: str
    tracked: str = ""


FIELDS = {
    "loss": Field("nats a learned token", "loss {:.4g}", "train/loss"),
    "held_out_loss": Field("nats a learned token", "held-out {:.4g}", "eval/loss"),
    "tokens_per_second": Field("tokens a second", "{} tok/s", "train/tokens_per_second"),
    "ceiling_share": Field("share, 0 to 1", "{:.0%} of peak", "train/ceiling_share"),
    "gpu_bytes": Field("bytes, the most so far", "{}", "train/gpu_bytes"),
    "rss_bytes": Field("bytes, the most so far", "{}", "train/rss_bytes"),
    "learning_rate": Field("1", "lr {:.2g}", "train/learning_rate"),
    "grad_norm": Field("1", "", "train/grad_norm"),
    "tokens": Field("tokens", "{:,} tokens"),
}  # fmt: skip


def shown(name: str, value: Any) -> str:
    """A figure for a person; nothing where there is none."""
    form = FIELDS[name].shown if name in FIELDS else ""
    if value is None or not form:
        return ""
    if name == "tokens_per_second":
        value = f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.4g}"
    if name.endswith("_bytes"):
        value = f"{value / 2**30:.1f} GiB"
    return form.format(value)


def resident() -> int:
    """The most memory that this process had so far, in bytes."""
    with contextlib.suppress(OSError), Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith(
                "VmHWM:"
            ):  # getrusage would count what a parent had before it forked
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
