"""doctor: one line for each thing that a run needs, and the exit code that a stage would end with."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import drivers
from tests.conftest import ROOT, Stages
from tests.hub_server import Hub
from tests.test_bad_input import mounted

NAMES = [
    "run directory", "volume", "scratch", "cache", "packages", "GPU", "shared memory", "token",
    "base model", "data set", "room",
]  # fmt: skip
Result = subprocess.CompletedProcess[str]


@pytest.fixture
def hub(tiny: Path, rows: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(rows, folder / "train.jsonl")
    with Hub() as hub:
        hub.push("models", "owner/tiny", tiny)
        hub.push("datasets", "owner/data", folder)
        yield hub


def failing(result: Result) -> list[str]:
    return [check["name"] for check in checks(result).values() if check["state"] == "fail"]


def checks(result: Result) -> dict[str, Any]:
    assert "Traceback" not in result.stderr, result.stderr
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def test_a_machine_that_will_do(stages: Stages, tmp_path: Path, tiny: Path, rows: Path) -> None:
    run = tmp_path / "run"
    args = ["doctor", "--base-model", tiny, "--dataset", rows, "--run-dir", run]
    told = stages(*args)
    assert told.returncode == 0, told.stdout + told.stderr
    assert not run.exists()
    found = checks(stages(*args, "--json"))
    assert [name for name in NAMES if name not in found] == []
    for name in found:
        assert f"\n  {name} " in told.stdout
    assert "torch" not in found  # nothing for it to be imported for
    assert "checkpoints" in found["room"]["found"]


def test_the_hub_is_asked_for_little(stages: Stages, tmp_path: Path, hub: Hub) -> None:
    env = {"BASE_MODEL": "owner/tiny", "DATASET": "owner/data", "HF_ENDPOINT": hub.url}
    args = ["doctor", "--json", "--run-dir", tmp_path / "run"]
    done = stages(*args, env=env)
    assert done.returncode == 0, done.stdout
    found = checks(done)
    assert hub.repositories["models", "owner/tiny"].main[:12] in found["base model"]["found"]
    assert "may be read" in found["data set"]["found"]
    assert "base model" in found["room"]["found"]
    assert not [
        path for _, path, *_ in hub.requests if "/large/" in path or path.endswith("rows.jsonl")
    ]

    offline = stages(*args, env=env | {"HF_HUB_OFFLINE": "1"})
    assert (offline.returncode, failing(offline)) == (66, ["base model", "data set"])
    assert "run `fetch`" in checks(offline)["base model"]["remedy"]
    fetch = stages("fetch", "--run-dir", tmp_path / "run", env=env)
    assert fetch.returncode == 0, fetch.stderr
    fetched = stages(*args, env=env | {"HF_HUB_OFFLINE": "1"})
    assert fetched.returncode == 0, fetched.stdout
    assert "as fetched" in checks(fetched)["data set"]["found"]


@pytest.mark.case("C1")
def test_gate_that_stands_before_the_files_alone(
    stages: Stages, tmp_path: Path, rows: Path, hub: Hub
) -> None:
    hub.repositories["models", "owner/tiny"].readers = {"hf_someoneElse"}
    env = {"BASE_MODEL": "owner/tiny", "DATASET": str(rows), "HF_ENDPOINT": hub.url}
    done = stages("doctor", "--json", "--run-dir", tmp_path / "run", env=env)
    assert (done.returncode, failing(done)) == (77, ["base model"])
    assert "huggingface.co/owner/tiny" in checks(done)["base model"]["found"]


def test_first_failure_gives_the_exit_code(
    stages: Stages, tmp_path: Path, tiny: Path, hub: Hub
) -> None:
    (tmp_path / "file").write_text("")
    env = {"BASE_MODEL": str(tiny), "DATASET": "owner/none", "HF_ENDPOINT": hub.url}
    done = stages("doctor", "--json", "--run-dir", tmp_path / "run", env=env)
    assert (done.returncode, failing(done)) == (66, ["data set"])
    done = stages("doctor", "--json", "--run-dir", tmp_path / "file" / "run", env=env)
    assert (done.returncode, failing(done)) == (73, ["run directory", "data set"])
    env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = stages("doctor", "--json", "--run-dir", tmp_path / "run", "--expect-gpu", env=env)
    assert done.returncode in (75, 78)  # whether the wheel is one for a GPU


@pytest.mark.skipif(not shutil.which("gcc"), reason="NOT TESTED: no gcc for a driver's library")
@pytest.mark.case("E2", "E1")
def test_stage_refuses_a_gpu_before_anything_slow(
    stages: Stages, tmp_path: Path, tiny: Path, rows: Path
) -> None:
    """With a torch that says so if it is imported."""
    args = ["--base-model", tiny, "--run-dir", tmp_path / "run"]
    made = stages("prepare-data", *args, "--dataset", rows, "--max-length", "64")
    assert made.returncode == 0, made.stderr
    env = {
        "PYTHONPATH": f"{drivers.wheel(tmp_path / 'wheel', '13.0')}:{ROOT}",
        "LD_LIBRARY_PATH": str(drivers.driver(tmp_path)),
        "FAKE_DRIVER": "550.54.15", "FAKE_CUDA": "12040",
    }  # fmt: skip
    old = stages("train", *args, env=env)
    assert old.returncode == 78, old.stderr
    assert "driver 550.54.15 serves CUDA 12.4" in old.stderr
    none = stages("train", *args, env=env | {"CUDA_VISIBLE_DEVICES": "", "EXPECT_GPU": "1"})
    assert none.returncode == 75, none.stderr
    assert "CUDA_VISIBLE_DEVICES" in none.stderr
    told = stages("doctor", *args, "--dataset", rows, "--json", env=env)
    assert (told.returncode, failing(told)) == (78, ["driver"])


@pytest.mark.case("A5")
def test_train_asks_for_room_before_it_begins(
    stages: Stages, tmp_path: Path, tiny: Path, rows: Path
) -> None:
    with mounted(tmp_path / "small", "size=4m") as small:
        args = ["--base-model", tiny, "--run-dir", small / "run"]
        made = stages("prepare-data", *args, "--dataset", rows, "--max-length", "64")
        assert made.returncode == 0, made.stderr
        big = ["--rank", "64", "--targets", "all-linear", "--optimizer", "adamw_torch"]
        done = stages("train", *args, *big, "--batch-tokens", "128", "--base-precision", "fp32")
    assert done.returncode == 73, done.stderr
    assert "are needed: checkpoints 6.0 MiB, adapter 1.0 MiB" in done.stderr


@pytest.mark.case("A7")
def test_read_only_volume_is_seen_before_a_download(
    stages: Stages, tmp_path: Path, hub: Hub
) -> None:
    env = {"BASE_MODEL": "owner/tiny", "DATASET": "owner/data", "HF_ENDPOINT": hub.url}
    with mounted(tmp_path / "small", "size=4m") as small:
        (small / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        for command in ("prepare-data", "fetch"):
            done = stages(command, "--run-dir", small / "run", env=env)
            assert done.returncode == 73, done.stderr
            assert "Read-only file system" in done.stderr
    assert hub.requests == []
