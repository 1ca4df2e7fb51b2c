"""push: the adapter, the merged model or the GGUF file in a repository of the hub.

Reads `adapter/`, `merged/` or `gguf/` in the run directory, every byte verified. Writes to the hub alone: into
a private repository, unless `--public` says otherwise; no other command ever does.
"""

from typing import Any

import click

from stages.lib.run.exits import BadSetting
from stages.lib.run.options import run_options
from stages.lib.run.rundir import Run
from stages.lib.run.settings import Stage, setting

KEPT_BACK = "last/"  # of an adapter: the state after the last step, where an earlier one is better


@click.command("push", cls=Stage)
@setting("--repository", "REPOSITORY", required=True, help="Where to: owner/name on the hub.")
@setting(
    "--push-what", "PUSH_WHAT", type=click.Choice(["adapter", "merged", "gguf"]), default="adapter",
    help="Which of the run's artifacts.",
)  # fmt: skip
@setting(
    "--public", "PUSH_PUBLIC", is_flag=True, help="Make a new repository public, or accept a public one."
)  # fmt: skip
@run_options
@click.pass_context
def push(
    ctx: click.Context, /, repository: str, push_what: str, public: bool, **run_settings: object
) -> None:
    """Upload an artifact to the hub, into a private repository unless told."""
    from stages.lib.report.table import table
    from stages.lib.run import pushing
    from stages.lib.run.progress import say

    if ctx.get_parameter_source("public") is click.ParameterSource.DEFAULT_MAP:
        raise BadSetting(
            "PUSH_PUBLIC is set in the preset, where it is easily forgotten; say it with --public"
        )
    made = Run(ctx).read(push_what, deep=True)
    # Its manifest stays here: it holds settings, and they paths of this host.
    entries = {
        name: entry
        for name, entry in made.manifest["files"].items()
        if not name.startswith(KEPT_BACK)
    }
    files = {name: made.path / name for name in entries}
    for name, path in pushing.paths_within(files, made.manifest).items():
        say(f"{name} names {path}, which nobody else has; others must put their own there")
    size = sum(entry["bytes"] for entry in entries.values())
    say(f"pushing {len(files)} files, {size / 1e6:,.1f} MB, to {repository}")
    message = f"Upload {push_what} of lora-stages"
    pushed = pushing.push(repository, files, entries, public, message)
    seen = "everybody" if pushed.public else "its members alone"
    rows: list[tuple[str, Any]] = [
        ("address", pushed.address), ("commit", pushed.commit), ("seen by", seen), ("files", len(files)),
        ("bytes", size),
    ]  # fmt: skip
    click.echo(table(("push", "value"), rows))
