"""runs: how the runs in a folder stand.

Reads what each has left: manifests, the records of its processes, `error.json` and the holder file. Hashes
nothing, writes nothing. A holder on another machine cannot be seen at once: its run is going on, perhaps.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.lib.run import options
from stages.lib.run.settings import Stage

if TYPE_CHECKING:
    from stages.lib.run.standing import Standing


@click.command("runs", cls=Stage)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
@options.beside
def runs(folder: Path | None, as_json: bool, beside: Path) -> None:
    """List the runs in FOLDER, by default those beside RUN_DIR, and how each stands."""
    from stages.lib.run import standing
    from stages.lib.run.exits import Missing

    folder = folder or beside.parent
    try:
        found = standing.standings(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Missing(f"there is no folder {folder}; name the one that holds your runs") from error
    if as_json:
        click.echo(json.dumps({"runs": [each.facts() for each in found]}, indent=1))
    elif found:
        click.echo(_shown(found, folder))
    else:
        click.echo(f"there is no run in {folder}")


def _shown(found: "list[Standing]", folder: Path) -> str:
    """The table, and below it the reason for each state that has one."""
    from stages.lib.report.table import table
    from stages.lib.run.standing import span
    from stages.lib.run.volume import amount

    names = [_name(each, folder) for each in found]
    headings = ("run", "state", "stage", "step", "loss", "held-out", "tokens/s", "age", "size")
    now = time.time()
    rows = [
        (
            name, each.state, each.stage, each.step, each.loss, each.held_out_loss, each.tokens_per_second,
            span(max(now - each.changed, 0)) if each.changed else None, amount(each.bytes),
        )
        for name, each in zip(names, found, strict=True)
    ]  # fmt: skip
    reasons = [
        f"{name}: {each.state}: {each.why}"
        for name, each in zip(names, found, strict=True)
        if each.why
    ]
    return "\n".join([table(headings, rows), *([""] if reasons else []), *reasons])


def _name(each: "Standing", folder: Path) -> str:
    inside = each.folder.removeprefix(f"{folder}/")
    return inside if inside != "." else str(folder)
