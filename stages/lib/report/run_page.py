"""A run as one page: how it stands, how it learned, what it learned from, how well, and what made it."""

import time
from typing import Any

from stages.lib.report import card, curves, evaluation_page, pictures, provenance
from stages.lib.report.answers import SIDES
from stages.lib.report.curves import Training
from stages.lib.report.found import Found
from stages.lib.report.page import cut, render
from stages.lib.report.plots import Figure, figure
from stages.lib.report.provenance import duration, gib, joined
from stages.lib.report.verdict import verdict

FILE = "report.html"
TEMPLATE = "run.html.jinja"
ANSWERS, LONGEST = 16, 4_000  # questions, and characters of a text: the page stays below 3 MB
MERGED = card.PROOF | {"perplexity_change": "relative change of the perplexity"}
SHARES = {
    "top1_agreement": "{:.2%}", "answers_equal": "{:.2%}", "perplexity_change": "{:+.3%}",
    "compared_tokens": "{:,}",
}  # fmt: skip
Facts = dict[str, Any]


def page(found: Found) -> str:
    """The page."""
    evaluation = found.evaluation
    return render(
        TEMPLATE, longest=LONGEST, found=found, verdict=verdict(found), cards=cards(found),
        plots=plots(found), accounts=accounts(found), histogram=_histogram(found),
        norms=pictures.norms(_health(found)), health=_living(found), merge=merge(found),
        intervals=_intervals(evaluation),
        measured=evaluation_page.rows(evaluation) if evaluation else [],
        parts=_parts(evaluation), others=_others(evaluation), sides=SIDES, width=evaluation_page.WIDTH,
        answers=(evaluation or {}).get("answers", [])[:ANSWERS], predicted=predicted(found),
        stages=list(provenance.stages(found)), attempts=provenance.attempts(found),
        settings=provenance.settings(found), versions=provenance.versions(found),
        inputs=provenance.inputs(found), files=provenance.files(found),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), origins=provenance.ORIGINS,
    )  # fmt: skip


def training(found: Found) -> Training | None:
    """A run's steps for curves; None where it has none."""
    if not (found.training and found.training["history"]):
        return None
    metrics = found.metrics("adapter")
    planned = {
        "gpu_bytes": metrics.get("predicted_gpu_bytes"),
        "tokens_per_second": metrics.get("predicted_tokens_per_second"),
    }
    return Training(
        found.training["history"], best=metrics.get("best_step"),
        resumed=metrics.get("resumed_from_step"),
        predicted={key: value for key, value in planned.items() if value},
    )  # fmt: skip


def plots(found: Found) -> list[Figure | str]:
    """The curves, or a sentence in place of one that was not recorded; nothing where nothing was trained."""
    run = training(found)
    if not run:
        return []
    loss = curves.loss(run)
    drawn: list[Figure | str] = [figure(loss, wide=True)] if loss else []
    on_cpu = _device(found).get("type") == "cpu"
    for plot, title, why in (
        (curves.learning_rate([run]), "Learning rate", curves.OLD),
        (curves.gradient([run]), "Gradient norm", curves.OLD),
        (curves.throughput([run]), "Throughput", curves.OLD),
        (
            curves.memory([run]),
            "GPU memory",
            "The run was on a CPU." if on_cpu else curves.OLD,
        ),
        (curves.clock(run), "Progress over time", curves.OLD),
    ):
        drawn.append(figure(plot) if plot else f"{title}: not recorded. {why}")
    return drawn


def _device(found: Found) -> Facts:
    made = found.artifacts.get("adapter")
    return dict(made.manifest.get("device") or {}) if made else {}


def _health(found: Found) -> Facts:
    return dict(found.metrics("adapter").get("health") or {})


def _living(found: Found) -> list[tuple[str, str]]:
    """What is known of the adapter's health, but for its norms."""
    health = _health(found)
    if not health:
        return []
    unmoved = health.get("unmoved", [])
    rows = [
        ("adapted modules", f"{len(health.get('b_norms', {})):,}"),
        ("of them never moved", joined(unmoved) or "none"),
        ("most that the adapter changes a logit", evaluation_page.plain(health.get("logit_change"))),
    ]  # fmt: skip
    if first := health.get("first_gradients"):
        least = f"{evaluation_page.plain(first['least'])} in {first['least_in']}, at step {first['step']:,}"
        rows += [
            ("least first gradient", least),
            ("modules that had no input then", joined(first["without_input"]) or "none"),
        ]
    return rows


def _histogram(found: Found) -> Figure | None:
    limit = found.artifacts["data"].setting("MAX_LENGTH") if "data" in found.artifacts else None
    return pictures.histogram(found.lengths, limit)


def accounts(found: Found) -> Facts | None:
    """The ledgers of rows and tokens, and what else became of rows; None without data."""
    if "data" not in found.artifacts:
        return None
    metrics = found.metrics("data")
    notes = [
        f"{metrics[key]:,} {words}"
        for key, words in (
            ("rows_truncated", "rows were cut to MAX_LENGTH"), ("rows_split", "rows were split"),
            ("turns_dropped", "unanswered turns were left out"),
        )
        if metrics[key]
    ]  # fmt: skip
    ended, written = metrics["rows_ending_in_trained_eos"], metrics["rows_written"]
    return {
        "rows": pictures.rows_account(metrics),
        "tokens": pictures.tokens_account(metrics, found.learned, found.metrics("adapter")),
        "note": "; ".join(
            [*notes, f"{ended:,} of {written:,} rows written end in an EOS that is learned"]
        )
        + ".",
    }


def cards(found: Found) -> list[tuple[str, str, str]]:
    """What a run is, in a few figures: title, value, and a small line below."""
    adapter, data = found.metrics("adapter"), found.metrics("data")
    first = next(iter(found.artifacts.values()), None)
    shown: list[tuple[str, str, str]] = []
    if first:
        base = first.manifest["inputs"].get("base") or {}
        shown.append(("base model", str(base.get("name", "-")), str(base.get("revision") or "")))
    if data:
        source = found.artifacts["data"].manifest["inputs"]["dataset"]["name"]
        shown.append(
            ("data", str(source), f"{data['rows_kept'] - data['rows_held_out']:,} rows to train on")
        )
    if adapter:
        made = found.artifacts["adapter"]
        values = [made.setting(name) for name in ("LORA_RANK", "LORA_ALPHA", "LORA_TARGETS")]
        rank, alpha, targets = values
        names = ("held_out_loss", "best_step", "trainable_parameters")
        held_out, best, parameters = (adapter[name] for name in names)
        shown += [
            ("adapter", f"rank {rank}, alpha {alpha:g}", f"{targets}, {parameters:,} parameters"),
            ("base held in", adapter["base_precision"], _device(found).get("name", "")),
            ("trained", f"{adapter['steps']:,} steps", f"{adapter['trained_tokens']:,} tokens learned"),
            ("held-out loss", "-" if held_out is None else f"{held_out:.3f}", f"at step {best:,}"),
        ]  # fmt: skip
        if speed := adapter.get("tokens_per_second"):
            shown.append(
                (
                    "speed",
                    f"{speed:,.0f} tokens/s",
                    f"{duration(adapter['train_seconds'])} of steps",
                )
            )
        peak = adapter.get("peak_gpu_bytes")
        shown.append(
            ("peak memory", gib(peak), "of the GPU" if adapter["gpus"] == 1 else "of the first GPU") if peak
            else ("peak memory", gib(made.manifest["peak_host_bytes"]), "of the host")
        )  # fmt: skip
    elif found.training:
        step, steps = (found.training[key] for key in ("step", "steps"))
        shown.append(("safe", f"step {step:,} of {steps:,}", f"{step / max(steps, 1):.0%}"))
    if found.artifacts:
        whole = sum(made.manifest["wall_seconds"] for made in found.artifacts.values())
        shown.append(("all stages", duration(whole), "of their last attempts"))
    return shown


def merge(found: Found) -> Facts | None:
    """The merge check: figures in words, and what a sentence says of the base."""
    if not found.merge:
        return None
    metrics = found.metrics("merged")
    weights = found.merge["weights"]
    rows = [
        (words, SHARES.get(key, "{:.4g}").format(metrics[key]))
        for key, words in MERGED.items()
        if metrics.get(key) is not None
    ]
    rows += [
        ("weights that the adapter changed", f"{weights['changed']:,}"),
        ("weights that are the base's to the last bit", f"{weights['kept']:,}"),
        ("furthest that a weight is from the sum, in roundings", f"{weights['roundings']:.3g}"),
    ]
    return {"rows": rows, "closer": found.merge["closer"]}


def predicted(found: Found) -> list[Facts]:
    """What was planned against what was measured: memory and speed."""
    metrics = found.metrics("adapter")
    rows: list[Facts] = []
    for words, one, other, form in (
        ("peak GPU memory", "predicted_gpu_bytes", "peak_gpu_bytes", gib),
        ("speed", "predicted_tokens_per_second", "tokens_per_second", "{:,.0f} tokens/s".format),
    ):
        planned, measured = metrics.get(one), metrics.get(other)
        if planned and measured:
            most = max(planned, measured)
            pairs = (("predicted", planned), ("measured", measured))
            bars = [(side, form(value), round(100 * value / most, 1)) for side, value in pairs]
            change = f"{measured / planned - 1:+.1%}"
            rows.append({"words": words, "change": change, "bars": bars})
    return rows


def _intervals(evaluation: Facts | None) -> Figure | None:
    """The held-out losses of both sides with their intervals."""
    rows: list[pictures.Interval] = [
        (side, evaluation[side]["loss"], evaluation[side].get("loss_interval"), colour)
        for colour, side in ((7, "base"), (1, "tuned"))
        if evaluation and evaluation[side]["loss"] is not None
    ]
    title, unit = "Held-out loss, with 95 % intervals", "nats a learned token"
    return pictures.intervals(title, unit, rows) if rows else None


def _parts(evaluation: Facts | None) -> list[Facts]:
    if not evaluation:
        return []
    return [
        part | {"rows": [row | {"name": cut(row["name"], 200)} for row in part["rows"][-100:]]}
        for part in evaluation_page.parts(evaluation)
    ]


def _others(evaluation: Facts | None) -> list[Facts]:
    """Benchmarks and a judge; the adapter's health has a section of its own."""
    if not evaluation:
        return []
    found = evaluation_page.others(evaluation | {"health": None})
    return [other | {"rows": provenance.shortened(other["rows"])} for other in found]
