"""The page of guarantees is what the tests say, and no case is forgotten."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import guarantees
from tests.conftest import ROOT
from tests.matrix import CASES, PROMISES

TESTS = """
import pytest
TABLE = [pytest.param(1, marks=pytest.mark.case("A2")), 2]
pytestmark = pytest.mark.promise("P1")

@pytest.mark.case("A1", "B3")
def test_one(record_property):
    record_property("tried", 7)

@pytest.mark.parametrize("number", TABLE)
def test_two(number):
    assert number == 2

class TestThree:
    @pytest.mark.case("A2")
    def test_four(self):
        pytest.skip("no disk")
"""


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """A folder with tests in it that carry marks."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_marked.py").write_text(TESTS)
    return tmp_path


def test_all_cases_are_there() -> None:
    areas = {"A": 29, "B": 23, "C": 14, "D": 14, "E": 14, "F": 7, "G": 14, "H": 9}
    expected = {f"{area}{n}" for area, last in areas.items() for n in range(1, last + 1)}
    assert CASES.keys() == expected
    assert len(CASES) == 124
    assert list(PROMISES) == [f"P{n}" for n in range(1, 11)]


def test_every_case_has_a_test_or_a_reason() -> None:
    faults = guarantees.faults_of_the_matrix(guarantees.marks())
    assert not faults, "\n".join(faults)


def test_what_is_wrong_is_told() -> None:
    carried = {name: {"tests/a.py::test_b"} for name in [*CASES, *PROMISES]}
    assert guarantees.faults_of_the_matrix(carried) == []
    del carried["C3"], carried["P7"]
    told = guarantees.faults_of_the_matrix(carried | {"Z1": {"tests/a.py::test_b"}})
    assert [line.split(" ")[0] for line in told] == ["tests/a.py::test_b", "C3", "P7"]


def test_the_page_is_fresh() -> None:
    made = guarantees.page(guarantees.marks(), guarantees.results_of_the_last_count())
    assert made == (ROOT / "docs" / "guarantees.md").read_text(), "run `make docs`"


def test_marks_are_read_off(marked: Path) -> None:
    file = "tests/test_marked.py"
    one, two, four = f"{file}::test_one", f"{file}::test_two", f"{file}::TestThree::test_four"
    assert guarantees.marks(marked) == {
        "A1": {one}, "B3": {one}, "A2": {two, four}, "P1": {one, two, four},
    }  # fmt: skip


def test_marks_that_cannot_be_read_off_are_refused(marked: Path) -> None:
    path = marked / "tests" / "test_marked.py"
    path.write_text(path.read_text().replace('"A1", "B3"', "*NAMES"))
    with pytest.raises(ValueError, match="write the names of a mark out"):
        guarantees.marks(marked)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_was_tried_and_held_is_counted(marked: Path, workers: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.counting", "-n", workers, "--rootdir", str(marked),
         "--guarantees", "found.json", "tests"],
        cwd=marked, env={"PYTHONPATH": str(ROOT), "PATH": ""}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert "guarantees: 4 tests" in done.stdout, done.stdout + done.stderr
    found = json.loads((marked / "found.json").read_text())
    assert (found["tests"], found["failed"], found["skipped"]) == (4, 1, 1)
    file = "tests/test_marked.py"
    assert found["names"]["A1"] == {
        f"{file}::test_one": {"tried": 7, "held": 7, "skipped": 0, "failed": 0}
    }
    assert found["names"]["A2"] == {
        f"{file}::test_two": {"tried": 1, "held": 0, "skipped": 0, "failed": 1},
        f"{file}::TestThree::test_four": {"tried": 0, "held": 0, "skipped": 1, "failed": 0},
    }
    assert found["names"]["P1"][f"{file}::test_two"]["tried"] == 2
    page = guarantees.page(guarantees.marks(marked), found)
    assert f"| P1 | {PROMISES['P1']} | 9 | 8 |" in page
    assert "[test_one](../tests/test_marked.py) (7 of 7) |" in page
