"""Every stage on an object store's mount: no rename, no append, no random write, no room to measure."""

import time
from pathlib import Path

import pytest

from tests.forking import Forking

KILLED = -9


def run(commands: Forking, folder: Path, stage: str, *args: str, kill: str = "") -> str:
    began = time.monotonic()
    env = {"FAILPOINTS": f"{kill}:kill"} if kill else {}
    done = commands("--env-file", "tiny.env", stage, "--run-dir", folder, *args, env=env)
    assert done.returncode == (KILLED if kill else 0), done.stderr
    print(stage, kill, time.monotonic() - began)
    return done.stderr


@pytest.mark.case("A15")
def test_every_stage_killed_and_run_again(commands: Forking, bucket: Path, tmp_path: Path) -> None:
    """What is made there is what is made on a disk, byte for byte."""
    local, remote = tmp_path / "run", bucket / "run"
    for folder in (local, remote):
        cut = folder == remote
        if cut:
            run(commands, folder, "prepare-data", kill="publish.manifest")
        run(commands, folder, "prepare-data")
        if cut:
            run(commands, folder, "train", kill="checkpoint.saved=3")
            run(commands, folder, "train", kill="publish.manifest")
        said = run(commands, folder, "train")
        assert ("going on from step" in said) == cut
        run(commands, folder, "evaluate")
        asked = ("--prompts-file", str(commands.folder / "many.txt"), "--batch-prompts", "1")
        if cut:
            run(commands, folder, "generate", *asked, kill="grow.line=4")
        said = run(commands, folder, "generate", *asked)
        assert ("going on: 3 of 6" in said) == cut
        run(commands, folder, "merge")
