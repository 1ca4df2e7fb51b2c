"""plan: what a run will take, before anything is downloaded or paid for.

Reads the base's `config.json` and no weights, the run's prepared data if there is any, and the manifests of
finished runs beside it. Writes sentences and tables or JSON to standard output, and nothing else.
"""

import json
import shutil
from pathlib import Path

import click

from stages.lib.data import wanted
from stages.lib.run import learning, options
from stages.lib.run.settings import Stage, setting
from stages.lib.run.values import Prices


@click.command("plan", cls=Stage)
@learning.settings
@wanted.dataset_or_none
@options.max_rows
@options.max_length
@options.validation_fraction
@options.expect_gpu
@setting(
    "--gpu",
    "GPU",
    help="Kind of GPU, as in H100; several with commas. [default: all that are known]",
)
@setting(
    "--price-per-hour", "PRICE_PER_HOUR", type=Prices(), identity=False,
    help="Price of an hour of one GPU; by kind: H100=2.5,L4=0.7.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the tables.")
@options.run_dir
@click.pass_context
def plan(
    ctx: click.Context, /, base_model: str, base_revision: str | None, base_precision: str, rank: int,
    targets: tuple[str, ...],
    optimizer: str, batch_tokens: int, micro_batch_tokens: int | None, recompute: str, num_gpus: int,
    gpu: str | None, price_per_hour: str | None, dataset: str | None, as_json: bool,
    run_dir: Path, **recipe: object,
) -> None:  # fmt: skip
    """Say what fits on which GPU, how long it takes, what it costs."""
    from stages.lib.data import bins
    from stages.lib.model import cutting
    from stages.lib.model.architecture import Setup
    from stages.lib.model.base import Base
    from stages.lib.report import amount, forecast, forecast_page
    from stages.lib.report.table import WIDTH
    from stages.lib.run import cards

    chosen = cards.named(gpu) if gpu else list(cards.CARDS)
    prices = cards.prices(price_per_hour)
    base = Base(base_model, base_revision)
    where = base.consult()
    sources = len(wanted.parse(dataset)) if dataset else 1
    found = amount.find(run_dir, ctx.params, sources)
    bins.check_sizes(batch_tokens, micro_batch_tokens, found.longest, num_gpus)
    base.check_length(found.longest)
    order = forecast.Order(
        base_model, where, forecast.architecture(base, targets), str(base.config.get("model_type")),
        Setup(base_precision, rank, targets, optimizer),
        cutting.sizes(batch_tokens, found.longest, micro_batch_tokens, num_gpus),
        batch_tokens, recompute, num_gpus,
    )  # fmt: skip
    fits = [forecast.fit(order, card, found, prices.get(card.name)) for card in chosen]
    off = forecast.errors(run_dir)
    if as_json:
        said = {
            "verdict": forecast_page.verdict(order, found, fits),
            "notes": forecast_page.notes(order, found, fits, off),
        }
        click.echo(json.dumps(forecast.facts(order, found, fits, off, said), indent=1))
        return
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    click.echo(forecast_page.text(order, found, fits, off, width))
