"""What `plan` rests on, and how far it is off: from the other scripts' results.

`python -m bench.planning`, from the root of the repository; a second, no GPU. Reads `results/train.json` and
`results/two-gpus.jsonl`, fits the figures of `stages/lib/model/speed.py` to the runs of ours on one GPU, and
writes them and the runs to `stages/lib/model/measured.json`, which the image has; into `docs/planning.md` go
the table of every run, predicted against measured, and that of the GPUs.

The fit is that of least squares over how far each run's predicted time is off, as a share of the measured one.
"""

import json
import re
import statistics
from typing import Any

import numpy as np

from bench.conversations import ROOT
from bench.train import LENGTH, WORKLOADS
from bench.train_results import RANK
from stages.lib.model import plan, speed
from stages.lib.model.architecture import Architecture, Setup
from stages.lib.report import past
from stages.lib.run import cards
from stages.lib.run.gpu import dotted

RESULTS = ROOT / "bench/results"
PAGE = ROOT / "docs/planning.md"
NAMES = ("products", "layers", "adapters")
DEFAULT_TARGETS = "q_proj,v_proj"
CONFIG = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
}  # fmt: skip
BEGIN, END = "<!-- {} by python -m bench.planning -->\n", "<!-- end -->\n"


def runs() -> list[dict[str, Any]]:
    """Every measured run of ours, one shape for all."""
    results = json.loads((RESULTS / "train.json").read_text())
    lengths = {"dense": LENGTH, "conversations": like(results)}
    found = []
    for result in results:
        if result["system"].startswith("lora-stages"):
            rows = WORKLOADS[result["workload"]][0]
            about = {"script": "train.py", "workload": result["workload"], "date": result["date"]}
            gpu = result["hardware"]["gpu"]
            found.append(about | _run(result, lengths[rows], gpu, 16384, 1))
    return found + _two(lengths["conversations"])


def like(results: list[dict[str, Any]]) -> int:
    """Tokens of equal rows with as much attention a token as the conversations, by their operations."""
    result = next(r for r in results if r["workload"] == "conversations")
    shape = Architecture.of(CONFIG)
    assert shape
    adapter = plan.adapter_parameters(shape, Setup("nf4", RANK, ("q_proj", "v_proj")))
    products = 4 * shape.vocabulary * shape.width + 6 * adapter
    attention = result["gflop_per_token"]["other"] * 1e9 - products
    return round(2 * attention / (7 * 2 * shape.layers * shape.query) - 1)


def _two(length: int) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (RESULTS / "two-gpus.jsonl").read_text().splitlines()]
    machine = next(line for line in lines if line["part"] == "machine")
    gpu = machine["gpus"][0].partition(",")[0]
    return [
        {"script": "two_gpus.py", "workload": "conversations", "date": machine["date"]}
        | _run(result, length, gpu, int(result["settings"]["BATCH_TOKENS"]), int(gpus))
        for line in lines if line["part"] == "speed" for gpus, result in line["runs"].items()
    ]  # fmt: skip


def _run(result: dict[str, Any], length: int, gpu: str, batch: int, gpus: int) -> dict[str, Any]:
    settings = result["settings"]
    start = {"start_seconds": result.get("seconds_to_second_step")}
    return {
        "gpu": gpu, "gpus": gpus, "precision": settings["BASE_PRECISION"], "rank": RANK,
        "targets": settings.get("LORA_TARGETS", DEFAULT_TARGETS), "row_tokens": length,
        "batch_tokens": batch, "pass_tokens": result["bin_tokens"],
        "recomputed_layers": result["recomputed_layers"], "offloaded_layers": result["offloaded_layers"],
        "tokens_per_second": result["tokens_per_second"], "peak_gib": result["peak_gib"],
    } | (start if all(start.values()) else {})  # fmt: skip


def fit(found: list[dict[str, Any]]) -> dict[str, float]:
    """What a run takes of each part of `speed.work`."""
    lines = []
    for run in (run for run in found if run["gpus"] == 1):
        shape, setup, card, rows, choice = past.of_run(CONFIG, run)
        parts = speed.work(shape, setup, card, rows)
        assert parts
        scale = speed.cost(shape, setup, choice) * run["tokens_per_second"]
        lines.append([part * scale for part in parts])
    solved = np.linalg.lstsq(np.array(lines), np.ones(len(lines)), rcond=None)[0]
    return {name: round(float(value), 3) for name, value in zip(NAMES, solved, strict=True)}


def times(found: list[dict[str, Any]]) -> float:
    """How many times as fast two GPUs were as one; the mean."""
    pairs: dict[str, dict[int, float]] = {}
    for run in (run for run in found if run["script"] == "two_gpus.py"):
        pairs.setdefault(run["precision"], {})[run["gpus"]] = run["tokens_per_second"]
    return round(statistics.mean(pair[2] / pair[1] for pair in pairs.values()), 3)


def measured() -> dict[str, Any]:
    """The contents of `measured.json`."""
    found = runs()
    starts = [run["start_seconds"] for run in found if "start_seconds" in run]
    return {
        "made_by": "python -m bench.planning", "rates": fit(found), "times": times(found),
        "start_seconds": round(statistics.mean(starts), 1), "config": CONFIG, "runs": found,
    }  # fmt: skip


def table() -> str:
    """Every run, predicted and measured, as Markdown; of what `measured.json` says."""
    lines = [
        "| run | base | adapted | tokens a pass | GPUs | GiB, predicted | measured | off | tokens/s, predicted "
        "| measured | off |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in past.measured():
        facts = run.facts
        about = f"{facts['script']}, {facts['workload']}, {facts['date']}"
        targets = "all seven" if facts["targets"] == "all-linear" else "q, v"
        lines.append(
            f"| {about} | {facts['precision']} | {targets} | {facts['pass_tokens']:,} | {facts['gpus']} "
            f"| {run.predicted_bytes / 2**30:.1f} | {run.peak_bytes / 2**30:.1f} | {run.memory_off:+.1f} % "
            f"| {run.predicted_speed:,.0f} | {run.speed:,.0f} | {run.speed_off:+.1f} % |"
        )
    return "\n".join(lines) + "\n"


def gpus() -> str:
    """The GPUs that are known, as Markdown."""
    lines = [
        "| GPU | GB | MiB that the driver has | compute capability | bf16 | fp8 | fp32 | GB/s | rates by |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for card in cards.CARDS:
        rates = (f"{rate:,g}" if rate else "-" for rate in (card.bf16, card.fp8, card.fp32))
        lines.append(
            f"| {card.name} | {card.gigabytes} | {card.mebibytes:,} | {dotted(card.capability)} "
            f"| {' | '.join(rates)} | {card.bandwidth:,} | {card.source} |"
        )
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with the tables of now."""
    for name, made in {"runs": table(), "GPUs": gpus()}.items():
        begin = BEGIN.format(name)
        text = re.sub(f"{begin}.*?{END}", lambda _, all=begin + made + END: all, text, flags=re.S)
    return text


def main() -> None:
    """Write both."""
    text = json.dumps(measured(), indent=1) + "\n"
    speed.MEASURED.write_text(text, encoding="utf-8")
    speed.measured.cache_clear()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table(), end="")


if __name__ == "__main__":
    main()
