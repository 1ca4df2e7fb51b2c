"""A cluster for a test; the tests are collected where `make slurm-test` says that one can run."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SWITCH, Cluster

collect_ignore_glob = [] if SWITCH in os.environ else ["test_*.py"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Of three nodes, on this machine."""
    with Cluster() as found:
        yield found
