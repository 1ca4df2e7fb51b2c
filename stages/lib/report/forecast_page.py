"""A forecast in words and tables, for a terminal."""

import textwrap
from collections.abc import Sequence
from typing import Any

from stages.lib.model import cutting, known, speed
from stages.lib.report.amount import Amount
from stages.lib.report.forecast import Fit, Order, memory, room
from stages.lib.report.table import WIDTH, table

GIB = 2**30
PARTS = ("weights", "adapter", "optimizer", "loss")
NARROW = 84  # columns, below which tables show less
SMALL = 1e9  # parameters, below which starting kernels takes longer than they do


def duration(seconds: float | None) -> str:
    """Such as `48 s`, `12 min`, `3.4 h`."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 100 else f"{hours:,.0f} h"


def money(value: float | None) -> str:
    """In whatever currency the price was."""
    return "-" if value is None else f"{value:,.2f}"


def verdict(order: Order, amount: Amount, fits: Sequence[Fit]) -> list[str]:
    """What fits where, how long it takes, what it costs: a sentence each."""
    fitting = [fit for fit in fits if fit.choice]
    setup, share = order.setup, order.trainable / order.parameters
    held = (
        f"in {setup.precision}"
        if setup.precision != "auto"
        else "in the fastest precision that fits"
    )
    said = [
        f"{order.base} {held}: {order.trainable:,} trainable parameters, {share:.2%} of "
        f"{order.parameters / 1e9:.3g} billion (rank {setup.rank} on {', '.join(setup.targets)})."
    ]
    if not fitting:
        return [*said, _none(fits)]
    if len(fits) == 1:
        said.append(_one(fitting[0]))
    else:
        least = min(fitting, key=lambda fit: fit.card.gigabytes).card
        few = f"{len(fitting)} of {len(fits)}" if len(fitting) < len(fits) else f"all {len(fits)}"
        said.append(f"It fits {few} kinds of GPU, from {least.gigabytes} GB on ({least.name}).")
    return said + _worth(order, amount, fitting)


def _one(fit: Fit) -> str:
    assert fit.choice
    assert fit.choice.memory
    taken, has = fit.choice.memory.total / GIB, fit.card.room / GIB
    return f"It fits {fit.card.name} ({fit.card.gigabytes} GB): {taken:.1f} of {has:.1f} GiB."


def _none(fits: Sequence[Fit]) -> str:
    if len(fits) == 1:
        return f"It does not fit {fits[0].card.name}: {fits[0].why}."
    largest = max(fits, key=lambda fit: fit.card.gigabytes)
    return f"It fits none of these GPUs; {largest.card.name}, the largest: {largest.why}."


def _worth(order: Order, amount: Amount, fitting: Sequence[Fit]) -> list[str]:
    """The sentences on time and money."""
    known_speed = [fit for fit in fitting if fit.tokens_per_second]
    if not known_speed:
        return ["How long it takes is not known: no run in this precision was measured."]
    most = "At most " if amount.at_most else ""
    each = f" on {order.gpus} GPUs" if order.gpus > 1 else ""
    per = amount.work is None
    times = [fit.million if per else fit.seconds for fit in known_speed]
    costs = [fit.million_cost if per else fit.cost for fit in known_speed]
    what = "A million tokens"
    if not per:
        steps = "step" if amount.steps == 1 else "steps"
        what = f"{most}{amount.tokens:,} tokens in {amount.steps:,} {steps}"
    said = [f"{what}{each}: {_between(times, known_speed, duration)}."]
    if any(cost is not None for cost in costs):
        said.append(f"It costs {most.lower()}{_between(costs, known_speed, money)}.")
    return said


def _between(values: Sequence[float | None], fits: Sequence[Fit], shown: Any) -> str:
    """The least and the most of what is known, each with its GPU."""
    pairs = [
        (value, fit.card.name) for value, fit in zip(values, fits, strict=True) if value is not None
    ]
    low, high = min(pairs), max(pairs)
    if len(pairs) == 1:
        return f"{shown(low[0])} on {low[1]}"
    return f"{shown(low[0])} on {low[1]} to {shown(high[0])} on {high[1]}"


def notes(order: Order, amount: Amount, fits: Sequence[Fit], off: dict[str, Any]) -> list[str]:
    """What the figures rest on, and where they may be wrong."""
    memory_off, speed_off = (
        "{:+.0f} to {:+.0f} %".format(*off[name]) for name in ("memory_percent", "speed_percent")
    )
    told, start = speed.measured(), speed.measured()["start_seconds"]
    read = "Read" if amount.tokens else "How much there is to learn is not known"
    free = 1 - cutting.SHARE
    said = [
        f"{read}: {amount.source}.",
        f"The sizes of the base are from {order.where}.",
        f"Memory is counted by part; for {off['measured_runs']} measured runs the sum was off by {memory_off}. "
        f"{free:.0%} of a GPU stays free.",
        f"Speed is an estimate: for the H200 from runs with a base of 7 billion, for which it is off by "
        f"{speed_off}; other GPUs were not measured, but scaled by their makers' figures.",
        f"In the time are {start:.0f} s to start, and evaluations; not in it are downloads and other stages.",
    ]
    if order.gpus > 1:
        said.append(
            f"Two GPUs of one host were {told['times']:.2f} times as fast as one; more were not measured."
        )
    if order.parameters < SMALL:
        said.append(
            "A base so small waits for its kernels to start: it will be slower than said here."
        )
    if order.kind not in known.COUNTED:
        said.append(
            f"The layers of {order.kind} may be others than those that are counted: see what `train` says."
        )
    if any(fit.setup.precision == "fp32" and fit.choice for fit in fits):
        said.append("No run with an fp32 base was measured.")
    hosts = [fit.facts(order.shape)["host_bytes"] or 0 for fit in fits]
    if any(hosts):
        said.append(f"Offloading takes up to {max(hosts) / GIB:.1f} GiB of the host for each GPU.")
    if order.recompute == "auto":
        said.append(
            "Where `train` finds room on the host, it may offload, and be faster than said."
        )
    return said


def gpus(order: Order, amount: Amount, fits: Sequence[Fit], width: int) -> str:
    """The table of GPUs that fit, and what the others lack."""
    fitting = [fit for fit in fits if fit.choice]
    narrow, per = width < NARROW, amount.work is None
    priced = any(fit.million_cost is not None for fit in fitting)
    headings = [
        "GPU",
        "GB",
        "base",
        "a pass",
        "again",
        "GiB",
        "tokens/s",
        "1M tokens" if per else "time",
    ]
    headings += ["cost"] * priced
    rows = []
    for fit in fitting:
        cut = fit.choice
        assert cut
        assert cut.memory
        base = "nf4, bf16" if fit.setup.unpacked else fit.setup.precision
        again = f"{cut.offloaded} away" if cut.offloaded else str(cut.recomputed)
        row = [
            fit.card.name, str(fit.card.gigabytes), base, f"{cut.tokens:,}", again,
            f"{cut.memory.total / GIB:.1f}",
            f"{fit.tokens_per_second:,.0f}" if fit.tokens_per_second else "-",
            duration(fit.million if per else fit.seconds),
        ]  # fmt: skip
        rows.append(row + [money(fit.million_cost if per else fit.cost)] * priced)
    dropped = {2, 3, 4} if narrow else set()
    kept = [n for n in range(len(headings)) if n not in dropped]
    cells = [[row[n] for n in kept] for row in rows]
    drawn = table([headings[n] for n in kept], cells, width, right=True)
    legend = [
        f"GiB at the peak. again: of {order.shape.layers} layers those that compute activations again."
    ]
    if any(fit.setup.unpacked for fit in fitting):
        legend.append("nf4, bf16: dequantised once.")
    under = ([] if narrow or not rows else [" ".join(legend)]) + _without(fits)
    return "\n".join([drawn] * bool(rows) + [_wrapped(under, width, "  ")] * bool(under))


def _without(fits: Sequence[Fit]) -> list[str]:
    """The GPUs that it does not fit, by what they lack."""
    said: dict[str, list[str]] = {}
    for fit in (fit for fit in fits if not fit.choice):
        if fit.least:
            what = f"Takes {fit.least / GIB:.1f} GiB at the least, too much for"
            name = f"{fit.card.name} ({room(fit.card) / GIB:.1f})"
        else:
            what, name = f"Cannot compute in {fit.setup.precision}:", fit.card.name
        said.setdefault(what, []).append(name)
    return [f"{what} {', '.join(names)}." for what, names in said.items()]


def parts(order: Order, width: int) -> str:
    """Memory of a pass by part in the base's precision, and in all of them together."""
    found, narrow = memory(order), width < NARROW
    asked = "fp8" if order.setup.precision == "auto" else order.setup.precision
    own = [r for r in found if r["base_precision"] == asked and not r["dequantised_once"]]
    names = () if narrow else PARTS
    rows = [
        (f"{row['pass_tokens']:,}", *(f"{row[name] / GIB:.2f}" for name in names),
         _both(row, "activations"), _both(row, "total"))
        for row in own
    ]  # fmt: skip
    headings = (f"{asked}: a pass", *names, "activations", "together")
    drawn = [table(headings, rows, width, right=True)]
    if narrow:
        drawn.append("  " + ", ".join(f"{name} {own[0][name] / GIB:.2f}" for name in PARTS))
    ends = list(dict.fromkeys((order.cuts[0], order.cuts[-1]))) if narrow else list(order.cuts)
    every: dict[str, list[str]] = {}
    for row in found:
        name = "nf4, bf16" if row["dequantised_once"] else row["base_precision"]
        cells = every.setdefault(name, [f"{row['weights'] / GIB:.2f}"])
        cells += [_both(row, "total")] * (row["pass_tokens"] in ends)
    headings = ("base", "weights", *(f"{size:,}" for size in ends))
    drawn += ["", table(headings, [(n, *cells) for n, cells in every.items()], width, right=True)]
    return "\n".join([*drawn, "  GiB; with all activations kept / with all computed again."])


def _both(row: dict[str, Any], name: str) -> str:
    return f"{row[name] / GIB:.1f} / {row[f'{name}_recomputed'] / GIB:.1f}"


def beside(off: dict[str, Any], width: int) -> str:
    """The finished runs in the same folder, predicted against measured; empty where there are none."""
    rows = []
    for run in off["beside"]:
        pairs = [
            (run["predicted_gpu_bytes"], run["peak_gpu_bytes"], run["memory_percent"], GIB, ".1f"),
            (run["predicted_tokens_per_second"], run["tokens_per_second"], run["speed_percent"], 1, ",.0f"),
        ]  # fmt: skip
        cells = [
            "-" if value is None else format(value / unit, form)
            for told, was, _, unit, form in pairs for value in (told, was)
        ]  # fmt: skip
        percents = ["-" if pair[2] is None else f"{pair[2]:+.1f} %" for pair in pairs]
        rows.append((run["run"], *cells[:2], percents[0], *cells[2:], percents[1]))
    headings = ("finished run", "GiB said", "was", "off", "tokens/s said", "was", "off")
    return table(headings, rows, width, right=True) if rows else ""


def _wrapped(lines: Sequence[str], width: int, mark: str = "") -> str:
    blank = " " * len(mark)
    return "\n".join(
        textwrap.fill(line, width, initial_indent=mark, subsequent_indent=blank) for line in lines
    )


def text(
    order: Order, amount: Amount, fits: Sequence[Fit], off: dict[str, Any], width: int = WIDTH
) -> str:
    """The whole page: the verdict first."""
    told = notes(order, amount, fits, off)
    blocks = [
        _wrapped(verdict(order, amount, fits), width), gpus(order, amount, fits, width),
        parts(order, width), beside(off, width), _wrapped(told, width, "- "),
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block)
