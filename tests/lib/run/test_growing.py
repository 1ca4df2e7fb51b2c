"""A file that grows by lines goes on where it was stopped, on every kind of mount."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from stages.lib.run import artifact, failpoints, growing
from stages.lib.run.exits import CannotWrite
from stages.lib.run.growing import Growing

FROM = {"inputs": {"a": 1}, "settings": {}}


def grow(folder: Path, goes_on: bool = True) -> Growing:
    return Growing(folder, "lines.jsonl", FROM, goes_on)


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "lines.jsonl").read_bytes().splitlines()]


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """An unfinished file of two lines."""
    with grow(tmp_path / "it", goes_on=False) as file:
        file.add({"number": 0, "text": "a\nb\u2028ü"})
        assert entries(tmp_path / "it") == file.entries  # readers see it at once
        file.add({"number": 1})
    return tmp_path / "it"


def test_it_goes_on_and_is_there_when_it_is_finished(stopped: Path) -> None:
    found = growing.begun(stopped)
    assert found
    assert found.manifest == FROM
    assert artifact.load(stopped) is None
    with grow(stopped) as file:
        assert file.resumed == 2
        file.add({"number": 2})
        file.finish({"metrics": {}})
    assert [entry["number"] for entry in entries(stopped)] == [0, 1, 2]
    made = artifact.load(stopped, deep=True)
    assert made
    assert list(made.manifest["files"]) == ["lines.jsonl"]
    assert {path.name for path in stopped.iterdir()} == {"lines.jsonl", "manifest.json"}
    (stopped / growing.DRAFT).write_text(json.dumps(FROM))  # killed before it could go
    assert growing.begun(stopped) is None


@pytest.mark.parametrize(
    "torn", [b'{"number": 2', b"\0\0\0\n", b'{"number"\n{"number": 3}\n', b"7\n"]
)
def test_a_torn_end_is_cut_off(stopped: Path, torn: bytes) -> None:
    with (stopped / "lines.jsonl").open("ab") as file:
        file.write(torn)
    with grow(stopped) as file:
        assert file.resumed == 2
        file.add({"number": 2})
    assert [entry["number"] for entry in entries(stopped)] == [0, 1, 2]


def test_what_was_made_otherwise_is_begun_anew(stopped: Path) -> None:
    with grow(stopped, goes_on=False) as file:
        file.add({"number": 9})
    assert entries(stopped) == [{"number": 9}]


def test_nothing_is_left_of_what_holds_no_line(tmp_path: Path) -> None:
    with grow(tmp_path / "it", goes_on=False):
        pass
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"inputs": {}}'])
def test_a_record_that_is_not_whole_is_none(stopped: Path, content: str) -> None:
    (stopped / growing.DRAFT).write_text(content)
    assert growing.begun(stopped) is None


@pytest.mark.case("A15")
def test_a_mount_that_cannot_append(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path.open

    def refuses(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "a" in mode:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return own(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuses)
    with grow(stopped) as file:
        file.add({"number": 2})
        file.finish({"metrics": {}})
    assert artifact.load(stopped, deep=True)
    assert [entry["number"] for entry in entries(stopped)] == [0, 1, 2]


class Closing:
    """A file of a mount that takes nothing after a flush."""

    def __init__(self, file: Any) -> None:
        self.file, self.flushed = file, False

    def fileno(self) -> int:
        self.flushed = True
        return int(self.file.fileno())

    def write(self, block: Any) -> int:
        if self.flushed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return int(self.file.write(block))

    def close(self) -> None:
        self.file.close()


@pytest.mark.case("A15")
def test_a_mount_whose_files_end_with_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "SYNC_SECONDS", -1.0)
    own = Path.open

    def opens(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = own(path, mode, *args, **kwargs)
        return Closing(file) if mode in ("ab", "wb") and path.suffix == ".jsonl" else file

    monkeypatch.setattr(Path, "open", opens)
    with grow(tmp_path / "it", goes_on=False) as file:
        for number in range(4):
            file.add({"number": number})
        file.finish({"metrics": {}})
    assert artifact.load(tmp_path / "it", deep=True)
    assert [entry["number"] for entry in entries(tmp_path / "it")] == [0, 1, 2, 3]


@pytest.mark.case("A5")
def test_a_full_disk_keeps_the_lines_before(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(growing, "SYNC_SECONDS", -1.0)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match="make room"), grow(stopped) as file:
        file.add({"number": 2})
    assert entries(stopped)[:2] == [{"number": 0, "text": "a\nb\u2028ü"}, {"number": 1}]


def test_a_manifest_that_may_not_be_on_the_disk_is_taken_back(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILPOINTS", "publish.written:ENOSPC")
    failpoints.arm()
    with pytest.raises(CannotWrite), grow(stopped) as file:
        file.finish({"metrics": {}})
    monkeypatch.setenv("FAILPOINTS", "")
    failpoints.arm()
    assert artifact.load(stopped) is None
    with grow(stopped) as file:
        assert file.resumed == 2
