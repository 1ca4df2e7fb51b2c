"""The command line on full disks, odd paths, few file handles, under clocks that are wrong."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.forking import Forking
from tests.refusals import debris, refused
from tests.storage.mounts import skip
from tests.storage.saving import verified
from tests.test_bad_input import mounted

YEAR = 365 * 86400


def adapter(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(commands: Forking, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with data and adapter, made in one go."""
    run = tmp_path_factory.mktemp("finished") / "run"
    for stage in ("prepare-data", "train"):
        done = commands("--env-file", "tiny.env", stage, "--run-dir", run)
        assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def prepared(finished: Path, tmp_path: Path) -> Path:
    """A run with data alone."""
    shutil.copytree(finished / "data", tmp_path / "run" / "data")
    return tmp_path / "run"


@pytest.mark.case("A5")
@pytest.mark.parametrize(("size", "saved"), [("8k", 0), ("200k", 2)])
def test_a_full_scratch_folder_ends_training_with_73(
    commands: Forking, prepared: Path, finished: Path, tmp_path: Path, size: str, saved: int
) -> None:
    """Before it begins where that can be told, else in a library's own words."""
    args = ("--env-file", "tiny.env", "train", "--run-dir", prepared)
    with mounted(tmp_path / "small", f"size={size}") as small:
        done = commands(*args, env={"SCRATCH_DIR": str(small)})
        refused(done, 73, "SCRATCH_DIR", "No space left on device" if saved else "8.0 KiB free")
        assert list(small.iterdir()) == []
    assert len(verified(prepared)) == saved
    done = commands(*args)
    assert done.returncode == 0, done.stderr
    assert adapter(prepared) == adapter(finished)


@pytest.mark.case("A5")
def test_a_full_volume_keeps_the_checkpoints_and_tells_what_is_needed(
    commands: Forking, finished: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "small", "size=200k") as small:
        shutil.copytree(finished / "data", small / "run" / "data")
        args = ("--env-file", "tiny.env", "train", "--run-dir", small / "run")
        done = commands(*args)
        refused(done, 73, "checkpoints/step-0000000", "KiB free", "KiB are needed", "RUN_DIR")
        kept = verified(small / "run")
        assert kept
        assert debris(small / "run") == []
        resize(small, "8m")
        done = commands(*args)
        assert done.returncode == 0, done.stderr
        assert f"going on from step {max(kept)}" in done.stderr
        assert adapter(small / "run") == adapter(finished)


def resize(mount: Path, size: str) -> None:
    import subprocess

    subprocess.run(["mount", "-o", f"remount,size={size}", str(mount)], check=True)


@pytest.mark.case("A20")
def test_a_clock_that_is_a_year_off_changes_nothing(
    commands: Forking, prepared: Path, finished: Path, clock: str
) -> None:
    """Killed under a clock that is ahead, and again under one that is behind."""
    if not clock:
        skip("no C compiler, so no clock that is wrong")
    args = ("--env-file", "tiny.env", "train", "--run-dir", prepared)
    for shift, point in ((YEAR, "checkpoint.saved=2"), (-YEAR, "checkpoint.prune")):
        done = commands(*args, env={"CLOCK_SHIFT": str(shift), "FAILPOINTS": f"{point}:kill"})
        assert done.returncode == -9, done.stderr
        said = json.loads(done.stderr.splitlines()[0])
        assert said["time"][:4] == str(this_year() + shift // YEAR)
    done = commands(*args)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    assert adapter(prepared) == adapter(finished)
    assert max(verified(prepared)) == 8


def this_year() -> int:
    import time

    return time.gmtime().tm_year


@pytest.mark.case("A24")
@pytest.mark.parametrize(
    "name",
    [
        "-with blanks and ünïcode 名" + "n" * 190,
        pytest.param("with blanks", marks=pytest.mark.sweep),
        pytest.param("名 = ü", marks=pytest.mark.sweep),
    ],
    ids=["all", "blanks", "unicode"],
)
def test_odd_paths(commands: Forking, finished: Path, rows: Path, name: str) -> None:
    """Of the run directory, of scratch and of the data; beside the working directory and below one another."""
    folder = commands.folder / name
    folder.mkdir()
    try:
        data = shutil.copyfile(rows, folder / f"{name[:100]} rows.jsonl")
        env = {
            "RUN_DIR": f"{name}/{name}", "SCRATCH_DIR": str(folder / "scratch"),
            "DATASET": str(data.relative_to(commands.folder)) if name[0] != "-" else str(data),
            "MAX_STEPS": "2",
        }  # fmt: skip
        for stage, *args in (
            ("prepare-data",), ("train",), ("merge",),
            ("generate", "--prompts-file", "many.txt"),
        ):  # fmt: skip
            done = commands("--env-file", "tiny.env", stage, *args, env=env)
            assert done.returncode == 0, done.stderr
        assert {p.parent.name for p in (folder / name).glob("*/manifest.json")} == {
            "data", "adapter", "merged", "generations",
        }  # fmt: skip
        done = commands("--env-file", "tiny.env", "train", "--run-dir", f"{name}/{name}", env=env)
        assert "nothing changed" in done.stderr
    finally:
        shutil.rmtree(folder)


@pytest.mark.case("A27")
def test_few_file_handles(commands: Forking, prepared: Path) -> None:
    """Sixty-four are enough; seven are not, and that is said."""
    args = ("--env-file", "tiny.env", "train", "--max-steps", "1", "--run-dir", prepared)
    for limit, code in ((7, 73), (64, 0)):
        commands.start(*args, handles=limit)
        done = commands.wait()
        assert done.returncode == code, done.stderr
        assert (
            "Too many open files; raise the limit, as with `ulimit -n 1024`" in done.stderr
        ) == bool(code)
        assert "Traceback" not in done.stderr
