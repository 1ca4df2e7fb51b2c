"""Peak resident memory of a process and all that it starts."""

import contextlib
import os
import re
import threading
from pathlib import Path

# Seconds between looks at RSS; PSS, which the kernel counts page by page, at every tenth look.
POLL, POLLS_A_PSS = 0.05, 10


class Memory(threading.Thread):
    """The peaks of the summed resident memory of a process and all that it starts, in bytes.

    Attributes:
        rss: shared pages counted in each process. pss: shared pages counted once.
    """

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self.session, self.rss, self.pss = session, 0, 0
        self.ended = threading.Event()

    def run(self) -> None:
        """Look until `ended` is set."""
        looks = 0
        while not self.ended.wait(POLL):
            processes = self._processes()
            self.rss = max(self.rss, sum(map(self._rss, processes)))
            if looks % POLLS_A_PSS == 0:
                self.pss = max(self.pss, sum(map(self._pss, processes)))
            looks += 1

    def _processes(self) -> list[Path]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.session:
                    found.append(path)
        return found

    @staticmethod
    def _rss(process: Path) -> int:
        with contextlib.suppress(OSError):
            return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    @staticmethod
    def _pss(process: Path) -> int:
        with contextlib.suppress(OSError):
            found = re.search(r"^Pss: +(\d+)", (process / "smaps_rollup").read_text(), re.M)
            return int(found[1]) * 1024 if found else 0
        return 0
