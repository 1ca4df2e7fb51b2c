"""Run directories as stages leave them, published by our own code, in milliseconds."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from stages.lib.data import prepared
from stages.lib.data.preparation import Batch
from stages.lib.model import history
from stages.lib.report import comparison, found
from stages.lib.report.found import Found, Readers
from stages.lib.run import artifact
from tests.lib.report.test_comparison import QUESTIONS, SAID, rows

READERS = Readers(prepared.account, history.so_far)
LENGTHS = {"train": [5, 9, 9, 40], "held_out": [7, 12]}
BASE = {"name": "owner/base", "revision": "abc123", "fingerprint": "f" * 64}
STARTED = 1_764_000_000.0
VERSIONS = {"lora-stages": "0.1.0", "torch": "2.13.0+cpu"}
STATE = {"loss": "loss", "held_out_loss": "eval_loss"}  # as Trainer calls them


def settings(**values: Any) -> dict[str, Any]:
    """As a manifest has them."""
    said = {"MAX_LENGTH": (1024, "default"), "BASE_MODEL": ("owner/base", "preset")} | values
    return {name: {"value": value, "from": origin} for name, (value, origin) in said.items()}


def steps(
    count: int = 60, recorded: bool = True, restarts: tuple[int, ...] = (21, 41)
) -> list[dict[str, Any]]:
    """A history; without `recorded` as older versions have it."""
    found, at = [], STARTED
    for step in range(1, count + 1):
        at += 900.0 if step in restarts else 2.0
        entry: dict[str, Any] = {
            "step": step, "loss": 1 + 3 / step, "learning_rate": 2e-4 * (1 - step / count), "grad_norm": 0.5,
        }  # fmt: skip
        if recorded:
            entry |= {
                "at": at, "attempt": 1 + sum(step >= one for one in restarts),
                "tokens_per_second": 9000.0 + step, "gpu_bytes": 20 * 2**30 + step,
            }  # fmt: skip
        found.append(entry)
        if step % 20 == 0:
            found.append({"step": step, "held_out_loss": 2 - step / 100})
    return found


def publish(
    run: Path, name: str, files: dict[str, str], manifest: dict[str, Any]
) -> artifact.Artifact:
    """An artifact of a run."""
    with tempfile.TemporaryDirectory() as scratch:
        for file, content in files.items():
            (Path(scratch) / file).write_text(content)
        common = {
            "versions": VERSIONS,
            "wall_seconds": 12.5,
            "peak_host_bytes": 2**30,
            "settings": settings(),
        }
        return artifact.publish(Path(scratch), run / name, common | manifest)


def data(run: Path, **said: Any) -> artifact.Artifact:
    """Prepared data: each part's rows of `LENGTHS`, their first token only read."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with prepared.Writer(folder) as writer:
            for part, lengths in LENGTHS.items():
                starts = np.cumsum([0, *lengths])
                learned = np.ones(starts[-1], bool)
                learned[starts[:-1]] = False
                batch = Batch([], np.zeros(starts[-1], np.int32), learned, starts)
                index = np.arange(len(lengths))
                writer.write(part, index + 1, 0, batch, index)
        tokens, count = sum(map(sum, LENGTHS.values())), sum(map(len, LENGTHS.values()))
        metrics = {
            "rows_read": count + 3, "rows_kept": count, "rows_held_out": 2, "rows_truncated": 1,
            "rows_split": 0, "rows_written": count, "turns_dropped": 0,
            "tokens_encoded": tokens + 30, "tokens": tokens,
            "trainable_tokens": tokens - count, "tokens_lost": 32, "tokens_added": 2,
            "rows_ending_in_trained_eos": count, "rows_dropped": {"duplicate": 2, "bad": 1},
        }  # fmt: skip
        source = {"name": "rows.jsonl", "sources": [{"name": "rows.jsonl"}]}
        manifest = {
            "stage": "prepare-data", "settings": settings(), "metrics": metrics, "seed": 0,
            "inputs": {"dataset": source, "base": BASE}, "versions": VERSIONS, "wall_seconds": 3.25,
            "peak_host_bytes": 2**29,
        } | said  # fmt: skip
        return artifact.publish(folder, run / "data", manifest)


def adapter(
    run: Path, made_from: str, past: list[dict[str, Any]], **metrics: Any
) -> artifact.Artifact:
    """A finished training."""
    norms = {
        f"model.layers.{layer}.self_attn.{kind}": 0.5 + layer / 10
        for layer in range(4)
        for kind in ("q_proj", "v_proj")
    }
    first = {
        "step": 1,
        "modules": 8,
        "least": 0.01,
        "least_in": next(iter(norms)),
        "without_input": [],
    }
    whole = {
        "steps": 60, "epochs": 2.0, "tokens": 126, "trained_tokens": 118, "loss": 1.05, "history": past,
        "base_precision": "bf16", "tokens_per_second": 9050.0, "train_seconds": 120.0, "best_step": 60,
        "held_out_loss": 1.4, "resumed_from_step": 40, "trainable_parameters": 4096, "gpus": 1,
        "predicted_gpu_bytes": 22 * 2**30, "peak_gpu_bytes": 21 * 2**30,
        "predicted_tokens_per_second": 10000.0,
        "health": {"b_norms": norms, "unmoved": [], "logit_change": 3.5, "first_gradients": first},
    } | metrics  # fmt: skip
    given = settings(
        LORA_RANK=(16, "flag"), LORA_ALPHA=(16.0, "environment"), LORA_TARGETS=("q_proj,v_proj", "default"),
        LEARNING_RATE=(2e-4, "preset"),
    )  # fmt: skip
    device = {"type": "cuda", "name": "NVIDIA H100", "memory_bytes": 85 * 10**9}
    manifest = {"stage": "train", "inputs": {"data": made_from, "base": BASE}, "metrics": whole,
                "settings": given, "device": device, "seed": 0}  # fmt: skip
    return publish(run, "adapter", {"adapter_model.safetensors": "weights"}, manifest)


def evaluated(gain: float = 0.5) -> dict[str, Any]:
    """An evaluation's result."""
    return comparison.compare(
        rows(40, gain), ["one", "two"], QUESTIONS, SAID, ["###"], 0, {"inputs": {}, "settings": {}}
    )


def evaluation(run: Path, made_from: str, result: dict[str, Any]) -> artifact.Artifact:
    """A finished evaluation."""
    manifest = {
        "stage": "evaluate", "inputs": {"adapter": made_from}, "metrics": comparison.metrics(result),
    }  # fmt: skip
    return publish(run, "evaluation", {comparison.FILE: json.dumps(result)}, manifest)


def merged(run: Path, made_from: str) -> artifact.Artifact:
    """A finished merge."""
    report = {
        "weights": {"changed": 8, "kept": 30, "roundings": 0.49}, "closer": "That base is the closer one.",
    }  # fmt: skip
    metrics = {
        "mean_kl": 2e-5, "top1_agreement": 0.9975, "fold_kl": 1e-5, "perplexity": 4.01, "answers_equal": 1.0,
        "perplexity_as_trained": 4.0, "perplexity_change": 0.0025, "compared_tokens": 400,
    }  # fmt: skip
    manifest = {
        "stage": "merge",
        "inputs": {"adapter": made_from, "base": BASE},
        "metrics": metrics,
    }
    return publish(run, "merged", {found.MERGE_REPORT: json.dumps(report)}, manifest)


def whole(run: Path, gain: float = 0.5, recorded: bool = True, **metrics: Any) -> Path:
    """A run with all that a report shows."""
    made = adapter(run, data(run).digest, steps(recorded=recorded), **metrics)
    evaluation(run, made.digest, evaluated(gain))
    merged(run, made.digest)
    attempt(run, 1, "train", 75, "stopped by SIGTERM; the same command goes on")
    attempt(run, 2, "train", 0)
    return run


def checkpoint(run: Path, step: int, of: int = 60) -> artifact.Artifact:
    """A checkpoint in the middle of a training, its state as Trainer writes it."""
    log = [
        {STATE.get(key, key): value for key, value in entry.items()} for entry in steps()
        if entry["step"] <= step
    ]  # fmt: skip
    state = json.dumps({"global_step": step, "max_steps": of, "log_history": log})
    manifest = {"stage": "train", "inputs": {}, "metrics": {"step": step, "held_out_loss": 1.9}}
    return publish(run, f"checkpoints/step-{step:08d}", {"trainer_state.json": state}, manifest)


def attempt(run: Path, number: int, stage: str, end: int | None, said: str = "") -> None:
    """The record of a process."""
    record = {
        "number": number, "stage": stage, "settings": "0" * 12, "host": "node", "boot": "", "oom_kills": None,
        "started": "2026-01-01T00:00:00Z", "seconds": 61.0, "resident_bytes": 2**30, "progress": 1,
        "end": end, "said": f"ended with {end}: {said}", "counts": True,
    }  # fmt: skip
    (run / "attempts").mkdir(parents=True, exist_ok=True)
    (run / "attempts" / f"{number:04d}-0000.json").write_text(json.dumps(record))


def look(run: Path) -> Found:
    """What a report finds."""
    return found.look(run, READERS)
