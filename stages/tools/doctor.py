"""doctor: all that a run with this preset needs, looked at before it costs anything.

Reads this machine, and of the hub the lists of files, the base's config and tokenizer. Writes a table or JSON
to standard output, and nothing to the run directory; ends with the exit code of the first check that failed.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.lib.data import wanted
from stages.lib.run import options
from stages.lib.run.settings import Stage

if TYPE_CHECKING:
    from stages.lib.model.architecture import Setup
    from stages.lib.run.checks import Check
    from stages.lib.run.preflight import Need


@click.command("doctor", cls=Stage)
@options.base_model
@options.base_revision
@options.base_precision
@options.rank
@options.targets
@options.optimizer
@wanted.dataset
@wanted.dataset_revision
@options.expect_gpu
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
@options.run_dir
def doctor(
    base_precision: str, rank: int, targets: tuple[str, ...], optimizer: str,
    dataset: str, dataset_revision: str | None, expect_gpu: bool, as_json: bool, run_dir: Path,
    base_model: str, base_revision: str | None,
) -> None:  # fmt: skip
    """Check what a run with this preset needs."""
    from stages.lib.model.architecture import Setup
    from stages.lib.report.table import table
    from stages.lib.run import environment, gpu, preflight
    from stages.lib.run.listing import cache

    scratch = environment.scratch_parent()
    found = [
        preflight.writable("run directory", run_dir), preflight.lasting(run_dir),
        preflight.writable("scratch", scratch), preflight.writable("cache", cache()),
        preflight.packages(), *_gpu(gpu.checks(base_precision, expect_gpu)), preflight.shared_memory(),
        preflight.token(),
    ]  # fmt: skip
    needs: list[Need] = []
    later: list[Need] = []
    setup = Setup(base_precision, rank, targets, optimizer)
    found.append(_base(base_model, base_revision, run_dir, setup, needs, later))
    found += _data(dataset, dataset_revision, needs)
    found += preflight.room(needs) + _later(preflight.room([*needs, *later]))
    if as_json:
        click.echo(json.dumps({"checks": [check.facts() for check in found]}, indent=1))
    else:
        rows = [(check.name, check.state, check.sentence) for check in found]
        click.echo(table(("check", "state", "found"), rows))
    sys.exit(next((check.code for check in found if check.failure), 0))


def _gpu(found: "list[Check]") -> "list[Check]":
    """What the driver says; and, where that is well, what torch says, which takes seconds to import."""
    if len(found) == 1 or any(check.failure for check in found):
        return found
    from stages.lib.model import accelerator

    return [*found, accelerator.check()]


def _base(
    name: str, revision: str | None, run_dir: Path, setup: "Setup", needs: "list[Need]",
    later: "list[Need]",
) -> "Check":  # fmt: skip
    """Whether the base model can be had and used; to `needs` goes what it and the run write, or may `later`."""
    from stages.lib.model import sample, storing
    from stages.lib.model.base import Base
    from stages.lib.run import access, environment, listing
    from stages.lib.run.checks import Check, refused
    from stages.lib.run.exits import StageError

    title = "base model"
    try:
        base = Base(name, revision)
        if base.is_sample:
            sample.check()
            return Check(title, sample.REVISION)
        check, listed = Check(title, str(base.path.resolve())), None
        if base.on_hub:
            check, listed = access.check(title, name, revision, "model")
        if not check.failure:
            base.fetch(weights=listed is None)
            size = listed.weights() if listed else base.weights()
            later.append(("merged model", run_dir, size))
            needs += storing.needs(run_dir, environment.scratch_parent(), base.config, setup)
        if listed:
            needs.append(("base model", listing.cache(), listed.missing()))
    except StageError as error:
        return refused(title, error)
    return check


def _later(found: "list[Check]") -> "list[Check]":
    """What does not fit beside the rest, and need not before it is asked for."""
    from stages.lib.run.checks import warned

    return [warned("room to merge", c.found, c.remedy) for c in found if c.failure]


def _data(dataset: str, revision: str | None, needs: "list[Need]") -> "list[Check]":
    """Whether each data set can be had."""
    from stages.lib.data import sources
    from stages.lib.run import access, environment, fetched, listing
    from stages.lib.run.checks import Check, refused
    from stages.lib.run.exits import StageError

    title, found = "data set", []
    try:
        away = sources.elsewhere(dataset, revision)
        for item in sources.parse(dataset, revision):
            shown = wanted.plain(item.name)
            if item not in away:
                (there,) = sources.find(item.name, None, environment.scratch_parent())
                files = len(there.train + there.held_out)
                found.append(Check(title, f"{shown}, files: {files}" if files else shown))
            elif item.is_url:
                fresh = fetched.copies(shown) is None
                said = "is asked by prepare-data alone" if fresh else "as fetched"
                found.append(Check(title, f"{shown} {said}", state="skip" if fresh else "ok"))
            else:
                check, listed = access.check(title, item.name, item.revision, "dataset")
                found.append(check)
                if listed:
                    needs.append((item.name, listing.cache(), listed.missing()))
    except StageError as error:
        found.append(refused(title, error))
    return found
