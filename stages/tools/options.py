"""options: every command and setting as Markdown, from which `docs/options.md` is made."""

import click

from stages.lib.run.settings import Setting, Stage, Stages


@click.command("options", cls=Stage)
@click.option(
    "--names", is_flag=True, help="Only the environment names, one a line, for `docker --env-file`."
)
@click.pass_context
def options(ctx: click.Context, names: bool) -> None:
    """Print every setting as Markdown."""
    group = ctx.find_root().command
    assert isinstance(group, Stages)
    click.echo("\n".join(group.names()) + "\n" if names else markdown(group), nl=False)


def markdown(group: Stages) -> str:
    """A table for each command."""
    lines = ["# Options", "", "Made by `make docs` from the commands.", ""]
    lines += [
        "A setting comes from its flag, else the environment, else the preset, else its default.",
        "",
    ]
    for name, command in group.commands.items():
        settings = [option for option in command.params if isinstance(option, Setting)]
        if settings:
            lines += [f"## {name}", "", command.help or "", ""]
            lines += ["| flag | variable | default | meaning |", "| --- | --- | --- | --- |"]
            lines += [_row(option) for option in settings] + [""]
    return "\n".join(lines)


def _row(option: Setting) -> str:
    meaning, _, unset = (option.help or "").partition(" [default: ")
    default = unset.removesuffix("]")
    if option.required:
        default = "required"
    elif option.show_default:
        default = f"`{option.default}`"
    if isinstance(option.type, click.Choice):
        meaning += f" One of {', '.join(f'`{choice}`' for choice in option.type.choices)}."
    return f"| `{option.opts[0]}` | `{option.variable}` | {default} | {meaning} |"
