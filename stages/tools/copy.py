"""copy: files to a volume or bucket, and artifacts back.

Reads FROM, writes TO: each a file or folder, here or behind s3:// and gs://. What is equal already is passed
over, so that the same command goes on. An artifact is held against its manifest, which is written last.
"""

import click

from stages.lib.run.settings import Stage


@click.command("copy", cls=Stage)
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
def copy(source: str, target: str) -> None:
    """Copy FROM to TO, here or in a bucket, verified."""
    from stages.lib.jobs import copying
    from stages.lib.jobs.places import place

    done = copying.copy(place(source), place(target))
    click.echo(
        f"{len(done.copied)} files copied ({done.bytes / 1e6:,.1f} MB), {len(done.equal)} were equal; all are "
        f"verified, {done.by_manifest} by a manifest"
    )
