"""The command line: `python -m stages [--env-file PRESET] STAGE [OPTIONS]`."""

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from stages import __version__
from stages.lib.run import environment, redaction, settings, several
from stages.lib.run.environment import SECRETS_FILE
from stages.lib.run.exits import Reported

COMPLETE = "_LORA_STAGES_COMPLETE"  # set by the scripts of `completion`
COMMANDS = {  # name -> module, in the order of `docs/options.md`
    "plan": "stages.tools.plan",
    "doctor": "stages.tools.doctor",
    "fetch": "stages.tools.fetch",
    "prepare-data": "stages.prepare_data",
    "train": "stages.train",
    "evaluate": "stages.evaluate",
    "generate": "stages.generate",
    "chat": "stages.tools.chat",
    "merge": "stages.merge",
    "export": "stages.tools.export",
    "push": "stages.tools.push",
    "report": "stages.tools.report",
    "runs": "stages.tools.runs",
    "gc": "stages.tools.gc",
    "chain": "stages.tools.chain",
    "job": "stages.tools.job",
    "copy": "stages.tools.copy",
    "options": "stages.tools.options",
    "completion": "stages.tools.completion",
}


def _presets(_: click.Context, __: click.Parameter, word: str) -> list[CompletionItem[str]]:
    """The presets that go on from a word; any file, where there is none."""
    found = sorted(str(path) for path in Path("env").glob("*.env") if path.name != SECRETS_FILE)
    fitting = [CompletionItem(path) for path in found if path.startswith(word)]
    return fitting or [CompletionItem(word, type="file")]


@click.group(cls=settings.Stages, commands=settings.Commands(COMMANDS))
@click.version_option(__version__, prog_name="lora-stages")
@click.option(
    "--env-file",
    type=click.Path(path_type=Path),
    shell_complete=_presets,
    help="Preset: a file of NAME=value lines, such as env/sample.env.",
)
@click.pass_context
def stages(ctx: click.Context, env_file: Path | None) -> None:
    """Fine-tune a language model with LoRA: stages that meet only on disk.

    A setting comes from its flag, else the environment, else the preset, else its default.
    """
    group = ctx.command
    assert isinstance(group, settings.Stages)
    settings.check_make_overrides(group.names)
    environment.load_secrets(Path("env"))
    if env_file:
        group.use_preset(ctx, env_file)


def main() -> None:
    """Run a command and exit with its code."""
    redaction.guard_streams()
    outcome = Reported(redaction.said, several.leave)
    with several.ending(outcome), outcome:
        stages.main(
            prog_name="python -m stages", complete_var=COMPLETE, standalone_mode=False, obj=outcome
        )


if __name__ == "__main__":
    main()
