"""A verified checkpoint is written once, and stays until a newer one is verified, whatever fails on the way."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.lib.run import artifact, checkpoints, failpoints, volume
from stages.lib.run.exits import TryAgain
from tests.storage.mounts import skip
from tests.storage.saving import END, STEPS, attempt, go_on, run_in, save, verified

POINTS = [
    name
    for name in failpoints.POINTS
    if name.startswith(("publish", "retire", "checkpoint", "lease"))
]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(volume, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(checkpoints, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("SCRATCH_DIR", str(tmp_path / "scratch"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped behind its third step, to be copied."""
    folder = tmp_path_factory.mktemp("three") / "run"
    go_on(folder, to=3)
    return folder


@pytest.fixture(scope="module")
def whole(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the same run comes to when nothing happens, to be copied."""
    folder = shutil.copytree(three, tmp_path_factory.mktemp("whole") / "run")
    go_on(folder)
    return folder


def holds(before: dict[int, str], after: dict[int, str]) -> None:
    """What P4 says of two moments."""
    for step, content in before.items():
        if step in after:
            assert after[step] == content, f"step {step} was overwritten"
        else:
            assert max(after) > max(before), f"step {step} went before a newer one was verified"
    assert max(after) >= max(before)


def arrivals(three: Path, folder: Path, point: str, action: str) -> int:
    """Have the run fail at every arrival at a point, and go on afterwards; how many there were."""
    for number in range(1, 60):
        run = shutil.copytree(three, folder / f"{point}-{number}" / "run")
        before = verified(run)
        code = attempt(run, f"{point}={number}:{action}")
        after = verified(run)
        holds(before, after)
        if code == 0 and action == "kill":
            return number - 1  # it was not reached any more
        if code:
            assert code in (-9, 73, 75), (point, number, code)
            assert attempt(run) == 0
            holds(after, verified(run))
        assert set(END) <= set(
            verified(run)
        )  # killed behind the last one, it has nothing left to remove
        shutil.rmtree(run.parent)
        if code == 0 and number >= 6:
            return number
    raise AssertionError(f"{point} has no end")


@pytest.mark.promise("P4", "P2")
@pytest.mark.case("A1", "A2", "A3", "A29")
def test_killed_at_any_point_of_saving(three: Path, tmp_path: Path) -> None:
    found = {point: arrivals(three, tmp_path, point, "kill") for point in POINTS}
    assert found.pop("lease.beat") == 0  # its thread wakes every ten seconds
    assert all(found.values()), found


@pytest.mark.sweep
@pytest.mark.promise("P4")
@pytest.mark.case("A5", "A6", "A16")
@pytest.mark.parametrize("action", ["EIO", "ENOSPC", "EDQUOT", "ESTALE"])
@pytest.mark.parametrize("point", [name for name in POINTS if name != "lease.beat"])
def test_a_fault_at_any_point_of_saving(
    three: Path, tmp_path: Path, point: str, action: str
) -> None:
    arrivals(three, tmp_path, point, action)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": ("adapter_model.safetensors", cut, "has 1900 bytes, its manifest says 2000"),
    "flipped": ("adapter_model.safetensors", flip, "adapter_model.safetensors does not have the sha256"),
    "no optimizer": ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
    "empty manifest": ("manifest.json", lambda path: path.write_bytes(b""), "was cut off"),
    "cut manifest": ("manifest.json", cut, "was cut off"),
}  # fmt: skip


@pytest.mark.case("A4", "A10", "A11", "A12")
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named_and_the_one_before_it_is_taken(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    name, spoil, words = DAMAGES[damage]
    spoil(run / "checkpoints" / "step-00000006" / name)
    found = checkpoints.newest(run_in(run), {})
    assert found
    assert checkpoints.step(found) == 5
    assert words in capsys.readouterr().err
    go_on(run)
    assert verified(run) == verified(whole)


@pytest.mark.case("A13")
def test_a_foreign_file_is_told_and_left_behind(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "checkpoints" / "step-00000006" / "pytorch_model.bin").write_bytes(
        b"what an editor left"
    )
    found = checkpoints.newest(run_in(run), {})
    assert found
    assert checkpoints.step(found) == STEPS
    assert (
        "step-00000006/pytorch_model.bin, which its manifest does not name"
        in capsys.readouterr().err
    )
    copied = checkpoints.bring(found, tmp_path / "local")
    assert {path.name for path in copied.iterdir()} == {"adapter_model.safetensors", "optimizer.pt"}


@pytest.mark.case("A14")
def test_with_every_checkpoint_corrupt_it_says_loudly_that_it_begins_anew(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    for path in run.glob("checkpoints/*/optimizer.pt"):
        flip(path)
    assert checkpoints.newest(run_in(run), {}) is None
    said = capsys.readouterr().err
    assert f"WARNING: no checkpoint in {run} is whole, of 3: beginning again at step 0" in said
    assert said.count("passing over a corrupt checkpoint") == 3
    go_on(run)
    assert verified(run) == verified(whole)


@pytest.mark.case("A20")
@pytest.mark.parametrize("order", ["equal", "backwards", "ahead"])
def test_no_file_time_matters(three: Path, whole: Path, tmp_path: Path, order: str) -> None:
    run = shutil.copytree(three, tmp_path / "run")
    now, year = 1_800_000_000, 365 * 86400
    for place, path in enumerate(sorted(run.rglob("*"))):
        moment = {"equal": now, "backwards": now - place * 1000, "ahead": now + year}[order]
        os.utime(path, (moment, moment))
    found = checkpoints.newest(run_in(run), {})
    assert found
    assert checkpoints.step(found) == 3
    go_on(run)
    assert verified(run) == verified(whole)


@pytest.mark.case("A28")
@pytest.mark.parametrize("kept", ["manifest.json", "optimizer.pt"])
def test_what_cannot_be_removed_stays_and_the_run_goes_on(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: str
) -> None:
    run = shutil.copytree(three, tmp_path / "run")
    path = run / "checkpoints" / "step-00000003" / kept
    with immutable(path):
        go_on(run)
    assert "step-00000003 is not needed and could not be removed: Operation not permitted" in (
        capsys.readouterr().err
    )
    assert [step for step in verified(run) if step != 3] == END
    assert path.exists()
    assert checkpoints.newest(run_in(run), {})
    if kept != "manifest.json":
        assert not path.parent.exists()  # now that it can be


class immutable:  # noqa: N801
    """A file that nobody can remove, root neither."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        done = subprocess.run(
            ["chattr", "+i", self.path], capture_output=True, text=True, check=False
        )
        if done.returncode:
            skip(f"chattr: {done.stderr.strip()}")

    def __exit__(self, *error: object) -> None:
        subprocess.run(["chattr", "-i", self.path], check=True)


@pytest.mark.case("A16", "A19")
def test_a_view_of_the_volume_that_is_behind_condemns_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another node wrote is not there at the first look, and is at the second."""
    run = shutil.copytree(whole, tmp_path / "run")
    path = run / "checkpoints" / "step-00000006" / "optimizer.pt"
    content = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(checkpoints.time, "sleep", lambda seconds: path.write_bytes(content))
    found = checkpoints.newest(run_in(run), {})
    assert found
    assert checkpoints.step(found) == STEPS


@pytest.mark.case("A18")
def test_it_is_known_what_a_save_takes(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_slowest", 0.0)
    run = run_in(shutil.copytree(three, tmp_path / "run"))
    with run.work() as scratch:
        assert checkpoints.expected_seconds() == 0
        save(run, scratch, 4)
        quick = checkpoints.expected_seconds()
        assert 0 < quick < 0.4
        own = volume.copy
        monkeypatch.setattr(volume, "copy", lambda *files: (slow(), own(*files))[1])
        save(run, scratch, 5)
        assert 0.4 < checkpoints.expected_seconds() < 5
        monkeypatch.setattr(volume, "copy", own)
        save(run, scratch, 6)
        assert checkpoints.expected_seconds() > 0.4


def slow() -> None:
    import threading

    threading.Event().wait(0.2)


@pytest.mark.case("A17")
def test_a_volume_that_fails_for_ever_is_worth_another_try_later(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(three, tmp_path / "run")
    before = verified(run)
    assert attempt(run, "publish.file=1+:EIO") == 75
    assert verified(run) == before
    reads: Callable[[Path], bytes] = Path.read_bytes

    def fails(path: Path) -> bytes:
        if path.name == "manifest.json":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return reads(path)

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(OSError, match="Stale"):
        artifact.load(run / "checkpoints" / "step-00000003")
    monkeypatch.setattr(Path, "read_bytes", reads)
    assert attempt(run) == 0
    assert TryAgain.exit_code == 75
