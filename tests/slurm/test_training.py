"""A training on two nodes of the cluster, by the rendered script."""

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.forking import Forking
from tests.lib.jobs.orders import spec
from tests.slurm.cluster import GOING, Cluster
from tests.test_several import RECIPE, check_same, metrics

PRESET = "smoke"
SETTINGS = RECIPE | {"MAX_STEPS": "6"}  # more than the preset's
LIMIT_SECONDS = 300.0


@pytest.fixture(scope="module")
def volume(few: Forking, tiny: Path, cluster: Cluster) -> Path:
    """With the base, and what one process makes of the data in `whole`."""
    folder = cluster.folder / "volume"
    shutil.copytree(tiny, folder / "base")
    preset = ("--env-file", str(ROOT / "env" / f"{PRESET}.env"))
    data = {
        "DATASET": str(few.folder / "rows.jsonl"),
        "VALIDATION_FRACTION": "0.1",
        "MAX_LENGTH": "64",
    }
    env = SETTINGS | data | {"BASE_MODEL": f"{folder}/base", "RUN_DIR": f"{folder}/whole"}
    for stage in ("prepare-data", "train"):
        done = few(*preset, stage, env=env)
        assert done.returncode == 0, done.stderr
    return folder


def test_two_nodes_one_of_which_is_killed_are_one_process(volume: Path, cluster: Cluster) -> None:
    """Killed in the middle of a step: the job is requeued, and goes on to the adapter of one process."""
    shutil.copytree(volume / "whole" / "data", volume / "two" / "data")
    variables = SETTINGS | {"BASE_MODEL": "/runs/base", "FAILPOINTS": "train.bin=8:kill@1"}
    script = spec(
        "slurm", preset=PRESET, run="two", stage="train", volume=str(volume), hosts=2, gpu=None, secret=None,
        variables=variables,
    )  # fmt: skip
    (volume / "job.sbatch").write_text(script)
    job = cluster.run("sbatch", "--parsable", "job.sbatch", folder=volume, STAND_IN_ROOT=str(ROOT))
    until = time.monotonic() + LIMIT_SECONDS
    while (found := cluster.said(job))["JobState"] in GOING and time.monotonic() < until:
        time.sleep(1)
    (log,) = volume.glob("*.log")
    said = log.read_text()
    ended = tuple(found[name] for name in ("JobState", "ExitCode", "Restarts", "NumNodes"))
    assert ended == ("COMPLETED", "0:0", "1", "2"), said
    assert "another process of this run is gone" in said
    assert metrics(volume / "two")["gpus"] == 2
    assert metrics(volume / "two")["resumed_from_step"] == 3
    check_same(volume / "two", volume / "whole")
    placed = [json.loads(line) for line in (volume / "nodes.jsonl").read_text().splitlines()]
    assert sorted(placed) == [["0", "2", "n[1-2]"]] * 2 + [["1", "2", "n[1-2]"]] * 2
