"""A pytest plugin: `--guarantees FILE` counts what was tried and what held, by promise and by case."""

import datetime
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest

KINDS = ("case", "promise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--guarantees", metavar="FILE", type=Path, help="Count promises and cases into FILE."
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have each test's names in its report, which is all that a worker hands over."""
    for item in items:
        for kind in KINDS:
            names = sorted({name for mark in item.iter_markers(kind) for name in mark.args})
            if names:
                item.user_properties.append((kind, names))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--guarantees") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Tally(config.getoption("--guarantees")))


class Tally:
    """The counts of one session.

    A test is one case, unless it says otherwise by `record_property("tried", N)`; where it fails, `held` of
    them did as they should.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.began = path, time.monotonic()
        self.names: dict[str, dict[str, dict[str, int]]] = {}
        self.tests = self.failed = self.skipped = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test's call, or the set-up that kept it from one."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            told: dict[str, Any] = {}
            for key, value in report.user_properties:
                told[key] = value
            names = [name for kind in KINDS for name in told.get(kind, ())]
            if names:
                self._count(report, told, names)

    def _count(self, report: pytest.TestReport, told: dict[str, Any], names: list[str]) -> None:
        self.tests += 1
        self.failed += report.failed
        self.skipped += report.skipped
        tried = 0 if report.skipped else int(told.get("tried", 1))
        held = tried if report.passed else min(int(told.get("held", 0)), tried)
        counts = {
            "tried": tried,
            "held": held,
            "skipped": int(report.skipped),
            "failed": int(report.failed),
        }
        test = report.nodeid.partition("[")[0]
        for name in names:
            line = self.names.setdefault(name, {}).setdefault(test, dict.fromkeys(counts, 0))
            for key, value in counts.items():
                line[key] += value

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        result = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "hardware": hardware(),
            "seconds": round(time.monotonic() - self.began),
            "tests": self.tests,
            "failed": self.failed,
            "skipped": self.skipped,
            "names": {
                name: dict(sorted(tests.items())) for name, tests in sorted(self.names.items())
            },
        }
        self.path.write_text(json.dumps(result, indent=1) + "\n")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print what it came to."""
        tried, held = (
            sum(line[key] for tests in self.names.values() for line in tests.values())
            for key in ("tried", "held")
        )
        seconds = time.monotonic() - self.began
        terminalreporter.write_line(
            f"guarantees: {self.tests} tests, {held:,} of {tried:,} cases held, in {seconds:.0f} s; {self.path}"
        )


def hardware() -> str:
    """The machine, in words."""
    cpu = platform.machine()
    about = Path("/proc/cpuinfo")
    for line in about.read_text().splitlines() if about.is_file() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {cpu}, {memory:.0f} GiB"
