"""Some of every kind of fault, and two runs to which anything happens: what `make test-faults` does in full."""

from collections.abc import Callable

import pytest

from tests.faults.ground import Ground
from tests.faults.history import try_runs
from tests.faults.judging import Fault, try_fault

SOME = [
    Fault("prepare-data", "publish.manifest", 1, "killed"),
    Fault("train", "publish.file", 3, "killed"),
    Fault("train", "train.bin", 3, "SIGTERM"),
    Fault("train", "publish.written", 5, "EIO"),
    Fault("train, resumed", "retire.manifest", 1, "killed"),
    Fault("train, resumed", "checkpoint.save", 2, "ENOSPC"),
    Fault("train, resumed", "lease.release", 1, "SIGTERM"),
    Fault("generate", "grow.line", 3, "killed"),
    Fault("generate", "publish.written", 1, "EIO from then on"),
]


@pytest.mark.promise("P1", "P2", "P3", "P4")
@pytest.mark.case("A2", "A3", "A5", "A29", "B23", "G4", "G6")
@pytest.mark.parametrize("fault", SOME, ids=str)
def test_after_a_fault_it_goes_on_and_ends_as_if_nothing_had_been(
    ground: Ground, fault: Fault
) -> None:
    assert try_fault(ground, fault) == []


@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.case("A12", "A20", "A21", "A22")
def test_whatever_happens_it_ends_well(
    ground: Ground, record_property: Callable[[str, object], None]
) -> None:
    try_runs(ground, 2, 5, record_property)
