"""One ground for all tests of faults in a process."""

from collections.abc import Iterator

import pytest

from tests.faults.ground import Ground, prepared_ground


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """The stages on a very small model, and what they make when nothing fails."""
    with prepared_ground(tmp_path_factory.mktemp("faults")) as made:
        yield made
