"""report: what a run came to, or several beside each other, as one page that opens from a file.

Reads all that there is in the run directories, finished or not. Writes `report.html` there, or OUTPUT; prints a
small table.
"""

from pathlib import Path

import click

from stages.lib.run import options
from stages.lib.run.exits import BadSetting, CannotWrite, Missing
from stages.lib.run.settings import Stage

MOST = 8  # runs that colours tell apart


@click.command("report", cls=Stage)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN]...")
@options.run_dir
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False),
    help="File of the page. [default: report.html in the run, or FIRST-compared.html beside it]",
)  # fmt: skip
@click.pass_context
def report(ctx: click.Context, runs: tuple[Path, ...], run_dir: Path, output: Path | None) -> None:
    """Show what a run came to, or compare several: each RUN is a run directory."""
    from stages.lib.data import prepared
    from stages.lib.model import history
    from stages.lib.report import compared_page, found, run_page
    from stages.lib.report.summary import compared, summary

    ctx.obj.run_dir = None  # what error.json says of the run has to stay
    given = ctx.get_parameter_source("run_dir") is click.core.ParameterSource.COMMANDLINE
    if runs and given:
        raise BadSetting("both --run-dir and RUN name a run; leave one out")
    if len(runs) > MOST:
        raise BadSetting(f"{len(runs)} runs are too many for one page; compare at most {MOST}")
    readers = found.Readers(prepared.account, history.so_far)
    looked = [found.look(folder, readers) for folder in runs or (run_dir,)]
    for one in looked:
        if one.empty:
            raise Missing(f"there is nothing of a run in {one.folder}; run `prepare-data` first")
    first = looked[0].folder
    if len(looked) == 1:
        click.echo(summary(looked[0]))
        page, path = run_page.page(looked[0]), output or first / run_page.FILE
    else:
        click.echo(compared(looked))
        beside = first.resolve()
        name = f"{beside.name}-compared.html"
        page, path = compared_page.page(looked), output or beside.with_name(name)
    _write(path, page)
    click.echo(f"The whole report: {path}")


def _write(path: Path, page: str) -> None:
    """Write the page over an older one.

    Raises:
        CannotWrite: not there.
    """
    from stages.lib.run import artifact

    try:
        with artifact.writing(path):
            artifact.write(path, page.encode(errors="replace"), replace=True)
    except CannotWrite as error:
        raise CannotWrite(f"{error.message}; or name another place with --output FILE") from error
