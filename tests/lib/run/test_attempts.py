"""Three attempts that got nowhere end the loop, and no others."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.lib.run import attempts, lease, preemption
from stages.lib.run.attempts import Attempt
from stages.lib.run.exits import BadData, Diverged, InUse, NoProgress, StageError, Stopped, TryAgain

SETTINGS = {"SEED": {"value": 0, "from": "default"}}


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    preemption.listen()
    yield
    preemption.listen()


def attempt(
    folder: Path,
    error: StageError | None = None,
    *,
    lasts: float = 0,
    verifies: int = 0,
    **how: Any,
) -> Attempt:
    """One that ends with an error, after so many seconds and verified things."""
    made = Attempt(folder, how.pop("stage", "train"), how.pop("settings", SETTINGS), **how)
    with made:
        made.began -= lasts
        for _ in range(verifies):
            made.progressed()
        if error:
            raise error
    return made


def ends(folder: Path, error: StageError, **how: Any) -> int:
    with pytest.raises(StageError) as caught:
        attempt(folder, error, **how)
    return caught.value.exit_code


def killed(folder: Path, lasted: float, verifies: int = 0, **changed: Any) -> None:
    """As SIGKILL leaves it: its record without an end."""
    made = Attempt(folder, "train", SETTINGS)
    made.__enter__()
    made.began -= lasted
    made.record |= changed
    for _ in range(verifies):
        made.progressed()
    made.beat()


def records(folder: Path) -> list[dict[str, Any]]:
    return [record for _, record in attempts.read(folder)]


def test_a_record_says_who_when_and_how_it_ended(tmp_path: Path) -> None:
    attempt(tmp_path, verifies=2)
    assert ends(tmp_path, BadData("row 7 is bad"), lasts=90) == 65
    done, bad = records(tmp_path)
    assert (done["number"], done["stage"], done["end"], done["progress"]) == (1, "train", 0, 2)
    assert (bad["number"], bad["end"], bad["said"]) == (2, 65, "ended with 65: row 7 is bad")
    assert bad["seconds"] >= 90
    assert bad["resident_bytes"] > 1 << 20
    assert bad.keys() >= {"host", "pid", "started", "boot"}


@pytest.mark.case("G11")
@pytest.mark.promise("P9")
def test_the_third_in_vain_ends_with_70_and_what_the_three_said(tmp_path: Path) -> None:
    assert ends(tmp_path, TryAgain("the hub failed")) == 75
    assert ends(tmp_path, TryAgain("no answer")) == 75
    with pytest.raises(NoProgress) as caught:
        attempt(tmp_path, TryAgain("status 503"))
    for words in (
        "attempt 1",
        "the hub failed",
        "attempt 2",
        "no answer",
        "attempt 3",
        "status 503",
    ):
        assert words in caught.value.message
    # Nobody who obeys the code starts it again; whoever does has mended something.
    assert ends(tmp_path, TryAgain("the hub failed")) == 75


@pytest.mark.case("G11")
@pytest.mark.parametrize(
    "between",
    [
        lambda folder: attempt(folder),
        lambda folder: ends(folder, TryAgain("503"), verifies=1),
        lambda folder: ends(folder, Diverged("loss")),
        lambda folder: killed(folder, 900, verifies=1),
    ],
)
def test_success_progress_and_other_ends_begin_anew(tmp_path: Path, between: Any) -> None:
    for _ in range(2):
        ends(tmp_path, TryAgain("503"))
    between(tmp_path)
    assert [ends(tmp_path, TryAgain("503")) for _ in range(3)] == [75, 75, 70]


@pytest.mark.case("G11")
def test_other_stages_settings_and_writers_are_not_counted(tmp_path: Path) -> None:
    ends(tmp_path, TryAgain("503"))
    ends(tmp_path, TryAgain("503"))
    assert ends(tmp_path, TryAgain("503"), stage="merge") == 75
    assert ends(tmp_path, TryAgain("503"), settings={"SEED": {"value": 1}}) == 75
    assert ends(tmp_path, InUse("taken over")) == 75
    assert ends(tmp_path, TryAgain("503")) == 70


def stopped(folder: Path, number: signal.Signals, lasts: float) -> int:
    preemption.listen()
    with preemption.deferred():
        signal.raise_signal(number)
    return ends(folder, Stopped("stopped"), lasts=lasts)


@pytest.mark.case("G11")
@pytest.mark.parametrize(
    ("number", "lasts", "code"),
    [
        (signal.SIGTERM, 10, 75), (signal.SIGUSR1, 200, 75), (signal.SIGTERM, 900, 70),
        (signal.SIGINT, 900, 75),
    ],
)  # fmt: skip
def test_a_stop_soon_after_the_beginning_was_not_in_vain(
    tmp_path: Path, number: signal.Signals, lasts: float, code: int
) -> None:
    assert [stopped(tmp_path, number, lasts) for _ in range(3)] == [75, 75, code]


@pytest.mark.case("G11")
def test_a_limit_that_leaves_no_time_is_in_vain(tmp_path: Path) -> None:
    for _ in range(2):
        assert ends(tmp_path, Stopped("MAX_RUNTIME")) == 75
    assert ends(tmp_path, Stopped("MAX_RUNTIME")) == 70


@pytest.mark.case("E5", "G11")
def test_the_fourth_is_refused_where_three_were_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        killed(tmp_path, 720, resident_bytes=0)
    with pytest.raises(NoProgress, match=r"attempt 3 was killed after 12 minutes at \d"):
        attempt(tmp_path)
    assert "the attempt before this one, 1, was killed after 12 minutes" in capsys.readouterr().err
    assert [record["end"] for record in records(tmp_path)] == [137, 137, 137, 70]
    attempt(tmp_path)


@pytest.mark.case("G11")
def test_force_goes_on_whatever_was_before(tmp_path: Path) -> None:
    for _ in range(3):
        killed(tmp_path, 720)
    attempt(tmp_path, force=True)


@pytest.mark.case("E5")
@pytest.mark.parametrize(
    ("changed", "words", "counts"),
    [
        # Killed within seconds, and the kernel says that it killed somebody.
        ({"oom_kills": -1}, "the kernel killed a process for want of memory", True),
        ({"boot": "another"}, "the kernel may have been out of memory", False),
        ({}, "GiB of memory", False),
    ],
)
def test_who_was_killed_for_want_of_memory(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
    words: str,
    counts: bool,
) -> None:
    assert attempts._oom_kills() is not None
    for _ in range(3):
        killed(tmp_path, 12, **changed)
    if counts:
        with pytest.raises(NoProgress, match="was killed after 12 seconds"):
            attempt(tmp_path)
    else:
        attempt(tmp_path)
    said = capsys.readouterr().err
    assert words in said
    assert ("kernel" in said) == bool(changed)


def test_old_records_go_and_broken_ones_are_passed_over(tmp_path: Path) -> None:
    for _ in range(attempts.KEEP + 3):
        attempt(tmp_path)
    assert [r["number"] for r in records(tmp_path)] == list(range(4, attempts.KEEP + 4))
    (tmp_path / attempts.FOLDER / "0099-x.json").write_text('{"number": ')
    assert attempt(tmp_path).number == attempts.KEEP + 4


def test_without_records_the_work_goes_on(tmp_path: Path) -> None:
    (tmp_path / attempts.FOLDER).write_text("in the way")
    attempt(tmp_path, verifies=1)
    assert ends(tmp_path, BadData("row")) == 65


@pytest.mark.case("A23")
def test_what_fails_since_the_run_is_anothers_is_no_fault_of_ours(tmp_path: Path) -> None:
    made = Attempt(tmp_path, "train", SETTINGS)
    with lease.held(tmp_path) as made.check_held:
        path = tmp_path / lease.HOLDER
        path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere"}))
        with pytest.raises(InUse, match="on elsewhere"), made:
            (tmp_path / "retired by the other").read_text()
    assert records(tmp_path)[0]["counts"] is False
