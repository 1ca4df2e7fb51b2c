"""No secret in anything that is written: canaries go through every command, and are then looked for."""

import base64
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.forking import Forking, Result, forking
from tests.hub_server import Hub
from tests.judge_server import KEY, Endpoint
from tests.refusals import write_preset

TOKEN = "hf_CanaryCanaryCanaryCanaryCanary01"
PASSWORD = "pass+Canary/word"
SECRETS = {
    "HF_TOKEN": TOKEN,
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY0001",
    "AWS_SECRET_ACCESS_KEY": "Canary/with+signs=and\"quotes'CANARY",
    "AWS_SESSION_TOKEN": "CanaryOfASession==",
    "JUDGE_API_KEY": KEY,
}
RECIPE = {
    "BASE_MODEL": "owner/tiny", "MAX_LENGTH": 64, "BASE_PRECISION": "fp32", "LORA_RANK": 4,
    "BATCH_TOKENS": 128, "MAX_STEPS": 2, "OPTIMIZER": "adamw_torch", "VALIDATION_FRACTION": 0.1,
    "MAX_NEW_TOKENS": 4, "EVALUATION_PROMPTS": 2, "JUDGE_MODEL": "wise",
}  # fmt: skip


def spellings(secret: str) -> set[bytes]:
    """How it may be written."""
    content = secret.encode()
    found = {content, quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode()}
    return found | {base64.b64encode(content), base64.urlsafe_b64encode(content)}


def holding(folder: Path, *secrets: str) -> list[str]:
    """The files below a folder, whatever they are, that hold one of some secrets or are named by it."""
    forms = set().union(*map(spellings, secrets))
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if any(form in content or form in str(path.relative_to(folder)).encode() for form in forms):
            found.append(path.relative_to(folder).as_posix())
    return sorted(found)


@pytest.fixture(scope="module")
def web(rows: Path) -> Iterator[str]:
    """The rows behind an address with a password."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(rows.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://somebody:{quote(PASSWORD, safe='')}@127.0.0.1:{server.server_port}/rows.jsonl"
        server.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of it happens; two of the secrets are in its env/secrets.env."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "env").mkdir()
    given = {name: SECRETS[name] for name in ("JUDGE_API_KEY", "AWS_SESSION_TOKEN")}
    write_preset(folder / "env" / "secrets.env", **given)
    write_preset(folder / "tiny.env", **RECIPE)
    return folder


@pytest.fixture(scope="module")
def hub(tiny: Path) -> Iterator[Hub]:
    """A hub with a gated model."""
    with Hub() as hub:
        hub.tokens = {TOKEN}
        for name, readers in (("owner/tiny", {TOKEN}), ("owner/gated", {"hf_somebodyElse"})):
            hub.push("models", name, tiny)
            hub.repositories["models", name].readers = readers
        yield hub


@pytest.fixture(scope="module")
def stages(folder: Path, hub: Hub, web: str) -> Iterator[Forking]:
    """The command line with the other secrets in its environment, and in its data set's address."""
    given = {name: value for name, value in SECRETS.items() if name != "JUDGE_API_KEY"}
    del given["AWS_SESSION_TOKEN"]
    with forking(folder, HF_ENDPOINT=hub.url, DATASET=web, **given) as stages:
        yield stages


@pytest.fixture(scope="module")
def said(stages: Forking, folder: Path) -> dict[str, Result]:
    """What every command said."""
    (folder / "prompts.txt").write_text(f"Hi\nIs {TOKEN} a token?\n")
    with Endpoint("first") as judge:
        return {
            " ".join(command): stages("--env-file", "tiny.env", *command, "--run-dir", "run")
            for command in (
                ["prepare-data", "--show", "2"],
                ["train"],
                ["evaluate", "--judge-url", judge.url],
                ["generate", "--prompts-file", "prompts.txt"],
                ["generate", "--json", "--prompt", f"What is {TOKEN}?"],
                ["merge"],
                ["report"],
                ["push", "--repository", "owner/new"],
            )
        }


@pytest.mark.promise("P7")
def test_no_command_writes_a_secret(said: dict[str, Result], folder: Path, hub: Hub) -> None:
    """Not even one that the user puts into a prompt; they were used, and all stages came to their end."""
    for command, result in said.items():
        expected = 77 if command.startswith("push") else 0  # that hub lets nobody write
        assert result.returncode == expected, (command, result.stderr)
    assert TOKEN in {token for _, _, token, _ in hub.requests}
    for name in ("data", "adapter", "evaluation", "generations", "merged", "checkpoints"):
        assert (folder / "run" / name).is_dir()
    assert "Is *** a token?" in (folder / "run" / "generations" / "generations.jsonl").read_text()
    own = {"env/secrets.env", "prompts.txt"}
    assert set(holding(folder, *SECRETS.values(), PASSWORD)) <= own
    for result in said.values():
        for form in set().union(*map(spellings, [*SECRETS.values(), PASSWORD])):
            assert form.decode() not in result.stdout + result.stderr


FAILURES = {
    "a refusal of the hub": (77, {"BASE_MODEL": "owner/gated"}),
    "a base that is not there": (66, {"BASE_MODEL": f"./{TOKEN}"}),
    "a data set that is not there": (66, {"DATASET": "{web}.none.jsonl"}),
    "a value that is none": (2, {"MAX_LENGTH": TOKEN}),
    "a run directory that is named so": (70, {"RUN_DIR": f"failing/{TOKEN}"}),
}


@pytest.mark.promise("P7")
@pytest.mark.parametrize("name", FAILURES)
def test_no_failure_tells_a_secret(stages: Forking, folder: Path, web: str, name: str) -> None:
    code, given = FAILURES[name]
    env = {"RUN_DIR": "failing/run", "FAILPOINTS": "publish.file:EBADMSG"}
    env |= {variable: value.format(web=web) for variable, value in given.items()}
    (folder / "failing" / "run").mkdir(parents=True, exist_ok=True)
    result = stages("--env-file", "tiny.env", "prepare-data", env=env)
    assert result.returncode == code, result.stderr
    assert ("Traceback" in result.stderr) == (code == 70)
    assert ("***" in result.stderr) == any(TOKEN in value for value in given.values())
    for secret in [*SECRETS.values(), PASSWORD]:
        for form in spellings(secret):
            assert form.decode() not in result.stdout + result.stderr
    recorded = folder / env["RUN_DIR"] / "error.json"
    assert json.loads(recorded.read_text())["exit"] == code
    assert holding(recorded.parent, *SECRETS.values(), PASSWORD) == []


def test_a_line_of_the_secrets_file_is_not_shown(stages: Forking, folder: Path) -> None:
    path = folder / "env" / "secrets.env"
    kept = path.read_text()
    for wrong in ("aBareSecretCANARY", "HF TOKEN=aBareSecretCANARY"):
        path.write_text(f"{wrong}\n")
        result = stages("report")
        assert result.returncode == 2
        assert "secrets.env:1" in result.stderr
        assert "aBareSecretCANARY" not in result.stderr
    path.write_text(kept)
