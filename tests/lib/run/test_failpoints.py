"""Where a test asks for a failure it comes, and nowhere else."""

import errno

import pytest

from stages.lib.run import failpoints
from stages.lib.run.exits import BadSetting


def arm(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FAILPOINTS", text)
    failpoints.arm()


def test_nothing_happens_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    arm(monkeypatch, "")
    for name in failpoints.POINTS:
        failpoints.reach(name)


@pytest.mark.parametrize(
    ("text", "failing"), [("EIO", [1]), ("=3:EIO", [3]), ("=3+:EIO", [3, 4, 5])]
)
def test_the_arrivals_that_were_asked_for_fail(
    monkeypatch: pytest.MonkeyPatch, text: str, failing: list[int]
) -> None:
    arm(monkeypatch, f"publish.done:ENOSPC, publish.file{text if '=' in text else ':EIO'}")
    found = []
    for arrival in range(1, 6):
        failpoints.reach("publish.begin")
        try:
            failpoints.reach("publish.file")
        except OSError as error:
            assert error.errno == errno.EIO  # noqa: PT017
            found.append(arrival)
    assert found == failing
    with pytest.raises(OSError, match="No space left"):
        failpoints.reach("publish.done")
    monkeypatch.setenv("FAILPOINTS", "")
    failpoints.arm()


def test_what_is_reached_can_be_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arm(monkeypatch, "scratch=2+:note")
    for name in ("scratch", "publish.begin", "scratch", "scratch"):
        failpoints.reach(name)
    assert capsys.readouterr().err == "failpoint scratch\n" * 2
    arm(monkeypatch, "")


@pytest.mark.parametrize(
    "text", ["publish.fil:EIO", "publish.file:EBOGUS", "publish.file", "=1:kill"]
)
def test_what_names_no_point_or_action_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    with pytest.raises(BadSetting, match="FAILPOINTS names"):
        arm(monkeypatch, text)
    monkeypatch.setenv("FAILPOINTS", "")
    failpoints.arm()
