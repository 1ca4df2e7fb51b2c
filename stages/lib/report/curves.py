"""The curves of a training: from the steps of its history to plots, with its restarts marked."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.lib.report import axes
from stages.lib.report.plots import HITS, Mark, Plot, Point, Series, smoothed, spread

SMOOTH_FROM = 40  # steps from which a mean over several is drawn too
STEP, UNIT = "optimizer step", "nats a learned token"
OLD = "This run was trained by a version that did not record it."

Steps = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """A run's steps, as curves need them.

    Attributes:
        name: of the run where several are drawn, else empty. colour: of it, likewise.
        best: the step whose adapter was kept. resumed: the step that the last attempt went on from.
        predicted: bytes of the GPU and tokens/s that were planned, by the name in the history.
    """

    history: Steps
    name: str = ""
    colour: int = 1
    best: int | None = None
    resumed: int | None = None
    predicted: dict[str, float] | None = None

    def points(self, key: str, scale: float = 1.0) -> list[Point]:
        """The steps at which something was recorded, and what, divided by `scale`."""
        return [
            (float(entry["step"]), _number(entry[key]) / scale)
            for entry in self.history
            if entry.get(key) is not None
        ]

    def finite(self, key: str) -> list[float]:
        """The values of it that are numbers."""
        return [y for _, y in self.points(key) if math.isfinite(y)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def restarts(training: Training) -> list[Mark]:
    """Where another attempt went on; of older runs only the last one is known."""
    marks, before = [], None
    for entry in training.history:
        attempt = entry.get("attempt")
        if attempt is None:
            continue
        if before is not None and attempt != before:
            marks.append(Mark(float(entry["step"]), "restart"))
        before = attempt
    if before is None and training.resumed:
        marks.append(Mark(float(training.resumed), "restart"))
    return marks


def loss(training: Training) -> Plot | None:
    """Loss and held-out loss of a run."""
    plot, held = losses([training]), held_out([training])
    if not (plot and held):
        return plot or held
    series = [*plot.series, *(replace(one, name="held-out loss", colour=2) for one in held.series)]
    alt = _alt("Loss", [training], "loss", "held_out_loss")
    note = f"{plot.note} {held.note}".strip()
    tips = _tips([training])
    return replace(plot, series=series, rings=held.rings, tips=tips, note=note, alt=alt)


def losses(runs: Sequence[Training]) -> Plot | None:
    """The losses of steps."""
    found = [(run, *_noisy(run, "loss", run.name or "loss of a step")) for run in runs]
    series = [one for _, some, _ in found for one in some]
    if not series:
        return None
    spans = sorted({span for *_, span in found if span > 1})
    notes = [f"The strong line is the mean of {' or '.join(map(str, spans))} steps."] * bool(spans)
    lost = sum(len(run.points("loss")) - len(run.finite("loss")) for run in runs)
    notes += [f"{lost} steps had no finite loss."] * bool(lost)
    return Plot(
        "Loss", STEP, UNIT, series, _alt("Loss", runs, "loss"), marks=_marks(runs),
        tips=_tips(runs, "loss"), note=" ".join(notes),
    )  # fmt: skip


def held_out(runs: Sequence[Training]) -> Plot | None:
    """The losses on held-out rows."""
    series = [
        Series(run.name, points, run.colour, dots=True)
        for run in runs
        if (points := run.points("held_out_loss"))
    ]
    if not series:
        return None
    rings = [p for run in runs for p in run.points("held_out_loss") if p[0] == run.best]
    note = "The ring is the adapter that was kept." if rings else ""
    return Plot(
        "Held-out loss", STEP, UNIT, series, _alt("Held-out loss", runs, "held_out_loss"),
        marks=_marks(runs), tips=_tips(runs, "held_out_loss"), rings=rings, note=note,
    )  # fmt: skip


def _noisy(run: Training, key: str, name: str, scale: float = 1.0) -> tuple[list[Series], int]:
    """A curve; of many steps the mean over some, with the steps themselves behind it."""
    points = run.points(key, scale)
    span = max(5, len(points) // 30 | 1) if len(points) >= SMOOTH_FROM else 1
    if not points:
        return [], 1
    if span == 1:
        return [Series(name, points, run.colour)], 1
    faint = "" if run.name else name
    strong = run.name or f"mean of {span} steps"
    return [
        Series(faint, points, run.colour, faint=True),
        Series(strong, smoothed(points, span), run.colour),
    ], span


def learning_rate(runs: Sequence[Training]) -> Plot | None:
    """The learning rate."""
    return _one(runs, "learning_rate", "Learning rate", "", "power", zero=True)


def gradient(runs: Sequence[Training]) -> Plot | None:
    """The gradient's norm before it is cut."""
    return _one(runs, "grad_norm", "Gradient norm", "norm, before it is cut", "power", zero=True)


def throughput(runs: Sequence[Training]) -> Plot | None:
    """Tokens a second."""
    return _one(runs, "tokens_per_second", "Throughput", "tokens a second", "", zero=True)


def memory(runs: Sequence[Training]) -> Plot | None:
    """Bytes of the GPU."""
    return _one(runs, "gpu_bytes", "GPU memory", "", "bytes", zero=True)


def _one(
    runs: Sequence[Training], key: str, title: str, unit: str, kind: str, *, zero: bool
) -> Plot | None:
    values = [y for run in runs for y in run.finite(key)]
    predicted = [(run, plan[key]) for run in runs if (plan := run.predicted or {}).get(key)]
    if not values:
        return None
    scale, sign = axes.scaled([*values, *(y for _, y in predicted)], kind) if kind else (1.0, "")
    series: list[Series] = []
    for run in runs:
        noisy = key in ("grad_norm", "tokens_per_second")
        name = run.name or title.lower()
        if noisy:
            series += _noisy(run, key, name, scale)[0]
        elif points := run.points(key, scale):
            series.append(Series(run.name, points, run.colour))
    for run, value in predicted:
        ends = [p[0] for p in run.points(key)]
        line = [(min(ends), value / scale), (max(ends), value / scale)] if ends else []
        series.append(Series("predicted", line, 7))
    y = ", ".join(filter(None, (unit, sign)))
    return Plot(
        title, STEP, y, series, _alt(title, runs, key), marks=_marks(runs), tips=_tips(runs, key),
        zero=zero,
    )  # fmt: skip


def _marks(runs: Sequence[Training]) -> list[Mark]:
    """Restarts; of several runs they would not be told apart."""
    return restarts(runs[0]) if len(runs) == 1 else []


def clock(training: Training) -> Plot | None:
    """Steps over the time of day: where nothing was done, it is level."""
    known = [(_number(e["at"]), float(e["step"])) for e in training.history if e.get("at")]
    known = [(at, step) for at, step in known if math.isfinite(at)]
    if len(known) < 2:
        return None
    begin = known[0][0]
    scale, unit = axes.scaled([at - begin for at, _ in known], "seconds")
    points = [((at - begin) / scale, step) for at, step in known]
    drawn = _levelled(points, {m.at for m in restarts(training)})
    steps = {step: x for x, step in points}
    marks = [Mark(steps[m.at], m.word) for m in restarts(training) if m.at in steps]
    tips = [
        (x, f"step {step:,.0f}, {moment(at)}")
        for (x, step), (at, _) in zip(points, known, strict=True)
    ]
    span = f"from {moment(begin)} to {moment(known[-1][0])}"
    return Plot(
        "Progress over time", f"{unit} since {moment(begin)}", STEP, [Series("", drawn)],
        f"Steps over time, {span}.", marks=marks, tips=tips, zero=True, whole=False,
    )  # fmt: skip


def _levelled(points: Sequence[Point], restarts: set[float]) -> list[Point]:
    """With a corner before each restart: until then no step was made."""
    drawn: list[Point] = []
    for x, step in points:
        if drawn and step in restarts:
            drawn.append((x, drawn[-1][1]))
        drawn.append((x, step))
    return drawn


def moment(seconds: float) -> str:
    """A time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


TOLD: dict[str, Callable[[float], str]] = {
    "loss": lambda v: f"loss {v:.4f}",
    "held_out_loss": lambda v: f"held-out loss {v:.4f}",
    "learning_rate": lambda v: f"learning rate {v:.3g}",
    "grad_norm": lambda v: f"gradient norm {v:.3g}",
    "tokens_per_second": lambda v: f"{v:,.0f} tokens/s",
    "gpu_bytes": lambda v: f"{v / 2**30:.2f} GiB",
}


def _tips(runs: Sequence[Training], *keys: str) -> list[tuple[float, str]]:
    """What is told of steps, of as many as have room; all keys, if none are named."""
    wanted = {key: form for key, form in TOLD.items() if not keys or key in keys}
    steps = {
        float(e["step"]) for run in runs for e in run.history if not e.keys().isdisjoint(wanted)
    }
    chosen = set(spread(sorted(steps), HITS))
    told: dict[float, list[str]] = {step: [] for step in sorted(chosen)}
    for run in runs:
        for entry in run.history:
            if float(entry["step"]) not in chosen:
                continue
            words = [f(_number(entry[k])) for k, f in wanted.items() if entry.get(k) is not None]
            if words:
                lead = f"{run.name}: " if run.name else ""
                at = (
                    f" ({moment(_number(entry['at']))})" if not run.name and entry.get("at") else ""
                )
                told[float(entry["step"])].append(lead + ", ".join(words) + at)
    return [(step, "\n".join([f"step {step:,.0f}", *lines])) for step, lines in told.items()]


def _alt(title: str, runs: Sequence[Training], *keys: str) -> str:
    """What a plot shows, for those who do not see it."""
    parts = []
    for run in runs:
        for key in keys:
            values = run.finite(key)
            if values:
                words = key.replace("_", " ")
                lead = f"{run.name}: " if run.name else ""
                parts.append(
                    f"{lead}{words} from {values[0]:.4g} to {values[-1]:.4g}, between {min(values):.4g} and "
                    f"{max(values):.4g}, {len(values)} steps"
                )
    return f"{title}: {'; '.join(parts)}."
