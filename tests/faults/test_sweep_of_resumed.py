"""Every point that `train` reaches on the second half of its way, times every failure."""

from collections.abc import Callable

import pytest

from tests.faults.ground import Ground
from tests.faults.judging import FAILURES, faults, hold

Record = Callable[[str, object], None]


@pytest.mark.sweep
@pytest.mark.promise("P1", "P2", "P3", "P4")
@pytest.mark.case("A1", "A2", "A3", "A5", "A17", "A29", "G4", "G6")
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("scenario", ["train, resumed", "train again", "train, slow"])
def test_a_resumed_train_holds(
    ground: Ground, scenario: str, failure: str, record_property: Record
) -> None:
    hold(ground, faults(ground, scenario, failure), record_property)
