"""Forty runs to which ten things happen each."""

from collections.abc import Callable

import pytest

from tests.faults.ground import Ground
from tests.faults.history import try_runs


@pytest.mark.sweep
@pytest.mark.promise("P1", "P2", "P3", "P4")
@pytest.mark.case("A10", "A11", "A12", "A14", "A20", "A21", "A22")
def test_whatever_happens_it_ends_well(
    ground: Ground, record_property: Callable[[str, object], None]
) -> None:
    try_runs(ground, 40, 10, record_property)
