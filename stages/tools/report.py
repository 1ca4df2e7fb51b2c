"""report: what a run came to, in a small table.

Reads the manifests of a run directory and its `evaluation/`. Writes nothing.
"""

from typing import Any

import click

from stages.lib.run import options
from stages.lib.run.artifact import load
from stages.lib.run.exits import Missing
from stages.lib.run.rundir import MADE_BY
from stages.lib.run.settings import Stage


@click.command("report", cls=Stage)
@options.run_dir
@click.pass_context
def report(ctx: click.Context, run_dir: Any) -> None:
    """Print what a run came to."""
    from stages.lib.report import comparison
    from stages.lib.report.table import table

    found = {name: made for name in MADE_BY if (made := load(run_dir / name))}
    if not found:
        raise Missing(f"there is no finished artifact in {run_dir}; run `prepare-data` first")
    if "evaluation" in found:
        click.echo(comparison.summary_table(comparison.read(found["evaluation"].path)))
    rows = [(name, str(made.path), _size(made.manifest)) for name, made in found.items()]
    click.echo(table(("artifact", "folder", "size"), rows))


def _size(manifest: dict[str, Any]) -> str:
    return f"{sum(entry['bytes'] for entry in manifest['files'].values()) / 1e6:,.1f} MB"
