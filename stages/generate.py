"""generate: answers from the tuned model.

Reads `adapter/` in the run directory and the base model.
Writes a single prompt's answer to standard output, and those of a prompts file to `generations/`.
"""

import sys
from pathlib import Path

import click

from stages.lib.run import options
from stages.lib.run.rundir import Run, run_options
from stages.lib.run.settings import Stage, more_explicit, setting
from stages.lib.run.values import Number


@click.command("generate", cls=Stage)
@setting(
    "--prompt", "PROMPT", help="One prompt; without it and a file, standard input is the prompt."
)
@setting(
    "--prompts-file", "PROMPTS_FILE", type=click.Path(path_type=Path),
    help="Prompts: one a line, or a .jsonl file with a `prompt` column.",
)  # fmt: skip
@setting("--system", "SYSTEM", help="What stands before the conversation.")
@setting(
    "--batch-prompts",
    "BATCH_PROMPTS",
    type=Number(int, low=1),
    default=8,
    help="Prompts of a file at a time.",
)
@options.max_new_tokens(256)
@run_options
@click.pass_context
def generate(
    ctx: click.Context, /, prompt: str | None, prompts_file: Path | None, system: str | None,
    batch_prompts: int, max_new_tokens: int, **run_settings: object,
) -> None:  # fmt: skip
    """Answer prompts with the tuned model."""
    from stages.lib.data import conversation, prompts
    from stages.lib.model.base import Base

    if more_explicit(ctx, "prompts_file", "prompt"):
        prompt = None
    elif prompt:
        prompts_file = None
    asked = prompts.read(prompt, prompts_file)
    run = Run(ctx)
    made = run.read("adapter", deep=True)
    base = Base.recorded(made.manifest["inputs"]["base"])
    inputs = {"adapter": made.digest, "prompts": prompts.digest(asked)}
    if prompts_file and run.finished("generations", inputs):
        return
    base.fetch()

    from stages.lib.data.formats import Format
    from stages.lib.data.tokens import Tokens
    from stages.lib.model import adapter, answer, load

    adapter.check_base(made, base)
    tokens = Tokens(base.folder)
    chat_format = Format.load(made.path, tokens)
    ids = [chat_format.prompt(conversation.ask(text, system or "")) for text in asked]
    base.check_room(max(map(len, ids)), max_new_tokens)
    precision = made.manifest["metrics"]["base_precision"]
    tuned = adapter.load(load.load(base, precision), made.path, base)
    speaker = answer.Speaker(
        tuned, precision, tokens, chat_format.stops, max_new_tokens, at_once=batch_prompts
    )
    if not prompts_file:
        write = (lambda text: click.echo(text, nl=False)) if sys.stdout.isatty() else None
        said = speaker.one(ids[0], write)
        click.echo("" if write else said.text)
        return
    with run.work() as scratch:
        found = dict(speaker.each(ids))
        answers = [found[place] for place in range(len(ids))]
        metrics = prompts.write(scratch, asked, answers)
        run.publish("generations", scratch, inputs, metrics, device=load.describe_device())
    click.echo(str(run.folder / "generations" / prompts.FILE))
