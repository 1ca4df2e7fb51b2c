"""chain: the stages from prepare-data to merge, one after the other, as one job runs them.

Reads and writes what they do. Ends with the exit code of the first that fails; the same command then goes on.
"""

import sys

import click

from stages.lib.jobs.chain import Chain
from stages.lib.jobs.order import CHAIN
from stages.lib.run import options


@click.command("chain", cls=click.Command)  # a Stage would take the signals
@options.max_runtime
@click.pass_context
def chain(ctx: click.Context, max_runtime: float | None) -> None:
    """Run prepare-data, train, evaluate and merge."""
    sys.exit(Chain(ctx.find_root().params["env_file"], max_runtime).run(CHAIN))
