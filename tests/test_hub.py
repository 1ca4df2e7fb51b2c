"""Base models and data sets from the hub: pinned, told apart when they fail, no token in what is written."""

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Stages
from tests.hub_server import Hub
from tests.test_bad_input import mounted

CANARY = "hf_canaryCANARYcanaryCANARYcanary"
COMMIT = re.compile(r"[0-9a-f]{40}")
RECIPE = """
MAX_LENGTH=64
BASE_PRECISION=fp32
LORA_RANK=4
BATCH_TOKENS=128
MAX_STEPS=2
OPTIMIZER=adamw_torch
"""
Result = subprocess.CompletedProcess[str]


@pytest.fixture
def hub(tiny: Path, rows: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub with a model, and with a data set that has a test split."""
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    folder = tmp_path / "served"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text("".join(lines[:30]), encoding="utf-8")
    (folder / "data" / "test.jsonl").write_text("".join(lines[30:]), encoding="utf-8")
    (folder / "README.md").write_text("# Rows\n")
    with Hub() as hub:
        hub.push("models", "owner/tiny", tiny)
        hub.push("datasets", "owner/data", folder)
        yield hub


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "hub.env"
    path.write_text("BASE_MODEL=owner/tiny\nDATASET=owner/data\n" + RECIPE)
    return path


def sentence(result: Result, code: int) -> str:
    """The one sentence of a refusal."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    said = [
        line for line in result.stderr.splitlines() if line.strip() and not line.startswith("{")
    ]
    assert len(said) == 1, result.stderr
    return said[0]


def nothing_left(run: Path, code: int) -> None:
    assert {path.name for path in run.iterdir()} - {"attempts"} == {"error.json"}
    assert json.loads((run / "error.json").read_text())["exit"] == code


def manifest(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def holding(folder: Path, text: str) -> list[Path]:
    return [
        path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()
    ]


@pytest.mark.promise("P7")
def test_base_and_data_from_the_hub(
    stages: Stages, tmp_path: Path, hub: Hub, preset: Path, other_tiny: Path
) -> None:
    """From a gated model to an adapter: both commits recorded, the token nowhere; then without the hub."""
    base, data = (
        hub.repositories["models", "owner/tiny"],
        hub.repositories["datasets", "owner/data"],
    )
    first = base.main
    base.readers, base.closed, hub.tokens = {CANARY}, True, {CANARY}
    run = tmp_path / "run"
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": CANARY, "OMP_NUM_THREADS": "1"}
    args = ["--env-file", preset]

    prepared = stages(*args, "prepare-data", "--run-dir", run, env=env)
    assert prepared.returncode == 0, prepared.stderr
    made = manifest(run / "data")
    assert made["inputs"]["base"] == {"name": "owner/tiny", "revision": first}
    assert made["inputs"]["dataset"]["name"] == "owner/data"
    (source,) = made["inputs"]["dataset"]["sources"]
    assert source["revision"] == data.main
    assert COMMIT.fullmatch(first)
    assert COMMIT.fullmatch(data.main)
    assert made["metrics"]["rows_held_out"] == 10
    assert made["metrics"]["rows_kept"] == 40
    assert not [
        path for _, path, *_ in hub.requests if path.endswith((".safetensors", "README.md"))
    ]

    # What is pushed between the stages changes nothing: the run is pinned to the commit of its data.
    second = hub.push("models", "owner/tiny", other_tiny)
    assert second != first
    trained = stages(*args, "train", "--run-dir", run, env=env)
    assert trained.returncode == 0, trained.stderr
    assert manifest(run / "adapter")["inputs"]["base"] == {"name": "owner/tiny", "revision": first}
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/tiny"
    assert config["revision"] == first

    hub.stop()
    for stage in ("prepare-data", "train"):
        began = time.monotonic()
        again = stages(*args, stage, "--run-dir", run, env=env)
        assert again.returncode == 0, again.stderr
        assert "finished and nothing changed" in again.stderr
        assert time.monotonic() - began < 2

    answered = stages(
        *args, "generate", "--prompt", "Hi", "--run-dir", run, env=env | {"MAX_NEW_TOKENS": "2"}
    )
    assert answered.returncode == 0, answered.stderr

    assert {token for _, path, token, _ in hub.requests if not path.startswith("/large/")} == {
        CANARY
    }
    assert {token for _, path, token, _ in hub.requests if path.startswith("/large/")} == {None}
    for result in (prepared, trained, again, answered):
        assert CANARY not in result.stdout + result.stderr
    assert holding(tmp_path, CANARY) == []


def test_manifest_names_no_path_of_the_host(
    stages: Stages, tmp_path: Path, hub: Hub, preset: Path
) -> None:
    run = tmp_path / "run"
    result = stages(
        "--env-file", preset, "prepare-data", "--run-dir", run, env={"HF_ENDPOINT": hub.url}
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) not in (run / "data" / "manifest.json").read_text()


def test_revision_that_was_asked_for(
    stages: Stages, tmp_path: Path, hub: Hub, preset: Path, other_tiny: Path
) -> None:
    old = hub.repositories["models", "owner/tiny"].main
    hub.push("models", "owner/tiny", other_tiny)
    run = tmp_path / "run"
    env = {"HF_ENDPOINT": hub.url, "BASE_REVISION": old}
    result = stages("--env-file", preset, "prepare-data", "--run-dir", run, env=env)
    assert result.returncode == 0, result.stderr
    assert manifest(run / "data")["inputs"]["base"]["revision"] == old


def test_cache_serves_another_run_without_the_hub(
    stages: Stages, tmp_path: Path, hub: Hub, preset: Path
) -> None:
    args = ["--env-file", preset, "prepare-data", "--run-dir"]
    assert stages(*args, tmp_path / "one", env={"HF_ENDPOINT": hub.url}).returncode == 0
    hub.stop()
    offline = stages(*args, tmp_path / "two", env={"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    down = stages(*args, tmp_path / "three", env={"HF_ENDPOINT": hub.url})
    assert down.returncode == 0, down.stderr
    made = [manifest(tmp_path / name / "data") for name in ("one", "two", "three")]
    assert made[0]["files"] == made[1]["files"] == made[2]["files"]
    assert made[0]["inputs"] == made[1]["inputs"] == made[2]["inputs"]

    # The tokenizer is in the cache, the weights are not.
    train = ["--env-file", preset, "train", "--run-dir", tmp_path / "one"]
    assert "owner/tiny" in sentence(stages(*train, env={"HF_HUB_OFFLINE": "1"}), 66)


def test_hiccup_of_one_file_is_ridden_out(
    stages: Stages, tmp_path: Path, hub: Hub, preset: Path
) -> None:
    hub.failing["/api/models/owner/tiny/tree/"] = 1
    run = tmp_path / "run"
    result = stages(
        "--env-file", preset, "prepare-data", "--run-dir", run, env={"HF_ENDPOINT": hub.url}
    )
    assert result.returncode == 0, result.stderr
    assert 503 in {status for *_, status in hub.requests}


# --- refusals --------------------------------------------------------------------------------------


def prepare(stages: Stages, tmp_path: Path, rows: Path, **env: str) -> Result:
    """`prepare-data` with a base from the hub, and local data unless told."""
    chosen = {"BASE_MODEL": "owner/tiny", "DATASET": str(rows), "MAX_LENGTH": "64"} | env
    return stages("prepare-data", "--run-dir", tmp_path / "run", env=chosen)


@pytest.mark.promise("P9")
@pytest.mark.case("C1")
@pytest.mark.parametrize(
    "closed", [False, True], ids=["gate before the files", "gate before the list"]
)
@pytest.mark.parametrize(
    ("token", "remedy"),
    [
        (None, "set HF_TOKEN"),
        ("hf_noAccessHere", "check that HF_TOKEN belongs to an account with access"),
        (CANARY, "check that HF_TOKEN belongs to an account with access"),
    ],
    ids=["no token", "an account without access", "a token of nobody"],
)
def test_gated_model(
    stages: Stages,
    tmp_path: Path,
    rows: Path,
    hub: Hub,
    token: str | None,
    remedy: str,
    closed: bool,
) -> None:
    repository = hub.repositories["models", "owner/tiny"]
    repository.readers, repository.closed = {"hf_someoneElse"}, closed
    hub.tokens = {"hf_noAccessHere", "hf_someoneElse"}
    env = {"HF_ENDPOINT": hub.url} | ({"HF_TOKEN": token} if token else {})
    result = prepare(stages, tmp_path, rows, **env)
    said = sentence(result, 77)
    assert "owner/tiny" in said
    assert remedy in said
    if token != CANARY:
        assert "https://huggingface.co/owner/tiny" in said
    nothing_left(tmp_path / "run", 77)
    assert not token or holding(tmp_path, token) == []
    assert not token or token not in result.stdout + result.stderr


def test_token_from_the_secrets_file(stages: Stages, tmp_path: Path, rows: Path, hub: Hub) -> None:
    repository = hub.repositories["models", "owner/tiny"]
    repository.readers, hub.tokens = {CANARY}, {CANARY}
    secrets = tmp_path / "env" / "secrets.env"
    secrets.parent.mkdir()
    secrets.write_text(f"HF_TOKEN={CANARY}\n")
    result = prepare(stages, tmp_path, rows, HF_ENDPOINT=hub.url)
    assert result.returncode == 0, result.stderr
    assert holding(tmp_path, CANARY) == [secrets]


@pytest.mark.case("C2")
@pytest.mark.parametrize("token", [None, CANARY], ids=["no token", "token"])
def test_missing_or_private_repository(
    stages: Stages, tmp_path: Path, rows: Path, hub: Hub, token: str | None
) -> None:
    hub.tokens = {CANARY}
    env = {"HF_ENDPOINT": hub.url} | ({"HF_TOKEN": token} if token else {})
    said = sentence(prepare(stages, tmp_path, rows, BASE_MODEL="owner/none", **env), 66)
    assert "owner/none" in said
    assert ("HF_TOKEN" in said) == (token is None)
    nothing_left(tmp_path / "run", 66)
    said = sentence(prepare(stages, tmp_path, rows, DATASET="owner/none", **env), 66)
    assert "owner/none" in said
    repository = hub.repositories["models", "owner/tiny"]
    repository.readers, repository.gated = set(), False
    assert "owner/tiny" in sentence(prepare(stages, tmp_path, rows, **env), 66)


@pytest.mark.case("C2")
@pytest.mark.parametrize(
    ("variable", "name"), [("BASE_REVISION", "owner/tiny"), ("DATASET_REVISION", "owner/data")]
)
def test_missing_revision(
    stages: Stages, tmp_path: Path, rows: Path, hub: Hub, variable: str, name: str
) -> None:
    env = {variable: "v9", "DATASET": "owner/data", "HF_ENDPOINT": hub.url}
    said = sentence(prepare(stages, tmp_path, rows, **env), 66)
    assert name in said
    assert "'v9'" in said
    nothing_left(tmp_path / "run", 66)


def test_data_set_without_a_file_that_can_be_read(
    stages: Stages, tmp_path: Path, rows: Path, hub: Hub
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "README.md").write_text("# Pictures\n")
    hub.push("datasets", "owner/pictures", folder)
    said = sentence(
        prepare(stages, tmp_path, rows, DATASET="owner/pictures", HF_ENDPOINT=hub.url), 66
    )
    assert "owner/pictures" in said
    assert ".jsonl" in said


def test_model_without_a_config(stages: Stages, tmp_path: Path, rows: Path, hub: Hub) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    hub.push("models", "owner/gguf", folder)
    said = sentence(
        prepare(stages, tmp_path, rows, BASE_MODEL="owner/gguf", HF_ENDPOINT=hub.url), 66
    )
    assert "config.json" in said
    assert "owner/gguf" in said


@pytest.mark.case("B22")
def test_data_that_changed_on_the_hub_between_attempts(
    stages: Stages, tmp_path: Path, hub: Hub, preset: Path
) -> None:
    """A pinned revision is the same bytes; without one the newest is taken whole, and recorded."""
    old = hub.repositories["datasets", "owner/data"].main
    args = ["--env-file", preset, "prepare-data", "--run-dir"]
    env = {"HF_ENDPOINT": hub.url, "DATASET_REVISION": old}
    killed = stages(*args, tmp_path / "run", env=env | {"FAILPOINTS": "publish.manifest:kill"})
    assert killed.returncode == -9, killed.stderr
    folder = tmp_path / "later"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "### Human: New?### Assistant: Yes."}\n' * 3)
    new = hub.push("datasets", "owner/data", folder)
    found = {}
    for name, given in (("run", env), ("other", {"HF_ENDPOINT": hub.url})):
        again = stages(*args, tmp_path / name, env=given)
        assert again.returncode == 0, again.stderr
        found[name] = manifest(tmp_path / name / "data")
    (source,) = found["run"]["inputs"]["dataset"]["sources"]
    assert source["revision"] == old
    assert found["run"]["metrics"]["rows_kept"] == 40
    (source,) = found["other"]["inputs"]["dataset"]["sources"]
    assert source["revision"] == new
    assert found["other"]["metrics"]["rows_read"] == 3


@pytest.mark.case("F1")
def test_no_network(stages: Stages, tmp_path: Path, rows: Path) -> None:
    with socket.socket() as closed:  # bound, so that nobody else gets it, but not listening
        closed.bind(("127.0.0.1", 0))
        result = prepare(
            stages, tmp_path, rows, HF_ENDPOINT=f"http://127.0.0.1:{closed.getsockname()[1]}"
        )
    said = sentence(result, 75)
    assert "owner/tiny" in said
    assert "network" in said
    nothing_left(tmp_path / "run", 75)


@pytest.mark.case("F1")
@pytest.mark.parametrize("mood", ["503", "hang-up", "portal"])
def test_hub_that_is_not_itself(
    stages: Stages, tmp_path: Path, rows: Path, hub: Hub, mood: str
) -> None:
    """It answers 503, closes the connection, or a network's sign-in page answers for it."""
    if mood == "503":
        hub.failing["/revision/"] = -1
    else:
        hub.mood = mood
    said = sentence(prepare(stages, tmp_path, rows, HF_ENDPOINT=hub.url, HF_TOKEN=CANARY), 75)
    assert "owner/tiny" in said
    assert CANARY not in said
    nothing_left(tmp_path / "run", 75)


def test_address_without_a_scheme(stages: Stages, tmp_path: Path, rows: Path) -> None:
    said = sentence(prepare(stages, tmp_path, rows, HF_ENDPOINT="huggingface.example"), 2)
    assert "HF_ENDPOINT" in said


@pytest.mark.case("C1")
def test_token_that_no_header_can_carry(
    stages: Stages, tmp_path: Path, rows: Path, hub: Hub
) -> None:
    """As copied with a typographic dash."""
    result = prepare(stages, tmp_path, rows, HF_ENDPOINT=hub.url, HF_TOKEN=f"{CANARY}\N{EN DASH}")
    assert "HF_TOKEN" in sentence(result, 77)
    assert CANARY not in result.stderr


def test_cache_that_is_full(stages: Stages, tmp_path: Path, rows: Path, hub: Hub) -> None:
    with mounted(tmp_path / "small", "size=200k") as small:
        said = sentence(
            prepare(stages, tmp_path, rows, HF_ENDPOINT=hub.url, HF_HOME=str(small)), 73
        )
    assert "HF_HOME" in said


def test_offline_with_nothing_cached(stages: Stages, tmp_path: Path, rows: Path, hub: Hub) -> None:
    said = sentence(prepare(stages, tmp_path, rows, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1"), 66)
    assert "owner/tiny" in said
    assert "HF_HUB_OFFLINE" in said
    assert hub.requests == []
    nothing_left(tmp_path / "run", 66)
