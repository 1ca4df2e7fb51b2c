"""Flag over environment over preset over default, and nothing that nobody declared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.lib.run import environment
from tests.conftest import ROOT, Stages, clean_environment

BASE = ["--base-model", "sample", "--dataset", "sample"]


def announced(stages: Stages, *args: str, **options: object) -> str:
    """The first line of a command that then fails on its missing input."""
    done = stages(*args, **options)
    return str(json.loads(done.stderr.splitlines()[0])["message"])


@pytest.mark.case("D6", "D7")
def test_precedence_and_origins(stages: Stages, tmp_path: Path, rows: Path) -> None:
    preset = tmp_path / "a.env"
    preset.write_text(
        f"BASE_MODEL=sample\nDATASET={rows}\nMAX_LENGTH=100\nSEED=1\nLOSS_ON='all' # x\n"
    )
    env = {"SEED": "2", "MAX_LENGTH": "90", "MAX_ROWS": ""}
    args = ("--env-file", str(preset), "prepare-data", "--max-length", "80", "--run-dir", "run")
    done = stages(*args, env=env)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())["settings"]
    assert settings["MAX_LENGTH"] == {"value": 80, "from": "flag"}
    assert settings["SEED"] == {"value": 2, "from": "environment"}
    assert settings["LOSS_ON"] == {"value": "all", "from": "preset"}
    assert settings["MAX_ROWS"] == {"value": None, "from": "default"}  # empty is unset
    assert "RUN_DIR" not in settings
    message = json.loads(done.stderr.splitlines()[0])["message"]
    assert "SEED='2' from the environment" in message
    assert "MAX_LENGTH='80' from the flag" in message
    assert "LOSS_ON" not in message


def test_a_stray_variable_is_seen(stages: Stages) -> None:
    args = ("train", "--base-model", "sample", "--run-dir", "run")
    assert "SEED='7' from the environment" in announced(stages, *args, env={"SEED": "7"})


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        (["LEARNIN_RATE=1"], "LEARNIN_RATE"),
        (["MAX_ROWS=3", "PROMPT=X=1 and\nY=2", "SCRATCH_DIR=/tmp", "HF_HUB_OFFLINE=1"], None),
        ([], None),
    ],
)
def test_make_does_not_swallow_a_misspelt_name(
    tmp_path: Path, given: list[str], refused: str | None
) -> None:
    """Through make itself, in a folder whose `.venv` runs the interpreter of the tests."""
    for name in ("env", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv" / "ready").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = [
        "make",
        "-f",
        str(ROOT / "Makefile"),
        "report",
        "RUNNER=local",
        "PRESET=smoke",
        *given,
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=clean_environment(tmp_path),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2  # make's own code, whatever the stage's
    if refused:
        assert (
            f"make was given {refused}, which is no setting. Did you mean LEARNING_RATE?"
            in done.stderr
        )
    else:
        assert "there is nothing of a run in runs/smoke" in done.stderr


def test_make_refuses_another_runner() -> None:
    command = ["make", "-n", "train", "RUNNER=Docker"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 2
    assert "RUNNER=Docker is neither docker nor local" in done.stderr


def test_every_preset_parses(stages: Stages) -> None:
    presets = sorted((ROOT / "env").glob("*.env"))
    assert len(presets) >= 3
    for preset in presets:
        done = stages("--env-file", str(preset), "train", "--run-dir", "none")
        assert done.returncode == 66, done.stderr  # no data yet, but every value was taken
        assert "prepare-data" in done.stderr


@pytest.mark.promise("P7")
def test_a_secret_from_a_file_reaches_the_libraries_and_no_artifact(
    stages: Stages, tmp_path: Path, rows: Path
) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "secrets.env").write_text("HF_TOKEN=hf_canary\n")
    done = stages("prepare-data", *BASE[:2], "--dataset", str(rows), "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert written
    assert not any(b"hf_canary" in path.read_bytes() for path in written)
    assert "hf_canary" not in done.stderr + done.stdout


def test_what_is_compiled_is_kept_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the cache folder; not if the compiler's own variable says otherwise, or it cannot be written."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "mine")  # to be restored
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment.keep_compiled()
    kept = tmp_path / "lora-stages/compiled/inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept)
    assert kept.is_dir()
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    environment.keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
