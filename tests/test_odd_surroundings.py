"""Homes, users, streams, locales and preset files as some machines have them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.lib.run import environment
from tests.conftest import ROOT, Stages, clean_environment
from tests.forking import Result

PREPARE = ["--max-length", "64", "--run-dir", "run"]


def settings(folder: Path) -> dict[str, object]:
    found = json.loads((folder / "run" / "data" / "manifest.json").read_text())["settings"]
    return {name: entry["value"] for name, entry in found.items()}


# --- preset files ----------------------------------------------------------------------------------


@pytest.mark.case("D8")
def test_a_preset_is_read_as_dotenv_does(
    stages: Stages, tmp_path: Path, tiny: Path, rows: Path
) -> None:
    """Quotes, `export`, comments, the ends of lines of Windows; a `$` is no variable, and nothing is run."""
    preset = tmp_path / "odd.env"
    preset.write_bytes(
        f"export BASE_MODEL='{tiny}'\r\n# a comment\r\n\r\nDATASET=\"{rows}\"  # another\r\n"
        "LOSS_ON = all\r\nSEED='3'\r\nDUPLICATES=keep".encode()
    )
    done = stages("--env-file", preset, "prepare-data", *PREPARE)
    assert done.returncode == 0, done.stderr
    found = settings(tmp_path)
    assert [found[name] for name in ("LOSS_ON", "SEED", "DUPLICATES")] == ["all", 3, "keep"]
    assert found["DATASET"] == str(rows)
    for value in ("$HOME", "${HOME}", "$(touch x)", "`touch x`"):
        preset.write_text(f"BASE_MODEL=sample\nDATASET=sample\nSEED={value}\n")
        refused = stages("--env-file", preset, "prepare-data", *PREPARE)
        assert refused.returncode == 2
        assert repr(value) in refused.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.case("D7")
def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where env/secrets.env has a value for it."""
    for name in environment.SECRETS:
        monkeypatch.setenv(name, "")
    (tmp_path / "secrets.env").write_text("HF_TOKEN=hf_fromTheFile\n")
    environment.load_secrets(tmp_path)
    assert os.environ["HF_TOKEN"] == "hf_fromTheFile"
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ


# --- homes and users -------------------------------------------------------------------------------


@pytest.mark.case("D11")
@pytest.mark.promise("P8")
def test_a_user_whom_nobody_knows(tmp_path: Path, tiny: Path, rows: Path) -> None:
    """No home and no name: caches and libraries get theirs in scratch."""
    if os.geteuid():
        pytest.skip("to become somebody else takes root")
    (tmp_path / "scratch").mkdir()
    for name in ("", "scratch"):
        os.chmod(tmp_path / name, 0o777)
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "SCRATCH_DIR": str(tmp_path / "scratch"),
    }
    caps = "+dac_override,+dac_read_search"  # pytest's folders are its own
    become = [
        "setpriv", "--reuid=54321", "--regid=0", "--clear-groups", f"--inh-caps={caps}",
        f"--ambient-caps={caps}",
    ]  # fmt: skip
    program = (
        "import getpass, sys; from stages.lib.run import environment; environment.have_home();"
        "from pathlib import Path; from huggingface_hub import constants;"
        "print(getpass.getuser(), Path.home(), constants.HF_HOME, environment.cache_dir())"
    )
    said = subprocess.run(
        [*become, sys.executable, "-c", program],
        env=env,
        text=True,
        capture_output=True,
        check=True,
    )
    home = str(tmp_path / "scratch" / "lora-stages-home-54321")
    assert said.stdout.split() == [
        "uid-54321", home, f"{home}/.cache/huggingface", f"{home}/.cache/lora-stages",
    ]  # fmt: skip
    command = ["-m", "stages", "prepare-data", "--base-model", str(tiny), "--dataset", str(rows)]
    done = subprocess.run(
        [*become, sys.executable, *command, *PREPARE], cwd=tmp_path, env=env, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert os.stat(tmp_path / "run" / "data" / "manifest.json").st_uid == 54321


@pytest.mark.case("D11")
def test_a_home_that_cannot_be_written_is_still_read(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    for folder in (home / ".cache", home):
        folder.chmod(0o555)
    program = (
        "import os; from stages.lib.run import environment; environment.have_home();"
        "print(*map(os.environ.get, ('HOME', 'XDG_CACHE_HOME', 'HF_HOME')))"
    )
    env = clean_environment(tmp_path) | {"HOME": str(home)}
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        env.pop(name, None)
    become = ["setpriv", "--bounding-set=-dac_override"] if not os.geteuid() else []
    said = subprocess.run(
        [*become, sys.executable, "-c", program],
        env=env,
        text=True,
        capture_output=True,
        check=True,
    )
    elsewhere = f"{tmp_path}/scratch/lora-stages-home-{os.getuid()}/.cache"
    assert said.stdout.split() == [str(home), elsewhere, str(home / ".cache" / "huggingface")]


def test_a_home_in_scratch_that_is_somebody_elses_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"lora-stages-home-{os.getuid()}").symlink_to(tmp_path / "theirs")
    environment.have_home()
    assert "XDG_CACHE_HOME" not in os.environ


# --- streams and locales ---------------------------------------------------------------------------


@pytest.mark.case("D12")
def test_nobody_reads_the_results(tmp_path: Path) -> None:
    """`stages options | head -0`: a sentence, and no traceback at the very end either."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "stages", "options"], env=clean_environment(tmp_path), text=True,
        stdout=writing, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 73
    assert "nobody reads standard output" in done.stderr
    assert "Broken" not in done.stderr


@pytest.mark.case("D12")
def test_closed_streams(tmp_path: Path) -> None:
    command = f"{sys.executable} -m stages options >&- 2>&-"
    done = subprocess.run(
        command, shell=True, env=clean_environment(tmp_path), capture_output=True, check=False
    )
    assert done.returncode == 0


@pytest.mark.case("D12", "D13")
def test_other_places_say_the_same(stages: Stages, tmp_path: Path, tiny: Path, rows: Path) -> None:
    """C and a comma's locale, a zone of its own, 80 columns, no colour: the same data, in the same words."""
    made = []
    for number, env in enumerate(
        (
            {},
            {"LC_ALL": "C", "LANG": "C", "NO_COLOR": "1", "COLUMNS": "80", "TERM": "dumb"},
            {"LC_ALL": "de_DE.UTF-8", "LC_NUMERIC": "de_DE", "TZ": "Asia/Kathmandu"},
            {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "nonsense"},
        )
    ):
        run = tmp_path / f"run{number}"
        args = ["--base-model", tiny, "--dataset", rows, "--max-length", "64", "--run-dir", run]
        done: Result = stages("prepare-data", *args, env=env)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        times = [json.loads(line)["time"] for line in done.stderr.splitlines()]
        assert all(time.endswith("Z") for time in times)
        files = json.loads((run / "data" / "manifest.json").read_text())["files"]
        made.append({name: entry["sha256"] for name, entry in files.items()})
    assert all(files == made[0] for files in made)
