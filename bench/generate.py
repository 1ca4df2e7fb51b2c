"""How fast `generate` answers on one GPU, beside transformers.

`python -m bench.generate`, from the root of the repository. A base of Llama 2 7B's shape with random weights
(`bench/train_model.py`) and an adapter of rank 16 on q and v answers one prompt of 100 tokens with 256, and a
file of 256 prompts, which are the first questions of real conversations, with 128 each; nobody stops early.
All systems run one after the other, each in a process of its own (`bench/generate_systems.py`), over the same
weights and prompts. A time is that of a second call; the first, which compiles, is told beside it.
"""

import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from bench import conversations
from bench.conversations import ROOT
from bench.generate_systems import FILE, ONE, SYSTEMS
from bench.train import hardware

RESULTS = ROOT / "bench/results/generate.json"
TITLES = {ONE: "one prompt", FILE: "a file of 256 prompts"}


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| | system | tokens/s | first answer, s | peak GiB |", "| --- | --- | ---: | ---: | ---: |"
    ]  # fmt: skip
    for workload, title in TITLES.items():
        for result in (r for r in results if r["workload"] == workload):
            lines.append(
                f"| {title} | {result['system']} | {result['tokens_per_second']:,.0f} "
                f"| {result['first_seconds']:.1f} | {result['peak_gib']:.1f} |"
            )
            title = ""
    return "\n".join(lines)


def measure(system: str, model: Path, data: Path, limit: float) -> list[dict[str, Any]]:
    """What a system prints, in a process that gives the GPU back."""
    command = [sys.executable, "-m", "bench.generate_systems", system, str(model), str(data)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        click.echo(f"{system} ended with {done.returncode}: {done.stderr[-1500:]}", err=True)
    return found


@click.command()
@conversations.option
@click.option("--model", type=click.Path(path_type=Path), help="A base that is there already.")
@click.option("--shape", type=click.Choice(["7b", "tiny"]), default="7b", show_default=True)
@click.option("--systems", help="Names or their beginnings, with commas. [default: all]")
@click.option("--limit", type=float, default=240, show_default=True, help="Seconds for a process.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    data: Path, model: Path | None, shape: str, systems: str | None, limit: float, output: Path
) -> None:
    """Measure, print a table and write it down."""
    wanted = tuple((systems or "").split(","))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        base = (model or Path(folder) / "model").resolve()
        if not (base / "config.json").is_file():
            base.mkdir()
            script = str(ROOT / "bench/train_model.py")
            subprocess.run(
                [sys.executable, "-P", script, str(data.resolve()), str(base), shape], check=True
            )
        results = []
        for system in (name for name in SYSTEMS if name.startswith(wanted)):
            begun = time.perf_counter()
            try:
                found = measure(system, base, data.resolve(), limit)
            except (click.ClickException, subprocess.TimeoutExpired) as error:
                click.echo(f"{system} failed: {error}", err=True)
                continue
            facts = {"hardware": hardware(), "date": datetime.now(UTC).date().isoformat()}
            results += [{"system": system} | one | facts for one in found]
            for one in found:
                took = time.perf_counter() - begun
                click.echo(
                    f"{system}, {one['workload']}: {one['tokens_per_second']:,.1f} tokens/s, first answer "
                    f"{one['first_seconds']:.1f} s, {took:.0f} s in all",
                    err=True,
                )
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")
    click.echo(table(results))


if __name__ == "__main__":
    main()
