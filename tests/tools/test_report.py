"""`report`: where the page goes, what is printed, and how it is in a browser."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Stages
from tests.lib.report import runs
from tests.lib.report.test_run_page import hostile

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.whole(tmp_path_factory.mktemp("runs") / "whole")


def test_the_page_lies_in_the_run_and_is_named(stages: Stages, tmp_path: Path) -> None:
    run = runs.whole(tmp_path / "run")
    for _ in range(2):  # the second takes the place of the first
        done = stages("report", "--run-dir", run)
        assert done.returncode == 0, done.stderr
        page = run / "report.html"
        assert done.stdout.splitlines()[-1] == f"The whole report: {page}"
        assert "held-out loss, nats a token" in done.stdout
        assert "Run run" in page.read_text()
        page.write_text("")
    assert not (run / "error.json").exists()
    assert stages("report", run).returncode == 0


def test_a_failed_run_keeps_its_error(stages: Stages, tmp_path: Path) -> None:
    error = {
        "stage": "train",
        "exit": 80,
        "code": "diverged",
        "message": "No number.",
        "hint": "-",
        "attempt": 1,
    }
    run = tmp_path / "run"
    runs.attempt(run, 1, "train", 80, "No number.")
    (run / "error.json").write_text(json.dumps(error))
    done = stages("report", "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert "failed with exit 80" in done.stdout
    assert "failed with exit 80" in (run / "report.html").read_text()
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    assert stages("report", "--run-dir", run).returncode == 73
    assert json.loads((run / "error.json").read_text()) == error


def test_a_volume_that_is_only_read_is_reported_elsewhere(stages: Stages, tmp_path: Path) -> None:
    run = runs.whole(tmp_path / "run")
    os.mkdir(run / "report.html")  # in the way, as root may write to what is only read
    done = stages("report", "--run-dir", run)
    assert done.returncode == 73
    assert "--output FILE" in done.stderr
    assert "held-out loss" in done.stdout
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    out = tmp_path / "elsewhere.html"
    done = stages("report", "--run-dir", run, "--output", out)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size < 3_000_000
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_several_runs_are_compared_beside_the_first(stages: Stages, tmp_path: Path) -> None:
    folders = [runs.whole(tmp_path / name, gain=gain) for name, gain in (("a", 0.2), ("b", 0.5))]
    done = stages("report", *folders)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "a-compared.html"
    assert done.stdout.splitlines()[-1] == f"The whole report: {page}"
    assert "b has the least held-out loss" in page.read_text()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [(["nowhere"], 66, "run `prepare-data` first"), (["a", "--run-dir", "b"], 2, "leave one out"),
     ([str(n) for n in range(9)], 2, "at most 8")],
)  # fmt: skip
def test_what_cannot_be_reported_is_refused(
    stages: Stages, args: list[str], code: int, words: str
) -> None:
    done = stages("report", *args)
    assert done.returncode == code
    assert words in done.stderr


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's Chromium, which has no profile but its own empty one."""
    if not CHROMIUM:
        pytest.skip("there is no chromium, so no page was opened: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def opened(browser: Any, path: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """A page, and all that it asked for and complained of."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    heard: list[str] = []
    page.on("console", lambda message: heard.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: heard.append(f"request: {request.url}"))
    page.goto(path.as_uri())
    return page, heard


def pages(folder: Path, whole: Path) -> list[Path]:
    from stages.lib.report import compared_page, run_page

    bad, bare = hostile(folder / "bad"), folder / "bare"
    runs.attempt(bare, 1, "train", None)
    made = {
        "whole": run_page.page(runs.look(whole)),
        "bad": run_page.page(runs.look(bad)),
        "bare": run_page.page(runs.look(bare)),
        "compared": compared_page.page([runs.look(run) for run in (whole, bad, bare)]),
    }
    for name, source in made.items():
        (folder / f"{name}.html").write_text(source)
    return [folder / f"{name}.html" for name in made]


def test_in_a_browser_no_page_asks_complains_or_overflows(
    browser: Any, whole: Path, tmp_path: Path
) -> None:
    for path in pages(tmp_path, whole):
        grounds = set()
        for width, scheme in ((360, "light"), (1280, "dark")):
            page, heard = opened(browser, path, width, scheme)
            assert heard == [f"request: {path.as_uri()}"]
            assert page.evaluate("document.documentElement.scrollWidth") == width, (path, width)
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert page.evaluate("document.querySelectorAll('script').length") == 0
            shown = page.evaluate(
                "[...document.querySelectorAll('svg.plot')].filter(e => e.checkVisibility())"
                ".map(e => [e.getAttribute('aria-label'), e.getBoundingClientRect().width,"
                " parseFloat(getComputedStyle(e.querySelector('text')).fontSize)"
                " * e.getBoundingClientRect().width / e.viewBox.baseVal.width])"
            )
            assert bool(shown) == (path.stem != "bare")
            for words, across, letters in shown:
                assert len(words) > 20
                assert 200 < across <= width
                assert letters > 9  # pixels: it can be read
            page.close()
        assert len(grounds) == 2, "light and dark look alike"


def test_a_page_prints(browser: Any, whole: Path, tmp_path: Path) -> None:
    path = pages(tmp_path, whole)[0]
    page, heard = opened(browser, path, 1280, "dark")
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert 2 <= printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") <= 12
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    files = page.locator("details", has_text="Every file").locator("table")
    assert files.evaluate("e => e.checkVisibility({contentVisibilityAuto: true})")
    assert heard == [f"request: {path.as_uri()}"]
