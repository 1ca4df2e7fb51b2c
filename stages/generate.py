"""generate: answers from the tuned model.

Reads `adapter/` in the run directory and the base model.
Writes a single prompt's answer to standard output, and those of a prompts file to `generations/`, each as soon
as it is finished; what was stopped goes on with the prompts that are left.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from stages.lib.run import gpu, options
from stages.lib.run.options import run_options
from stages.lib.run.progress import Progress, say
from stages.lib.run.rundir import Run
from stages.lib.run.settings import Stage, more_explicit, setting
from stages.lib.run.values import Number


@click.command("generate", cls=Stage)
@setting(
    "--prompt", "PROMPT", identity=False,
    help="One prompt; without it and a file, standard input is the prompt.",
)  # fmt: skip
@setting(
    "--prompts-file", "PROMPTS_FILE", type=click.Path(path_type=Path), identity=False,
    help="Prompts: one a line, or a .jsonl file with `prompt` or `messages`.",
)  # fmt: skip
@setting(
    "--json", "AS_JSON", is_flag=True, identity=False,
    help="A single prompt's answer as a line of JSON, with counts and why it ended.",
)  # fmt: skip
@setting(
    "--batch-prompts", "BATCH_PROMPTS", type=Number(int, low=1), identity=False,
    help="Prompts of a file at a time, at most. [default: as many as fit]",
)  # fmt: skip
@options.speaking(256)
@options.expect_gpu
@run_options
@click.pass_context
def generate(
    ctx: click.Context, /, prompt: str | None, prompts_file: Path | None, json: bool,
    batch_prompts: int | None, max_new_tokens: int, stop: tuple[str, ...], chat_format: str,
    force_format: bool, seed: int, system: str | None, expect_gpu: bool, **_: object,
) -> None:  # fmt: skip
    """Answer prompts with the tuned model."""
    from stages.lib.data import formats, prompts
    from stages.lib.model.base import Base

    if more_explicit(ctx, "prompts_file", "prompt"):
        prompt = None
    elif prompt:
        prompts_file = None
    asked = prompts.read(prompt, prompts_file, system)
    run = Run(ctx)
    made = run.read("adapter", deep=True, own=("SEED",))
    base = Base.recorded(made.manifest["inputs"]["base"])
    forced = formats.reference(chat_format) if force_format else None
    inputs = {"adapter": made.digest, "prompts": prompts.digest(asked), "chat_format": forced}
    if prompts_file and run.finished("generations", inputs):
        return
    gpu.require(made.metrics["base_precision"], expect_gpu)

    from stages.lib.data.tokens import Tokens

    tokens = Tokens(base.fetch(weights=False))
    written = formats.spoken(made.path, tokens, chat_format, force_format)
    ids = [one.ids(written) for one in asked]
    for one, found in zip(asked, ids, strict=True):
        base.check_room(len(found), max_new_tokens, one.where)
    base.fetch()

    from stages.lib.model import adapter, load
    from stages.lib.model.answer import Speaker
    from stages.lib.model.sampling import Sampling

    adapter.check_base(made, base)
    precision = made.metrics["base_precision"]
    stops = replace(written.stops, texts=(*written.stops.texts, *stop))
    sampling = Sampling(**options.drawn(ctx.params))
    facts = {"seed": seed} | ({"forced_format": written.name} if written.forced else {})

    def speaker() -> Speaker:
        tuned = adapter.load(load.load(base, precision), made.path, base)
        return Speaker(tuned, precision, tokens, stops, max_new_tokens, sampling, batch_prompts)

    if not prompts_file:
        _single(speaker(), asked[0], ids[0], json, facts)
        return
    with run.work():
        many = speaker()
        with run.growing("generations", prompts.FILE, inputs) as file:
            speed = _many(many, asked, ids, file, facts)
            metrics = prompts.metrics(file.entries) | speed | {"resumed": file.resumed}
            inputs["prompts_file"] = str(prompts_file)
            file.finish(run.manifest(inputs, metrics, device=load.describe_device(), **facts))
    click.echo(str(run.folder / "generations" / prompts.FILE))


def _single(speaker: Any, asked: Any, ids: list[int], as_json: bool, facts: dict[str, Any]) -> None:
    """Answer on standard output, as it is said where a person watches."""
    from stages.lib.data import prompts

    for remark in speaker.remarks:
        say(remark)
    streams = sys.stdout.isatty() and not as_json
    said = speaker.one(ids, (lambda text: click.echo(text, nl=False)) if streams else None)
    if as_json:
        click.echo(prompts.dumps(prompts.entry(asked, said, len(ids), **facts)))
    else:
        click.echo("" if streams else said.text)


def _many(
    speaker: Any, asked: list[Any], ids: list[list[int]], file: Any, facts: dict[str, Any]
) -> dict[str, Any]:
    """Answer all that has no line yet; how fast it went."""
    from stages.lib.data import prompts

    done = {line["number"] for line in file.entries}
    left = [number for number in range(len(asked)) if number not in done]
    if done:
        say(f"going on: {len(done)} of {len(asked)} prompts are answered")
    for remark in speaker.remarks:
        say(remark)
    began, spoken = time.monotonic(), 0
    with Progress(len(asked), "prompts", len(done), "answering") as progress:
        for place, said in speaker.each([ids[number] for number in left], left):
            number = left[place]
            file.add(prompts.entry(asked[number], said, len(ids[number]), **facts))
            spoken += said.tokens
            rate = spoken / max(time.monotonic() - began, 1e-9)
            progress.update(progress.done + 1, tokens_per_second=rate)
    seconds = time.monotonic() - began
    return {"tokens_per_second": round(spoken / seconds, 1) if spoken else None}
