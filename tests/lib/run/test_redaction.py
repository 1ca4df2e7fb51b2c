"""What a secret looks like, in messages and in results."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.lib.run import artifact, redaction
from tests.conftest import ROOT

KEY = 'a"key\\with/öddities'


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)


@pytest.mark.promise("P7")
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"key {KEY}.", "key ***."),
        (json.dumps({"a": KEY}), '{"a": "***"}'),
        (json.dumps({"a": KEY}, ensure_ascii=False), '{"a": "***"}'),
        ("?k=a%22key%5Cwith%2F%C3%B6ddities", "?k=***"),
        ("Basic YSJrZXlcd2l0aC/DtmRkaXRpZXM=", "Basic ***"),
        ("hf_" + "x" * 34, "***"),
        ("hf_hub_download_to_cache", "hf_hub_download_to_cache"),
        ("https://me:p@ss@host/a and http://host/b@c", "https://***@host/a and http://host/b@c"),
        ("https://h/a?x=1&X-Amz-Signature=0a1&y=2", "https://h/a?x=1&***&y=2"),
    ],
)
def test_messages(text: str, shown: str) -> None:
    assert redaction.said(text) == shown


@pytest.mark.promise("P7")
def test_results_lose_values_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    row = "see https://me:password@host/ and hf_" + "x" * 34
    assert redaction.result(row) == row
    assert redaction.line(f"{row} {KEY}".encode()) == f"{row} ***".encode()
    monkeypatch.setenv("HTTPS_PROXY", "http://me:password@proxy:3128")
    assert redaction.result(row) == row.replace("me:password", "***")
    monkeypatch.setenv("JUDGE_API_KEY", "none")
    assert redaction.result("none") == "none"


@pytest.mark.promise("P7")
def test_an_artifact_holds_none(tmp_path: Path) -> None:
    """Neither its texts nor its manifest; what is no text stays as it is."""
    source = tmp_path / "source"
    source.mkdir()
    lines = "".join(f"{n} {KEY}\n" for n in range(300_000))  # of several blocks
    (source / "card.md").write_text(lines)
    (source / "weights.bin").write_text(lines)
    facts = {"inputs": {KEY: [KEY]}, "settings": {}, "metrics": {"loss": 1.5}}
    made = artifact.publish(source, tmp_path / "made", facts)
    assert (made.path / "card.md").read_text() == lines.replace(KEY, "***")
    assert (made.path / "weights.bin").read_text() == lines
    assert made.manifest["inputs"] == {"***": ["***"]}
    assert artifact.load(made.path, deep=True) == made


@pytest.mark.promise("P7")
def test_streams_are_what_they_were() -> None:
    """But for the secret: in logs, tracebacks and what is printed in pieces; also where there is none."""
    program = """
import logging, os, sys
from stages.lib.run import redaction
redaction.guard_streams()
if sys.stdout:
    print(os.environ["JUDGE_API_KEY"], "hf_" + 34 * "x", end="", flush=True)
    assert sys.stdout.fileno() == 1 and not sys.stderr.isatty() and sys.stderr.write("ab") == 2
logging.getLogger("a").warning("%s hf_" + 34 * "x", os.environ["JUDGE_API_KEY"])
raise ValueError(os.environ["JUDGE_API_KEY"])
"""
    env = {"JUDGE_API_KEY": "AKeyThatIsSecret", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "*** hf_" + 34 * "x"
    assert done.stderr.startswith("ab*** ***\nTraceback")
    assert done.stderr.endswith("ValueError: ***\n")
    closed = subprocess.run(
        ["sh", "-c", f"{sys.executable} -c '{program}' >&- 2>&-"], env=env, capture_output=True,
        check=False,
    )  # fmt: skip
    assert closed.returncode == 1
    assert closed.stdout + closed.stderr == b""


def test_a_stream_that_is_no_file_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    redaction.guard_streams()
    assert type(sys.stdout) is io.StringIO
    assert sys.stderr.name == os.devnull
    sys.stderr.close()
