"""prepare-data: from a data set to token ids and a mask that says what is learned.

Reads a hub data set, files, or the embedded sample, and the base model's tokenizer.
Writes `data/` in the run directory: `train.arrow`, `held_out.arrow`, `prompts.jsonl` (held-out questions),
`prompt_format.json`, and the manifest with the account of every row.
"""

import click

from stages.lib.run import options
from stages.lib.run.rundir import Run, run_options
from stages.lib.run.settings import Stage, setting
from stages.lib.run.values import Number


@click.command("prepare-data", cls=Stage)
@setting("--dataset", "DATASET", required=True, help="Hub id, file, folder, glob, or `sample`.")
@setting("--dataset-revision", "DATASET_REVISION", help="Commit, tag or branch of a hub data set.")
@options.base_model
@options.base_revision
@setting(
    "--max-rows",
    "MAX_ROWS",
    type=Number(int, low=1),
    help="Use only the first rows. [default: all]",
)
@setting(
    "--max-length",
    "MAX_LENGTH",
    type=Number(int, low=2),
    default=1024,
    help="Longest row, in tokens with EOS.",
)
@setting(
    "--on-long", "ON_LONG", type=click.Choice(["truncate", "drop", "error"]), default="truncate",
    help="What happens to a longer row; a truncated one still ends in EOS.",
)  # fmt: skip
@setting(
    "--loss-on", "LOSS_ON", type=click.Choice(["assistant", "all"]), default="assistant",
    help="Learn what the assistant says, or all tokens.",
)  # fmt: skip
@setting(
    "--validation-fraction", "VALIDATION_FRACTION", type=Number(low=0, high=0.5), default=0.05,
    help="Share of rows held out, unless the data set has a test split of its own.",
)  # fmt: skip
@options.seed
@run_options
@click.pass_context
def prepare_data(
    ctx: click.Context, /, dataset: str, dataset_revision: str | None, base_model: str,
    base_revision: str | None, max_rows: int | None, max_length: int, on_long: str, loss_on: str,
    validation_fraction: float, seed: int, **run_settings: object,
) -> None:  # fmt: skip
    """Read a data set, tokenise it, and account for every row."""
    from stages.lib.data import preparation, prepared, sources
    from stages.lib.model.base import Base
    from stages.lib.report.table import account
    from stages.lib.run import preemption
    from stages.lib.run.progress import Progress

    run = Run(ctx)
    base = Base(base_model, base_revision)
    known = run.previous_inputs("data").get("dataset")
    if run.finished(
        "data", {"base": base.reference(), "dataset": sources.reference(dataset, known)}
    ):
        return
    source = sources.find(dataset, dataset_revision)
    with run.work() as scratch:
        from stages.lib.data.tokens import Tokens

        tokens = Tokens(base.fetch(weights=False))
        base.check_length(max_length)
        base.check_vocabulary(len(tokens))
        ledger = preparation.Ledger()
        examples = preparation.examples(
            source, tokens, ledger, max_rows=max_rows, max_length=max_length, on_long=on_long,
            loss_on=loss_on, validation_fraction=validation_fraction, seed=seed,
        )  # fmt: skip
        with prepared.Writer(scratch, tokens) as writer, Progress(max_rows, "rows") as progress:
            for part, example in examples:
                preemption.check()
                writer.write(part, example)
                progress.update(ledger.rows_read, tokens=ledger.tokens)
        ledger.check(source.name)
        inputs = {"dataset": source.inputs(), "base": base.identity()}
        made = run.publish("data", scratch, inputs, ledger.metrics(), seed=seed)
    click.echo(account(made.metrics))
