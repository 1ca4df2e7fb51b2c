"""completion: what has a shell complete `python -m stages ...`: commands, options, their values, presets.

Writes a script for bash, zsh or fish to standard output, to be sourced from the shell's own start-up file.
"""

from importlib import resources

import click


@click.command("completion", cls=click.Command)  # nothing else is to be said
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what has SHELL complete this program's command lines."""
    script = resources.files("stages.lib.run") / "shells" / f"completion.{shell}"
    click.echo(script.read_text(encoding="utf-8"), nl=False)
