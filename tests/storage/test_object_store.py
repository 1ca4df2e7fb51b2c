"""On an object store's mount: no append, no random write, no link, a folder that goes with its last file."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from stages.lib.run import artifact, volume
from stages.lib.run.growing import Growing
from tests.forking import Forking
from tests.storage.conftest import PROMPTS
from tests.storage.saving import END, go_on, verified

KILLED = -9
MADE_FROM = {"inputs": {}, "settings": {}}


def failure(act: object) -> int | None:
    try:
        act()  # type: ignore[operator]
    except OSError as error:
        return error.errno
    return None


@pytest.mark.case("A15")
def test_artifacts_checkpoints_and_lines_are_written_in_sequence(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH_DIR", str(tmp_path / "scratch"))
    folder = bucket / "quick"
    (folder / "there").mkdir(parents=True)
    (folder / "there" / "file").write_bytes(b"x")
    assert failure(lambda: (folder / "link").symlink_to("there")) == errno.EIO
    assert failure(lambda: os.truncate(folder / "there" / "file", 5)) == errno.EPERM

    go_on(folder / "run", to=4)
    (folder / "run" / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    go_on(folder / "run")
    assert list(verified(folder / "run")) == END

    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "large").write_bytes(os.urandom(volume.BLOCK + 5))
    for _ in range(2):  # the second replaces the first
        made = artifact.publish(source, folder / "run" / "data", {"metrics": {}})
        found = artifact.load(made.path, deep=True)
        assert found
        assert found.digest == made.digest
    names = sorted(path.name for path in made.path.rglob("*") if path.is_file())
    assert names == ["large", "manifest.json"]
    shutil.rmtree(source / "inner")
    (source / "other").write_bytes(b"other")
    artifact.publish(source, made.path, {"metrics": {}})
    assert sorted(path.name for path in made.path.iterdir()) == ["manifest.json", "other"]

    lines = folder / "run" / "generations"
    for number in range(2):  # the second goes on where the first was stopped
        with Growing(lines, "lines.jsonl", MADE_FROM, goes_on=bool(number)) as file:
            assert file.resumed == 2 * number
            file.add({"number": 2 * number})
            file.add({"number": 2 * number + 1})
            if number:
                file.finish({"metrics": {}})
    assert artifact.load(lines, deep=True)
    written = (lines / "lines.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in written] == [0, 1, 2, 3]


def run(commands: Forking, folder: Path, stage: str, *args: str, kill: str = "") -> str:
    env = {"FAILPOINTS": f"{kill}:kill"} if kill else {}
    done = commands("--env-file", "tiny.env", stage, "--run-dir", folder, *args, env=env)
    assert done.returncode == (KILLED if kill else 0), done.stderr
    return done.stderr


@pytest.mark.sweep
@pytest.mark.case("A15")
@pytest.mark.promise("P2")
def test_every_stage_killed_and_run_again(commands: Forking, bucket: Path, tmp_path: Path) -> None:
    """What is made there, in pieces, is what is made on a disk in one go."""
    local, remote = tmp_path / "run", bucket / "run"
    asked = ("--prompts-file", str(commands.folder / "many.txt"), "--batch-prompts", "1")
    for stage, *args in (
        ("prepare-data",),
        ("train",),
        ("evaluate",),
        ("generate", *asked),
        ("merge",),
    ):
        run(commands, local, stage, *args)
    run(commands, remote, "prepare-data", kill="publish.manifest")
    run(commands, remote, "prepare-data")
    run(commands, remote, "train", kill="checkpoint.saved=3")
    run(commands, remote, "train", kill="publish.manifest")
    assert "going on from step" in run(commands, remote, "train")
    run(commands, remote, "evaluate", kill="publish.file=2")
    run(commands, remote, "evaluate")
    run(commands, remote, "generate", *asked, kill="grow.line=4")
    assert f"going on: 3 of {PROMPTS}" in run(commands, remote, "generate", *asked)
    run(commands, remote, "merge", kill="publish.manifest")
    run(commands, remote, "merge")
    for name in (
        "adapter/adapter_model.safetensors", "adapter/last/adapter_model.safetensors",
        "merged/model.safetensors", "data/train.arrow",
    ):  # fmt: skip
        assert artifact.sha256(local / name) == artifact.sha256(remote / name), name
    for name in ("data", "adapter", "evaluation", "generations", "merged"):
        assert artifact.load(remote / name, deep=True)
    answers = [
        [json.loads(line)["answer"] for line in path.read_text().splitlines()]
        for path in (side / "generations" / "generations.jsonl" for side in (local, remote))
    ]
    assert sorted(answers[0]) == sorted(answers[1])
    assert len(answers[0]) == PROMPTS
