"""The rows that all benchmarks read."""

from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
option = click.option(
    "--data", default=ROOT / "../shared/data/oasst-guanaco.jsonl", show_default=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Conversations in the shape of openassistant-guanaco.",
)  # fmt: skip
