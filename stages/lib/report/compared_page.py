"""Several runs as one page: their results, what was set otherwise, and their curves over each other."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stages.lib.report import curves, evaluation_page, pictures, provenance
from stages.lib.report.curves import Training
from stages.lib.report.evaluation_page import MEASURES, plain
from stages.lib.report.found import Found
from stages.lib.report.page import render
from stages.lib.report.plots import Figure, figure
from stages.lib.report.provenance import duration, gib
from stages.lib.report.run_page import LONGEST, training
from stages.lib.report.verdict import verdict

TEMPLATE = "compared.html.jinja"
QUESTIONS = 8
Facts = dict[str, Any]


def page(runs: Sequence[Found]) -> str:
    """The page."""
    differing, alike = settings(runs)
    return render(
        TEMPLATE, longest=LONGEST, names=names(runs), verdicts=[verdict(run) for run in runs],
        folders=[str(run.folder) for run in runs], sentence=sentence(runs), cautions=cautions(runs),
        results=results(runs), intervals=_intervals(runs), plots=plots(runs), differing=differing,
        alike=alike, versions=versions(runs), questions=questions(runs),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )  # fmt: skip


def names(runs: Sequence[Found]) -> list[str]:
    """What the runs are called: their folders' names, or whole paths where two are called alike."""
    short = [run.name for run in runs]
    if len({*short}) == len(short):
        return short
    paths = [str(run.folder) for run in runs]
    if len({*paths}) == len(paths):
        return paths
    return [f"{path} ({place})" for place, path in enumerate(paths, 1)]


def sentence(runs: Sequence[Found]) -> str:
    """Which run has the least held-out loss."""
    losses = [
        (run.evaluation["tuned"]["loss"], name)
        for run, name in zip(runs, names(runs), strict=True)
        if run.evaluation and run.evaluation["tuned"]["loss"] is not None
    ]
    if len(losses) < 2:
        count = ["None", "Only one"][len(losses)]
        return f"{count} of {len(runs)} runs was evaluated on held-out rows: there is no result to compare."
    if not _same_rows(runs):
        return "The runs were evaluated on different rows: their losses say nothing of each other."
    losses.sort()
    (least, name), (most, worst) = losses[0], losses[-1]
    if least == most:
        return f"All evaluated runs have the same held-out loss, {least:.3f} nats a token."
    return (
        f"{name} has the least held-out loss of {len(losses)} evaluated runs: {least:.3f} nats a token; "
        f"{worst} has the most, {most:.3f}."
    )


def cautions(runs: Sequence[Found]) -> list[str]:
    """What keeps the runs from being compared as they stand."""
    said = []
    if len(_inputs(runs, "data", "base")) > 1:
        said.append(
            "The runs have different base models: a token of one is not a token of the other."
        )
    elif not _same_rows(runs):
        said.append("The runs have different data, so their held-out losses are of different rows.")
    if _evaluated(runs) > 1:
        said.append(
            "An interval is that of a run's own loss. Where two overlap the runs may still differ, as they "
            "answer for the same rows; the change against the base is the sounder figure."
        )  # fmt: skip
    return said


def _evaluated(runs: Sequence[Found]) -> int:
    return sum(run.evaluation is not None for run in runs)


def _same_rows(runs: Sequence[Found]) -> bool:
    """Whether all runs that have data have the same held-out rows."""
    held_out = {
        run.artifacts["data"].manifest["files"]["held_out.arrow"]["sha256"]
        for run in runs
        if "data" in run.artifacts
    }
    return len(held_out) < 2


def _inputs(runs: Sequence[Found], artifact: str, key: str) -> set[str]:
    return {
        str(run.artifacts[artifact].manifest["inputs"].get(key)) for run in runs if artifact in run.artifacts
    }  # fmt: skip


def results(runs: Sequence[Found]) -> list[Facts]:
    """A line for each figure: `words`, and for each run `value` and its `interval`."""
    lines: list[Facts] = [
        {
            "words": "state",
            "cells": [{"value": verdict(run).state, "interval": None} for run in runs],
        }
    ]
    measured = [
        {row["words"]: row for row in evaluation_page.rows(run.evaluation)} if run.evaluation else {}
        for run in runs
    ]  # fmt: skip
    for one in MEASURES:
        for side in ("tuned", "change") if one.name == "loss" else ("tuned",):
            rows = [row.get(one.words, {}) for row in measured]
            cells = [{"value": r.get(side), "interval": r.get(f"{side}_interval")} for r in rows]
            words = one.words if side == "tuned" else f"{one.words}: change against the base"
            lines.append({"words": words, "cells": cells})
    for words, told in TOLD.items():
        lines.append(
            {"words": words, "cells": [{"value": told(run), "interval": None} for run in runs]}
        )
    for line in lines:
        line["cells"] = [cell | {"value": cell["value"] or "-"} for cell in line["cells"]]
    return [line for line in lines if any(cell["value"] != "-" for cell in line["cells"])]


def _metric(artifact: str, key: str, form: Any) -> Any:
    def told(run: Found) -> str | None:
        value = run.metrics(artifact).get(key)
        return None if value is None else str(form(value))

    return told


def _seconds(run: Found) -> str | None:
    made = run.artifacts.get("adapter")
    return duration(made.manifest["wall_seconds"]) if made else None


def _device(run: Found) -> str | None:
    made = run.artifacts.get("adapter")
    return str((made.manifest.get("device") or {}).get("name", "")) if made else None


def _count(value: float) -> str:
    return f"{value:,}"


TOLD = {
    "held-out loss in training, of the kept adapter": _metric(
        "adapter", "held_out_loss", "{:.3f}".format
    ),
    "step of the kept adapter": _metric("adapter", "best_step", _count),
    "steps": _metric("adapter", "steps", _count),
    "tokens learned": _metric("adapter", "trained_tokens", _count),
    "parameters of the adapter": _metric("adapter", "trainable_parameters", _count),
    "tokens a second": _metric("adapter", "tokens_per_second", "{:,.0f}".format),
    "peak GPU memory": _metric("adapter", "peak_gpu_bytes", gib),
    "training, its last attempt": _seconds,
    "device": _device,
    "merged, nats a token from what was trained": _metric("merged", "mean_kl", "{:.2g}".format),
}


def _intervals(runs: Sequence[Found]) -> Figure | None:
    rows: list[pictures.Interval] = []
    for colour, (run, name) in enumerate(zip(runs, names(runs), strict=True), 1):
        side = run.evaluation["tuned"] if run.evaluation else {}
        if side.get("loss") is not None:
            rows.append((name, side["loss"], side.get("loss_interval"), colour))
    title, unit = "Held-out loss, with 95 % intervals", "nats a learned token"
    return pictures.intervals(title, unit, rows) if rows else None


def plots(runs: Sequence[Found]) -> list[Figure | str]:
    """The curves over each other; of what no run recorded there is a sentence."""
    found: list[Training] = []
    for colour, (run, name) in enumerate(zip(runs, names(runs), strict=True), 1):
        if one := training(run):
            found.append(replace(one, name=name, colour=colour, predicted=None))
    if not found:
        return []
    drawn: list[Figure | str] = []
    for number, (title, draw) in enumerate(CURVES.items()):
        plot = draw(found)
        drawn.append(figure(plot, wide=not number) if plot else f"{title}: no run recorded it.")
    return drawn


CURVES = {
    "Loss": curves.losses, "Held-out loss": curves.held_out, "Learning rate": curves.learning_rate,
    "Gradient norm": curves.gradient, "Throughput": curves.throughput, "GPU memory": curves.memory,
}  # fmt: skip


def settings(runs: Sequence[Found]) -> tuple[list[Facts], list[tuple[str, str]]]:
    """Settings that differ, with value and origin in each run; and those that are alike in all."""
    found = [_values(run) for run in runs]
    differing, alike = [], []
    for name in sorted(set().union(*found)):
        cells = [one.get(name, ("not set", "")) for one in found]
        if len({value for value, _ in cells}) > 1:
            differing.append({"name": name, "cells": cells})
        else:
            alike.append((name, cells[0][0]))
    return differing, alike


def _values(run: Found) -> dict[str, tuple[str, str]]:
    """Each setting's value and origin; where stages had it otherwise, both."""
    found: dict[str, tuple[str, str]] = {}
    for row in provenance.settings(run):
        name, value, origin = row["name"], row["value"], row["origin"]
        if name in found and found[name][0] != value:
            value, origin = (
                f"{found[name][0]}; {value}",
                f"{found[name][1]}; {row['stages']}: {origin}",
            )
        found[name] = (value, origin)
    return found


def versions(runs: Sequence[Found]) -> list[list[str]]:
    """Inputs, devices and packages that are not the same in all runs."""
    found = []
    for run in runs:
        rows = dict(provenance.inputs(run))
        for package, version, stages in provenance.versions(run):
            rows[package] = (
                version if package not in rows else f"{rows[package]}; {version} ({stages})"
            )
        found.append(rows)
    lines = [
        [name, *(plain(rows.get(name)) for rows in found)]
        for name in dict.fromkeys(n for rows in found for n in rows)
    ]
    return [line for line in lines if len({*line[1:]}) > 1]


def questions(runs: Sequence[Found]) -> list[Facts]:
    """Questions that several runs were asked, and what each said when it was tuned."""
    said: dict[str, list[Facts | None]] = {}
    for place, run in enumerate(runs):
        for entry in (run.evaluation or {}).get("answers", []):
            said.setdefault(entry["question"], [None] * len(runs))[place] = entry["tuned"]
    asked = [(q, found) for q, found in said.items() if sum(one is not None for one in found) > 1]
    return [{"question": q, "answers": found} for q, found in asked[:QUESTIONS]]
