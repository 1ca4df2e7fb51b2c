"""A run, or several, as small tables for a terminal."""

from collections.abc import Sequence

from stages.lib.report import comparison, provenance
from stages.lib.report.compared_page import names, results
from stages.lib.report.found import Found
from stages.lib.report.preview import visible
from stages.lib.report.table import table
from stages.lib.report.verdict import beware, verdict


def summary(found: Found) -> str:
    """What an evaluation came to, else how the run stands; and its artifacts."""
    lead = (
        comparison.summary_table(found.evaluation)
        if found.evaluation
        else visible("\n".join(verdict(found).sentences))
    )
    rows = [
        (name, str(made.path), provenance.megabytes(made.manifest))
        for name, made in found.artifacts.items()
    ]
    if found.evaluation:
        lead = "\n".join([lead, *map(visible, beware(found))])
    return "\n".join([lead, table(("artifact", "folder", "size"), rows)] if rows else [lead])


def compared(runs: Sequence[Found]) -> str:
    """The results of several runs, a column each."""
    rows = [[row["words"], *(cell["value"] for cell in row["cells"])] for row in results(runs)]
    return table(("", *names(runs)), [[*map(visible, row)] for row in rows])
