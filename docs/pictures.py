"""The documents' pictures, of a real run: `make pictures` writes `docs/pictures/`.

Opens the report of a finished run in Debian's Chromium (`apt-get install chromium`), in light, in dark, and as
a phone shows it. The pictures in the repository are of `make demo`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
FOLDER = Path(__file__).parent / "pictures"
SHOTS = {
    "report-light.png": (1000, 980, "light"), "report-dark.png": (1000, 980, "dark"),
    "report-phone.png": (390, 980, "dark"),
}  # fmt: skip


def pictures(page: Path, folder: Path) -> None:
    """A picture of the top of a page, for each of `SHOTS`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, (width, height, scheme) in SHOTS.items():
            size: Any = {"width": width, "height": height}
            shown = browser.new_page(viewport=size, color_scheme=scheme)
            shown.goto(page.as_uri())
            shown.screenshot(path=folder / name)
        browser.close()


def main() -> None:
    """Report on a run, and take its pictures."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("run", type=Path, help="a finished run directory, such as runs/sample")
    run = asked.parse_args().run
    if not CHROMIUM.exists():
        sys.exit(f"{CHROMIUM} is not there; apt-get install chromium")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        command = [sys.executable, "-m", "stages", "report", "--run-dir", run, "--output", page]
        subprocess.run(command, check=True)
        pictures(page, FOLDER)


if __name__ == "__main__":
    main()
