"""One table of ends, and a record of each that says what to do."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from stages.lib.run import endings, exits, notes
from stages.lib.run.endings import ENDINGS
from stages.lib.run.exits import Missing, Reported, StageError, Stopped, classify

ROOT = Path(__file__).parent.parent.parent.parent


def all_below(kind: type[StageError]) -> Iterator[type[StageError]]:
    for below in kind.__subclasses__():
        yield below
        yield from all_below(below)


ERRORS = [StageError, *all_below(StageError)]


@pytest.mark.promise("P9")
def test_every_error_is_in_the_table() -> None:
    rows = {row.slug: row.code for row in ENDINGS}
    assert len(rows) == len(ENDINGS)
    assert {kind.slug: kind.exit_code for kind in ERRORS} == {
        slug: rows[slug] for slug in rows.keys() - {"done", "interrupted", "killed", "terminated"}
    }


@pytest.mark.promise("P9")
def test_what_is_worth_a_retry() -> None:
    assert {row.code for row in ENDINGS if row.retry} == {
        75,
        128 + signal.SIGKILL,
        128 + signal.SIGTERM,
    }
    assert not {row.code for row in ENDINGS if row.retry} & {r.code for r in ENDINGS if not r.retry}


@pytest.mark.promise("P9")
def test_the_document_has_the_table() -> None:
    assert endings.table() in (ROOT / "docs" / "stopping.md").read_text(), endings.table()


def ended(folder: Path, error: BaseException, stage: str = "train") -> int:
    outcome = Reported()
    outcome.stage, outcome.run_dir = stage, folder
    with pytest.raises(SystemExit) as caught, outcome:
        raise error
    return int(caught.value.code or 0)


@pytest.mark.promise("P9")
@pytest.mark.parametrize("kind", ERRORS)
def test_the_record_of_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[StageError]
) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr(exits, "TERMINATION_LOG", log)
    assert ended(tmp_path, kind("it is so; do that")) == kind.exit_code
    shown = json.loads(log.read_text())
    assert (shown["exit"], shown["code"]) == (kind.exit_code, kind.slug)
    assert shown["retryable"] == (kind.exit_code == 75)
    assert shown["message"] == "it is so; do that"
    assert shown["stage"] == "train"
    assert len(shown["hint"]) > 5
    assert shown["time"].endswith("Z")
    if kind is exits.InUse:  # the other's run, and its record
        assert not (tmp_path / "error.json").exists()
    else:
        assert json.loads((tmp_path / "error.json").read_text()) == shown
    assert {path.name for path in tmp_path.iterdir()} <= {"error.json", "termination-log"}


@pytest.mark.promise("P9")
def test_our_own_fault_has_a_record_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(tmp_path, ZeroDivisionError("division by zero")) == 70
    assert "Traceback" in capsys.readouterr().err
    record = json.loads((tmp_path / "error.json").read_text())
    assert (record["code"], record["retryable"]) == ("fault", False)
    assert record["message"] == "ZeroDivisionError: division by zero"


def test_what_kubernetes_shows_is_short_and_put_there_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "TERMINATION_LOG", tmp_path / "log")
    ended(tmp_path, Missing("ü" * 9000))
    assert not (tmp_path / "log").exists()
    (tmp_path / "log").touch()
    ended(tmp_path, Missing('"ü' * 9000))
    assert 1000 < len((tmp_path / "log").read_bytes()) <= 4096
    assert json.loads((tmp_path / "log").read_text())["exit"] == 66
    assert len(json.loads((tmp_path / "error.json").read_text())["message"]) == 18000


def test_success_removes_the_record_of_its_own_stage(tmp_path: Path) -> None:
    for stage, left in (("merge", True), ("train", False)):
        ended(tmp_path, Missing("data"), "train")
        outcome = Reported()
        outcome.stage, outcome.run_dir = stage, tmp_path
        with outcome:
            pass
        assert (tmp_path / "error.json").exists() == left


def test_a_mount_that_cannot_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no rename here")

    monkeypatch.setattr(notes.os, "replace", refuse)
    for number in (1, 2):
        notes.write(tmp_path / "note", {"n": number})
        assert notes.read(tmp_path / "note") == {"n": number}
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def raised(error: BaseException, within: BaseException | None = None, cause: bool = False) -> Any:
    """`error` as it is raised while `within` is dealt with."""
    if cause:
        error.__cause__ = within
    else:
        error.__context__ = within
    return classify(error)


@pytest.mark.case("G2", "G3")
def test_a_stop_that_a_library_swallowed_is_one() -> None:
    stop = Stopped("stopped by SIGTERM")
    assert raised(RuntimeError("connection lost"), stop) is stop
    assert raised(Missing("the hub did not answer"), stop, cause=True) is stop
    # What we find out for ourselves while we stop has its own code.
    assert raised(exits.Diverged("loss"), stop).exit_code == 80
    assert raised(exits.NoProgress("three"), stop, cause=True).exit_code == 70
    assert raised(RuntimeError("bug")) is None


def test_clicks_own_ends_have_a_code_of_the_table(tmp_path: Path) -> None:
    assert ended(tmp_path, click.FileError("x")) == 2
    assert ended(tmp_path, KeyboardInterrupt()) == 75
