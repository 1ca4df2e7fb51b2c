"""Every point that the other stages reach, times every failure; and that there is no point beside."""

from collections.abc import Callable

import pytest

from stages.lib.run import failpoints
from tests.conftest import ROOT
from tests.faults.ground import SCENARIOS, Ground
from tests.faults.judging import FAILURES, faults, hold

# Points that need more than a run directory, and the tests that fail there.
ELSEWHERE = dict.fromkeys(("download.block", "download.whole"), "tests/lib/run/test_hub.py")
OTHERS = [name for name, scenario in SCENARIOS.items() if scenario.stage != "train"]


@pytest.mark.sweep
@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.case("A2", "A3", "A5", "A17", "A29", "B23", "G5", "G6")
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("scenario", OTHERS)
def test_a_stage_holds(
    ground: Ground, scenario: str, failure: str, record_property: Callable[[str, object], None]
) -> None:
    hold(ground, faults(ground, scenario, failure), record_property)


@pytest.mark.sweep
def test_every_point_is_tried(ground: Ground) -> None:
    tried = {fault.point for name in SCENARIOS for fault in faults(ground, name, "killed")}
    elsewhere = {point for point in failpoints.POINTS if point in ELSEWHERE}
    assert failpoints.POINTS.keys() - tried == elsewhere, "give the sweep a scenario for it"
    for point in elsewhere:
        assert point in (ROOT / ELSEWHERE[point]).read_text()
