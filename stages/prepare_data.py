"""prepare-data: from a data set to token ids and a mask that says what is learned.

Reads hub data sets, files, URLs, or the embedded sample, and the base model's tokenizer.
Writes `data/` in the run directory: `train.arrow`, `held_out.arrow`, `prompts.jsonl` (held-out questions),
`prompt_format.json`, `ledger.jsonl` (what each row lost), `rejects.jsonl` (rows that could not be read),
`preview.html`, and the manifest with the account of every row. Until then `data-shards/` keeps what was
prepared, for the same command to go on with.
"""

import click

from stages.lib.data import wanted
from stages.lib.run import options
from stages.lib.run.options import run_options
from stages.lib.run.rundir import Run
from stages.lib.run.settings import Stage, setting
from stages.lib.run.values import Names, Number


@click.command("prepare-data", cls=Stage)
@wanted.dataset
@wanted.dataset_revision
@setting(
    "--shape", "SHAPE", default="auto", help="What the rows look like; auto tells it by their columns.",
    type=click.Choice(["auto", "guanaco", "alpaca", "sharegpt", "messages", "text"]),
)  # fmt: skip
@setting(
    "--chat-format", "CHAT_FORMAT", default="auto",
    help="How a conversation is written: tokenizer (its own template), guanaco, alpaca, chatml, llama2, text, "
    "or a .jinja file.",
)  # fmt: skip
@options.base_model
@options.base_revision
@options.max_rows
@options.max_length
@setting(
    "--on-long", "ON_LONG", type=click.Choice(["truncate", "split", "drop", "error"]), default="truncate",
    help="What happens to a longer row; a truncated one still ends in EOS.",
)  # fmt: skip
@setting(
    "--loss-on", "LOSS_ON", type=click.Choice(["assistant", "all"]), default="assistant",
    help="Learn what the assistant says, or all tokens.",
)  # fmt: skip
@options.validation_fraction
@setting(
    "--duplicates", "DUPLICATES", type=click.Choice(["drop", "keep", "near"]), default="drop",
    help="Rows that were there before; near drops those that are almost the same too.",
)  # fmt: skip
@setting(
    "--fail-on-leakage", "FAIL_ON_LEAKAGE", is_flag=True,
    help="End where a training row is in the data set's own test split, instead of leaving it out.",
)  # fmt: skip
@setting(
    "--max-bad-rows", "MAX_BAD_ROWS", type=Number(int, low=0), default=0,
    help="Rows that cannot be read and may be left out.",
)  # fmt: skip
@setting(
    "--allow", "ALLOW", type=Names(among=("nothing-to-learn", "empty-answers", "unended")),
    help="Checks to pass over: nothing-to-learn, empty-answers (over 1 %), unended (over 1 % without EOS).",
)  # fmt: skip
@setting(
    "--keep-rejected-text",
    "KEEP_REJECTED_TEXT",
    is_flag=True,
    help="Keep the text of bad rows too.",
)
@setting(
    "--show", "SHOW", type=Number(int, low=0), default=0, identity=False,
    help="Print so many rows as they are learned.",
)  # fmt: skip
@options.seed
@run_options
@click.pass_context
def prepare_data(
    ctx: click.Context, /, dataset: str, dataset_revision: str | None, shape: str, chat_format: str,
    base_model: str, base_revision: str | None, max_rows: int | None, max_length: int, on_long: str,
    loss_on: str, validation_fraction: float, duplicates: str, keep_rejected_text: bool, show: int,
    seed: int, max_bad_rows: int, allow: tuple[str, ...] | None, fail_on_leakage: bool, **run_settings: object,
) -> None:  # fmt: skip
    """Read data sets, tokenise them, and account for every row."""
    from stages.lib.data import formats, prepared, shards, sources
    from stages.lib.model.base import Base
    from stages.lib.report import preview
    from stages.lib.report.table import account
    from stages.lib.run.progress import say

    run = Run(ctx)
    base = Base(base_model, base_revision)
    template = formats.reference(chat_format)
    known = run.previous_inputs("data").get("dataset")
    before = {"base": base.reference(), "dataset": sources.reference(dataset, known)}
    if made := run.finished("data", before | {"chat_template": template}):
        shards.sweep(run)
        if show:
            from stages.lib.data.tokens import Tokens

            tokens = Tokens(base.fetch(weights=False))
            click.echo(preview.text(prepared.head(made.path, show), tokens))
        return
    with run.work() as scratch:
        from stages.lib.data import assembly
        from stages.lib.data.ledger import Ledger
        from stages.lib.data.preparation import Preparer
        from stages.lib.data.tokens import Tokens

        out = scratch / "data"
        found = sources.find(dataset, dataset_revision, scratch)
        tokens = Tokens(base.fetch(weights=False))
        base.check_length(max_length)
        base.check_vocabulary(tokens.vocabulary())
        readings = assembly.recognise(found, shape)
        shapes = list(dict.fromkeys(reading.shape.name for reading in readings))
        written, why = formats.choose(chat_format, tokens, shapes, loss_on)
        say(f"chat format {written.name}, as {why}")
        prepare = Preparer(written, max_length, on_long, seed, duplicates == "near")
        kept = shards.Shards(prepare, base.identity(), scratch, run.folder, run.publish)
        out.mkdir()
        with prepared.Writer(out) as writer, Ledger(out, keep_rejected_text) as ledger:
            by_source = assembly.Assembly(
                kept, writer, ledger, scratch, held_out=validation_fraction, repeats=duplicates,
                max_rows=max_rows, seed=seed,
            ).run(readings)  # fmt: skip
        ledger.check(
            wanted.plain(dataset), max_bad_rows=max_bad_rows, max_length=max_length, on_long=on_long,
            allowed=allow or (), fail_on_leakage=fail_on_leakage,
        )  # fmt: skip
        written.save(out)
        facts = {"shape": ",".join(shapes), "chat_format": written.name, "sources": by_source}
        metrics = ledger.metrics() | facts
        preview.write(out, prepared.head(out, preview.ROWS), tokens, metrics, ledger.lengths)
        now = sources.identity(dataset, found, before["dataset"])
        inputs = {"dataset": now, "base": base.identity()}
        metrics |= {"rows_resumed": kept.rows_resumed}
        made = run.publish("data", out, inputs | {"chat_template": template}, metrics, seed=seed)
        kept.clear()
    if show:
        click.echo(preview.text(prepared.head(made.path, show), tokens))
    click.echo(account(metrics))
