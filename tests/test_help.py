"""The command line answers at once, and every command says what it does."""

import resource
import sys

import pytest

from stages.__main__ import COMMANDS
from tests.conftest import Stages


def spent() -> float:
    """Seconds of a core that commands took so far: a clock would count what runs beside them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_within_three_tenths_of_a_second(stages: Stages, command: str) -> None:
    seconds = []
    for _ in range(5):
        began = spent()
        done = stages(*command.split(), "--help")
        seconds.append(spent() - began)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Usage: python -m stages")
    assert min(seconds) < 0.3  # the least of five, as others share the core's caches


def test_the_command_line_does_not_import_torch() -> None:
    import subprocess

    code = (
        "import sys, stages.__main__ as m; dict(m.stages.commands); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "False"
