"""What an 8-bit or 4-bit base costs: held-out loss after training, beside the same with a base in bf16.

`python -m bench.quality`, from the root of the repository. The embedded model is trained on real
conversations, prepared once, through `python -m stages train`, for each precision, set of projections
and seed. A held-out loss is that of the adapter on the base on which it was trained.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import click

from bench import conversations
from bench.conversations import ROOT
from bench.train import hardware

RESULTS = ROOT / "bench/results/quality.json"
RECIPE = {
    "BASE_MODEL": "sample", "LOSS_ON": "assistant", "MAX_LENGTH": "1024", "VALIDATION_FRACTION": "0.14",
    "LORA_RANK": "16", "LORA_ALPHA": "16", "LORA_DROPOUT": "0.05", "OPTIMIZER": "adamw_8bit",
    "LEARNING_RATE": "1e-3", "BATCH_TOKENS": "8192",
}  # fmt: skip


def stage(name: str, run: Path, settings: dict[str, str], *extra: str) -> dict[str, Any]:
    """Metrics and versions of a stage's run."""
    env = os.environ | RECIPE | settings | {"RUN_DIR": str(run)}
    command = [sys.executable, "-m", "stages", name, *extra]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(
            f"{settings}: {name} ended with {done.returncode}: {done.stderr[-2000:]}"
        )
    made = {"prepare-data": "data", "train": "adapter"}[name]
    manifest = json.loads((run / made / "manifest.json").read_text())
    return {"versions": manifest["versions"]} | manifest["metrics"]


def table(results: list[dict[str, Any]]) -> str:
    """Mean over the seeds, what the seeds differ by, and what the precision costs, in nats a token."""
    found: dict[tuple[str, str], list[float]] = {}
    for result in results:
        key = result["targets"], result["precision"]
        found.setdefault(key, []).append(result["held_out_loss"])
    lines = [
        "| adapters | base | held-out loss | seeds differ by | more than bf16 |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (targets, precision), losses in found.items():
        mean = statistics.mean(losses)
        more = mean - statistics.mean(found.get((targets, "bf16"), [mean]))
        spread = max(losses) - min(losses)
        lines.append(f"| {targets} | {precision} | {mean:.4f} | {spread:.4f} | {more:+.4f} |")
    return "\n".join(lines)


@click.command()
@click.option("--precisions", default="bf16,fp8,nf4", show_default=True)
@click.option("--targets", default="q_proj+v_proj,all-linear", show_default=True)
@click.option("--seeds", default="0,1", show_default=True)
@click.option("--epochs", default="2", show_default=True)
@click.option("--max-rows", help="Of the data. [default: all]")
@click.option("--at-once", default=4, show_default=True, help="Runs side by side.")
@conversations.option
@click.option(
    "--output", default=RESULTS, show_default=True, type=click.Path(dir_okay=False, path_type=Path)
)
def main(
    precisions: str, targets: str, seeds: str, epochs: str, max_rows: str | None, at_once: int, data: Path,
    output: Path,
) -> None:  # fmt: skip
    """Train with every precision, set of projections and seed, and print what the held-out loss is."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        rows = Path(folder, "rows")
        settings = {"DATASET": str(data.resolve()), "EPOCHS": epochs}
        settings |= {"MAX_ROWS": max_rows} if max_rows else {}
        prepared = stage("prepare-data", rows, settings)
        click.echo(
            f"{prepared['rows_kept']} rows, {prepared['trainable_tokens']} learned tokens", err=True
        )

        def run(case: tuple[str, str, str]) -> dict[str, Any]:
            names, precision, seed = case
            place = Path(folder, "-".join(case))
            shutil.copytree(rows / "data", place / "data")
            mine = {
                "BASE_PRECISION": precision,
                "LORA_TARGETS": names.replace("+", ","),
                "SEED": seed,
            }
            found = stage(
                "train", place, settings | mine, "--allow-stale"
            )  # of another seed, the same rows
            click.echo(f"{' '.join(case)}: {found['held_out_loss']:.4f}", err=True)
            facts = {
                key: found[key]
                for key in ("held_out_loss", "loss", "steps", "best_step", "versions")
            }
            return {"targets": names, "precision": precision, "seed": int(seed)} | facts

        cases = list(product(targets.split(","), precisions.split(","), seeds.split(",")))
        with ThreadPoolExecutor(at_once) as pool:
            results = list(pool.map(run, cases))
    facts = {
        "hardware": hardware(),
        "date": datetime.now(UTC).date().isoformat(),
        "recipe": RECIPE | {"EPOCHS": epochs},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([result | facts for result in results], indent=1) + "\n")
    click.echo(table(results))


if __name__ == "__main__":
    main()
