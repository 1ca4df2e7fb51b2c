"""fetch: what later stages need lies on the volume, pinned and whole, and they ask nobody for it."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Stages, clean_environment
from tests.hub_server import Hub
from tests.refusals import refused
from tests.test_bad_input import mounted

RECIPE = """
BASE_MODEL=owner/tiny
DATASET=owner/data
MAX_LENGTH=64
BASE_PRECISION=fp32
LORA_RANK=64
LORA_TARGETS=all-linear
BATCH_TOKENS=128
MAX_STEPS=2
OPTIMIZER=adamw_torch
"""
# Before anything of ours: who connects, or asks for an address, is written down and refused.
NO_SOCKETS = """
import socket
def refuse(*args, **kwargs):
    with open({path!r}, "a") as file:
        file.write(f"{{args[1:] or args}}\\n")
    raise OSError(101, "Network is unreachable")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.create_connection = refuse
"""


@pytest.fixture
def hub(tiny: Path, rows: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub with a model, and with a data set that has a manifest of its own."""
    folder = tmp_path / "served"
    (folder / "data").mkdir(parents=True)
    shutil.copy(rows, folder / "data" / "train.jsonl")
    (folder / "manifest.json").write_text('[{"text": "### Human: Hi### Assistant: Ho."}]\n')
    with Hub() as hub:
        hub.push("models", "owner/tiny", tiny)
        hub.push("datasets", "owner/data", folder)
        yield hub


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "fetch.env"
    path.write_text(RECIPE)
    return path


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def commit(run: Path) -> str:
    """The one that the base is pinned to."""
    return str(manifest(run / "fetched")["inputs"]["repositories"]["model:owner/tiny"]["commit"])


def files_asked(hub: Hub) -> list[str]:
    return [path for method, path, *_ in hub.requests if method == "GET" and "/api/" not in path]


@pytest.mark.case("F6")
@pytest.mark.promise("P8")
def test_stages_need_no_network_afterwards(
    stages: Stages, tmp_path: Path, hub: Hub, preset: Path, other_tiny: Path
) -> None:
    """The branch moves, the hub and its cache go away, the run directory is moved: not a socket is used."""
    args, first = ["--env-file", preset], hub.repositories["models", "owner/tiny"].main
    before = tmp_path / "before"
    done = stages(*args, "fetch", "--run-dir", before, env={"HF_ENDPOINT": hub.url})
    assert done.returncode == 0, done.stderr
    hub.push("models", "owner/tiny", other_tiny)
    hub.stop()
    shutil.rmtree(tmp_path / "hub")
    run = before.rename(tmp_path / "run")

    asked = tmp_path / "asked"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_SOCKETS.format(path=str(asked)))
    env = clean_environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = f"{tmp_path / 'site'}:{env['PYTHONPATH']}"
    alone = ["unshare", "-n"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        alone = []  # not allowed here; what Python does is seen all the same
    for stage in ("prepare-data", "train"):
        command = [*alone, sys.executable, "-m", "stages", *args, stage, "--run-dir", run]
        done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert not asked.exists(), asked.read_text()
    assert manifest(run / "adapter")["inputs"]["base"] == {"name": "owner/tiny", "revision": first}
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/tiny"
    assert config["revision"] == first
    assert manifest(run / "data")["metrics"]["rows_kept"] > 38  # the data set's own manifest too
    _check_estimate(run)

    # The guard itself guards.
    code = "import socket; socket.create_connection(('127.0.0.1', 9))"
    subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert "127.0.0.1" in asked.read_text()


def _check_estimate(run: Path) -> None:
    """What room for a run is asked for, against what it wrote."""
    from stages.lib.model import storing
    from stages.lib.model.architecture import Setup

    (folder,) = (run / "hub").glob("model--*")
    config = json.loads((folder / "files" / "config.json").read_text())
    setup = Setup("fp32", 64, ("all-linear",), "adamw_torch")
    needs = {
        what: size for what, _, size in storing.needs(run / "none", run / "none", config, setup)
    }
    (last,) = (run / "checkpoints").glob("step-00000002")
    size = sum(path.stat().st_size for path in last.iterdir())
    assert needs["checkpoints"] / storing.AT_MOST == pytest.approx(size, rel=0.03)
    weights = sum(path.stat().st_size for path in (run / "adapter").rglob("*.safetensors"))
    assert needs["adapter"] == pytest.approx(weights, rel=0.03)


@pytest.mark.promise("P10")
@pytest.mark.case("B22")
def test_again(stages: Stages, tmp_path: Path, hub: Hub, preset: Path, other_tiny: Path) -> None:
    """Nothing to do; a part that was lost comes back as it was; --force takes what the branch is now."""
    run, first = tmp_path / "run", hub.repositories["models", "owner/tiny"].main
    args, env = ["--env-file", preset, "fetch", "--run-dir", run], {"HF_ENDPOINT": hub.url}
    assert stages(*args, env=env).returncode == 0
    second = hub.push("models", "owner/tiny", other_tiny)

    hub.requests.clear()
    began = time.monotonic()
    again = stages(*args, env=env)
    assert time.monotonic() - began < 2
    assert again.returncode == 0, again.stderr
    assert "nothing changed" in again.stderr
    assert hub.requests == []

    (weights,) = (run / "hub").rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    mended = stages(*args, env=env)
    assert mended.returncode == 0, mended.stderr
    assert commit(run) == first != second
    assert stages(*args, "--verify", env=env).returncode == 0

    forced = stages(*args, "--force", env=env)
    assert forced.returncode == 0, forced.stderr
    assert commit(run) == second


@pytest.mark.case("F4")
def test_what_is_not_the_hubs(stages: Stages, tmp_path: Path, hub: Hub, preset: Path) -> None:
    """A bit that flipped in the cache is found by the hub's hash, and the file is fetched once more."""
    run, env = tmp_path / "run", {"HF_ENDPOINT": hub.url}
    args = ["--env-file", preset, "fetch", "--run-dir"]
    assert stages(*args, tmp_path / "first", env=env).returncode == 0
    for name in ("model.safetensors", "config.json"):
        (cached,) = (tmp_path / "hub").rglob(name)
        content = bytearray(cached.resolve().read_bytes())
        content[-1] ^= 1
        cached.resolve().write_bytes(content)
    done = stages(*args, run, env=env)
    assert done.returncode == 0, done.stderr
    assert "fetching it again" in done.stderr
    first, second = (
        manifest(next((folder / "hub").glob("model--*")))["files"]
        for folder in (tmp_path / "first", run)
    )
    assert first == second


def test_stopped_half_way(stages: Stages, tmp_path: Path, hub: Hub, preset: Path) -> None:
    """What is whole is not fetched again, and until all is whole the run is pinned to nothing."""
    run, env = tmp_path / "run", {"HF_ENDPOINT": hub.url}
    args = ["--env-file", preset, "fetch", "--run-dir", run]
    hub.repositories["datasets", "owner/data"].readers = {"hf_someoneElse"}
    done = stages(*args, env=env)
    assert done.returncode == 77, done.stderr
    assert "https://huggingface.co/" in done.stderr
    assert not (run / "fetched").exists()
    hub.repositories["datasets", "owner/data"].readers = None
    hub.requests.clear()
    assert stages(*args, env=env).returncode == 0
    assert files_asked(hub)
    assert not [path for path in files_asked(hub) if "owner/tiny" in path or "/large/" in path]


def test_runs_that_share_a_folder(stages: Stages, tmp_path: Path, hub: Hub, preset: Path) -> None:
    store, env = tmp_path / "store", {"HF_ENDPOINT": hub.url, "FETCH_DIR": str(tmp_path / "store")}
    args = ["--env-file", preset, "fetch", "--run-dir"]
    assert stages(*args, tmp_path / "one", env=env).returncode == 0
    hub.requests.clear()
    assert stages(*args, tmp_path / "two", env=env).returncode == 0
    assert files_asked(hub) == []
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["attempts", "fetched"]
    assert len(list(store.iterdir())) == 2
    shutil.rmtree(tmp_path / "hub")
    offline = ["--env-file", preset, "prepare-data", "--run-dir", tmp_path / "two"]
    done = stages(*offline, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


def test_no_room_is_seen_before_the_download(
    stages: Stages, tmp_path: Path, hub: Hub, preset: Path
) -> None:
    args = ["--env-file", preset, "fetch", "--run-dir", tmp_path / "run"]
    with mounted(tmp_path / "small", "size=4m") as small:
        done = stages(*args, env={"HF_ENDPOINT": hub.url, "FETCH_DIR": str(small / "store")})
    assert done.returncode == 73, done.stderr
    assert "are needed: copy" in done.stderr
    assert files_asked(hub) == []


def test_files_behind_a_url(stages: Stages, tmp_path: Path, tiny: Path, rows: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(rows.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{rows.name}"
    args = ["--base-model", tiny, "--run-dir", tmp_path / "run"]
    env = {"DATASET": f"{url}?signature=secret", "MAX_LENGTH": "64"}
    done = stages("fetch", *args, env=env)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert "secret" not in (tmp_path / "run" / "fetched" / "manifest.json").read_text()
    prepared = stages("prepare-data", *args, env=env)
    assert prepared.returncode == 0, prepared.stderr
    (source,) = manifest(tmp_path / "run" / "data")["inputs"]["dataset"]["sources"]
    assert [file["path"] for file in source["files"]] == [url]


def test_what_is_nowhere(stages: Stages, tmp_path: Path, tiny: Path) -> None:
    args = ["fetch", "--base-model", tiny, "--dataset", "no/such/file.jsonl", "--run-dir"]
    refused(stages(*args, tmp_path / "run"), 66, "no/such/file.jsonl", "mounted")
