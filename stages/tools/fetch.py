"""fetch: base model and data sets, pinned and brought onto the volume, for stages without a network.

Reads BASE_MODEL and DATASET from the hub or behind URLs. Writes `hub/` in the run directory, or FETCH_DIR: each
repository as plain files, compared with the hub's hashes; and `fetched/`: which commits the run is pinned to.
"""

from pathlib import Path

import click

from stages.lib.data import wanted
from stages.lib.run import fetched, options
from stages.lib.run.options import run_options
from stages.lib.run.rundir import Run
from stages.lib.run.settings import Stage, setting


@click.command("fetch", cls=Stage)
@options.base_model
@options.base_revision
@wanted.dataset
@wanted.dataset_revision
@setting(
    "--fetch-dir", "FETCH_DIR", type=click.Path(path_type=Path), identity=False,
    help="Folder for what is fetched, which runs may share. [default: hub/ in the run directory]",
)  # fmt: skip
@run_options
@click.pass_context
def fetch(
    ctx: click.Context, /, base_model: str, base_revision: str | None, dataset: str,
    dataset_revision: str | None, fetch_dir: Path | None, **run_settings: object,
) -> None:  # fmt: skip
    """Bring base model and data onto the volume, at commits that later stages keep to."""
    from stages.lib.data import sources
    from stages.lib.model.base import Base
    from stages.lib.report.table import table
    from stages.lib.run.fetching import Store

    run = Run(ctx)
    base = Base(base_model, base_revision)
    items = sources.elsewhere(dataset, dataset_revision)
    store = Store(run, fetch_dir)
    if store.is_whole() and run.finished(fetched.PINS, {}):
        return
    with run.work() as scratch, store.held():
        if base.on_hub:
            Base(str(store.repository(base.name, base.revision, "model")), None).fetch()
        else:
            base.fetch()
        for number, item in enumerate(items):
            if item.is_url:
                copies = sources.copy(item.name, scratch / str(number))
                folder = store.files(wanted.plain(item.name), copies)
            else:
                folder = store.repository(item.name, item.revision, "dataset")
            sources.find(str(folder), None, scratch)
        (scratch / fetched.PINS).mkdir()
        metrics = {"bytes": store.size}
        made = run.publish(fetched.PINS, scratch / fetched.PINS, store.pins, metrics)
    pinned = made.manifest["inputs"]
    rows = [(name, known["commit"]) for name, known in pinned["repositories"].items()]
    rows += [(url, "as it was") for url in pinned["urls"]]
    rows += [("folder", str(store.folder)), ("MB", f"{store.size / 1e6:,.1f}")]
    click.echo(table(("fetch", "pinned to"), rows))
