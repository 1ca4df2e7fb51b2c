"""What the launcher's path costs on one GPU: `train` under torchrun with one process, beside `train` alone.

`python -m bench.launcher --output results.jsonl`, from the root of the repository; no network, 15 GB in
`TMPDIR`. The base, rows and settings are those of `bench/two_gpus.py`. Both train the same steps through the
stage; alone it is `python -m stages train`, and under torchrun a process that has a rank: a gloo and an NCCL
group, an agreement and a sum of the gradient at every step. They take turns, in the order that the round has.
Results are JSON:

- `machine`: the GPU and the date.
- `round`: tokens/s of each.
- `result`: the median of each, `cost`, the share of its speed that the launcher takes, and `apart`, how far the
  losses of a step are at most.
"""

import os
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from bench import conversations
from bench.conversations import ROOT
from bench.train import Settings
from bench.two_gpus import PASS, TwoGpus, apart, devices, say

ALONE, LAUNCHED = "alone", "launched"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]


class Launcher(TwoGpus):
    """Runs `train` alone or under torchrun."""

    launched = False

    def _stage(self, name: str) -> list[str]:
        under = TORCHRUN if self.launched and name == "train" else []
        return [sys.executable, *under, "-m", "stages", name]

    def turn(self, kind: str, settings: Settings, rows: Path) -> dict[str, Any]:
        """Speed and losses of one run."""
        self.launched = kind == LAUNCHED
        return self.measured(settings, rows)


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The medians, and what they say."""
    speeds = {kind: [run["tokens_per_second"] for run in found] for kind, found in runs.items()}
    middle = {kind: statistics.median(found) for kind, found in speeds.items()}
    far = [
        apart(a["losses"], b["losses"]) for a, b in zip(runs[ALONE], runs[LAUNCHED], strict=True)
    ]
    return {
        "tokens_per_second": middle, "cost": round(1 - middle[LAUNCHED] / middle[ALONE], 4),
        "runs": speeds, "apart": max(far),
        "wall_seconds": {k: [run["wall_seconds"] for run in found] for k, found in runs.items()},
    }  # fmt: skip


@click.command()
@click.option("--shape", default="7b", show_default=True, type=click.Choice(list(PASS)))
@click.option("--precision", default="fp8", show_default=True)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A line a part.")
@click.option("--limit", default=240.0, show_default=True, help="Seconds for a process.")
@conversations.option
def main(
    shape: str, precision: str, rounds: int, output: Path | None, limit: float, data: Path
) -> None:
    """Measure one process with a launcher beside one without; prints JSON, a line for each part."""
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    say("machine", {"gpus": devices(), "date": datetime.now(UTC).date().isoformat()}, output)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        work = Path(name)
        bench = Launcher(work, work / "model", data.resolve(), sys.executable, limit)
        bench.make_model(shape)
        rows = bench.rows("conversations")
        settings = bench.settings(1, precision, shape)
        runs: dict[str, list[dict[str, Any]]] = {ALONE: [], LAUNCHED: []}
        for number in range(rounds):
            order = (ALONE, LAUNCHED) if number % 2 == 0 else (LAUNCHED, ALONE)
            for kind in order:
                runs[kind].append(bench.turn(kind, settings, rows))
            found = {kind: runs[kind][-1]["tokens_per_second"] for kind in runs}
            say("round", {"number": number + 1, "tokens_per_second": found}, output)
        say("result", {"precision": precision, "shape": shape} | compared(runs), output)


if __name__ == "__main__":
    main()
