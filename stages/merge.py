"""merge: the adapter folded into its base, a model that stands alone.

Reads `adapter/` in the run directory, held-out rows of `data/` if they are there, and the base model.
Writes `merged/`: a model folder that plain transformers loads, once it says what base plus adapter says, and
`merge_report.json` on how close it is.
"""

import json

import click

from stages.lib.run.rundir import Run, run_options
from stages.lib.run.settings import Stage, setting
from stages.lib.run.values import Number

ROWS, TOKENS = 8, 128  # of held-out text, on which the result is compared


@click.command("merge", cls=Stage)
@setting(
    "--merge-base", "MERGE_BASE", type=click.Choice(["original", "dequantized"]), default="original",
    help="The base's weights: as published, or as a 4-bit or 8-bit run had them.",
)  # fmt: skip
@setting(
    "--merge-most-kl", "MERGE_MOST_KL", type=Number(above=0), default=0.5,
    help="How far the result may be from base plus adapter as trained, in nats a token; else exit 82.",
)  # fmt: skip
@run_options
@click.pass_context
def merge(
    ctx: click.Context, /, merge_base: str, merge_most_kl: float, **run_settings: object
) -> None:
    """Fold the adapter into its base and prove that nothing changed."""
    from stages.lib.data import prepared
    from stages.lib.model.base import Base
    from stages.lib.report.table import table
    from stages.lib.run import artifact

    run = Run(ctx)
    made = run.read("adapter", deep=True)
    base = Base.recorded(made.manifest["inputs"]["base"])
    inputs = {"adapter": made.digest, "base": base.reference()}
    if run.finished("merged", inputs):
        return
    with run.work() as scratch:
        base.fetch()
        inputs["base"] = base.identity()

        from stages.lib.data.formats import Format
        from stages.lib.data.tokens import Tokens
        from stages.lib.model import adapter, merging

        adapter.check_base(made, base)
        tokens = Tokens(base.folder)
        chat_format = Format.load(made.path, tokens)
        data = artifact.load(run.folder / "data")
        rows = [chat_format.recorded()["golden"]["ids"]]
        if data and data.digest == made.manifest["inputs"]["data"]:
            held_out = prepared.head(data.path, ROWS, "held_out")
            rows = [ids[:TOKENS] for _, ids, _ in held_out] or rows
        job = merging.Merge(base, made.path, made.metrics["base_precision"], merge_base)
        with run.draft("merged", sum(job.sizes.values())) as draft:
            job.write(scratch, draft.move)
            report = job.prove(draft.path, rows, merge_most_kl)
            (scratch / merging.REPORT).write_text(json.dumps(report, indent=1) + "\n")
            merging.describe(job, chat_format.stops.ids, scratch)
            tokens.save(scratch, chat_format.source)
            for path in sorted(scratch.iterdir()):
                draft.move(path)
            metrics = merging.summary(report)
            draft.finish(run.manifest(inputs, metrics))
    click.echo(table(("merge", "value"), list(metrics.items())))
    click.echo(report["closer"])
