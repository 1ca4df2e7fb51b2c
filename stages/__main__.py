"""The command line: `python -m stages [--env-file PRESET] STAGE [OPTIONS]`."""

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from stages import __version__
from stages.lib.run import environment, redaction, settings, several
from stages.lib.run.environment import SECRETS_FILE
from stages.lib.run.exits import Reported

COMPLETE = "_LORA_STAGES_COMPLETE"  # set by the scripts of `completion`


def _presets(_: click.Context, __: click.Parameter, word: str) -> list[CompletionItem[str]]:
    """The presets that go on from a word; any file, where there is none."""
    found = sorted(str(path) for path in Path("env").glob("*.env") if path.name != SECRETS_FILE)
    fitting = [CompletionItem(path) for path in found if path.startswith(word)]
    return fitting or [CompletionItem(word, type="file")]


@click.group(cls=settings.Stages)
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
    settings.check_make_overrides(group.names())
    environment.load_secrets(Path("env"))
    if env_file:
        group.use_preset(ctx, env_file)


def _register() -> None:
    from stages.evaluate import evaluate
    from stages.generate import generate
    from stages.merge import merge
    from stages.prepare_data import prepare_data
    from stages.tools.chain import chain
    from stages.tools.chat import chat
    from stages.tools.completion import completion
    from stages.tools.copy import copy
    from stages.tools.doctor import doctor
    from stages.tools.export import export
    from stages.tools.fetch import fetch
    from stages.tools.gc import gc
    from stages.tools.job import job
    from stages.tools.options import options
    from stages.tools.plan import plan
    from stages.tools.push import push
    from stages.tools.report import report
    from stages.tools.runs import runs
    from stages.train import train

    for command in (
        plan, doctor, fetch, prepare_data, train, evaluate, generate, chat, merge, export, push, report, runs,
        gc, chain, job, copy, options, completion,
    ):  # fmt: skip
        stages.add_command(command)


def main() -> None:
    """Run a command and exit with its code."""
    _register()
    redaction.guard_streams()
    outcome = Reported(redaction.said, several.leave)
    with several.ending(outcome), outcome:
        stages.main(
            prog_name="python -m stages", complete_var=COMPLETE, standalone_mode=False, obj=outcome
        )


if __name__ == "__main__":
    main()
