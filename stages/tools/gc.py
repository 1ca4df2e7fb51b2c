"""gc: what the runs in a folder no longer need, listed and then, if told so, removed.

Reads the runs in a folder and SCRATCH_DIR. Removes debris, checkpoints that no command needs, and what dead
processes left in scratch; never an artifact, nor anything of a run that somebody holds. Without `--delete` it
asks on a terminal, and elsewhere only lists.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.lib.run import options
from stages.lib.run.settings import Stage

if TYPE_CHECKING:
    from stages.lib.run.debris import Needless


@click.command("gc", cls=Stage)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--delete", is_flag=True, help="Remove what is listed, unasked.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
@options.beside
def gc(folder: Path | None, delete: bool, as_json: bool, beside: Path) -> None:
    """List debris and old checkpoints of the runs in FOLDER, by default beside RUN_DIR; then remove them."""
    from stages.lib.run import debris
    from stages.lib.run.exits import CannotWrite
    from stages.lib.run.volume import amount

    found, said = _found(folder or beside.parent)
    listed = [item for items in found.values() for item in items] + debris.in_scratch()
    if not as_json:
        click.echo("\n".join([_listing(listed), *said]))
        delete = delete or (bool(listed) and _agreed(sum(item.bytes for item in listed)))
    gone, kept, failed = _remove(found, listed) if delete else ([], [], [])
    if as_json:
        facts = {"listed": listed, "removed": gone}
        told = {name: [item.facts() for item in items] for name, items in facts.items()}
        click.echo(json.dumps(told | {"left_alone": said + kept, "failed": failed}, indent=1))
    elif delete:
        size = amount(sum(item.bytes for item in gone))
        click.echo("\n".join([*kept, f"removed {len(gone)} of {len(listed)}, {size}"]))
    elif listed:
        click.echo("nothing was removed; --delete removes it")
    if failed:
        raise CannotWrite(f"{len(failed)} could not be removed, the first because {failed[0]}")


def _found(folder: Path) -> "tuple[dict[Path, list[Needless]], list[str]]":
    """What may go of each run that nobody holds, and what there is to say of the others."""
    from stages.lib.run import debris, lease, standing
    from stages.lib.run.exits import Missing

    if not folder.is_dir():
        raise Missing(f"there is no folder {folder}; name the one that holds your runs")
    found, said = {}, []
    for run in standing.runs_in(folder):
        try:
            holder = lease.seen(run)
            if holder and holder.sure:
                said.append(
                    f"{standing.plain(run)}: left alone, {holder.stage} is at work on it, {holder.process}"
                )
            else:
                found[run] = debris.in_run(run)
        except OSError as error:
            said.append(f"{standing.plain(run)}: left alone, {error.strerror or error}")
    return found, said


def _listing(listed: "list[Needless]") -> str:
    from stages.lib.run.standing import plain
    from stages.lib.run.volume import amount

    if not listed:
        return "there is nothing to remove"
    lines = [f"{amount(item.bytes):>11}  {plain(item.path)}: {item.reason}" for item in listed]
    return "\n".join([*lines, f"{amount(sum(item.bytes for item in listed)):>11}  all of it"])


def _agreed(size: int) -> bool:
    """Whether a person who was asked said yes; where there is none, nobody did."""
    from stages.lib.run.volume import amount

    asked = sys.stdin.isatty() and sys.stdout.isatty()
    return asked and click.confirm(f"Remove these, {amount(size)}?")


def _remove(
    found: "dict[Path, list[Needless]]", listed: "list[Needless]"
) -> "tuple[list[Needless], list[str], list[str]]":
    """Remove what was listed; what is gone, what was left alone, and what could not be removed."""
    from stages.lib.run import debris
    from stages.lib.run.exits import CannotWrite, InUse

    gone: list[Needless] = []
    kept: list[str] = []
    failed: list[str] = []
    for run, items in found.items():
        try:
            done = debris.clear(run, items) if items else ([], [])
            gone, failed = [*gone, *done[0]], [*failed, *done[1]]
        except InUse as error:
            kept.append(f"left alone: {error.message}")
        except CannotWrite as error:
            failed.append(error.message)
    for item in listed:
        if item.kind == "scratch":
            try:
                gone += [item] if debris.remove(item) else []
            except CannotWrite as error:
                failed.append(error.message)
    return gone, kept, failed
