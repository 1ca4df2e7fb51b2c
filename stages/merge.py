"""merge: the adapter folded into its base, a model that stands alone.

Reads `adapter/` in the run directory, and the base model in the precision that it was published in.
Writes `merged/`: a model folder that plain transformers loads, once its logits agree with base plus adapter.
"""

import click

from stages.lib.run.rundir import Run, run_options
from stages.lib.run.settings import Stage


@click.command("merge", cls=Stage)
@run_options
@click.pass_context
def merge(ctx: click.Context, /, **run_settings: object) -> None:
    """Fold the adapter into its base and prove that nothing changed."""
    from stages.lib.model.base import Base
    from stages.lib.report.table import table

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
        golden = chat_format.recorded()["golden"]["ids"]
        metrics = merging.merge(base, made.path, golden, scratch)
        tokens.save(scratch, chat_format.source)
        run.publish("merged", scratch, inputs, metrics)
    click.echo(table(("merge", "value"), list(metrics.items())))
