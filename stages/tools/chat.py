"""chat: talk with the tuned model.

Reads `adapter/` in the run directory, the base model, and a line a turn from standard input.
Writes the answers to standard output, and nothing to the run directory.
"""

import contextlib
import sys
from dataclasses import replace
from typing import Any

import click

from stages.lib.run import gpu, options, preemption
from stages.lib.run.exits import BadData, BadSetting, TryAgain
from stages.lib.run.options import reading_options
from stages.lib.run.progress import say
from stages.lib.run.rundir import Run
from stages.lib.run.settings import Stage, did_you_mean

COMMANDS = {
    "/reset": "forget what was said",
    "/system": "/system TEXT: what stands before the talk; without a text nothing does",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does",
}


@click.command("chat", cls=Stage)
@options.speaking(256)
@reading_options
@click.pass_context
def chat(
    ctx: click.Context, /, max_new_tokens: int, stop: tuple[str, ...], chat_format: str,
    force_format: bool, system: str | None, **_: object,
) -> None:  # fmt: skip
    """Talk with the tuned model."""
    from stages.lib.data import formats
    from stages.lib.data.conversation import is_unicode
    from stages.lib.data.talk import Talk
    from stages.lib.data.tokens import Tokens
    from stages.lib.model.base import Base

    if system and not is_unicode(system):
        raise BadSetting("SYSTEM is not UTF-8; convert it")
    made = Run(ctx).read("adapter", deep=True, own=("SEED",))
    gpu.require(made.metrics["base_precision"], promised=False)
    base = Base.recorded(made.manifest["inputs"]["base"])
    tokens = Tokens(base.fetch(weights=False))
    written = formats.spoken(made.path, tokens, chat_format, force_format)
    base.check_room(1, max_new_tokens)
    talk = Talk(written, base.context and base.context - max_new_tokens, system or "")
    base.fetch()

    from stages.lib.model import adapter, load
    from stages.lib.model.answer import Speaker
    from stages.lib.model.sampling import Sampling

    adapter.check_base(made, base)
    precision = made.metrics["base_precision"]
    tuned = adapter.load(load.load(base, precision), made.path, base)
    stops = replace(written.stops, texts=(*written.stops.texts, *stop))
    sampling = Sampling(**options.drawn(ctx.params))
    speaker = Speaker(tuned, precision, tokens, stops, max_new_tokens, sampling)
    for remark in speaker.remarks:
        say(remark)
    number = 0
    _listen()
    while (line := _next_line()) is not None:
        command, rest = (*line.split(maxsplit=1), "", "")[:2] if line[:1] == "/" else ("", "")
        if command == "/quit":
            break
        if command:
            _obey(talk, command, rest.strip())
        elif line.strip():
            if not is_unicode(line):
                raise BadSetting("a line of standard input is not UTF-8; convert it")
            _turn(speaker, talk, line, number)
            number += 1


def _listen() -> None:
    """Take any bytes, and let a line be edited where it is typed."""
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


def _next_line() -> str | None:
    """What is typed or piped, without its end; None where it ends. Ctrl-C drops what is being typed."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            line = f"{input('> ')}\n" if typed else sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        except EOFError:
            click.echo()
            return None
        except TryAgain:
            if not (typed and preemption.by_keyboard()):
                raise
            click.echo()


def _obey(talk: Any, command: str, rest: str) -> None:
    if command == "/reset":
        talk.reset()
    elif command == "/system":
        talk.system = rest
    elif command == "/help":
        for name, meaning in COMMANDS.items():
            click.echo(f"{name:8} {meaning}", err=True)
    else:
        near = did_you_mean(command, COMMANDS)
        say(f"there is no {command}; /help lists what there is, a blank before it asks it.{near}")


def _turn(speaker: Any, talk: Any, line: str, number: int) -> None:
    """One question and its answer; Ctrl-C ends the answer, and what was said of it is kept."""
    try:
        ids = talk.ask(line)
    except BadData as error:
        say(error.message)
        return
    if talk.dropped:
        say(f"the model's context is full: {talk.dropped} of the oldest questions forgotten")
    heard: list[str] = []
    streams = sys.stdout.isatty()

    def write(text: str) -> None:
        heard.append(text)
        if streams:
            click.echo(text, nl=False)

    try:
        with preemption.deferred():
            speaker.one(ids, write, number)
    except TryAgain:
        if not (streams and preemption.by_keyboard()):
            raise
    answer = "".join(heard).strip()
    click.echo("" if streams else answer)
    talk.answered(line, answer)
