"""fetch: what later stages need lies on the volume, pinned, and they ask nobody for it."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Stages
from tests.hub_server import Hub

Result = subprocess.CompletedProcess[str]
RECIPE = """
BASE_MODEL=owner/tiny
DATASET=owner/data
MAX_LENGTH=64
BASE_PRECISION=fp32
LORA_RANK=4
BATCH_TOKENS=128
MAX_STEPS=2
OPTIMIZER=adamw_torch
"""


@pytest.fixture
def hub(tiny: Path, rows: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub with a model and a data set, whose files lie in folders."""
    folder = tmp_path / "served"
    (folder / "data").mkdir(parents=True)
    shutil.copy(rows, folder / "data" / "train.jsonl")
    (folder / "manifest.json").write_text('{"text": "### Human: Hi### Assistant: Ho."}\n')
    with Hub() as hub:
        hub.push("models", "owner/tiny", tiny)
        hub.push("datasets", "owner/data", folder)
        yield hub


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "fetch.env"
    path.write_text(RECIPE)
    return path


def pins(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "fetched" / "manifest.json").read_text())["inputs"])


def test_x(stages: Stages, tmp_path: Path, hub: Hub, preset: Path) -> None:
    run = tmp_path / "run"
    done = stages("--env-file", preset, "fetch", "--run-dir", run, env={"HF_ENDPOINT": hub.url})
    print(done.stdout, done.stderr)
    print(subprocess.run(["find", run], text=True, capture_output=True).stdout)
    print(pins(run))
    assert 0
