"""Whole or absent, with a manifest that tells."""

import errno
import json
import os
import signal
import stat
from pathlib import Path

import pytest

from stages.lib.run import artifact, failpoints, preemption
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


def test_without_a_manifest_it_is_debris(made: artifact.Artifact) -> None:
    path = made.path / "manifest.json"
    whole = path.read_text()
    for cut in ("", whole[:50], "[]", "null"):
        path.write_text(cut)
        assert artifact.load(made.path) is None
    path.unlink()
    assert artifact.load(made.path) is None


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


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "inner/../../outside"])
def test_names_stay_inside(made: artifact.Artifact, name: str) -> None:
    path = made.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadData, match="leaves the artifact"):
        artifact.load(made.path)


def test_a_new_one_replaces_the_old_one_whole(made: artifact.Artifact, tmp_path: Path) -> None:
    source = tmp_path / "other"
    source.mkdir()
    (source / "c.txt").write_text("c")
    artifact.publish(source, made.path, FACTS)
    assert sorted(path.name for path in made.path.iterdir()) == ["c.txt", "manifest.json"]


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


def test_what_will_not_fit_is_not_begun(tmp_path: Path) -> None:
    artifact.check_room(tmp_path, 1)
    with pytest.raises(CannotWrite, match=r"GiB free, 1073741824\.0 are needed"):
        artifact.check_room(tmp_path, 2**60)


@pytest.mark.promise("P1")
def test_a_stop_does_not_come_between_the_manifest_and_its_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "_reasons", [])
    before = signal.signal(signal.SIGTERM, preemption._note)
    monkeypatch.setenv("FAILPOINTS", "publish.done:term")
    failpoints.arm()
    try:
        with artifact.Draft(tmp_path / "made") as draft:
            draft.finish({"metrics": {}})
    finally:
        signal.signal(signal.SIGTERM, before)
        monkeypatch.setenv("FAILPOINTS", "")
        failpoints.arm()
    assert artifact.load(tmp_path / "made")
    with pytest.raises(TryAgain):
        preemption.check()
