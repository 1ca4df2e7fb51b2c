"""What is pushed arrives byte for byte, in a private repository unless told, and nothing else ever leaves."""

import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.lib.run import artifact
from tests.conftest import ROOT, Stages
from tests.hub_server import Hub, files
from tests.test_hub import CANARY, Result, holding, sentence

FILES = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors", "prompt_format.json"),
    "merged": ("README.md", "config.json", "model.safetensors"),
    "gguf": ("Modelfile", "export_report.json", "model.gguf"),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with all that can be pushed, and what must not be."""
    made = tmp_path / "made"
    for name, listed in FILES.items():
        folder = made / name
        (folder / "last").mkdir(parents=True)
        for number, file in enumerate(listed):
            (folder / file).write_bytes(f"{name} {file} ".encode() * (number + 1) * 50)
        for file in folder.glob("*.json"):
            file.write_text(json.dumps({"of": name}))
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
        if name == "adapter":
            (folder / "README.md").unlink()
            (folder / "last" / "adapter_model.safetensors").write_bytes(b"the last")
        dataset = {"DATASET": {"value": str(tmp_path), "from": "flag"}}
        manifest = {"stage": "it", "inputs": {}, "settings": dataset, "metrics": {}}
        artifact.publish(folder, tmp_path / "run" / name, manifest)
    (tmp_path / "run" / "error.json").write_text("{}")
    return tmp_path / "run"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub where the token may make repositories of `me`."""
    with Hub() as hub:
        hub.tokens, hub.owners = {CANARY, "hf_other"}, {"me": {CANARY}}
        yield hub


def push(stages: Stages, run: Path, hub: Hub, *args: str, **env: str) -> Result:
    given = {"HF_ENDPOINT": hub.url, "HF_TOKEN": CANARY, "HF_HUB_DISABLE_XET": "1"} | env
    given = {name: value for name, value in given.items() if value}
    return stages("push", "--run-dir", run, "--repository", "me/it", *args, env=given)


def pushed(hub: Hub) -> dict[str, bytes]:
    repository = hub.repositories["models", "me/it"]
    folder = repository.commits[repository.main]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files(folder)}


def writes(hub: Hub) -> list[str]:
    return [path for method, path, *_ in hub.requests if method in ("POST", "PUT")]


@pytest.mark.parametrize("what", FILES)
def test_it_arrives_private_and_byte_for_byte(
    stages: Stages, run: Path, hub: Hub, tmp_path: Path, what: str
) -> None:
    result = push(stages, run, hub, "--push-what", what)
    assert result.returncode == 0, result.stderr
    assert hub.received[0]["visibility"] == "private"
    assert hub.repositories["models", "me/it"].private
    arrived = pushed(hub)
    assert arrived == {name: (run / what / name).read_bytes() for name in arrived}
    listed = set(json.loads((run / what / "manifest.json").read_text())["files"])
    assert set(arrived) == {name for name in listed if not name.startswith("last/")}
    assert "manifest.json" not in arrived
    assert "its members alone" in result.stdout
    assert f"{hub.url}/me/it" in result.stdout
    assert {token for method, _, token, _ in hub.requests if method == "PUT"} == {None}
    assert CANARY not in result.stdout + result.stderr
    assert holding(tmp_path, CANARY) == []


def test_again_after_a_change(stages: Stages, run: Path, hub: Hub) -> None:
    """Large files that are there are not sent again; a changed one is."""
    assert push(stages, run, hub).returncode == 0
    hub.requests.clear()
    assert push(stages, run, hub).returncode == 0
    assert [path for path in writes(hub) if path.startswith("/large/")] == []
    made = artifact.load(run / "adapter")
    assert made is not None
    source = shutil.copytree(run / "adapter", run.parent / "changed")
    (source / "manifest.json").unlink()
    (source / "adapter_model.safetensors").write_bytes(b"trained more")
    shutil.rmtree(run / "adapter")
    rest = {key: made.manifest[key] for key in ("stage", "inputs", "settings", "metrics")}
    artifact.publish(source, run / "adapter", rest)
    assert push(stages, run, hub).returncode == 0
    assert pushed(hub)["adapter_model.safetensors"] == b"trained more"


def test_public_only_when_said(stages: Stages, run: Path, hub: Hub) -> None:
    result = push(stages, run, hub, "--public")
    assert result.returncode == 0, result.stderr
    assert hub.received[0]["visibility"] == "public"
    assert "everybody" in result.stdout
    hub.requests.clear()
    said = sentence(push(stages, run, hub), 2)
    assert "me/it is public" in said
    assert "--public" in said
    assert writes(hub) == []
    hub.repositories["models", "me/it"].private = True
    result = push(stages, run, hub, PUSH_PUBLIC="1")
    assert result.returncode == 0, result.stderr
    assert "me/it is private and stays so" in result.stderr
    assert hub.repositories["models", "me/it"].private


def test_a_hub_that_makes_it_public_all_the_same(stages: Stages, run: Path, hub: Hub) -> None:
    hub.only_public = True
    assert "nothing was sent" in sentence(push(stages, run, hub), 2)
    assert writes(hub) == ["/api/repos/create"]


def test_a_preset_does_not_make_it_public(
    stages: Stages, run: Path, hub: Hub, tmp_path: Path
) -> None:
    preset = tmp_path / "mine.env"
    preset.write_text("PUSH_PUBLIC=1\n")
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": CANARY}
    args = ("--env-file", preset, "push", "--run-dir", run, "--repository", "me/it")
    assert "PUSH_PUBLIC" in sentence(stages(*args, env=env), 2)
    assert hub.requests == []


def test_paths_of_this_host_are_named(
    stages: Stages, run: Path, hub: Hub, tmp_path: Path, sample_model: Path
) -> None:
    source = tmp_path / "local"
    source.mkdir()
    config = {"base_model_name_or_path": str(sample_model)}
    (source / "adapter_config.json").write_text(json.dumps(config))
    (source / "README.md").write_text(f"Trained on {tmp_path}/rows.jsonl\n")
    made = artifact.load(run / "adapter")
    assert made is not None
    shutil.rmtree(run / "adapter")
    rest = {key: made.manifest[key] for key in ("stage", "inputs", "settings", "metrics")}
    artifact.publish(source, run / "adapter", rest)
    result = push(stages, run, hub)
    assert result.returncode == 0, result.stderr
    assert f"adapter_config.json names {sample_model}" in result.stderr
    assert f"README.md names {tmp_path}" in result.stderr


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "word"), [("", "set HF_TOKEN"), ("hf_nobody", "(401)"), ("hf_other", "(403)")]
)
def test_who_may_not_make_it(stages: Stages, run: Path, hub: Hub, token: str, word: str) -> None:
    said = sentence(push(stages, run, hub, HF_TOKEN=token), 77)
    assert "me/it" in said
    assert word in said
    assert [path for path in writes(hub) if path != "/api/repos/create"] == []
    assert bool(token) == bool(hub.requests)
    assert not token or holding(run, token) == []


def test_who_may_read_but_not_write(stages: Stages, run: Path, hub: Hub) -> None:
    assert push(stages, run, hub).returncode == 0
    hub.repositories["models", "me/it"].readers = {CANARY, "hf_other"}
    said = sentence(push(stages, run, hub, HF_TOKEN="hf_other"), 77)
    assert "write access" in said
    hub.repositories["models", "me/it"].readers = {CANARY}
    hub.owners["me"].add("hf_other")
    assert "(409)" in sentence(push(stages, run, hub, HF_TOKEN="hf_other"), 77)


@pytest.mark.parametrize("mood", ["503", "hang-up", "portal", "no network", "xet"])
def test_a_hub_that_is_not_itself(stages: Stages, run: Path, hub: Hub, mood: str) -> None:
    env = {}
    if mood == "503":
        hub.failing["/repos/create"] = -1
    elif mood == "xet":
        env["HF_HUB_DISABLE_XET"] = ""
    elif mood == "no network":
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            env["HF_ENDPOINT"] = f"http://127.0.0.1:{closed.getsockname()[1]}"
    else:
        hub.mood = mood
    said = sentence(push(stages, run, hub, **env), 75)
    assert "me/it" in said
    assert CANARY not in said
    assert "cache" not in said
    assert json.loads((run / "error.json").read_text())["exit"] == 75


def test_a_hiccup_is_ridden_out(stages: Stages, run: Path, hub: Hub) -> None:
    hub.failing["/preupload/"] = 1
    result = push(stages, run, hub)
    assert result.returncode == 0, result.stderr
    assert 503 in {status for *_, status in hub.requests}


def test_other_bytes_on_the_hub_are_seen(stages: Stages, run: Path, hub: Hub) -> None:
    hub.damaged = True
    assert "adapter_model.safetensors is not in me/it as it is here" in sentence(
        push(stages, run, hub), 82
    )


def test_what_is_corrupt_or_missing_does_not_go(stages: Stages, run: Path, hub: Hub) -> None:
    path = run / "merged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert str(path) in sentence(push(stages, run, hub, "--push-what", "merged"), 65)
    shutil.rmtree(run / "gguf")
    assert "run `export` first" in sentence(push(stages, run, hub, "--push-what", "gguf"), 66)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "env"), [("me/it/too", {}), ("me/--", {}), ("me/it", {"HF_HUB_OFFLINE": "1"})]
)
def test_names_that_are_none_and_no_hub(
    stages: Stages, run: Path, hub: Hub, name: str, env: dict[str, str]
) -> None:
    said = sentence(push(stages, run, hub, "--repository", name, **env), 2)
    assert (next(iter(env), None) or name) in said
    assert hub.requests == []


def test_nothing_else_pushes() -> None:
    sends = re.compile(
        r"create_commit|create_repo|upload_(file|folder|large)|push_to_hub|CommitOperation"
    )
    found = {
        path.name for path in (ROOT / "stages").rglob("*.py") if sends.search(path.read_text())
    }
    assert found == {"pushing.py"}
    users = {path for path in (ROOT / "stages").rglob("*.py") if "pushing" in path.read_text()}
    assert {path.name for path in users} == {"push.py"}
