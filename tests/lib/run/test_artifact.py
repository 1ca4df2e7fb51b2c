"""Whole or absent, with a manifest that tells."""

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.lib.run import artifact, failpoints, preemption, volume
from stages.lib.run.exits import BadData, CannotWrite, TryAgain

FACTS = {"stage": "test", "inputs": {}, "settings": {}, "metrics": {"loss": 1.5}}


@pytest.fixture
def made(tmp_path: Path) -> artifact.Artifact:
    """A small artifact with a folder in it."""
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "a.bin").write_bytes(os.urandom(9 << 20))
    (source / "inner" / "b.txt").write_text("b")
    (source / "a.bin").chmod(0o600)  # as safetensors leaves it
    return artifact.publish(source, tmp_path / "target", FACTS)


@pytest.fixture
def small(tmp_path: Path) -> artifact.Artifact:
    """The same with few bytes."""
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "a.bin").write_bytes(b"a")
    (source / "inner" / "b.txt").write_text("b")
    return artifact.publish(source, tmp_path / "target", FACTS)


def told(made: artifact.Artifact, change: Callable[[dict[str, Any]], object]) -> None:
    """Have its manifest say something else."""
    path = made.path / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_published_is_what_was_made(made: artifact.Artifact) -> None:
    found = artifact.load(made.path, deep=True)
    assert found is not None
    assert found.manifest == made.manifest
    assert found.digest == made.digest
    names = sorted(p.relative_to(made.path).as_posix() for p in made.path.rglob("*") if p.is_file())
    assert names == ["a.bin", "inner/b.txt", "manifest.json"]
    umask = os.umask(0)
    os.umask(umask)
    for name in names:
        assert stat.S_IMODE((made.path / name).stat().st_mode) == 0o666 & ~umask


@pytest.mark.case("A4")
def test_without_a_manifest_it_is_debris(made: artifact.Artifact) -> None:
    path = made.path / "manifest.json"
    whole = path.read_text()
    for cut in ("", whole[:50], "[]", "null"):
        path.write_text(cut)
        assert artifact.load(made.path) is None
    path.unlink()
    assert artifact.load(made.path) is None


@pytest.mark.case("A10", "A11", "A12")
def test_damage_is_named(made: artifact.Artifact) -> None:
    path = made.path / "a.bin"
    content = bytearray(path.read_bytes())
    content[5_000_000] ^= 1
    path.write_bytes(content)
    assert artifact.load(made.path) is not None  # the size is right
    with pytest.raises(BadData, match=r"a\.bin.*sha256"):
        artifact.load(made.path, deep=True)
    path.write_bytes(content[:-1])
    with pytest.raises(BadData, match=r"a\.bin has 9437183 bytes"):
        artifact.load(made.path)
    path.unlink()
    with pytest.raises(BadData, match=r"a\.bin is missing"):
        artifact.load(made.path)


ENTRY = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.case("A26")
@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "inner/../../outside", "", ".", "a//b.txt", "./a.bin", "a\0.bin"],
)
def test_names_stay_inside(small: artifact.Artifact, name: str) -> None:
    (small.path.parent / "outside").write_text("o")
    told(small, lambda manifest: manifest["files"].update({name: ENTRY}))
    with pytest.raises(BadData, match="leaves the artifact"):
        artifact.load(small.path)


@pytest.mark.case("A25")
@pytest.mark.parametrize("name", ["inner", "inner/b.txt", "manifest.json"])
def test_links_are_refused(small: artifact.Artifact, tmp_path: Path, name: str) -> None:
    """Even where they lead to the very same bytes: what they lead to may be changed unseen."""
    moved = (small.path / name).rename(tmp_path / "elsewhere")
    (small.path / name).symlink_to(moved)
    with pytest.raises(BadData, match=f"{name} is a link, which leaves the artifact"):
        artifact.load(small.path)


def test_a_folder_that_is_reached_through_a_link_is_no_link_inside(
    small: artifact.Artifact, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(small.path)
    assert artifact.load(tmp_path / "link") is not None


def test_what_is_no_regular_file_is_not_opened(small: artifact.Artifact) -> None:
    (small.path / "a.bin").unlink()
    os.mkfifo(small.path / "a.bin")
    told(small, lambda manifest: manifest["files"]["a.bin"].update(bytes=0))
    with pytest.raises(BadData, match="no regular file"):
        artifact.load(small.path, deep=True)


BAD_ENTRIES = [
    None, [], 7, {}, {"bytes": 1}, ENTRY | {"bytes": -1}, ENTRY | {"bytes": 1.0}, ENTRY | {"bytes": True},
    ENTRY | {"sha256": None}, ENTRY | {"sha256": "0" * 63}, ENTRY | {"sha256": "0" * 63 + "/"},
]  # fmt: skip


def test_sizes_and_hashes_are_sane(small: artifact.Artifact) -> None:
    for entry in BAD_ENTRIES:
        told(small, lambda manifest, entry=entry: manifest["files"].update({"a.bin": entry}))
        with pytest.raises(BadData, match=r"gives 'a\.bin' no size and sha256"):
            artifact.load(small.path)


@pytest.mark.parametrize("part", ["files", "inputs", "settings", "metrics"])
def test_parts_are_what_they_are(small: artifact.Artifact, part: str) -> None:
    for value in ([], [["a.bin", ENTRY]], "a", None):
        told(small, lambda manifest, value=value: manifest.update({part: value}))
        with pytest.raises(BadData, match=f"under '{part}' what no manifest does"):
            artifact.load(small.path)


def test_a_manifest_has_a_limit(small: artifact.Artifact) -> None:
    path = small.path / "manifest.json"
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(BadData, match="1073741824 bytes, no manifest is over"):
        artifact.load(small.path)
    path.write_text("[" * 100_000)
    with pytest.raises(BadData, match="nested too deeply"):
        artifact.load(small.path)


@pytest.mark.case("D14")
def test_another_schema_is_named(small: artifact.Artifact) -> None:
    told(small, lambda manifest: manifest.update(schema=0))
    with pytest.raises(BadData, match="schema 0, this version reads 1"):
        artifact.load(small.path)


def test_a_new_one_replaces_the_old_one_whole(made: artifact.Artifact, tmp_path: Path) -> None:
    source = tmp_path / "other"
    source.mkdir()
    (source / "c.txt").write_text("c")
    artifact.publish(source, made.path, FACTS)
    assert sorted(path.name for path in made.path.iterdir()) == ["c.txt", "manifest.json"]


@pytest.mark.case("A5", "A17")
def test_a_failed_flush_is_a_failed_publish(
    made: artifact.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a lost write once, at fsync; a mount that knows no fsync says so otherwise."""

    def fails(code: int) -> None:
        def fsync(handle: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    fails(errno.EINVAL)
    artifact.publish(tmp_path / "source", tmp_path / "mount", FACTS)
    for code, refusal in ((errno.EIO, TryAgain), (errno.ENOSPC, CannotWrite)):
        fails(code)
        with pytest.raises(refusal):
            artifact.publish(tmp_path / "source", made.path, FACTS)
        assert not made.path.exists()


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(
    made: artifact.Artifact, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="JSON"):
        artifact.publish(
            tmp_path / "source", made.path, FACTS | {"metrics": {"loss": float("nan")}}
        )
    assert artifact.load(made.path, deep=True) is not None


def test_a_draft_is_there_when_it_is_finished_and_gone_when_it_is_not(tmp_path: Path) -> None:
    target, source = tmp_path / "run" / "large", tmp_path / "part"
    with artifact.Draft(target) as draft:
        for number in range(2):
            source.write_text(f"part {number}")
            source.rename(source.with_name(f"part{number}"))
            draft.move(source.with_name(f"part{number}"))
            assert artifact.load(target) is None
        draft.finish({"metrics": {}})
    found = artifact.load(target, deep=True)
    assert found
    assert sorted(found.manifest["files"]) == ["part0", "part1"]
    assert not list(tmp_path.glob("part*"))
    with artifact.Draft(target) as draft:
        source.write_text("again")
        draft.move(source)
        assert target.exists()
    assert not target.exists()


@pytest.mark.case("A5")
def test_what_will_not_fit_is_not_begun(tmp_path: Path) -> None:
    volume.check_room(tmp_path, 1)
    with pytest.raises(CannotWrite, match=r"GiB free, 1073741824.0 GiB are needed"):
        volume.check_room(tmp_path, 2**60)


class Notes:
    """As `Parts` keeps them."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {"a result": 3}

    def keep(self, name: str, result: Any) -> Any:
        self.known[name] = result


def test_a_stopped_draft_keeps_what_its_notes_say_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, notes = tmp_path / "large", Notes()
    for number in range(3):
        (tmp_path / f"part{number}").write_text(f"part {number}")
    with contextlib.suppress(TryAgain), artifact.Draft(target, notes=notes) as draft:
        draft.take(tmp_path / "part0")
        draft.take(tmp_path / "part1")
        raise TryAgain("stopped")
    drop = Path.unlink
    for last in range(1, 4):  # killed while it clears away, it is still ours
        (target / "part1").write_text("part X")
        (target / "part2").write_text("cut o")
        left = iter(range(last, 0, -1))

        def killed(path: Path, missing_ok: bool = False, left: Any = left) -> None:
            drop(path, missing_ok)
            if next(left) == 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(Path, "unlink", killed)
            artifact.Draft(target, notes=notes).__enter__()
        artifact.check_ours(target)
    (target / "part1").write_text("part X")
    (target / "part2").write_text("cut o")
    with artifact.Draft(target, notes=notes) as draft:
        assert (draft.holds("part0"), draft.holds("part1"), draft.size) == (True, False, 6)
        assert sorted(path.name for path in target.iterdir()) == ["draft.json", "part0"]
        draft.take(tmp_path / "part1")
        draft.take(tmp_path / "part2")
        made = draft.finish({"metrics": {}})
    found = artifact.load(target, deep=True)
    assert found
    assert found.digest == draft.digest == made.digest
    with contextlib.suppress(OSError), artifact.Draft(target, notes=notes) as draft:
        assert not draft.holds("part0")  # a published one is made anew
        raise OSError("other")
    assert not target.exists()


class Told:
    """A holder that is asked to stop while it counts what was published, as its record is written then."""

    def check_held(self) -> None:
        """It is."""

    def progressed(self) -> None:
        """Reach a point of failure."""
        failpoints.reach("attempt.record")


@pytest.mark.promise("P1")
@pytest.mark.parametrize("point", ["publish.done", "attempt.record"])
def test_a_stop_does_not_come_between_the_manifest_and_its_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setattr(preemption, "_reasons", [])
    monkeypatch.setattr(preemption, "_signals", [])
    before = signal.signal(signal.SIGTERM, preemption._note)
    monkeypatch.setenv("FAILPOINTS", f"{point}:term")
    failpoints.arm()
    try:
        with artifact.Draft(tmp_path / "made", Told()) as draft:
            draft.finish({"metrics": {}})
    finally:
        signal.signal(signal.SIGTERM, before)
        monkeypatch.setenv("FAILPOINTS", "")
        failpoints.arm()
    assert artifact.load(tmp_path / "made")
    with pytest.raises(TryAgain):
        preemption.check()


@pytest.mark.case("A16", "A17")
@pytest.mark.parametrize("fault", ["EIO", "ESTALE", "ENOTCONN"])
@pytest.mark.parametrize("point", ["publish.file", "publish.block", "publish.manifest"])
def test_a_hiccup_that_passes_is_borne(
    made: artifact.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, fault: str
) -> None:
    monkeypatch.setattr(volume, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setenv("FAILPOINTS", f"{point}=1:{fault}")
    failpoints.arm()
    artifact.publish(tmp_path / "source", made.path, FACTS)
    found = artifact.load(made.path, deep=True)
    assert found
    assert found.digest == made.digest
    monkeypatch.setenv("FAILPOINTS", f"{point}=1+:{fault}")
    failpoints.arm()
    with pytest.raises(TryAgain, match="the volume failed"):
        artifact.publish(tmp_path / "source", made.path, FACTS)
    monkeypatch.setenv("FAILPOINTS", "")
    failpoints.arm()
    assert not made.path.exists()


@pytest.mark.promise("P1")
@pytest.mark.parametrize("lost", ["a.bin", "manifest.json"])
def test_what_the_volume_loses_is_not_taken_for_written(
    made: artifact.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """It says that all is well, and gives back something else."""
    monkeypatch.setattr(volume, "RETRY_SECONDS", (0.0, 0.0))
    sets = volume.set_mode

    def loses(path: Path) -> None:
        sets(path)
        if path.name == lost and path.parent == made.path:
            with path.open("r+b") as file:
                file.write(b"\0\0\0")

    monkeypatch.setattr(volume, "set_mode", loses)
    with pytest.raises(TryAgain, match=lost):
        artifact.publish(tmp_path / "source", made.path, FACTS)
    assert artifact.load(tmp_path / "target") is None


def test_a_folder_that_no_stage_made_is_left_alone(tmp_path: Path) -> None:
    """As `data/` beside the project, when RUN_DIR is the project itself."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_text("mine")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("a")
    with pytest.raises(CannotWrite, match=r"data holds 'mine\.jsonl' and no manifest"):
        artifact.publish(tmp_path / "source", tmp_path / "data", FACTS)
    assert (tmp_path / "data" / "mine.jsonl").read_text() == "mine"
    (tmp_path / "data" / "mine.jsonl").unlink()
    artifact.publish(tmp_path / "source", tmp_path / "data", FACTS)


def test_what_is_removed_beside_an_artifact_is_told(
    made: artifact.Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made.path / "inner" / "notes.txt").write_text("mine")
    artifact.publish(tmp_path / "source", made.path, FACTS)
    assert "removing " + str(made.path / "inner" / "notes.txt") in capsys.readouterr().err
    assert artifact.foreign(made.path) == []


def test_without_room_the_old_one_stays(
    made: artifact.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    (tmp_path / "source" / "more").write_bytes(bytes(5000))
    with pytest.raises(CannotWrite, match=r"10 bytes free, 4.* KiB are needed"):
        artifact.publish(tmp_path / "source", made.path, FACTS)
    assert artifact.load(made.path, deep=True)


def test_only_what_a_manifest_names_is_fetched(made: artifact.Artifact, tmp_path: Path) -> None:
    (made.path / "pytorch_model.bin").write_bytes(b"foreign")
    local = artifact.fetch(made, tmp_path / "local")
    names = sorted(path.name for path in local.rglob("*") if path.is_file())
    assert names == ["a.bin", "b.txt"]
    (made.path / "inner" / "b.txt").write_text("c")
    with pytest.raises(BadData, match=r"b\.txt is corrupt"):
        artifact.fetch(made, tmp_path / "again")


@pytest.mark.case("A15")
def test_a_folder_may_go_with_its_last_file(
    made: artifact.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an object store there are no folders, but names with a slash."""

    def gone(path: Path) -> None:
        os.rmdir(path)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(Path, "rmdir", gone)
    artifact.retire(made.path)
    assert not made.path.exists()
    artifact.publish(tmp_path / "source", made.path, FACTS)
    assert artifact.load(made.path, deep=True)
